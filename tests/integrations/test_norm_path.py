"""`attach(..., fuse="norm")`: scores inside the model's own RMSNorms, of every architecture that begins with one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from swift_kernels import SwiftHead, UnsupportedModelError, attach, schema
from swift_kernels.integrations.compatibility import eos_token_ids
from swift_kernels.integrations.transformers import NotScoredError
from swift_kernels.norms import FusableNorm, find_norms
from tests.architectures import NAMED, OTHERS, fresh_model, tiny_model
from tests.integrations.helpers import check_parity, generate, responses_of
from tests.oracle import assert_scores, captured_tokens, oracle

EVERY = [
    *("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "mixtral", "granite", "glm", "smollm3"),
    *("qwen2_moe", "qwen3_moe", "apertus", "seed_oss", "gpt_oss", "lfm2", "glm4"),
]
"""Every layer begins with an RMSNorm, and one ends the model."""
ONLY_LAST = ["olmo2", "exaone4"]
"""Layers end with their norms: only the last entry comes out of one."""
NONE = [name for name in (*NAMED, *OTHERS) if name not in (*EVERY, *ONLY_LAST)]
UNIT_OFFSET = ("gemma2", "gemma3_text")


def model_with_norm_weights(name, dtype=torch.float32):
    """The tiny model with random vectors: fresh norms weigh everything by one, which hides mistakes."""
    model = copy.deepcopy(tiny_model(name, torch.float32))
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data = 1 + 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", [*NAMED, *OTHERS])
def test_norms_are_found_by_what_they_take_and_compute(name, dtype):
    found = find_norms(tiny_model(name, dtype)).entries
    fusable = [isinstance(norm, FusableNorm) for norm in found]
    expected = {True: [True] * 4, False: [False] * 3 + [name in ONLY_LAST]}[name in EVERY]
    assert fusable == expected, found
    for index, norm in enumerate(found):
        if isinstance(norm, FusableNorm):
            assert norm.unit_offset == (name in UNIT_OFFSET)
            assert norm.scores_output == (index == 3)
            eps = getattr(norm.module, "variance_epsilon", None) or norm.module.eps
            assert norm.eps == eps
            if dtype == torch.bfloat16 and name in ("olmo2", "gpt_oss"):
                assert not norm.round_first


OTHERS_A_LAYER = dict.fromkeys(EVERY, 1) | {"gemma2": 3, "gemma3_text": 3, "glm4": 3}
"""Norms over the width of the model that read no entry; those of single attention heads run as they are."""


@pytest.mark.parametrize("name", EVERY)
def test_norms_that_read_no_entry_are_found_as_well(name):
    others = find_norms(tiny_model(name)).others
    assert len(others) == 3 * OTHERS_A_LAYER[name]
    assert all(type(norm.module).__name__.endswith("RMSNorm") for norm in others)
    assert all(norm.unit_offset == (name in UNIT_OFFSET) and not norm.scores_output for norm in others)


class Doubled(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, hidden_states):
        return 2 * self.norm(hidden_states)


def test_what_resembles_an_rms_norm_is_not_taken_for_one():
    model = fresh_model()
    for layer in model.model.layers:
        layer.input_layernorm = Doubled(layer.input_layernorm)
    model.model.norm = Doubled(model.model.norm)
    reasons = find_norms(model).entries
    # The norm inside takes the layer's input as well, and is one.
    assert [isinstance(reason, FusableNorm) for reason in reasons] == [True, True, True, False]
    assert "does not compute an RMSNorm" in reasons[3]


@pytest.mark.parametrize("name", EVERY)
def test_parity(name, prompts):
    """Both levels, against the states of that very run and against one teacher-forced forward; and against gather."""
    model = model_with_norm_weights(name)
    head = SwiftHead.for_model(model)
    scorer = check_parity(model, head, prompts, fuse="norm")
    assert "ran so far: norm" in scorer.describe()
    with attach(model, head) as gathering:
        gathered = generate(model, prompts, num_return_sequences=3)
    with attach(model, head, fuse="norm") as scorer:
        assert torch.equal(generate(model, prompts, num_return_sequences=3), gathered)
    # The states themselves differ by a few roundings, which the layers then carry on.
    torch.testing.assert_close(scorer.scores(), gathering.scores(), rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False, "copies": 1},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 3},
        {"prefill_chunk_size": 1},
        {"use_cache": False},
    ],
    ids=lambda options: ",".join(f"{key}={value}" for key, value in options.items()),
)
@pytest.mark.parametrize("layers", ["all", [1, 2], [-1], [0, 3]], ids=str)
def test_parity_of_layers_and_modes(layers, options, prompts):
    model = model_with_norm_weights("llama")
    scorer = check_parity(model, SwiftHead.for_model(model, layers), prompts, fuse="norm", **options)
    # Without a cache every forward is of the whole sequence: there is no step to fuse.
    assert ("ran so far: gather" if "use_cache" in options else "ran so far: norm") in scorer.describe()


@pytest.mark.parametrize("span", ["fed", "all"])
@pytest.mark.parametrize("gate", [True, False], ids=["gate", "mean"])
def test_trace_gives_the_scores_again(gate, span, prompts):
    model = model_with_norm_weights("qwen3")
    head = SwiftHead.for_model(model, gate=gate, span=span)
    with attach(model, head, fuse="norm", trace=True) as scorer:
        generate(model, prompts, num_return_sequences=2)
        for score, tokens in zip(scorer.scores(), scorer.trace(), strict=True):
            gates, rewards = tokens.T
            torch.testing.assert_close((gates * rewards).sum() / gates.sum(), score, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt_oss"])
def test_level_a_in_half_precision(name, dtype, prompts):
    model = model_with_norm_weights(name, dtype)
    head = SwiftHead.for_model(model)
    with attach(model, head, fuse="norm") as scorer:
        output = generate(
            model, prompts, num_return_sequences=2, return_dict_in_generate=True, output_hidden_states=True
        )
    responses = responses_of(scorer, output.sequences, prompts["input_ids"].shape[1])
    tokens = captured_tokens(output, head, responses, eos_token_ids(model))
    assert_scores(scorer.scores(), *oracle(tokens, head))


@pytest.mark.parametrize("name", EVERY)
def test_logits_are_those_of_the_stock_model(name, prompts):
    """In fp32 within 1e-5 of the largest logit: the norms add up in another order, nothing else changes."""
    model = model_with_norm_weights(name)
    head = SwiftHead.for_model(model)
    tokens = torch.arange(6, 96)[:, None]
    slots = torch.full((90,), -1)
    slots[::2] = torch.arange(45)
    with torch.no_grad():
        stock = model(input_ids=tokens, use_cache=False).logits
        with attach(model, head, fuse="norm") as scorer:
            scorer.begin(slots, num_slots=45)
            fused = model(input_ids=tokens, use_cache=False).logits
            assert "ran so far: norm" in scorer.describe()
            assert scorer.token_counts().tolist() == [1] * 45
    torch.testing.assert_close(fused, stock, rtol=0, atol=1e-5 * stock.abs().max().item())


def test_the_fused_kernels_ran(prompts, monkeypatch):
    model = tiny_model("llama")
    calls = []
    for name in ("rms_norm_score", "rms_norm", "score_step"):
        original = getattr(schema, name)

        def counted(*args, name=name, original=original):
            calls.append((name, args[7] if name == "rms_norm_score" else None))
            return original(*args)

        monkeypatch.setattr(schema, name, counted)
    with attach(model, SwiftHead.for_model(model, [1, 3]), fuse="norm") as scorer:
        model.generate(**prompts, do_sample=False, max_new_tokens=4, min_new_tokens=4)
        assert scorer.token_counts().tolist() == [3, 3, 3]
    # Layers 0 and 2 are not selected, and norms after an attention read no entry: those only normalise. The prefill
    # runs the stock norms.
    plain = ("rms_norm", None)
    step = [plain, plain, ("rms_norm_score", 0), plain, plain, plain, ("rms_norm_score", 1)]
    assert calls == step * 3
    assert "2 RMSNorms score and 5 normalise, one call each by cpp on cpu" in scorer.describe()


@pytest.mark.parametrize(
    "odd",
    [
        torch.randn(3, 32),
        torch.randn(3, 2, 32),
        torch.randn(3, 1, 32, dtype=torch.float64),
        torch.randn(32, 1, 3).transpose(0, 2),
    ],
    ids=["2-D", "two tokens", "another dtype", "columns apart"],
)
def test_a_norm_that_reads_no_entry_may_be_called_with_anything(odd):
    model = fresh_model()
    norm = model.model.layers[0].post_attention_layernorm
    expected, got = norm(odd), []
    with torch.no_grad(), attach(model, SwiftHead.for_model(model), fuse="norm") as scorer:
        scorer.begin(torch.arange(3))
        hook = model.model.layers[1].register_forward_pre_hook(lambda *_: got.append(norm(odd)))
        model(input_ids=torch.ones(3, 1, dtype=torch.int64), use_cache=False)
        hook.remove()
        assert scorer.token_counts().tolist() == [1] * 3
    assert torch.equal(got[0], expected)


def test_a_norm_called_on_one_token_makes_no_step_of_a_prefill():
    model = fresh_model()
    layer = model.model.layers[0]
    ids = torch.arange(15).view(3, 5)
    with torch.no_grad():
        stock = model(input_ids=ids, use_cache=False).logits
        with attach(model, SwiftHead.for_model(model), fuse="norm") as scorer:
            scorer.begin(torch.arange(3))
            hook = layer.register_forward_pre_hook(
                lambda *_: (
                    [norm(torch.ones(3, 1, 32)) for norm in (layer.post_attention_layernorm, model.model.norm)] and None
                )
            )
            logits = model(input_ids=ids, use_cache=False).logits
            hook.remove()
            with pytest.raises(NotScoredError, match="no forward of one position was scored"):
                scorer.scores()
    assert torch.equal(logits, stock)


def test_a_step_whose_norm_is_compiled_by_itself_gathers():
    model = fresh_model()
    ids = torch.ones(3, 1, dtype=torch.int64)
    with torch.no_grad(), attach(model, SwiftHead.for_model(model), fuse="norm") as scorer:
        scorer.begin(torch.arange(3))
        model(input_ids=ids, use_cache=False)
        expected = scorer.scores()
        model.model.layers[1].input_layernorm.compile(backend="eager")
        scorer.begin(torch.arange(3))
        model(input_ids=ids, use_cache=False)
        assert "gather" in scorer.describe().partition("ran so far:")[2]
        torch.testing.assert_close(scorer.scores(), expected, rtol=1e-5, atol=1e-6)


def test_a_weight_that_was_taken_away_while_attached_is_named():
    model = fresh_model()
    norm = model.model.layers[0].post_attention_layernorm
    with torch.no_grad(), attach(model, SwiftHead.for_model(model), fuse="norm") as scorer:
        scorer.begin(torch.arange(3))
        nn.utils.parametrize.register_parametrization(norm, "weight", nn.Identity())
        with pytest.raises(RuntimeError, match=r"weight of a fused .*LlamaRMSNorm .* attach again"):
            model(input_ids=torch.ones(3, 1, dtype=torch.int64), use_cache=False)
        nn.utils.parametrize.remove_parametrizations(norm, "weight")


def test_gradients_are_left_to_the_stock_norms():
    model = fresh_model()
    tokens = torch.full((2, 1), 9)
    with attach(model, SwiftHead.for_model(model), fuse="norm") as scorer:
        scorer.begin(torch.arange(2))
        model(input_ids=tokens).logits.sum().backward()
        assert scorer.token_counts().tolist() == [1, 1]
        assert "ran so far: gather" in scorer.describe()
    assert all(parameter.grad is not None for parameter in model.model.norm.parameters())


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_steps_gather(backend):
    """An opaque norm would break Inductor's fusion of the residual addition with the norm."""
    model = fresh_model()
    head = SwiftHead.for_model(model)
    tokens = torch.randint(6, 96, (5, 3, 1), generator=torch.Generator().manual_seed(0))

    def step(token_ids):
        return model(input_ids=token_ids, use_cache=False).logits

    results = []
    with torch.no_grad(), attach(model, head, fuse="norm") as scorer:
        for run in (step, torch.compile(step, fullgraph=True, backend=backend)):
            scorer.begin(torch.arange(3))
            for token_ids in tokens:
                run(token_ids)
            results.append(scorer.scores())
        assert "ran so far: norm and gather" in scorer.describe()
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ONLY_LAST)
def test_entries_without_a_norm_are_gathered(name, prompts):
    model = tiny_model(name)
    scorer = check_parity(model, SwiftHead.for_model(model), prompts, fuse="norm")
    assert "gather, one cpp call a step on cpu, as 3 of 4 entries cannot be scored in a norm" in scorer.describe()
    scorer = check_parity(model, SwiftHead.for_model(model, [-1]), prompts, fuse="norm")
    assert "ran so far: norm" in scorer.describe()


@pytest.mark.parametrize("name", NONE)
def test_models_without_a_fusable_norm_are_refused(name):
    model = tiny_model(name)
    with pytest.raises(ValueError, match=rf"{type(model).__name__} has no RMSNorm .* use fuse=\"gather\""):
        attach(model, SwiftHead.for_model(model), fuse="norm")


def test_logits_have_no_norm(model):
    with pytest.raises(ValueError, match="the head reads logits"):
        attach(model, SwiftHead.for_model(model, "logits"), fuse="norm")


def test_a_norm_fed_with_something_else_than_was_traced_is_an_error(prompts):
    model = fresh_model()
    with attach(model, SwiftHead.for_model(model), fuse="norm"):
        layer = model.model.layers[1]
        handle = layer.input_layernorm.register_forward_pre_hook(lambda _module, args: (args[0] * 1.0,))
        with pytest.raises(NotScoredError, match=r"entry 1 cannot be scored .* does not take what the layer was"):
            generate(model, prompts)
        handle.remove()
        handle = model.model.norm.register_forward_hook(lambda _module, _args, output: output * 1.0)
        with pytest.raises(NotScoredError, match=r"entry 3 cannot be scored .* is not what the model returned"):
            generate(model, prompts)
        handle.remove()
        generate(model, prompts)


def test_a_layer_that_is_left_out_is_an_error(prompts):
    model = fresh_model()
    with attach(model, SwiftHead.for_model(model), fuse="norm"):
        layers = model.model.layers
        stock = layers[1].forward
        layers[1].forward = lambda hidden_states, *args, **kwargs: hidden_states
        with pytest.raises(NotScoredError, match=r"entry 2 cannot be scored .* entry 1 was to come next"):
            generate(model, prompts)
        layers[1].forward = stock


@pytest.mark.parametrize("layers", [[-1], "all"], ids=str)
def test_other_calls_of_the_final_norm_score_nothing(layers):
    """A logit lens, outside of a forward and within one."""
    model = fresh_model()
    token = torch.full((3, 1), 9)
    lens = []

    def look(_module, _args, output):
        lens.append(model.model.norm(output[0] if isinstance(output, tuple) else output))

    with torch.no_grad(), attach(model, SwiftHead.for_model(model, layers), fuse="norm") as scorer:
        scorer.begin(torch.arange(3))
        output = model(input_ids=token, use_cache=False, output_hidden_states=True)
        model.lm_head(model.model.norm(output.hidden_states[1]))
        handle = model.model.layers[1].register_forward_hook(look)
        model(input_ids=token, use_cache=False)
        handle.remove()
        assert scorer.token_counts().tolist() == [2, 2, 2]
        assert "ran so far: norm" in scorer.describe()
    assert len(lens) == 1


def test_norms_that_changed_since_are_found_anew():
    model = fresh_model()
    head = SwiftHead.for_model(model)
    token = torch.full((3, 1), 9)
    with attach(model, head, fuse="norm"):
        pass
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 0.05
    model.model.layers[1].input_layernorm = copy.deepcopy(model.model.layers[1].input_layernorm)
    with torch.no_grad():
        stock = model(input_ids=token, use_cache=False).logits
        with attach(model, head, fuse="norm") as scorer:
            scorer.begin(torch.arange(3))
            torch.testing.assert_close(model(input_ids=token, use_cache=False).logits, stock, rtol=1e-5, atol=1e-5)
            assert scorer.token_counts().tolist() == [1, 1, 1]


def test_a_norm_that_runs_twice_is_not_fused(prompts):
    model = fresh_model()
    model.model.layers[1].post_attention_layernorm = model.model.layers[1].input_layernorm
    with attach(model, SwiftHead.for_model(model), fuse="norm") as scorer:
        generate(model, prompts)
        assert scorer.scores().isfinite().any()
    assert "it runs 2 times in a forward" in scorer.describe()


def test_a_layer_that_changes_its_input_in_place_cannot_be_read():
    model = fresh_model()
    layer = model.model.layers[1]
    stock = layer.forward
    layer.forward = lambda hidden_states, *args, **kwargs: hidden_states.add_(
        stock(hidden_states.clone(), *args, **kwargs)
    )
    with pytest.raises(UnsupportedModelError, match=r"does not show hidden_states\[1\]"):
        attach(model, SwiftHead.for_model(model))


@pytest.mark.parametrize("fuse", ["gather", "norm"])
def test_layers_that_are_compiled_one_by_one_gather(fuse):
    model = fresh_model()
    head = SwiftHead.for_model(model)
    token = torch.full((3, 1), 9)
    results = []
    with torch.no_grad():
        for compiled in (False, True):
            if compiled:
                for layer in model.model.layers:
                    layer.compile(backend="eager")
            with attach(model, head, fuse=fuse) as scorer:
                scorer.begin(torch.arange(3))
                model(input_ids=token, use_cache=False)
                results.append(scorer.scores())
    assert "gather" in scorer.describe()
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_warmup_scores_nothing(model, head, prompts):
    with attach(model, head, fuse="norm", trace=True) as scorer:
        scorer.warmup(rows=3)
        generate(model, prompts)
        first = scorer.scores()
        scorer.warmup(rows=5)
        assert torch.equal(scorer.scores(), first)


def test_probing_leaves_the_model_as_it_was():
    model = fresh_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = [(dict(module._forward_hooks), dict(module._forward_pre_hooks)) for module in model.modules()]
    model.train()
    find_norms(model)
    assert model.training
    assert hooks == [(dict(module._forward_hooks), dict(module._forward_pre_hooks)) for module in model.modules()]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
