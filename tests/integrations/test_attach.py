"""What `attach` promises beside the right numbers: generation as it was, no trace left, errors instead of guesses."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

from swift_kernels import SwiftHead, UnsupportedModelError, attach
from swift_kernels.checkpoint import ModelMismatchError
from swift_kernels.features import model_layout
from swift_kernels.integrations.transformers import NotScoredError, UnsupportedGenerationError
from tests.architectures import fresh_model, tiny_model
from tests.integrations.helpers import check_parity, generate, responses_of
from tests.integrations.test_architectures import compiled_static


class FavourLowTokens(transformers.LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores - torch.arange(scores.shape[-1]) * 0.01


class StopAtMultiplesOfSeven(transformers.StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] % 7 == 0


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"temperature": 0.7, "top_p": 0.8},
        {"logits_processor": transformers.LogitsProcessorList([FavourLowTokens()])},
        {"stopping_criteria": transformers.StoppingCriteriaList([StopAtMultiplesOfSeven()])},
        {"eos_token_id": 9},
        {"eos_token_id": None},
        {"max_new_tokens": 1},
        {"min_new_tokens": 16},
        {"cache_implementation": "static"},
        {"num_return_sequences": 5},
        {"forced_eos_token_id": 1},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    ],
    ids=lambda options: ",".join(options),
)
def test_generate_is_unchanged_and_scores_are_right(model, head, prompts, options):
    copies = options.pop("num_return_sequences", 1)
    eos = model.generation_config.eos_token_id
    try:
        if "eos_token_id" in options:
            # The tests' oracle asks the model's generation config which tokens end an answer.
            model.generation_config.eos_token_id = options.pop("eos_token_id")
        check_parity(model, head, prompts, copies=copies, **options)
    finally:
        model.generation_config.eos_token_id = eos


def test_rows_ended_by_a_custom_criterion_do_not_count_what_follows(model, head, prompts):
    """Without an end-of-sequence token, `generate` goes on sampling for rows that a criterion has ended."""
    criteria = transformers.StoppingCriteriaList([StopAtMultiplesOfSeven()])
    with attach(model, head) as scorer:
        output = generate(model, prompts, stopping_criteria=criteria, eos_token_id=None, num_return_sequences=4)
    responses = output[:, prompts["input_ids"].shape[1] :].tolist()
    ends = [next((i for i, token in enumerate(row) if token % 7 == 0), len(row) - 1) for row in responses]
    assert scorer.token_counts().tolist() == ends
    assert scorer.response_lengths().tolist() == [end + 1 for end in ends]
    assert scorer.finished().tolist() == [row[end] % 7 == 0 for row, end in zip(responses, ends, strict=True)]


def test_a_row_does_not_depend_on_when_its_batch_ends(model, head, prompts):
    """Early finishers have their end-of-sequence token fed and then padding; late ones do not."""
    with attach(model, head) as scorer:
        generate(model, prompts, num_return_sequences=4, max_new_tokens=24)
        counts = scorer.token_counts().tolist()
        lengths = scorer.response_lengths().tolist()
        finished = scorer.finished().tolist()
    assert len(set(lengths)) > 3, "the answers should end at different lengths"
    assert counts == [length - 1 for length in lengths]
    assert finished == [length < 24 for length in lengths]


class Collector(transformers.generation.streamers.BaseStreamer):
    def __init__(self):
        self.tokens = []

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.tokens.append("end")


def test_streamer_sees_the_same_tokens(model, head, prompts):
    single = {name: value[:1] for name, value in prompts.items()}
    plain, scored = Collector(), Collector()
    generate(model, single, streamer=plain)
    with attach(model, head) as scorer:
        generate(model, single, streamer=scored)
        assert scorer.scores().isfinite().all()
    assert plain.tokens == scored.tokens


def test_continuing_from_a_cache(model, head, prompts):
    """The prefill is then a single position, which must not be scored."""
    single = {"input_ids": prompts["input_ids"][:1], "attention_mask": prompts["attention_mask"][:1]}
    with torch.no_grad():
        prefix = {name: value[:, :-1] for name, value in single.items()}
        caches = [model(**prefix, use_cache=True).past_key_values for _ in range(2)]
    plain = generate(model, single, past_key_values=caches[0])
    with attach(model, head) as scorer:
        scored = generate(model, single, past_key_values=caches[1])
        assert scorer.token_counts().item() == scorer.response_lengths().item() - 1
        resumed = scorer.scores()
        generate(model, single)
        torch.testing.assert_close(resumed, scorer.scores(), rtol=1e-4, atol=1e-5)
    assert torch.equal(plain, scored)


@pytest.mark.parametrize("layers", ["all", "logits"])
@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no-cache"])
@pytest.mark.parametrize("as_dict", [False, True], ids=["tensor", "dict"])
def test_span_all_counts_every_sampled_token(model, prompts, layers, cache, as_dict):
    head = SwiftHead.for_model(model, layers, span="all")
    plain = generate(model, prompts, use_cache=cache, return_dict_in_generate=as_dict)
    with attach(model, head) as scorer:
        output = generate(model, prompts, use_cache=cache, return_dict_in_generate=as_dict)
        scores = scorer.scores()
    sequences = output.sequences if as_dict else output
    assert torch.equal(sequences, plain.sequences if as_dict else plain)
    if as_dict and cache:
        assert output.past_key_values.get_seq_length() == plain.past_key_values.get_seq_length()
    assert torch.equal(scorer.token_counts().long(), scorer.response_lengths())
    from swift_kernels import score_texts
    from tests.integrations.helpers import unpadded

    forced = score_texts(model, None, head, unpadded(prompts, 1), responses_of(scorer, sequences, 7))
    torch.testing.assert_close(scores, forced, rtol=1e-4, atol=1e-4)


def test_trace_gives_the_scores_again(model, head, prompts):
    with attach(model, head, trace=True) as scorer:
        generate(model, prompts, num_return_sequences=3)
        scores = scorer.scores()
        rows = scorer.trace()
    assert [row.shape[0] for row in rows] == scorer.token_counts().tolist()
    for row, score in zip(rows, scores, strict=True):
        again = (row[:, 0] * row[:, 1]).sum() / row[:, 0].sum() if len(row) else torch.tensor(torch.nan)
        torch.testing.assert_close(again, score, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_a_row_without_scored_tokens_has_no_score(model, head, prompts):
    with attach(model, head) as scorer:
        generate(model, prompts, max_new_tokens=1)
        assert scorer.scores().isnan().all()
        assert scorer.token_counts().tolist() == [0, 0, 0]


def snapshot(model):
    """Every attribute of every module, by identity; hooks by their contents."""
    facts = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            facts[name, key] = dict(value) if isinstance(value, dict) else value
    return facts


def same(first, second):
    return first.keys() == second.keys() and all(
        first[key] is second[key] or first[key] == second[key] for key in first
    )


@pytest.mark.parametrize("fuse", ["gather", "norm"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_detached_models_are_as_before(prompts, compiled, fuse):
    model = fresh_model()
    head = SwiftHead.for_model(model)
    options = compiled_static("eager") if compiled else {}
    if compiled:
        generate(model, prompts, **options)
    before = snapshot(model)
    with attach(model, head, fuse=fuse):
        assert not same(before, snapshot(model))
    assert same(before, snapshot(model))
    twin = fresh_model()
    generate(twin, prompts, **options)
    with attach(model, head, fuse=fuse):
        generate(model, prompts, **options)
    generated = snapshot(model).keys() - snapshot(twin).keys()
    assert not generated, f"left behind: {generated}"


@pytest.mark.parametrize("fuse", ["gather", "norm"])
def test_an_exception_leaves_the_model_clean(prompts, fuse):
    class Interrupt(transformers.StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            raise KeyboardInterrupt

    model = fresh_model()
    head = SwiftHead.for_model(model)
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt), attach(model, head, fuse=fuse) as scorer:
        generate(model, prompts, stopping_criteria=transformers.StoppingCriteriaList([Interrupt()]))
    assert same(before, snapshot(model))
    with pytest.raises(RuntimeError, match="nothing was generated"):
        scorer.scores()
    check_parity(model, head, prompts, fuse=fuse)


@pytest.mark.parametrize("fuse", ["gather", "norm"])
def test_two_models_do_not_notice_each_other(prompts, fuse):
    scored, other = fresh_model(0), fresh_model(1)
    head = SwiftHead.for_model(scored)
    expected = generate(other, prompts)
    with attach(scored, head, fuse=fuse) as scorer:
        generate(scored, prompts)
        before = scorer.scores()
        assert torch.equal(generate(other, prompts), expected)
        with attach(other, SwiftHead.for_model(other), fuse=fuse) as second:
            generate(other, prompts)
            assert torch.equal(scorer.scores(), before)
            assert not torch.equal(second.scores(), before)
        generate(scored, prompts)
        assert torch.equal(scorer.scores(), before)


@pytest.mark.parametrize("fuse", ["gather", "norm"])
def test_nested_attach_is_refused_and_attaching_again_works(model, head, prompts, fuse):
    scorer = attach(model, head, fuse=fuse)
    with scorer:
        with pytest.raises(ValueError, match="attached already"), attach(model, head, fuse=fuse):
            pass
        generate(model, prompts)
        first = scorer.scores()
    with scorer:
        generate(model, prompts)
        assert torch.equal(scorer.scores(), first)
    with attach(model, head, fuse=fuse) as again:
        generate(model, prompts)
        assert torch.equal(again.scores(), first)


@pytest.mark.parametrize("fuse", ["gather", "norm"])
def test_each_generate_starts_afresh(model, head, prompts, fuse):
    with attach(model, head, fuse=fuse) as scorer:
        generate(model, prompts, seed=1)
        first = scorer.scores()
        generate(model, prompts, seed=2)
        assert not torch.equal(first, scorer.scores())
        generate(model, prompts, seed=1)
        assert torch.equal(first, scorer.scores())
        generate(model, prompts, seed=1, num_return_sequences=2)
        assert scorer.scores().shape == (6,)


@pytest.mark.parametrize("fuse", ["gather", "norm"])
def test_plain_forwards_between_generations_are_not_scored(model, head, prompts, fuse):
    with attach(model, head, fuse=fuse) as scorer, torch.no_grad():
        generate(model, prompts)
        before = scorer.scores()
        for rows in (3, 1, 8):
            model(input_ids=torch.full((rows, 1), 9))
        assert torch.equal(before, scorer.scores())


@pytest.mark.parametrize("fuse", ["gather", "norm"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_attach_after_generate_was_compiled(prompts, backend, fuse):
    """Dynamo would reuse the graph it traced without hooks: attach gives it a code object of its own."""
    model = fresh_model()
    head = SwiftHead.for_model(model)
    options = compiled_static(backend)
    plain = generate(model, prompts, **options)
    stock = model._compiled_call
    with attach(model, head, fuse=fuse) as scorer:
        assert torch.equal(generate(model, prompts, **options), plain)
        compiled = scorer.scores()
        assert scorer._compiled is not None, "the compiled path did not run"
        torch.testing.assert_close(compiled, scores_of_eager(model, scorer, prompts), rtol=1e-4, atol=1e-5)
    assert model._compiled_call is stock
    assert torch.equal(generate(model, prompts, **options), plain)


def scores_of_eager(model, scorer, prompts):
    generate(model, prompts)
    return scorer.scores()


@pytest.mark.parametrize("fuse", ["gather", "norm"])
def test_attach_after_the_user_compiled_forward(prompts, fuse):
    """A layer with a forward of its own fails dynamo's guards, where a hook would be ignored: it traces again."""
    torch.compiler.reset()
    model = fresh_model()
    head = SwiftHead.for_model(model)
    with attach(model, head) as scorer:
        expected = scores_of_eager(model, scorer, prompts)
    model.forward = torch.compile(model.forward, backend="eager")
    plain = generate(model, prompts)
    for _ in range(2):
        with attach(model, head, fuse=fuse) as scorer:
            assert torch.equal(generate(model, prompts), plain)
            torch.testing.assert_close(scorer.scores(), expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(generate(model, prompts), plain)


def test_a_forward_that_was_not_scored_is_a_loud_error(prompts):
    """As when something else replaces a module's forward while it is attached."""
    model = fresh_model()
    with attach(model, SwiftHead.for_model(model)) as scorer:
        del model.model.__dict__["forward"]
        with pytest.raises(NotScoredError, match="attach first"):
            generate(model, prompts)
        with pytest.raises(RuntimeError, match="did not return"):
            scorer.scores()


def test_two_models_over_one_decoder_are_not_attached_at_once(model, head):
    twin = copy.copy(model)
    twin.__dict__["_modules"] = dict(model._modules)
    with attach(model, head), pytest.raises(ValueError, match="attached already"), attach(twin, head):
        pass


def test_scores_of_a_loop_outlive_its_block(model, head):
    with torch.no_grad(), attach(model, head) as scorer:
        scorer.begin(torch.arange(2))
        model(input_ids=torch.full((2, 1), 9), use_cache=False)
        inside = scorer.scores()
    assert torch.equal(scorer.scores(), inside)


@pytest.mark.parametrize("fuse", ["gather", "norm"])
def test_a_copy_of_an_attached_model_is_a_stock_model(prompts, fuse):
    model = fresh_model()
    plain = generate(model, prompts)
    with attach(model, SwiftHead.for_model(model), fuse=fuse) as scorer:
        generate(model, prompts)
        scores = scorer.scores()
        twin = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0)  # a copy that ran its original's layers would notice
        assert torch.equal(generate(twin, prompts), plain)
        assert torch.equal(scorer.scores(), scores)


def test_a_logits_processor_that_runs_the_model_is_noticed(model, head, prompts):
    class RunsTheModel(transformers.LogitsProcessor):
        def __call__(self, input_ids, scores):
            model(input_ids=input_ids[:, -1:])
            return scores

    with attach(model, head) as scorer:
        generate(model, prompts, logits_processor=transformers.LogitsProcessorList([RunsTheModel()]))
        with pytest.raises(NotScoredError, match="something else ran the model"):
            scorer.scores()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"num_beams": 2, "do_sample": False}, "beam search"),
        ({"num_beams": 2}, "beam sample"),
        ({"prompt_lookup_num_tokens": 2, "do_sample": False}, "assisted generation"),
        ({"guidance_scale": 1.5}, "guidance_scale"),
        ({"custom_generate": lambda model, **kwargs: None}, "custom_generate"),
        ({"cache_implementation": "paged"}, "continuous batching"),
        ({"generation_config": transformers.GenerationConfig(num_beams=3)}, "beam"),
    ],
    ids=["beam", "beam-sample", "prompt-lookup", "guidance", "custom", "paged", "config"],
)
def test_generation_that_cannot_be_scored_is_refused_before_it_starts(model, head, prompts, options, reason):
    forwards = []
    handle = model.register_forward_pre_hook(lambda *_: forwards.append(1))
    try:
        with attach(model, head), pytest.raises(UnsupportedGenerationError, match=reason):
            generate(model, prompts, **options)
    finally:
        handle.remove()
    assert not forwards


def test_assisted_generation_is_refused(model, head, prompts):
    with attach(model, head), pytest.raises(UnsupportedGenerationError, match="assisted"):
        generate(model, prompts, assistant_model=fresh_model())


def test_continuous_batching_is_refused(model, head):
    with attach(model, head), pytest.raises(UnsupportedGenerationError, match="continuous batching"):
        model.generate_batch([[5, 6, 7]])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda model: SwiftHead.for_model(tiny_model("qwen2")), ModelMismatchError, "Qwen2ForCausalLM"),
        (lambda model: SwiftHead([32] * 4), ValueError, "for None layers"),
        (lambda model: SwiftHead.for_model(model).with_config(widths=(32,) * 3 + (31,)), RuntimeError, "size mismatch"),
    ],
    ids=["other-model", "no-layers", "width"],
)
def test_heads_that_do_not_fit_are_refused(model, make, error, message):
    with pytest.raises(error, match=message):
        attach(model, make(model))


def test_a_head_of_other_weights_is_refused_unless_told(model, head, prompts):
    other = fresh_model(seed=5)
    with pytest.raises(ModelMismatchError, match="allow_mismatch=True"):
        attach(other, head)
    with pytest.warns(UserWarning, match="scores may be off"):
        scorer = attach(other, head, allow_mismatch=True)
    with scorer:
        generate(other, prompts)
        assert scorer.scores().isfinite().any()


@pytest.mark.parametrize("layer", [4, -5, 99])
def test_layer_index_out_of_range(model, layer):
    with pytest.raises(ValueError, match=rf"layer index {layer} is out of range: expected -4\.\.3"):
        SwiftHead.for_model(model, [0, layer])


def test_fuse_and_trace_say_what_they_expect(model, head):
    with pytest.raises(ValueError, match="fuse is 'magic'"):
        attach(model, head, fuse="magic")
    with attach(model, head) as scorer:
        with pytest.raises(ValueError, match="trace=True"):
            scorer.trace()
        with pytest.raises(RuntimeError, match="nothing was generated"):
            scorer.scores()
        scorer.begin(torch.tensor([0]))
        with pytest.raises(NotScoredError, match="no forward of one position"):
            scorer.scores()
    with pytest.raises(RuntimeError, match="not attached"):
        scorer.begin(torch.tensor([0]))


def test_a_model_without_generate_is_refused(head):
    with pytest.raises(UnsupportedModelError, match="cannot generate"):
        attach(torch.nn.Linear(2, 2), head)


def test_a_wrapped_model_is_found(model, head, prompts):
    wrapped = torch.compile(model, backend="eager")
    with attach(wrapped, head) as scorer:
        generate(wrapped, prompts)
        assert scorer.scores().isfinite().any()


def test_probing_a_model_keeps_its_mode_and_the_random_numbers():
    model = fresh_model()
    model.train()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    before = snapshot(model)
    model_layout(model)
    assert same(before, snapshot(model))
    assert all(module.training for module in model.modules())
    assert torch.equal(state, torch.get_rng_state())
