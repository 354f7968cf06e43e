"""`swift-kernels demo`: what a head sees, what it wins and what it costs, on sums it was not trained on."""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text
from torch import Tensor

from swift_kernels import schema
from swift_kernels.cli import render
from swift_kernels.evaluation.evaluate import Evaluation, evaluate
from swift_kernels.evaluation.tasks import Problem, Sums
from swift_kernels.integrations.transformers import attach
from swift_kernels.selection.pick import best_index, majority_vote
from swift_kernels.training.generation import Sampling, SeededSampler, decode, grade, prefill
from swift_kernels.training.rollouts import Rollout, encode_prompt

BATCH_ROWS = 64
TIMED_PAIRS = 6
"""Batches that are decoded a second time without scoring, to compare the speed."""


@dataclass(frozen=True)
class Shown:
    """The problem that is looked at closely: its answers, and gate and reward of every scored token."""

    rollout: Rollout
    scores: list[float]
    traces: list[Tensor]
    tokens: list[list[str]]


@dataclass(frozen=True)
class DemoResult:
    shown: Shown
    evaluation: Evaluation
    scored_rates: list[float]
    plain_rates: list[float]
    tokens: int
    rows: int
    state_bytes: int
    scratch_bytes: int
    hidden_bytes: int
    model_name: str
    parameters: int
    where: str
    seconds: float

    @property
    def relative_speed(self) -> float:
        """Median over the batches of the speed with scoring relative to that without, each pair run back to back."""
        return statistics.median(a / b for a, b in zip(self.scored_rates, self.plain_rates, strict=True))

    def facts(self) -> dict[str, Any]:
        rollout = self.shown.rollout
        return {
            "model": self.model_name,
            "where": self.where,
            "head_parameters": self.parameters,
            "evaluation": self.evaluation.to_dict(),
            "tokens_per_second": {
                "with_scoring": statistics.median(self.scored_rates),
                "without": statistics.median(self.plain_rates),
                "relative": self.relative_speed,
                "pairs": len(self.plain_rates),
            },
            "bytes_held_by_scoring": {
                "sequences": self.state_bytes,
                "scratch": self.scratch_bytes,
                "hidden_states_if_kept": self.hidden_bytes,
            },
            "tokens": self.tokens,
            "seconds": self.seconds,
            "problem": {
                "prompt": rollout.prompt,
                "answer": rollout.answer,
                "candidates": [
                    {
                        **asdict(candidate),
                        "score": render.number(score),
                        "tokens": tokens,
                        "gate_reward": trace.tolist(),
                    }
                    for candidate, score, tokens, trace in zip(
                        rollout.candidates, self.shown.scores, self.shown.tokens, self.shown.traces, strict=True
                    )
                ],
            },
        }


def run(model: Any, tokenizer: Any, head: Any, problems: int, n: int, seed: int) -> DemoResult:
    """Answers `problems` test sums `n` times each with scoring, and some of them again without."""
    started = time.perf_counter()
    bench = _Bench(model, tokenizer, head, Sampling(n=n, max_new_tokens=Sums.max_new_tokens, seed=seed))
    chosen = bench.task.problems("test", problems, seed)
    size = max(1, BATCH_ROWS // n)
    batches = [chosen[start : start + size] for start in range(0, len(chosen), size)]
    bench.run(chosen[:1], scoring=True)  # builds or compiles the kernel
    runs: list[_Run] = []
    plain: list[_Run] = []
    with render.progress("answering and scoring", len(chosen)) as update:
        for number, batch in enumerate(batches):
            # The same tokens twice, and each way first in half of the pairs: what differs is the scoring.
            order = (False, True) if number % 2 else (True, False)
            for scoring in order if number < TIMED_PAIRS else (True,):
                (runs if scoring else plain).append(bench.run(batch, scoring=scoring))
            update(sum(map(len, batches[: number + 1])))
    rollouts = [rollout for item in runs for rollout in item.rollouts]
    # An answer belongs to (seed, problem, number), so the problem shown is answered as it was above.
    shown = bench.run([chosen[_instructive(rollouts)]], scoring=True, trace=True)
    largest = max(runs, key=lambda item: item.state_bytes)
    longest = max(len(candidate.token_ids or ()) for rollout in rollouts for candidate in rollout.candidates)
    rows = len(batches[0]) * n
    device = next(model.parameters()).device
    place = f"{torch.get_num_threads()} CPU threads" if device.type == "cpu" else torch.cuda.get_device_name(device)
    return DemoResult(
        shown=Shown(
            shown.rollouts[0],
            shown.scores[0],
            shown.traces,
            [[tokenizer.decode([token]) for token in c.token_ids or ()] for c in shown.rollouts[0].candidates],
        ),
        evaluation=evaluate(rollouts, [row for item in runs for row in item.scores]),
        scored_rates=[item.tokens / item.seconds for item in runs[: len(plain)]],
        plain_rates=[item.tokens / item.seconds for item in plain],
        tokens=sum(item.tokens for item in runs),
        rows=rows,
        state_bytes=largest.state_bytes,
        scratch_bytes=largest.scratch_bytes,
        hidden_bytes=rows * longest * head.config.num_features * next(model.parameters()).element_size(),
        model_name=(head.config.base_model or {}).get("name", type(model).__name__),
        parameters=head.config.num_outputs * (head.config.num_features + 1),
        where=f"{place}, {schema.implementation(device.type)} kernel",
        seconds=time.perf_counter() - started,
    )


@dataclass(frozen=True)
class _Run:
    rollouts: list[Rollout]
    tokens: int
    seconds: float
    scores: list[list[float]]
    traces: list[Tensor]
    state_bytes: int
    scratch_bytes: int


class _Bench:
    """Answers problems with `model.generate`, scored or not; the seconds are those of decoding, after prefill."""

    def __init__(self, model: Any, tokenizer: Any, head: Any, sampling: Sampling) -> None:
        self.model, self.tokenizer, self.head, self.sampling = model, tokenizer, head, sampling
        self.task = Sums()

    def run(self, problems: list[Problem], *, scoring: bool, trace: bool = False) -> _Run:
        prompts = [self.task.prompt(problem.question) for problem in problems]
        prompt_ids = [encode_prompt(self.tokenizer, prompt, chat=False) for prompt in prompts]
        identities = [problem.id for problem in problems]
        n = self.sampling.n
        inputs = prefill(self.model, self.tokenizer, prompt_ids, self.sampling)
        sampler = SeededSampler(self.sampling, identities, self.model.device)
        scorer = attach(self.model, self.head, trace=trace) if scoring else None
        with scorer or nullcontext():
            start = time.perf_counter()
            answers = decode(self.model, self.tokenizer, inputs, sampler, self.sampling, self.task.stop)
            scores = [] if scorer is None else scorer.scores().view(-1, n).tolist()
            seconds = time.perf_counter() - start
        rollouts = []
        for index, (problem, prompt, ids) in enumerate(zip(problems, prompts, prompt_ids, strict=True)):
            own = answers[index * n : (index + 1) * n]
            graded = grade(self.tokenizer, self.task, problem, own)
            rollouts.append(Rollout(problem.id, problem.key, prompt, problem.answer, ids, graded))
        return _Run(
            rollouts=rollouts,
            tokens=sum(len(token_ids) for token_ids, _ in answers),
            seconds=seconds,
            scores=scores,
            traces=scorer.trace() if scorer is not None and trace else [],
            state_bytes=0 if scorer is None else scorer.nbytes,
            scratch_bytes=0 if scorer is None else scorer.scratch_nbytes,
        )


def _instructive(rollouts: list[Rollout]) -> int:
    """The first problem with right and wrong answers, whatever SWIFT picks there; otherwise the first of all."""
    mixed = (
        index
        for index, rollout in enumerate(rollouts)
        if 0 < sum(c.correct for c in rollout.candidates) < len(rollout.candidates)
    )
    return next(mixed, 0)


def parts(result: DemoResult) -> list[RenderableType]:
    """The demo's screen, top to bottom."""
    rollout = result.shown.rollout
    question = rollout.prompt.rpartition("Question: ")[2].partition("\n")[0]
    relative = result.relative_speed
    n = result.evaluation.n
    return [
        Text.assemble(
            (f"{result.model_name} answers: {question}", "bold"),
            f"  (right: {rollout.answer}; {len(rollout.candidates)} answers sampled)",
        ),
        _candidate_table(result.shown),
        _legend(),
        Text(),
        Text("The answer that SWIFT picked, token by token", "bold"),
        _trace_table(result.shown),
        Text(),
        Text(f"{result.evaluation.problems} sums the head was not trained on, one of {n} answers picked", "bold"),
        render.evaluation_table(result.evaluation),
        Text(render.evaluation_lines(result.evaluation)),
        Text(),
        Text.assemble(
            ("Speed   ", "bold"),
            f"{statistics.median(result.scored_rates):.0f} tokens/s with scoring, "
            f"{statistics.median(result.plain_rates):.0f} without: x{relative:.3f} "
            f"(median ratio of {len(result.plain_rates)} pairs)\n        {result.where}",
        ),
        Text.assemble(
            ("Memory  ", "bold"),
            f"{result.state_bytes:,} bytes for {result.rows} answers at once, 12 each at any length, and "
            f"{result.scratch_bytes:,} of scratch\n        (keeping the hidden states: "
            f"{result.hidden_bytes / 1e6:,.0f} MB, growing with every token)",
        ),
        Text.assemble(
            ("Head    ", "bold"),
            f"{result.parameters:,} parameters; {result.tokens:,} tokens scored; all this took {result.seconds:.0f} s",
        ),
    ]


def _candidate_table(shown: Shown) -> Table:
    """Equal answers share a line; the best score is on top."""
    texts = [candidate.text for candidate in shown.rollout.candidates]
    picked = texts[best_index(shown.scores)]
    answers = [candidate.answer for candidate in shown.rollout.candidates]
    voted = answers[majority_vote(answers)] if any(answer is not None for answer in answers) else None
    counts = Counter(texts)
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name, justify in (
        ("score", "right"),
        ("times", "right"),
        ("", "left"),
        ("answer", "left"),
        ("picked by", "left"),
    ):
        table.add_column(name, justify=justify, no_wrap=name != "answer")  # type: ignore[arg-type]
    first = {text: index for index, text in reversed(list(enumerate(texts)))}
    scale = max((float(trace[:, 1].abs().max()) for trace in shown.traces if len(trace)), default=1.0)
    for text, index in sorted(first.items(), key=lambda item: _descending(shown.scores[item[1]])):
        candidate = shown.rollout.candidates[index]
        by = [name for name, holds in (("SWIFT", text == picked), ("vote", candidate.answer == voted)) if holds]
        table.add_row(
            f"{shown.scores[index]:+.3f}",
            str(counts[text]),
            Text("right", "green") if candidate.correct else Text("wrong", "red"),
            _coloured(shown.tokens[index], shown.traces[index], scale),
            ", ".join(by),
        )
    return table


def _coloured(tokens: list[str], trace: Tensor, scale: float) -> Text:
    """Each scored token on a background from red (low reward) to green (high); dim where the gate is small."""
    text = Text()
    for position, token in enumerate(tokens):
        shown = token.replace("\n", "\\n")
        if position >= len(trace):
            text.append(shown, "dim italic")
            continue
        gate, reward = trace[position].tolist()
        text.append(shown, f"{'bold white' if gate >= 0.5 else 'grey70'} on {_colour(reward / scale)}")
    return text


def _colour(value: float) -> str:
    """From red (-1) over grey (0) to green (1)."""
    strength = min(abs(value), 1.0)
    grey, full = 60, 150
    level = round(grey + (full - grey) * strength)
    other = round(grey * (1 - strength))
    return f"rgb({other},{level},{other})" if value >= 0 else f"rgb({level},{other},{other})"


def _legend() -> Text:
    text = Text("background: reward, low ")
    for value in (-1.0, -0.5, 0.0, 0.5, 1.0):
        text.append("   ", f"on {_colour(value)}")
    return text.append(" high; bold: gate >= 0.5; italic: not fed, not scored")


def _trace_table(shown: Shown) -> Table:
    """Gate and reward in figures, for terminals without colour."""
    index = best_index(shown.scores)
    trace = shown.traces[index]
    table = Table(box=None, padding=(0, 1, 0, 0), show_header=False)
    for name, values in (
        ("token", [repr(token)[1:-1].replace(" ", "_") for token in shown.tokens[index][: len(trace)]]),
        ("gate", [f"{gate:.2f}" for gate in trace[:, 0].tolist()]),
        ("reward", [f"{reward:+.1f}" for reward in trace[:, 1].tolist()]),
    ):
        table.add_row(name, *values)
    return table


def _descending(score: float) -> float:
    return math.inf if math.isnan(score) else -score
