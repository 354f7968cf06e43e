"""Heads of `top_logprobs`, which score a token once the next one is known: the same scores wherever that is learned."""

from __future__ import annotations

import pytest
import torch
import transformers

from swift_kernels import HeadConfig, SwiftHead, attach, score_texts
from swift_kernels.integrations.compatibility import eos_token_ids
from swift_kernels.integrations.shared_prompt import score_responses
from swift_kernels.integrations.top_logprobs import TopLogprobs
from swift_kernels.integrations.transformers import NotScoredError
from swift_kernels.training.activations import collect
from tests.architectures import fresh_model, tiny_model
from tests.integrations.helpers import check_parity, generate, responses_of, unpadded
from tests.integrations.test_architectures import MODES, compiled_static
from tests.integrations.test_attach import FavourLowTokens, StopAtMultiplesOfSeven
from tests.integrations.test_loops import live_tensor_bytes
from tests.oracle import assert_scores, captured_tokens, oracle
from tests.recorded import Recording

OPTIONS = {
    "temperature-top-p": {"temperature": 0.7, "top_p": 0.8},
    "processor": {"logits_processor": transformers.LogitsProcessorList([FavourLowTokens()])},
    "criterion": {"stopping_criteria": transformers.StoppingCriteriaList([StopAtMultiplesOfSeven()])},
    "forced-eos": {"forced_eos_token_id": 1},
    "no-early-end": {"min_new_tokens": 16},
    "one-token": {"max_new_tokens": 1},
    "two-tokens": {"max_new_tokens": 2},
    "five-copies": {"copies": 5},
    "top-k": {"top_k": 3, "repetition_penalty": 1.3},
}


@pytest.fixture
def head(model):
    torch.manual_seed(0)
    return SwiftHead.for_model(model, "top_logprobs", top_logprobs=7)


def only_the_sampled_tokens(model, k=5):
    """A head without a gate whose reward is the log-probability of the token that follows."""
    head = SwiftHead.for_model(model, "top_logprobs", gate=False, top_logprobs=k)
    with torch.no_grad():
        head.bias.zero_()
        head.weight.zero_()
        head.weight[0, -1] = 1.0
    return head


def mean_logprobs(model, prompts, responses):
    """Mean over the scored tokens of the next one's log-probability: all of a response but its first token."""
    means, ends = [], eos_token_ids(model)
    for prompt, response in zip(prompts, responses, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*prompt, *response]])).logits[0].double()
        chosen = logits.log_softmax(-1)[range(len(prompt), len(prompt) + len(response) - 1), response[1:]]
        assert not set(response[:-1]) & set(ends)
        means.append(chosen.mean() if len(chosen) else torch.tensor(torch.nan, dtype=torch.float64))
    return torch.stack(means)


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2"])
def test_parity(name, mode, prompts):
    check_parity(tiny_model(name), SwiftHead.for_model(tiny_model(name), "top_logprobs"), prompts, **mode)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("gate", [True, False], ids=["gate", "mean"])
def test_parity_however_tokens_are_chosen(model, prompts, gate, options):
    check_parity(model, SwiftHead.for_model(model, "top_logprobs", gate=gate, top_logprobs=9), prompts, **options)


def test_parity_without_an_end_of_sequence_token(prompts):
    model = fresh_model()
    model.generation_config.eos_token_id = None
    criteria = transformers.StoppingCriteriaList([StopAtMultiplesOfSeven()])
    check_parity(model, SwiftHead.for_model(model, "top_logprobs"), prompts, stopping_criteria=criteria)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_decode_step(prompts, backend):
    model = fresh_model()
    check_parity(model, SwiftHead.for_model(model, "top_logprobs"), prompts, **compiled_static(backend))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_level_a_in_half_precision(dtype, prompts):
    model = tiny_model("llama", dtype)
    head = SwiftHead.for_model(model, "top_logprobs")
    with attach(model, head) as scorer:
        output = generate(model, prompts, num_return_sequences=2, return_dict_in_generate=True, output_logits=True)
        responses = responses_of(scorer, output.sequences, prompts["input_ids"].shape[1])
        assert_scores(scorer.scores(), *oracle(captured_tokens(output, head, responses, eos_token_ids(model)), head))


@pytest.mark.parametrize(
    "options",
    [{"do_sample": False}, {}, {"temperature": 0.3, "top_p": 0.5}, {"temperature": 2.5}, {"top_k": 2}],
    ids=["greedy", "plain", "cold", "hot", "top-2"],
)
def test_the_last_column_is_the_sampled_tokens_before_any_processor(model, prompts, options):
    """Against transformers' own account of its raw logits, and against a forward of whole sequences."""
    head = only_the_sampled_tokens(model)
    with attach(model, head) as scorer:
        output = generate(model, prompts, **options, return_dict_in_generate=True, output_logits=True)
        responses = responses_of(scorer, output.sequences, prompts["input_ids"].shape[1])
    own = model.compute_transition_scores(output.sequences, output.logits, normalize_logits=True)
    own = torch.stack([row[1 : len(response)].mean() for row, response in zip(own, responses, strict=True)])
    torch.testing.assert_close(scorer.scores(), own, rtol=1e-6, atol=1e-6, equal_nan=True)
    forced = mean_logprobs(model, unpadded(prompts, 1), responses)
    torch.testing.assert_close(scorer.scores().double(), forced, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_every_way_of_scoring_answers_reads_the_same_tokens(model):
    head = only_the_sampled_tokens(model)
    prompt = [7, 30, 31, 32]
    responses = [[50, 51, 52, 53, 1], [60], [61, 62], list(range(40, 60)), [50, 2], []]
    expected = mean_logprobs(model, [prompt] * 6, responses)
    assert expected.isnan().tolist() == [False, True, False, False, False, True]
    together = score_texts(model, None, head, [prompt] * 6, responses, batch_size=4)
    shared = score_responses(model, head, prompt, responses, batch_size=2)
    activations = collect(model, head.config, [(prompt, responses)], batch_size=3)
    assert activations.values.dtype == torch.float32
    assert activations.lengths == (4, 0, 1, 19, 1, 0)
    stored = head(*activations.batch(torch.arange(6))).detach()
    for found in (together, shared, stored):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_activations_of_a_half_precision_model_are_float32():
    """The features are float32, whatever the model computes in: training reads what scoring does."""
    model = tiny_model("llama", torch.bfloat16)
    head = SwiftHead.for_model(model, "top_logprobs")
    responses = [[50, 51, 52, 53, 1], [61, 62, 63]]
    activations = collect(model, head.config, [([7, 30], responses)])
    stored = head(*activations.batch(torch.arange(2))).detach()
    torch.testing.assert_close(stored, score_responses(model, head, [7, 30], responses), rtol=1e-5, atol=1e-6)


def test_a_row_is_bitwise_the_same_alone(model, head):
    """Given the same logits, and beside rows that are skipped or NaN and fed what is no token."""
    logits = torch.randn(65, 96, generator=torch.Generator().manual_seed(0))
    logits[1::2] = torch.nan
    token_ids = torch.arange(65) + 7
    slots = torch.where(torch.arange(65) % 2 == 0, torch.arange(65), -1)
    token_ids[1::2] = -100
    together = head.init_state(65)
    late = TopLogprobs(head, 96)
    late.hold(logits)
    late.settle(token_ids, together, slots, None)
    for row in range(0, 65, 2):
        alone = head.init_state(1)
        late.hold(logits[row : row + 1])
        late.settle(token_ids[row : row + 1], alone, torch.tensor([0]), None)
        assert torch.equal(alone.sums[0], together.sums[row])
    assert together.token_count.tolist() == [1, 0] * 32 + [1]


def test_trace_gives_the_scores_again(model, prompts):
    head = only_the_sampled_tokens(model)
    with attach(model, head, trace=True) as scorer:
        output = generate(model, prompts, num_return_sequences=3)
        rows, scores = scorer.trace(), scorer.scores()
    responses = responses_of(scorer, output, prompts["input_ids"].shape[1])
    assert [len(row) for row in rows] == [len(response) - 1 for response in responses]
    for row, score in zip(rows, scores, strict=True):
        torch.testing.assert_close(row[:, 1].mean(), score, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_a_logits_processor_that_runs_the_model_is_noticed(model, head, prompts):
    class RunsTheModel(transformers.LogitsProcessor):
        def __call__(self, input_ids, scores):
            model(input_ids=input_ids[:, -1:], use_cache=False)
            return scores

    with attach(model, head) as scorer:
        processors = transformers.LogitsProcessorList([RunsTheModel()])
        with pytest.raises(NotScoredError, match="2 forwards ran for one sampled token"):
            generate(model, prompts, logits_processor=processors)
        generate(model, prompts)
        assert scorer.scores().isfinite().any()


def sampled_tokens(model, prompts, steps=9):
    """Greedy tokens `[rows, steps]` that never end, and what continues each prompt: mask, positions, cache."""
    inputs = {**prompts, "position_ids": (prompts["attention_mask"].cumsum(1) - 1).clamp_min(0)}
    output = generate(model, prompts, do_sample=False, max_new_tokens=steps, eos_token_id=None)
    return inputs, output[:, prompts["input_ids"].shape[1] :]


def run_loop(model, inputs, tokens, slots_of, sampled=lambda step: None):
    """Feeds every column of `tokens` but the last; `sampled` is called once the next one is known."""
    with torch.no_grad():
        cache, mask = model(**inputs, use_cache=True).past_key_values, inputs["attention_mask"]
        for step in range(tokens.shape[1] - 1):
            slots_of(step)
            mask = torch.cat([mask, mask.new_ones(mask.shape[0], 1)], dim=1)
            model(
                input_ids=tokens[:, step : step + 1],
                attention_mask=mask,
                position_ids=mask.sum(1, keepdim=True) - 1,
                past_key_values=cache,
            )
            sampled(step)


def test_a_hand_written_loop(model, head, prompts):
    """With `commit` it scores what `generate` does; without, the last token fed to a slot waits for ever."""
    inputs, tokens = sampled_tokens(model, prompts)
    responses = tokens.tolist()
    slots = torch.tensor([2, 0, 1])
    with attach(model, head) as scorer:
        scorer.begin(slots)
        run_loop(model, inputs, tokens, lambda step: None, lambda step: scorer.commit(tokens[:, step + 1]))
        assert scorer.token_counts().tolist() == [8, 8, 8]
        told = scorer.scores()[slots]
        expected = score_texts(model, None, head, unpadded(prompts, 1), responses, eos_token_id=[])
        torch.testing.assert_close(told, expected, rtol=1e-4, atol=1e-5)

        scorer.begin(slots)
        run_loop(model, inputs, tokens, lambda step: None)
        assert scorer.token_counts().tolist() == [7, 7, 7]
        shorter = [response[:-1] for response in responses]
        expected = score_texts(model, None, head, unpadded(prompts, 1), shorter, eos_token_id=[])
        torch.testing.assert_close(scorer.scores()[slots], expected, rtol=1e-4, atol=1e-5)
        scorer.commit(tokens[:, -1])
        torch.testing.assert_close(scorer.scores()[slots], told, rtol=1e-5, atol=1e-6)
        scorer.commit(tokens[:, -1])
        assert scorer.token_counts().tolist() == [8, 8, 8], "nothing waits any more"


def test_rows_of_a_loop_that_pause_or_end(model, prompts):
    """What waits belongs to its slot: it waits while the slot is not fed, and is lost with a slot that never is."""
    head = only_the_sampled_tokens(model)
    tokens = torch.randint(6, 96, (6, 3), generator=torch.Generator().manual_seed(1))
    routes = [[0, 1, 2], [2, -1, 0], [-1, 0, 2], [-1, -1, -1], [0, -1, -1], [-1, 2, 1]]
    slots = torch.empty(3, dtype=torch.int64)
    expected: dict[int, list[float]] = {slot: [] for slot in range(4)}
    waiting = {}
    with torch.no_grad(), attach(model, head) as scorer:
        scorer.begin(slots, num_slots=4)
        for token_ids, route in zip(tokens, routes, strict=True):
            slots.copy_(torch.tensor(route))
            logprobs = model(input_ids=token_ids[:, None], use_cache=False).logits[:, 0].double().log_softmax(-1)
            for row, slot in enumerate(route):
                if slot >= 0:
                    if slot in waiting:
                        expected[slot].append(waiting[slot][token_ids[row]].item())
                    waiting[slot] = logprobs[row]
        assert scorer.token_counts().tolist() == [3, 1, 3, 0]
        means = torch.tensor([sum(values) / len(values) if values else torch.nan for values in expected.values()])
        torch.testing.assert_close(scorer.scores(), means, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_a_prefill_that_keeps_one_row_of_logits_is_no_step(model, head):
    with torch.no_grad(), attach(model, head) as scorer:
        scorer.begin(torch.arange(2))
        model(input_ids=torch.full((2, 5), 9), logits_to_keep=1)
        with pytest.raises(NotScoredError, match="no forward of one position"):
            scorer.scores()
        model(input_ids=torch.full((2, 1), 9), use_cache=False)
        assert scorer.token_counts().tolist() == [0, 0]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_loop_step_compiled_as_one_graph(model, head, backend):
    slots = torch.tensor([1, 0, 2])
    tokens = torch.randint(6, 96, (6, 3, 1), generator=torch.Generator().manual_seed(0))

    def step(token_ids):
        return model(input_ids=token_ids, use_cache=False).logits

    results = []
    with torch.no_grad(), attach(model, head) as scorer:
        for run in (step, torch.compile(step, fullgraph=True, backend=backend)):
            scorer.begin(slots)
            slots.copy_(torch.tensor([1, 0, 2]))
            for token_ids in tokens[:3]:
                run(token_ids)
            slots[1] = -1
            for token_ids in tokens[3:]:
                run(token_ids)
            scorer.commit(tokens[0, :, 0])
            results.append((scorer.scores(), scorer.token_counts()))
    assert results[0][1].tolist() == results[1][1].tolist() == [2, 6, 6]
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4, atol=1e-5)


def test_a_step_never_waits_for_the_device(model, head, monkeypatch):
    """Also what capture into a CUDA graph requires. On the CPU slots are checked, which reads them."""
    monkeypatch.setattr("swift_kernels.integrations.top_logprobs.check_slots", lambda *_: None)
    slots = torch.tensor([2, -1, 1])
    late = TopLogprobs(head, 96)
    with attach(model, head) as scorer, torch.no_grad():
        scorer.begin(slots)
        mask = torch.ones(3, 1, 1, 1, dtype=torch.bool)
        with Recording() as mode:
            for _ in range(2):
                model(input_ids=torch.full((3, 1), 9), attention_mask=mask, use_cache=False)
            scorer.commit(torch.full((3,), 9))
            late.hold(torch.zeros(3, 96))
            late.settle(torch.full((3,), 9), scorer._state, slots, None)
        assert "score_step" in mode.ops
        assert scorer.token_counts().tolist() == [0, 3, 3]


def test_scoring_holds_the_same_bytes_after_any_number_of_tokens(head):
    model = fresh_model()
    held = {}
    with attach(model, head) as scorer, torch.no_grad():
        for steps in (32, 1024):
            scorer.begin(torch.arange(3))
            for _ in range(steps):
                model(input_ids=torch.full((3, 1), 9), use_cache=False)
            assert scorer.token_counts().tolist() == [steps - 1] * 3
            held[steps] = (scorer.nbytes, scorer.scratch_nbytes, live_tensor_bytes(model))
    assert held[32] == held[1024]
    assert held[32][0] == 12 * 3
    assert held[32][1] > 4 * 3 * 96, "the logits that wait are reported"


def test_generating_leaves_no_logits_behind(model, head, prompts):
    with attach(model, head) as scorer:
        generate(model, prompts)
        assert scorer._late._held == []
        assert scorer._late.buffers() == []


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (
            lambda model: SwiftHead.for_model(model, "top_logprobs", top_logprobs=97),
            r"top_logprobs is 97: expected 2\.\.",
        ),
        (lambda model: SwiftHead.for_model(model, "top_logprobs", top_logprobs=1), "top_logprobs is 1"),
        (lambda model: SwiftHead.for_model(model, "all", top_logprobs=5), 'expected layers="top_logprobs"'),
        (lambda model: SwiftHead.for_model(model, "top_logprobs", span="all"), 'span="all" scores the last token'),
        (
            lambda model: attach(model, SwiftHead.for_model(model, "top_logprobs"), fuse="norm"),
            "the head reads top_logprobs",
        ),
        (
            lambda model: attach(
                model, SwiftHead.for_model(model, "top_logprobs").with_config(features="hidden_states")
            ),
            "for None layers",
        ),
        (lambda model: attach(model, wide_head()), "top_logprobs is 150: expected 2..96"),
    ],
    ids=["k-large", "k-small", "k-of-layers", "span", "norm", "source", "vocabulary"],
)
def test_what_is_refused(model, run, message):
    with pytest.raises(ValueError, match=message):
        run(model)


def wide_head():
    return SwiftHead(HeadConfig(widths=(153,), features="top_logprobs"))


def test_commit_says_what_it_expects(model, head):
    with torch.no_grad(), attach(model, head) as scorer:
        with pytest.raises(RuntimeError, match=r"call scorer\.begin\(slots\) first"):
            scorer.commit(torch.tensor([9]))
        scorer.begin(torch.arange(2))
        with pytest.raises(ValueError, match=r"expected int64 \[2\] on cpu"):
            scorer.commit(torch.tensor([9]))
        with pytest.raises(ValueError, match="without input_ids"):
            model(inputs_embeds=torch.zeros(2, 1, 32))
        for wrong in ([0, 0], [0, 5]):
            scorer.begin(torch.tensor(wrong))
            with pytest.raises(ValueError, match="slots contains"):
                model(input_ids=torch.full((2, 1), 9))
    with torch.no_grad(), attach(model, SwiftHead.for_model(model)) as scorer:
        scorer.begin(torch.arange(2))
        model(input_ids=torch.full((2, 1), 9))
        scorer.commit(torch.tensor([9, 9]))
        assert scorer.token_counts().tolist() == [1, 1], "other sources do not wait"


def test_a_finished_text_whose_end_has_no_token(head):
    model = fresh_model()
    model.generation_config.eos_token_id = None
    tokenizer = lambda text, **_: {"input_ids": [ord(character) % 90 + 6 for character in text]}  # noqa: E731
    with pytest.raises(ValueError, match=r"responses\[0\] is a finished text, but no end-of-sequence token is known"):
        score_texts(model, tokenizer, head, ["ab"], ["cde"])
    assert score_texts(model, tokenizer, head, ["ab"], ["cde"], finished=False).isfinite().all()
    assert score_texts(model, tokenizer, head, ["ab"], ["cde"], eos_token_id=9).isfinite().all()
