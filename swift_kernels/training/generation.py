"""Generating rollouts: many answers to each problem, the same ones however the run is batched or interrupted."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList

from swift_kernels.evaluation.tasks import Problem, Task, timeouts
from swift_kernels.evaluation.worker import WorkerError
from swift_kernels.files import whole_characters
from swift_kernels.hub import first_line
from swift_kernels.integrations.compatibility import check_context, check_token_ids, eos_token_ids
from swift_kernels.training.recording import Recorder
from swift_kernels.training.rollouts import Confidence, Response, Rollout, encode_prompt
from swift_kernels.training.store import ShardProblem

SampledAnswer = tuple[list[int], bool]
"""Token ids as sampled, without padding, and whether the answer finished."""

# `SeededSampler` has sampled by the time `generate` takes the greatest logit. What a model's own generation config says
# of sampling would draw a warning.
_GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled; `top_k=0` and `top_p=1` switch a filter off."""

    n: int = 8
    temperature: float = 1.0
    top_p: float = 0.9
    top_k: int = 0
    max_new_tokens: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in (("n", self.n), ("max_new_tokens", self.max_new_tokens)):
            if value < 1:
                raise ValueError(f"{name} is {value}: expected at least 1")
        if not 0 < self.temperature < math.inf:
            raise ValueError(
                f"temperature is {self.temperature}: expected a finite value above 0, or n equal answers come out"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}: expected more than 0, at most 1")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}: expected 0 (off) or more")


def settings(model: nn.Module, task: Task, sampling: Sampling, *, split: str, chat: bool) -> dict[str, Any]:
    """The header of a rollout file: all that decides about its content but the number of problems."""
    from swift_kernels.fingerprint import fingerprint

    return {
        "model": fingerprint(model),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "task": task.name,
        "split": split,
        "chat": chat,
        "stop": list(task.stop),
        "sampling": asdict(sampling),
    }


def check_prompts(
    model: Any, tokenizer: Any, task: Task, problems: Sequence[Problem], sampling: Sampling, *, chat: bool
) -> None:
    """Raises, before anything is generated, where a problem's prompt is one that the model cannot be given.

    Raises:
        ValueError: with the place of the problem: its prompt is no text for the tokenizer, has no token or one that
            the model lacks, or leaves no room in the context for an answer as long as it may get.
    """
    for problem in problems:
        what = problem.place or f"{task.name}, problem {problem.id!r}"
        try:
            ids = encode_prompt(tokenizer, task.prompt(problem.question), chat=chat)
            if not ids:
                raise ValueError("the prompt is empty: expected at least one token")
            check_token_ids(model, ids, "the prompt")
            check_context(model, len(ids) + 1, "the prompt, with one token of an answer,")
            check_context(
                model, len(ids) + sampling.max_new_tokens, f"the prompt, with {sampling.max_new_tokens} of an answer,"
            )
        except Exception as error:  # templates and tokenizers have errors of their own
            raise ValueError(
                f"{what}: {first_line(error)}; mend the problem or leave it out, or let answers be shorter "
                "(--max-new-tokens)"
            ) from None


@torch.no_grad()
def generate_rollouts(
    model: Any,
    tokenizer: Any,
    task: Task,
    problems: Sequence[Problem],
    sampling: Sampling,
    *,
    chat: bool | None = None,
    batch_size: int = 64,
) -> Iterator[Rollout]:
    """Yields the rollout of each problem, in order; `batch_size` answers are decoded at once.

    Each prompt is prefilled once, not once per answer.
    """
    per_batch = max(1, batch_size // sampling.n)
    for start in range(0, len(problems), per_batch):
        yield from generate_together(model, tokenizer, task, problems[start : start + per_batch], sampling, chat=chat)[
            0
        ]


@torch.no_grad()
def generate_together(
    model: Any,
    tokenizer: Any,
    task: Task,
    problems: Sequence[Problem],
    sampling: Sampling,
    *,
    chat: bool | None = None,
    recorder: Recorder | None = None,
    note: Callable[[str], None] = warnings.warn,
) -> tuple[list[Rollout], list[tuple[ShardProblem, list[Tensor]]]]:
    """The rollouts of some problems, decoded as one batch, and what `recorder` kept of them for a store.

    `note` is told of problems whose answers the task could not grade.
    """
    chat = task.chat if chat is None else chat
    n = sampling.n
    prompts = [task.prompt(problem.question) for problem in problems]
    prompt_ids = [encode_prompt(tokenizer, prompt, chat=chat) for prompt in prompts]
    inputs = prefill(model, tokenizer, prompt_ids, sampling)
    observe = None if recorder is None else recorder.sampled
    sampler = SeededSampler(sampling, [problem.id for problem in problems], model.device, record=True, observe=observe)
    with recorder or nullcontext():
        answers = decode(model, tokenizer, inputs, sampler, sampling, task.stop)
    confidences = sampler.confidences([len(ids) for ids, _ in answers])
    rollouts, recorded = [], []
    for index, (problem, prompt, ids) in enumerate(zip(problems, prompts, prompt_ids, strict=True)):
        own = slice(index * n, (index + 1) * n)
        graded = grade(tokenizer, task, problem, answers[own], note)
        candidates = [
            replace(candidate, confidence=confidence)
            for candidate, confidence in zip(graded, confidences[own], strict=True)
        ]
        rollouts.append(Rollout(problem.id, problem.key, prompt, problem.answer, ids, candidates))
        if recorder is not None:
            recorded.append(
                recorder.problem(problem.id, index * n, [ids for ids, _ in answers[own]], eos_token_ids(model))
            )
    return rollouts, recorded


def grade(
    tokenizer: Any,
    task: Task,
    problem: Problem,
    answers: Sequence[SampledAnswer],
    note: Callable[[str], None] = warnings.warn,
) -> list[Response]:
    """Decodes and grades the answers to one problem.

    Where the task raises, an answer counts as wrong and as having none, and `note` is told once for the problem. One
    that takes its grader too long has none either: it would take as long again to look for it.
    """
    responses = []
    errors = []
    for token_ids, finished in answers:
        # What a grader reads is what the file will hold.
        text = whole_characters(cut_at_stop(tokenizer.decode(token_ids, skip_special_tokens=True), task.stop))
        try:
            before = timeouts(task)
            correct = task.grade(text, problem)
            answer = task.extract(text, problem) if timeouts(task) == before else None
        except WorkerError:
            raise
        except Exception as error:  # one odd answer must not cost those that were generated with it
            errors.append(error)
            correct, answer = False, None
        responses.append(Response(token_ids, text, finished, correct, answer))
    if errors:
        note(
            f"{task.name}, problem {problem.id!r}: {len(errors)} of {len(answers)} answers could not be graded and "
            f"count as wrong: {type(errors[0]).__name__}: {first_line(errors[0])}"
        )
    return responses


def prefill(model: Any, tokenizer: Any, prompts: Sequence[list[int]], sampling: Sampling) -> dict[str, Any]:
    """Inputs of `generate` for n answers to each prompt, whose cache is filled once a prompt instead of n times."""
    inputs = _left_padded(tokenizer, prompts, model)
    check_context(model, inputs["input_ids"].shape[1] + sampling.max_new_tokens)
    expanded = {name: value.repeat_interleave(sampling.n, dim=0) for name, value in inputs.items()}
    if sampling.n == 1 or min(map(len, prompts)) < 2:
        return expanded
    # `generate` needs one token to feed, so the cache stops before the last one. The token sampled here is not used.
    output = model.generate(
        input_ids=inputs["input_ids"][:, :-1],
        attention_mask=inputs["attention_mask"][:, :-1],
        max_new_tokens=1,
        return_dict_in_generate=True,
        pad_token_id=tokenizer.pad_token_id,
        **_GREEDY,
    )
    output.past_key_values.batch_repeat_interleave(sampling.n)
    return {**expanded, "past_key_values": output.past_key_values}


def decode(
    model: Any,
    tokenizer: Any,
    inputs: dict[str, Any],
    sampler: SeededSampler,
    sampling: Sampling,
    stop: Sequence[str] = (),
) -> list[SampledAnswer]:
    """`sampling.n` answers to each prompt of `prefill`, in order."""
    output = model.generate(
        **inputs,
        logits_processor=LogitsProcessorList([sampler]),
        max_new_tokens=sampling.max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        **({"stop_strings": list(stop), "tokenizer": tokenizer} if stop else {}),
        **_GREEDY,
    )
    return [trim(row, model, tokenizer, stop) for row in output[:, inputs["input_ids"].shape[1] :].tolist()]


def _left_padded(tokenizer: Any, prompts: Sequence[list[int]], model: Any) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` of prompts, padded on the left, on the model's device."""
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {index} is empty: expected at least one token")
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}


class SeededSampler(LogitsProcessor):
    """Samples by inverting the cumulative distribution at uniform numbers that were drawn beforehand.

    The numbers belong to (seed, problem, candidate, position), not to a position in a stream that all rows share: a
    candidate does not depend on which other rows are decoded beside it, on how many candidates its problem gets, or
    on the device. It leaves one finite logit a row, for `generate(do_sample=False)` to take.
    """

    def __init__(
        self,
        sampling: Sampling,
        identities: Sequence[str],
        device: torch.device,
        record: bool = False,
        observe: Callable[[Tensor, Tensor], None] | None = None,
    ) -> None:
        """`identities` name the problems; with `record`, how sure the model was of each token is kept.

        `observe` is told the logits `[rows, vocabulary]` and the sampled tokens `[rows, 1]` of each step.
        """
        self.sampling = sampling
        self._step = 0
        self._record = record
        self._observe = observe
        self._recorded: list[Tensor] = []
        self._uniform = torch.stack(
            [
                self._draw(f"{sampling.seed}/{identity}/{candidate}")
                for identity in identities
                for candidate in range(sampling.n)
            ]
        ).to(device)

    def _draw(self, name: str) -> Tensor:
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big", signed=True)
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(self.sampling.max_new_tokens, generator=generator)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if bool(scores.isnan().any()):
            raise ValueError("the model's logits are NaN: nothing can be sampled (is float16 too narrow for it?)")
        logits = scores.float() / self.sampling.temperature
        if self.sampling.top_k:
            kth = logits.topk(min(self.sampling.top_k, logits.shape[-1]), dim=-1).values[:, -1:]
            logits = logits.masked_fill(logits < kth, -torch.inf)
        probabilities, tokens = self._largest(logits.softmax(dim=-1))
        cumulative = probabilities.cumsum(dim=-1)
        # The nucleus is the shortest prefix that reaches top_p: tokens before which less than top_p was gathered.
        kept = (cumulative - probabilities < self.sampling.top_p).sum(dim=-1, keepdim=True)
        mass = cumulative.gather(1, kept - 1)
        place = torch.searchsorted(cumulative, self._uniform[:, self._step, None] * mass, right=True)
        chosen = tokens.gather(1, place.clamp_max(kept - 1))
        self._step += 1
        if self._record:
            self._recorded.append(_confidence(scores, chosen))
        if self._observe is not None:
            self._observe(scores, chosen)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)

    def confidences(self, lengths: Sequence[int]) -> list[Confidence]:
        """Of the first tokens of each row, as many as `lengths` says."""
        every = torch.stack(self._recorded, dim=1).double().tolist() if self._recorded else [[]] * len(lengths)
        digits = [[[float(f"{value:.5g}") for value in token] for token in row] for row in every]
        return [
            Confidence(*([token[kind] for token in row[:length]] for kind in range(3)))
            for row, length in zip(digits, lengths, strict=True)
        ]

    def _largest(self, probabilities: Tensor) -> tuple[Tensor, Tensor]:
        """The largest probabilities in descending order, enough of them to hold the nucleus, and their tokens."""
        vocabulary = probabilities.shape[-1]
        width = 256 if self.sampling.top_p < 1 else vocabulary
        while True:
            largest = probabilities.topk(min(width, vocabulary), dim=-1)
            # Sorting a whole vocabulary takes as long as a small model's forward, and is rarely needed.
            if width >= vocabulary or bool((largest.values.sum(dim=-1) >= self.sampling.top_p).all()):
                return largest.values, largest.indices
            width *= 8


def _confidence(logits: Tensor, chosen: Tensor) -> Tensor:
    """`[rows, 3]` log-probability of the chosen tokens, entropy, and divergence of the uniform distribution."""
    logprobs = logits.float().log_softmax(dim=-1)
    # A token that a model rules out (-inf) takes no part: the divergence would be infinite everywhere.
    possible = logprobs.isfinite()
    finite = logprobs.where(possible, 0.0)
    count = possible.sum(dim=-1)
    entropy = -(logprobs.exp() * finite).sum(dim=-1)
    self_certainty = -finite.sum(dim=-1) / count - count.log()
    return torch.stack([logprobs.gather(1, chosen)[:, 0], entropy, self_certainty], dim=1)


def trim(row: list[int], model: Any, tokenizer: Any, stop: Sequence[str]) -> SampledAnswer:
    """The sampled tokens of one row of `generate`'s output, without padding, and whether the answer finished.

    The padding may be the end-of-sequence token itself: after a stop string it is padding, otherwise it was sampled.
    """
    ends = eos_token_ids(model)
    length = next((i for i, token in enumerate(row) if token in ends or token == tokenizer.pad_token_id), len(row))
    stopped = any(string in tokenizer.decode(row[:length]) for string in stop)
    if stopped or length == len(row):
        return row[:length], stopped
    return (row[: length + 1] if row[length] in ends else row[:length]), True


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """`text` up to the first stop string."""
    return text[: min((text.index(string) for string in stop if string in text), default=len(text))]
