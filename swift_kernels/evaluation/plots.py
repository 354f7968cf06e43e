"""Pictures of an evaluation."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from swift_kernels.evaluation.calibration import Abstention, Calibration, Reliability
from swift_kernels.evaluation.compare import SELECTOR_NAMES
from swift_kernels.evaluation.evaluate import Evaluation
from swift_kernels.evaluation.metrics import Estimate
from swift_kernels.evaluation.page import OTHERS, OURS, inline_svg
from swift_kernels.evaluation.study import OverOptimization, TaskStudy, Transfer
from swift_kernels.evaluation.wording import percent

INK = "#1c2430"
_OWN = {"swift": OURS, "oracle": INK, "swift_vote": "#4f9bd9"}
COLOURS = _OWN | dict(zip([name for name in SELECTOR_NAMES if name not in _OWN], OTHERS, strict=True))
"""Of each selector, the same in all pictures."""


@dataclass(frozen=True)
class Picture:
    """An SVG element, a name for its file, and what it shows; the figure that it is made of is closed."""

    name: str
    caption: str
    svg: str

    @classmethod
    def of(cls, name: str, caption: str, figure: Any) -> Picture:
        return cls(name, caption, inline_svg(figure))


def task_pictures(task: TaskStudy, name: str, pyplot: Any) -> Iterator[Picture]:
    """Those of one task; what its data do not allow is left out."""
    evaluation = task.evaluation
    if len(evaluation.accuracy) > 1:
        yield Picture.of(
            f"{name}-accuracy",
            "Accuracy of the pick against the number of answers it is picked from; bands are 95% intervals over "
            "problems. Where SWIFT's line falls, more answers mislead it: over-optimisation.",
            accuracy(evaluation, pyplot),
        )
    yield Picture.of(
        f"{name}-selectors",
        "Left, accuracy at the largest N; right, how far SWIFT is ahead, paired by problem. Lines are 95% intervals.",
        selectors(evaluation, pyplot),
    )
    if task.over_optimization is not None and len(evaluation.accuracy) > 1:
        yield Picture.of(
            f"{name}-belief",
            "What the head believes of its picks, mean P(correct), and what is so. Where belief grows and accuracy "
            "does not, more answers only find what the head overrates.",
            belief(task.over_optimization, evaluation, pyplot),
        )
    if task.calibration is not None:
        yield Picture.of(
            f"{name}-reliability",
            "Share that is right against P(correct), on problems that did not fit the temperature. Marks grow with the "
            "number of answers; on the diagonal, chances mean what they say.",
            reliability(task.calibration, pyplot),
        )
        yield Picture.of(
            f"{name}-abstention",
            "Accuracy among the problems that are answered when the least sure are left out; bands are 95% intervals.",
            abstention(task.calibration, pyplot),
        )


def accuracy(evaluation: Evaluation, pyplot: Any) -> Any:
    """Of every selector against N."""
    figure, axis = pyplot.subplots(figsize=(8.6, 4.6))
    rows = evaluation.accuracy
    ns = sorted(rows)
    for key, title in SELECTOR_NAMES.items():
        if key not in rows[ns[-1]]:
            continue
        _line(
            axis,
            ns,
            [rows[n][key] for n in ns],
            COLOURS[key],
            title,
            width=2.6 if key == "swift" else 1.3,
            band=key in ("swift", "oracle"),
            style="--" if key == "oracle" else "-",
        )
    _powers(axis, ns)
    axis.set(xlabel="answers to pick from, N", ylabel="right (%)")
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def selectors(evaluation: Evaluation, pyplot: Any) -> Any:
    """Accuracy and paired differences at the largest N."""
    last = evaluation.accuracy[evaluation.n]
    names = [key for key in reversed(SELECTOR_NAMES) if key in last]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10.5, 1.1 + 0.34 * len(names)), sharey=True)
    for place, key in enumerate(names):
        _interval(left, place, last[key], COLOURS[key])
        gap = evaluation.differences.get(f"swift - {key}")
        if gap is not None:
            _interval(right, place, gap, COLOURS[key])
    left.set_yticks(range(len(names)), [SELECTOR_NAMES[key] for key in names])
    left.set(xlabel="right (%)")
    right.set(xlabel="SWIFT is ahead by (points)")
    right.axvline(0, color=INK, lw=1)
    return figure


def belief(found: OverOptimization, evaluation: Evaluation, pyplot: Any) -> Any:
    """Mean P(correct) of the picks and their accuracy, against N."""
    figure, axis = pyplot.subplots(figsize=(6.4, 4.0))
    ns = sorted(found.belief)
    _line(axis, ns, [found.belief[n] for n in ns], OTHERS[1], "believed: mean P(correct)", style="--", band=True)
    _line(axis, ns, [evaluation.accuracy[n]["swift"] for n in ns], OURS, "so: accuracy", width=2.6, band=True)
    _powers(axis, ns)
    axis.set(xlabel="answers to pick from, N", ylabel="%")
    axis.legend(frameon=False)
    return figure


def reliability(calibration: Calibration, pyplot: Any) -> Any:
    """Before, after, and of the picks."""
    figure, axes = pyplot.subplots(1, 3, figsize=(10.5, 3.9), sharey=True)
    shown = (
        ("before", "sigmoid(score)", OTHERS[0]),
        ("after", "P(correct), all answers", OURS),
        ("picks", "P(correct), picks", OTHERS[2]),
    )
    for axis, (key, title, colour) in zip(axes, shown, strict=True):
        found: Reliability = getattr(calibration, key)
        axis.plot([0, 1], [0, 1], color=INK, lw=1, ls=":")
        bins = found.bins
        most = max((each.count for each in bins), default=1)
        axis.plot([each.confidence for each in bins], [each.accuracy for each in bins], color=colour, lw=1, alpha=0.35)
        axis.scatter(
            [each.confidence for each in bins],
            [each.accuracy for each in bins],
            s=[12 + 110 * each.count / most for each in bins],
            color=colour,
            alpha=0.8,
            zorder=3,
        )
        axis.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xlabel=title)
        axis.set_title(f"ECE {found.ece:.3f}, {sum(each.count for each in bins):,} answers", loc="left", fontsize=9)
    axes[0].set(ylabel="share that is right")
    return figure


def abstention(calibration: Calibration, pyplot: Any) -> Any:
    """Accuracy against coverage, sure by P(correct) and by share of the vote."""
    figure, axis = pyplot.subplots(figsize=(6.4, 4.0))
    for key, title, colour in (
        ("abstention", "SWIFT's pick, sure by its score", OURS),
        ("vote_abstention", "majority vote, sure by its share", COLOURS["vote"]),
    ):
        found: Abstention | None = getattr(calibration, key)
        if found is not None:
            _line(axis, [100 * share for share in found.coverage], found.accuracy, colour, title, band=True)
    axis.set(xlabel="problems answered (%)", ylabel="right among them (%)")
    axis.invert_xaxis()
    axis.legend(frameon=False)
    return figure


def transfer(found: Transfer, pyplot: Any) -> Any:
    """Each head on each task."""
    import numpy as np

    heads, tasks = found.heads, found.tasks
    values = np.array([[100 * cell.mean for cell in row] for row in found.accuracy])
    # Colours compare heads on one task, 30 points from light to dark: tasks differ in how hard they are.
    shade = 1 - (values.max(axis=0) - values) / 30
    figure, axis = pyplot.subplots(figsize=(2.6 + 2.4 * len(tasks), 1.6 + 0.7 * len(heads)))
    axis.imshow(shade, cmap="Blues", vmin=-0.2, vmax=1.9, aspect="auto")
    for row in range(len(heads)):
        for column in range(len(tasks)):
            cell, own = found.accuracy[row][column], found.difference[row][column] is None
            text = percent(cell).replace(" ", "\n")
            axis.text(column, row, text, ha="center", va="center", weight="bold" if own else None, fontsize=8.5)
    axis.set_xticks(range(len(tasks)), [f"{_wrapped(task)}\nN={n}" for task, n in zip(tasks, found.n, strict=True)])
    axis.set_yticks(range(len(heads)), [_wrapped(head) for head in heads])
    axis.grid(False)
    axis.set(ylabel="head")
    return figure


def training_problems(ablation: Mapping[str, Any], pyplot: Any) -> Any:
    """Best-of-N accuracy and AUC against the number of training problems, of `swift-kernels ablate`; None without."""
    results = [result for result in ablation["results"] if result["variant"]["axis"] in (None, "problems")]
    rows = sorted(
        ((result["variant"]["problems"] or ablation["train_problems"], result) for result in results),
        key=lambda row: row[0],
    )
    if len(rows) < 2:
        return None
    counts = [count for count, _ in rows]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10.5, 3.8))
    last = max(rows[0][1]["accuracy"], key=int)
    _line(
        left, counts, [Estimate(**result["accuracy"][last]) for _, result in rows], OURS, "SWIFT", width=2.2, band=True
    )
    vote = ablation["baselines"].get("vote", {}).get(last)
    if vote:
        left.axhline(100 * vote["mean"], color=COLOURS["vote"], ls="--", label="majority vote")
    _line(
        right, counts, [Estimate(**result["auc"]) for _, result in rows], OURS, "SWIFT", width=2.2, band=True, scale=1
    )
    for axis, label in ((left, f"right at N={last} (%)"), (right, "within-problem AUC")):
        axis.set(xlabel="training problems", ylabel=label)
        _powers(axis, counts)
    left.legend(frameon=False)
    return figure


def _line(
    axis: Any,
    places: Sequence[float],
    estimates: Sequence[Estimate],
    colour: str,
    label: str,
    *,
    width: float = 1.8,
    style: str = "-",
    band: bool = False,
    scale: float = 100,
) -> None:
    known = [(x, each) for x, each in zip(places, estimates, strict=True) if not math.isnan(each.mean)]
    xs = [x for x, _ in known]
    means, lows, highs = ([scale * getattr(each, key) for _, each in known] for key in ("mean", "low", "high"))
    axis.plot(xs, means, style, color=colour, lw=width, marker="o", ms=3.5, label=label)
    if band:
        axis.fill_between(xs, lows, highs, color=colour, alpha=0.13, lw=0)


def _interval(axis: Any, place: float, estimate: Estimate, colour: str) -> None:
    if not math.isnan(estimate.mean):
        axis.plot([100 * estimate.low, 100 * estimate.high], [place, place], color=colour, lw=2)
        axis.plot(100 * estimate.mean, place, "o", color=colour, ms=6)


def _powers(axis: Any, ns: Sequence[int]) -> None:
    axis.set_xscale("log", base=2)
    # Labels of neighbours that are nearly equal would cover each other.
    shown = [n for n, following in zip(ns, [*ns[1:], None], strict=True) if following is None or following > 1.4 * n]
    axis.set_xticks(shown, [f"{n:,}" for n in shown])
    axis.minorticks_off()


def _wrapped(text: str) -> str:
    return text.replace(":", ":\n").replace(",", ",\n")
