"""Parity of the scores for every architecture that `attach` promises, and for others that share its code."""

from __future__ import annotations

import pytest
import torch
import transformers

from swift_kernels import SwiftHead, UnsupportedModelError, attach
from swift_kernels.integrations.compatibility import eos_token_ids
from swift_kernels.schema import implementation
from tests.architectures import NAMED, OTHERS, randomised, tiny_model
from tests.integrations.helpers import check_parity, generate, responses_of
from tests.oracle import assert_scores, captured_tokens, oracle

MODES = {
    "dynamic": {},
    "greedy": {"do_sample": False, "copies": 1},
    "static": {"cache_implementation": "static"},
    "chunked-prefill": {"prefill_chunk_size": 3},
    "single-token-chunks": {"prefill_chunk_size": 1},
    "no-cache": {"use_cache": False},
}
FEATURES = {
    "all": "all",
    "subset": [1, 3],
    "negative": [-1, 0],
    "one": [2],
    "logits": "logits",
    "top-logprobs": "top_logprobs",
}


def compiled_static(backend: str) -> dict:
    config = transformers.CompileConfig(backend=backend, mode=None)
    config._compile_all_devices = True  # transformers compiles on GPUs only, unless told to
    return {"cache_implementation": "static", "compile_config": config}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("name", NAMED)
def test_parity(name, mode, prompts):
    if "static" in mode.values() and not getattr(tiny_model(name), "_can_compile_fullgraph", True):
        mode = {}
    check_parity(tiny_model(name), SwiftHead.for_model(tiny_model(name)), prompts, **mode)


@pytest.mark.parametrize("layers", FEATURES.values(), ids=FEATURES)
@pytest.mark.parametrize("gate", [True, False], ids=["gate", "mean"])
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2"])
def test_parity_features(name, gate, layers, prompts):
    check_parity(tiny_model(name), SwiftHead.for_model(tiny_model(name), layers, gate=gate), prompts)


@pytest.mark.parametrize("name", OTHERS)
def test_parity_others(name, prompts):
    check_parity(tiny_model(name), SwiftHead.for_model(tiny_model(name)), prompts)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "opt"])
def test_level_a_in_half_precision(name, dtype, prompts):
    """Level (b) is not asserted here: the model itself moves by percents between two forwards."""
    model = tiny_model(name, dtype)
    head = SwiftHead.for_model(model)
    with attach(model, head) as scorer:
        output = generate(
            model, prompts, num_return_sequences=2, return_dict_in_generate=True, output_hidden_states=True
        )
        responses = responses_of(scorer, output.sequences, prompts["input_ids"].shape[1])
        tokens = captured_tokens(output, head, responses, eos_token_ids(model))
        assert_scores(scorer.scores(), *oracle(tokens, head))


def test_the_fused_kernel_ran(prompts):
    model = tiny_model("llama")
    head = SwiftHead.for_model(model)
    calls = []
    original = head.step
    head.step = lambda *args, **kwargs: (calls.append(len(args[0])), original(*args, **kwargs))
    with attach(model, head) as scorer:
        model.generate(**prompts, do_sample=False, max_new_tokens=8, min_new_tokens=8)
    assert calls == [4] * 7, "one call with all four entries for each of the seven tokens fed"
    assert implementation("cpu") == "cpp"
    assert "one cpp call a step" in scorer.describe()


def test_embeddings_narrower_than_the_model(prompts):
    """OPT-350m projects its embeddings: no final norm, and the last entry is narrower than the others."""
    config = transformers.OPTConfig(
        vocab_size=96, hidden_size=32, ffn_dim=48, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=128, word_embed_proj_dim=16, do_layer_norm_before=False, pad_token_id=0,
    )  # fmt: skip
    model = randomised(config)
    head = SwiftHead.for_model(model)
    assert head.config.widths == (32, 32, 32, 16)
    check_parity(model, head, prompts)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (transformers.MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, state_size=4), "does not show"),
        (
            transformers.Gemma3nTextConfig(
                vocab_size=96, hidden_size=32, intermediate_size=[48] * 2, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, head_dim=8, vocab_size_per_layer_input=96, hidden_size_per_layer_input=8,
                altup_num_inputs=2, laurel_rank=4, num_kv_shared_layers=0, layer_types=["full_attention"] * 2,
                activation_sparsity_pattern=[0.0] * 2,
            ),
            r"shape \[2, 1, 3, 32\]",
        ),
    ],
    ids=["mamba", "gemma3n"],
)  # fmt: skip
def test_models_whose_states_cannot_be_read_are_refused_by_name(config, reason):
    model = randomised(config)
    with pytest.raises(UnsupportedModelError, match=rf"{type(model).__name__}.*{reason}"):
        attach(model, SwiftHead.for_model(model))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMED)
def test_parity_compiled_static_cache(name, prompts):
    model = tiny_model(name)
    compiled = compiled_static("aot_eager")
    check_parity(model, SwiftHead.for_model(model), prompts, **compiled)


@pytest.mark.slow
def test_parity_compiled_by_inductor(prompts):
    model = tiny_model("llama")
    check_parity(model, SwiftHead.for_model(model), prompts, **compiled_static("inductor"))
