"""A rival that scores otherwise than ours is found before anything is timed, and ends the run without a figure."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any

import pytest
import torch

from bench import best_of_n, decode, memory, rivals, score_sequence, score_step, shapes
from swift_kernels import SwiftHead
from tests.recorded import recorded

CPU = torch.device("cpu")
ROWS, WIDTHS = 3, [64, 32]


def test_rivals_of_a_step_pass_and_a_wrong_one_does_not():
    weight, bias = score_step.make_head(WIDTHS)
    tokens = score_step.make_inputs(ROWS, WIDTHS, CPU, 3)
    eager = [each for each in rivals.rivals(weight, bias, ROWS, WIDTHS) if "compiled" not in each.name]
    for contender in [rivals.ours(weight, bias, ROWS, WIDTHS), *eager]:
        score_step.check(contender, tokens, weight, bias)
        assert not contender.sums.any(), "checked, and back to nothing scored"
    wrong = rivals.upstream(weight + 1e-3, bias, ROWS)
    with pytest.raises(SystemExit, match=r"upstream scores otherwise than the reference.*not timed"):
        score_step.check(wrong, tokens, weight, bias)


@pytest.mark.parametrize("what", ["scores", "the gradient of the weight", "the gradient of the bias"])
@pytest.mark.parametrize("heads", [1, 3])
def test_rivals_of_sequences_pass_and_a_wrong_one_does_not(heads, what):
    packed = score_sequence.make_packed([4, 1, 7], WIDTHS, CPU, 0)
    makers = (score_sequence.ours, score_sequence.upstream, score_sequence.per_layer)
    contenders = [make(WIDTHS, *score_sequence.make_parameters(WIDTHS, heads, CPU)) for make in makers]
    score_sequence.check(contenders, packed, heads)
    right = contenders[2]

    class Wrong(score_sequence.Contender):
        def forward(self, packed: Any) -> Any:
            return right.forward(packed) + (1e-2 if what == "scores" else 0)

        def backward(self, packed: Any) -> Any:
            weight, bias = right.backward(packed)
            return weight + 1e-2 * (what.endswith("weight")), bias + 1e-2 * (what.endswith("bias"))

    with pytest.raises(SystemExit, match=f"per layer, fp32: {what} is off by .* units"):
        score_sequence.check([contenders[0], Wrong(right.name, right.scores, right.parameters)], packed, heads)


@pytest.fixture(scope="module")
def tiny() -> Any:
    return shapes.llama(shapes.TINY, CPU)


def decode_contenders(tiny: Any, head: SwiftHead, stack: ExitStack, shared: bool) -> list[decode.Contender]:
    contenders: list[decode.Contender] = []
    for name in decode.CONTENDERS["eager"]:
        cache = contenders[0].decoder.cache if shared and contenders else None
        decoder_of = partial(decode.Decoder, rows=2, context=20, cache=cache)
        contenders.append(decode.Contender(name, "eager", tiny, head, decoder_of, stack))
    return contenders


@pytest.mark.parametrize("shared", [False, True], ids=["own caches", "one cache"])
@pytest.mark.parametrize("fault", ["weights", "a step too few", "what was to be skipped"])
def test_wrong_scores_of_a_decode_step_are_found(tiny, fault, shared):
    head = SwiftHead.for_model(tiny)
    with torch.no_grad(), ExitStack() as stack:
        contenders = decode_contenders(tiny, head, stack, shared)
        steps = [each.step for each in contenders]
        assert decode.faults(contenders, "eager", steps, head) == {}
        if fault == "weights":
            head.weight.mul_(1.01)
            message = {"gather": "scores are off by"}  # by a hundredth; norms may be by three
        elif fault == "a step too few":
            steps[1] = iter_once(steps[1])
            message = {"gather": "tokens of 16"}
        else:
            contenders[3]._slots = contenders[3].decoder.slots
            message = {"norm, bare": "scores rows that it was told to skip"}
        found = decode.faults(contenders, "eager", steps, head)
        assert found.keys() == message.keys()
        assert all(message[name] in told for name, told in found.items())


@pytest.mark.parametrize("shared", [False, True], ids=["own caches", "one cache"])
def test_decode_steps_score_as_captured_graphs_do(tiny, shared, monkeypatch):
    """Replayed without the Python of a step, which no quick run on a CPU does."""
    monkeypatch.setattr(decode, "Replay", lambda calls, device: recorded(calls[0]))
    head = SwiftHead.for_model(tiny)
    with torch.no_grad(), ExitStack() as stack:
        contenders = decode_contenders(tiny, head, stack, shared)
        steps = [each.captured() for each in contenders]
        assert decode.faults(contenders, "eager", steps, head) == {}


def iter_once(step: Any) -> Any:
    """The step, but for its first call."""
    calls = iter([lambda: None])
    return lambda: next(calls, step)()


def test_a_pipeline_that_scores_otherwise_is_found(monkeypatch):
    with torch.no_grad():
        pipeline = best_of_n.float32_pipeline(CPU)
        best_of_n.check(pipeline, 1e-4)
        _, scores = pipeline.upstream()
        # A token late, as a pass that takes the last prompt token for the answer's first.
        monkeypatch.setattr(pipeline, "upstream", lambda: (0, scores.roll(1)))
        with pytest.raises(SystemExit, match="upstream: scores differ from ours"):
            best_of_n.check(pipeline, 1e-4)


def test_flops_of_the_kernel_are_counted():
    head = SwiftHead(WIDTHS)
    state, slots = head.init_state(ROWS), torch.arange(ROWS)
    states = [torch.zeros(ROWS, width) for width in WIDTHS]
    with torch.no_grad():
        assert best_of_n.count_flops(lambda: head.step(states, state, slots)) == 2 * 2 * ROWS * sum(WIDTHS)


def test_scores_that_differ_make_no_memory_figure():
    head = SwiftHead(WIDTHS)
    memory.check({"ours": torch.tensor([0.5]), "theirs": torch.tensor([0.5 + 1e-7])}, head, 8)
    with pytest.raises(SystemExit, match="no figure"):
        memory.check({"ours": torch.tensor([0.5]), "theirs": torch.tensor([0.51])}, head, 8)
