"""What a head looks at, as one page and as figures for machines: weights, probe, and answers token by token."""

from __future__ import annotations

import math
import statistics
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from swift_kernels.evaluation import charts, colours, metrics, page
from swift_kernels.evaluation.metrics import Estimate
from swift_kernels.evaluation.probe import Probe
from swift_kernels.evaluation.traces import Trace
from swift_kernels.evaluation.weights import EntryWeight
from swift_kernels.training.rollouts import Response, Rollout

TICKS = 5
CLIPPED = 0.98
"""Colours end at this quantile of the distances from the middle: one extreme token would leave the rest pale."""


@dataclass(frozen=True)
class Answer:
    """An answer of a problem that is shown.

    Attributes:
        rank: 1 for the best score; NaN scores come last.
        positions: of the scored tokens among all.
        texts: what each token adds to the answer.
        special: which tokens the tokenizer calls special.
    """

    response: Response
    trace: Trace
    rank: int
    positions: list[int]
    texts: list[str]
    special: list[bool]


@dataclass(frozen=True)
class Shown:
    """A problem and all its answers, in the order of the rollouts."""

    rollout: Rollout
    answers: list[Answer]


@dataclass(frozen=True)
class Inspection:
    """All that the page says.

    Attributes:
        facts: name and value, for the list at the top.
        weights: the shares of the entries; `scaled`, by the deviation of the features.
        head_auc: within-problem AUC of the head on the answers that were probed, where it could be computed.
        notes: what is left out of the page, and why.
        source: where gates and rewards come from.
    """

    facts: dict[str, str]
    weights: list[EntryWeight]
    scaled: bool
    gate: bool
    probe: Probe | None = None
    head_auc: Estimate | None = None
    shown: list[Shown] = field(default_factory=list)
    source: str = ""
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Every figure, for JSON, which has no NaN."""
        return metrics.without_nan(
            {
                "facts": self.facts,
                "weights": {"scaled_by_deviation": self.scaled, "entries": [asdict(own) for own in self.weights]},
                "probe": None if self.probe is None else {**asdict(self.probe), "best": self.probe.best.entry},
                "head_within_auc": None if self.head_auc is None else asdict(self.head_auc),
                "source": self.source,
                "problems": [_problem_facts(own) for own in self.shown],
                "notes": self.notes,
            }
        )


def make_answers(
    rollout: Rollout, traces: Sequence[Trace], positions: list[list[int]], texts: list[list[str]], special: set[int]
) -> list[Answer]:
    """The answers to a problem with their ranks; the lists have one entry an answer."""
    order = sorted(range(len(traces)), key=lambda index: _descending(traces[index].score))
    ranks = {index: rank for rank, index in enumerate(order, start=1)}
    return [
        Answer(candidate, trace, ranks[index], positions[index], texts[index], [i in special for i in ids])
        for index, (candidate, trace) in enumerate(zip(rollout.candidates, traces, strict=True))
        for ids in [candidate.token_ids or []]
    ]


def choose_problems(rollouts: Sequence[Rollout], count: int) -> list[Rollout]:
    """The first with right and wrong answers, whatever the head makes of them; then the first of the others."""
    mixed = [item for item in rollouts if len({candidate.correct for candidate in item.candidates}) == 2]
    rest = [item for item in rollouts if item not in mixed]
    return [*mixed, *rest][:count]


def choose_answers(answers: Sequence[Answer]) -> list[Answer]:
    """The best and the worst scored of the right and of the wrong answers, best first; equal answers once."""
    chosen: dict[int, Answer] = {}
    for kind in (True, False):
        own = sorted((answer for answer in answers if answer.response.correct == kind), key=lambda answer: answer.rank)
        seen: set[tuple[int, ...]] = set()
        for answer in (own[:1], own[::-1]):
            for candidate in answer:
                ids = tuple(candidate.response.token_ids or ())
                # A worst answer that equals the best tells nothing new.
                if ids not in seen and not math.isnan(candidate.trace.score):
                    seen.add(ids)
                    chosen[candidate.rank] = candidate
                    break
    return [chosen[rank] for rank in sorted(chosen)]


def render(inspection: Inspection) -> str:
    """The page.

    Raises:
        ImportError: jinja2 or matplotlib is not installed; the message names the extra.
    """
    probe = inspection.probe
    return page.render(
        "inspect.html",
        title="What a head looks at",
        inspection=inspection,
        weights_chart=page.inline_svg(charts.weights(inspection.weights), "Share of the weight of each layer"),
        probe_chart=None
        if probe is None
        else page.inline_svg(charts.probe(probe, inspection.head_auc), "Accuracy and AUC of a probe of each layer"),
        problems=[_problem_view(own, inspection.gate) for own in inspection.shown],
        ink=colours.INK,
        clipped=round(100 * CLIPPED),
        confidence=round(100 * metrics.CONFIDENCE),
        heaviest=max(inspection.weights, key=lambda own: own.reward),
    )


def _problem_view(shown: Shown, gate: bool) -> dict[str, Any]:
    """What the template says of a problem: a scale for each view, the answers, and the picture of all of them."""
    scored = [answer for answer in shown.answers if not math.isnan(answer.trace.score)]
    centre = statistics.fmean(answer.trace.score for answer in scored) if scored else 0.0
    chosen = choose_answers(shown.answers)
    rewards = np.concatenate([answer.trace.gate_reward[:, 1].double().numpy() for answer in chosen] or [np.zeros(0)])
    pulls = np.concatenate([answer.trace.pull(centre).numpy() for answer in chosen] or [np.zeros(0)])
    reach = {"reward": _reach(rewards - centre), "pull": _reach(pulls)}
    scales = {
        "reward": _scale(colours.DIVERGING, centre - reach["reward"], centre + reach["reward"]),
        "pull": _scale(colours.DIVERGING, -reach["pull"], reach["pull"]),
    }
    if gate:
        scales["gate"] = _scale(colours.SEQUENTIAL, 0.0, 1.0)
    names = dict(zip((answer.rank for answer in chosen), "ABCD", strict=False))
    return {
        "rollout": shown.rollout,
        "centre": centre,
        "count": len(shown.answers),
        "right": sum(answer.response.correct for answer in shown.answers),
        "scales": scales,
        "answers": [
            {"name": names[answer.rank], "answer": answer, "tokens": _token_views(answer, centre, reach, gate)}
            for answer in chosen
        ],
        "curves": page.inline_svg(charts.running(scored, names), "Score after each token, an answer a line")
        if scored
        else None,
    }


def _token_views(answer: Answer, centre: float, reach: dict[str, float], gate: bool) -> list[dict[str, Any]]:
    """Each token: its text in segments, its colours, and what is read on hovering over it."""
    trace = answer.trace
    place = {position: index for index, position in enumerate(answer.positions)}
    running, pull = trace.running().tolist(), trace.pull(centre).tolist()
    pairs = trace.gate_reward.tolist()
    views = []
    for position, (text, token) in enumerate(zip(answer.texts, answer.response.token_ids or [], strict=True)):
        name = f"token {position + 1}, id {token}: {text!r}"
        view: dict[str, Any] = {"segments": segments(text), "special": answer.special[position], "scored": False}
        index = place.get(position)
        if index is None:
            view["title"] = f"{name}\nnot scored: it was not fed to the model, or ends the answer"
        else:
            own_gate, reward = pairs[index]
            lines = [name, *([f"gate {own_gate:.4f}"] if gate else [])]
            lines += [f"reward {reward:+.4f}", f"pull {pull[index]:+.4f}", f"score so far {running[index]:+.4f}"]
            view |= {
                "scored": True,
                "title": "\n".join(lines),
                "reward": _diverging(reward - centre, reach["reward"]),
                "pull": _diverging(pull[index], reach["pull"]),
                "gate": colours.mix(colours.SEQUENTIAL, own_gate),
            }
        views.append(view)
    return views


def segments(text: str) -> list[tuple[str, str, str]]:
    """A token's text cut into (kind, text, mark): what a browser would not show gets a visible mark before it.

    Kinds are "text", "newline", "tab", "space" (a token of spaces alone), "return", "hidden" (characters without a
    shape) and "part" (of a character that a later token completes). Marks are no part of the page's text: what is
    copied from it is the answer. Control characters that HTML cannot hold are shown as their mark alone.
    """
    if not text:
        return [("part", "", "·")]
    if not text.strip(" "):
        return [("space", text, "␣" * len(text))]
    found: list[tuple[str, str, str]] = []
    for character in text:
        if character == "\n":
            kind = ("newline", character, "↵")
        elif character == "\t":
            kind = ("tab", character, "⇥")
        elif character == "\r":
            kind = ("return", "", "␍")
        elif unicodedata.category(character) == "Cc":
            kind = ("hidden", "", f"U+{ord(character):04X}")
        elif (
            unicodedata.category(character) in ("Zl", "Zp", "Co", "Cn") or character in "\u200b\u200e\u200f\ufeff\u00ad"
        ):
            kind = ("hidden", character, f"U+{ord(character):04X}")
        elif found and found[-1][0] == "text":
            kind = ("text", found.pop()[1] + character, "")
        else:
            kind = ("text", character, "")
        found.append(kind)
    return found


def _reach(distances: np.ndarray) -> float:
    """The distance from the middle at which colours end."""
    return float(np.quantile(np.abs(distances), CLIPPED)) or 1.0 if len(distances) else 1.0


def _diverging(distance: float, reach: float) -> str:
    return colours.mix(colours.DIVERGING, 0.5 + distance / (2 * reach))


def _scale(stops: Sequence[str], low: float, high: float) -> dict[str, Any]:
    """A legend: its colours, and numbers at even distances."""
    ticks = [low + (high - low) * index / (TICKS - 1) for index in range(TICKS)]
    digits = max(0, 2 - math.floor(math.log10(high - low))) if high > low else 2
    # Without the sign that rounding leaves on a zero.
    return {"stops": stops, "ticks": [f"{round(tick, digits) + 0.0:.{digits}f}" for tick in ticks]}


def _descending(score: float) -> float:
    return math.inf if math.isnan(score) else -score


def _problem_facts(shown: Shown) -> dict[str, Any]:
    rollout = shown.rollout
    return {
        "id": rollout.id,
        "prompt": rollout.prompt,
        "answer": rollout.answer,
        "answers": [
            {
                "score": answer.trace.score,
                "rank": answer.rank,
                "correct": answer.response.correct,
                "finished": answer.response.finished,
                "answer": answer.response.answer,
                "text": answer.response.text,
                "tokens": answer.texts,
                "token_ids": answer.response.token_ids,
                "scored": answer.positions,
                "gate_reward": answer.trace.gate_reward.tolist(),
                "running": answer.trace.running().tolist(),
            }
            for answer in shown.answers
        ],
    }
