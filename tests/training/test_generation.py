from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from swift_kernels.evaluation.tasks import Problem, Sums
from swift_kernels.evaluation.worker import WorkerError
from swift_kernels.training.generation import (
    Sampling,
    SeededSampler,
    cut_at_stop,
    decode,
    generate_rollouts,
    grade,
    prefill,
    settings,
    trim,
)
from swift_kernels.training.rollouts import encode_prompt
from tests import architectures, tiny

SAMPLING = Sampling(n=3, max_new_tokens=12, seed=7)


def sample(model: Any, tokenizer: Any, prompts: list[str], sampling: Sampling, stop: tuple[str, ...] = ()) -> Any:
    ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    with torch.no_grad():
        sampler = SeededSampler(sampling, prompts, model.device)
        return decode(model, tokenizer, prefill(model, tokenizer, ids, sampling), sampler, sampling, stop)


def sampler(identities: list[str]) -> SeededSampler:
    return SeededSampler(SAMPLING, identities, torch.device("cpu"))


@pytest.fixture(scope="module")
def double() -> Any:
    """In float64 a batch's rounding does not reach the sampler."""
    return tiny.model().double()


def test_answers_do_not_depend_on_the_batch(double: Any, tokenizer: Any) -> None:
    prompts = ["1+1=", "What is 22 + 3?", "x", "abc"]
    together = sample(double, tokenizer, prompts, SAMPLING)
    alone = [answer for prompt in prompts for answer in sample(double, tokenizer, [prompt], SAMPLING)]
    assert together == alone
    assert len({tuple(ids) for ids, _ in together}) > 6
    more = sample(double, tokenizer, prompts, replace(SAMPLING, n=5))
    assert [more[5 * row : 5 * row + 3] for row in range(4)] == [together[3 * row : 3 * row + 3] for row in range(4)]
    assert sample(double, tokenizer, prompts, replace(SAMPLING, seed=8)) != together


def test_shared_prefill_changes_nothing(double: Any, tokenizer: Any) -> None:
    prompts = ["Question: 1+1?", "2?"]
    ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    with torch.no_grad():
        inputs = prefill(double, tokenizer, ids, SAMPLING)
        cache = inputs.pop("past_key_values")
        assert cache.get_seq_length() == max(map(len, ids)) - 1
        without = decode(double, tokenizer, inputs, sampler(prompts), SAMPLING)
        inputs["past_key_values"] = cache
        assert decode(double, tokenizer, inputs, sampler(prompts), SAMPLING) == without


@pytest.mark.parametrize("name", architectures.NAMED)
def test_shared_prefill_on_every_architecture(name: str, tokenizer: Any) -> None:
    # Eager attention of Gemma2 is NaN on padding in float64, grouped matmuls of Mixtral have no float64.
    model = architectures.tiny_model(name, torch.float32 if name in ("gemma2", "mixtral") else torch.float64)
    prompts = [[30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40, 41], [50, 51, 52]]
    with torch.no_grad():
        inputs = prefill(model, tokenizer, prompts, SAMPLING)
        together = decode(model, tokenizer, inputs, sampler(["a", "b"]), SAMPLING)
        inputs.pop("past_key_values")
        assert decode(model, tokenizer, inputs, sampler(["a", "b"]), SAMPLING) == together


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"),
    [(1.0, 1.0, 0), (1.0, 0.7, 0), (0.5, 0.9, 0), (1.0, 1.0, 3), (2.0, 0.8, 4)],
    ids=["plain", "nucleus", "cold", "top-k", "both"],
)
def test_sampler_draws_what_transformers_would(temperature: float, top_p: float, top_k: int) -> None:
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.tensor([[2.0, 0.5, 1.5, -1.0, 0.0, 1.0, -3.0, 0.2]])
    rows = 20_000
    sampling = Sampling(rows, temperature, top_p, top_k, max_new_tokens=1)
    chosen = SeededSampler(sampling, ["p"], torch.device("cpu"))(None, logits.expand(rows, -1)).argmax(dim=-1)
    warped = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        warped = TopKLogitsWarper(top_k)(None, warped)
    expected = TopPLogitsWarper(top_p)(None, warped).softmax(dim=-1)[0]
    frequencies = torch.bincount(chosen, minlength=8) / rows
    assert (frequencies[expected == 0] == 0).all()
    # Five standard errors of a frequency.
    assert ((frequencies - expected).abs() <= 5 * (expected * (1 - expected) / rows).sqrt()).all()


def test_sampler_finds_a_nucleus_wider_than_its_first_look() -> None:
    sampling = Sampling(4000, top_p=0.5, max_new_tokens=1)
    chosen = SeededSampler(sampling, ["p"], torch.device("cpu"))(None, torch.zeros(4000, 3000)).argmax(dim=-1)
    # Half of 3,000 equally likely tokens, of which 4,000 draws see nearly all.
    assert 1300 < chosen.unique().numel() <= 1501


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("ab", ("ab", False)),
        ("ab<eos><pad>", ("ab<eos>", True)),
        ("ab\n<pad><pad>", ("ab\n", True)),
        ("ab\n", ("ab\n", True)),
        ("<eos>", ("<eos>", True)),
    ],
    ids=["cut-off", "end-of-sequence", "stop-string", "stop-at-the-limit", "nothing"],
)
def test_trim(model: Any, tokenizer: Any, row: str, expected: tuple[str, bool]) -> None:
    def ids(text: str) -> list[int]:
        special = {"<eos>": 1, "<pad>": 0}
        for name in special:
            text = text.replace(name, {"<eos>": "\x0b", "<pad>": "\x0c"}[name])
        encoded = tokenizer(text, add_special_tokens=False)["input_ids"]
        vertical, feed = tokenizer("\x0b\x0c", add_special_tokens=False)["input_ids"]
        return [{vertical: 1, feed: 0}.get(token, token) for token in encoded]

    assert trim(ids(row), model, tokenizer, ["\n"]) == (ids(expected[0]), expected[1])


def test_trim_where_padding_is_the_end_of_sequence(model: Any, tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    a, newline = tokenizer("a\n", add_special_tokens=False)["input_ids"]
    assert trim([a, newline, 1, 1], model, tokenizer, ["\n"]) == ([a, newline], True)
    assert trim([a, 1, 1, 1], model, tokenizer, ["\n"]) == ([a, 1], True)
    assert trim([a, a, a], model, tokenizer, ["\n"]) == ([a, a, a], False)


def test_rollouts_are_graded_and_continue_alike(double: Any, tokenizer: Any) -> None:
    task = Sums()
    problems = task.problems("train", 5)
    whole = list(generate_rollouts(double, tokenizer, task, problems, SAMPLING, batch_size=6))
    rest = list(generate_rollouts(double, tokenizer, task, problems[3:], SAMPLING, batch_size=64))
    assert whole[3:] == rest
    for rollout, problem in zip(whole, problems, strict=True):
        assert (rollout.id, rollout.key, rollout.answer) == (problem.id, problem.key, problem.answer)
        assert rollout.prompt_token_ids == encode_prompt(tokenizer, rollout.prompt, chat=False)
        for candidate in rollout.candidates:
            assert candidate.token_ids is not None
            assert len(candidate.token_ids) <= 12
            assert "\n" not in candidate.text
            assert candidate.correct is task.grade(candidate.text, problem)


class Fragile(Sums):
    """Cannot bear some answers."""

    def grade(self, text: str, problem: Problem) -> bool:
        if "!" in text:
            raise OverflowError("too large\nto grade")
        return True

    def extract(self, text: str, problem: Problem | None = None) -> str | None:
        if "?" in text:
            raise RecursionError
        return text


def test_a_grader_that_does_not_start_ends_the_run(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> bool:
        raise WorkerError("the process does not start")

    task = Sums()
    monkeypatch.setattr(task, "grade", fail)
    problem = Problem("1+2", "1+2", "What is 1 + 2?", "3")
    with pytest.raises(WorkerError):
        grade(tokenizer, task, problem, [(tokenizer("3")["input_ids"], True)])


def test_an_answer_that_cannot_be_graded_is_wrong_and_the_others_are_graded(tokenizer: Any) -> None:
    problem = Problem("1+2", "1+2", "What is 1 + 2?", "3")
    answers = [(tokenizer(text)["input_ids"], True) for text in ("3", "3!", "3?", "4")]
    notes: list[str] = []
    responses = grade(tokenizer, Fragile(), problem, answers, notes.append)
    assert [(response.text, response.correct, response.answer) for response in responses] == [
        ("3", True, "3"),
        ("3!", False, None),
        ("3?", False, None),
        ("4", True, "4"),
    ]
    assert notes == [
        "sums, problem '1+2': 2 of 4 answers could not be graded and count as wrong: OverflowError: too large"
    ]


class Slow(Sums):
    """Takes too long to grade some answers, and would to look for what they say."""

    timeouts = 0

    def grade(self, text: str, problem: Problem) -> bool:
        self.timeouts += "^" in text
        return "^" not in text

    def extract(self, text: str, problem: Problem | None = None) -> str | None:
        assert "^" not in text
        return text


def test_an_answer_whose_grading_took_too_long_is_not_read_again(tokenizer: Any) -> None:
    problem = Problem("1+2", "1+2", "What is 1 + 2?", "3")
    task = Slow()
    answers = [(tokenizer(text)["input_ids"], True) for text in ("3", "9^9", "4")]
    responses = grade(tokenizer, task, problem, answers, pytest.fail)
    assert [(response.correct, response.answer) for response in responses] == [
        (True, "3"),
        (False, None),
        (True, "4"),
    ]
    assert task.timeouts == 1


def test_rollouts_go_on_where_a_grader_fails(double: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    problems = Sums().problems("train", 4)
    expected = list(generate_rollouts(double, tokenizer, Sums(), problems, SAMPLING))

    def fail_once(self: Sums, text: str, problem: Problem) -> bool:
        if problem is problems[1]:
            raise ZeroDivisionError
        return self.extract(text) == problem.answer

    monkeypatch.setattr(Sums, "grade", fail_once)
    with pytest.warns(
        UserWarning, match=f"problem '{problems[1].id}': 3 of 3 answers .* ZeroDivisionError".replace("+", r"\+")
    ):
        got = list(generate_rollouts(double, tokenizer, Sums(), problems, SAMPLING))
    assert [rollout.id for rollout in got] == [problem.id for problem in problems]
    assert [*got[:1], *got[2:]] == [*expected[:1], *expected[2:]]
    assert [candidate.answer for candidate in got[1].candidates] == [None] * 3


def test_header_holds_all_that_decides(model: Any) -> None:
    header = settings(model, Sums(), SAMPLING, split="train", chat=False)
    assert header["sampling"]["seed"] == 7
    assert (header["task"], header["dtype"], header["stop"]) == ("sums", "float32", ["\n"])
    assert header["model"]["architecture"] == "LlamaForCausalLM"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n is 0"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_k": -1}, "top_k is -1"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
    ],
    ids=lambda value: str(value),
)
def test_impossible_sampling(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


def test_nan_logits_are_an_error() -> None:
    logits = torch.zeros(3, 10)
    logits[1, 4] = torch.nan
    with pytest.raises(ValueError, match="logits are NaN"):
        SeededSampler(SAMPLING, ["p"], torch.device("cpu"))(None, logits)


def test_prompts_that_cannot_be_answered(model: Any, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        prefill(model, tokenizer, [[5], []], SAMPLING)
    with pytest.raises(ValueError, match=f"takes at most {tiny.CONTEXT}"):
        prefill(model, tokenizer, [[5] * (tiny.CONTEXT - 5)], SAMPLING)


def test_one_token_prompts_are_answered(double: Any, tokenizer: Any) -> None:
    assert len(sample(double, tokenizer, ["a", "bc"], SAMPLING)) == 6


def test_stop_strings_cut_the_text() -> None:
    assert cut_at_stop("4\nQuestion", ["\n"]) == "4"
    assert cut_at_stop("4;\n", ["\n", ";"]) == "4"
    assert cut_at_stop("4", []) == "4"


def test_halves_of_characters_are_graded_as_what_stands_for_them() -> None:
    """A tokenizer that puts bytes together by itself may leave half a character, which no file takes."""
    tokenizer = Mock(decode=lambda *args, **options: "= 1\ud800 7")
    problem = Sums().problems("train", 1)[0]
    [response] = grade(tokenizer, Sums(), problem, [([5], True)])
    assert (response.text, response.answer) == ("= 1\ufffd 7", "1")
