"""Pictures of what a head looks at, as matplotlib figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from swift_kernels.evaluation.metrics import Estimate
from swift_kernels.evaluation.page import OURS, drawing
from swift_kernels.evaluation.probe import Probe
from swift_kernels.evaluation.weights import EntryWeight

if TYPE_CHECKING:
    from swift_kernels.evaluation.inspection import Answer

RIGHT, WRONG = "#0b5fa5", "#c8650a"
"""Of right and wrong answers: blue and orange, which differ in lightness too; wrong ones are dashed as well."""
GREY = "#5c6672"
WIDTH = 9.6
SHOWN_NAMES = 34
"""Names of entries that fit below a picture; of more, every second or third."""


def weights(shares: Sequence[EntryWeight]) -> Any:
    """The share of gate and reward weight on each entry, as bars side by side."""
    with drawing() as pyplot:
        figure, axes = pyplot.subplots(figsize=(WIDTH, 2.6))
        rows = [("reward", OURS, [own.reward for own in shares])]
        if shares[0].gate is not None:
            rows.append(("gate", "#5fb3a1", [own.gate or 0.0 for own in shares]))
        bar = 0.8 / len(rows)
        for index, (name, colour, values) in enumerate(rows):
            places = [place + (index - (len(rows) - 1) / 2) * bar for place in range(len(shares))]
            axes.bar(places, [100 * value for value in values], bar, color=colour, label=name)
        axes.set_ylabel("% of the squared norm")
        axes.legend(frameon=False, ncols=2)
        axes.grid(axis="x", visible=False)
        _name_entries(axes, [own.entry for own in shares])
        return figure


def probe(found: Probe, head_auc: Estimate | None) -> Any:
    """Accuracy above, AUC below, of each entry, with bands for the intervals; the head's own AUC as a line."""
    entries = [own.entry for own in found.entries]
    with drawing() as pyplot:
        figure, (accuracy, auc) = pyplot.subplots(2, 1, figsize=(WIDTH, 5.2), sharex=True)
        _band(accuracy, entries, [own.accuracy for own in found.entries], OURS, "accuracy", "-")
        _band(accuracy, entries, [own.balanced_accuracy for own in found.entries], WRONG, "balanced accuracy", "--")
        accuracy.axhline(found.majority, color=GREY, linewidth=1, linestyle=":", label="always the commoner grade")
        accuracy.set_ylabel("accuracy")
        _band(auc, entries, [own.within_auc for own in found.entries], OURS, "AUC within problems", "-")
        _band(auc, entries, [own.auc for own in found.entries], WRONG, "AUC over all answers", "--")
        auc.axhline(0.5, color=GREY, linewidth=1, linestyle=":", label="chance")
        if head_auc is not None and head_auc.mean == head_auc.mean:
            auc.axhline(head_auc.mean, color="#1c2430", linewidth=1.2, label="the head, within problems")
        auc.set_ylabel("AUC")
        for axes in (accuracy, auc):
            axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        _name_entries(auc, entries)
        return figure


def running(answers: Sequence[Answer], names: Mapping[int, str]) -> Any:
    """The score after each scored token, an answer a line; those of `names`, by rank, are drawn bold and named."""
    with drawing() as pyplot:
        figure, axes = pyplot.subplots(figsize=(WIDTH, 3.0))
        labelled: set[str] = set()
        ends: list[tuple[int, float, str, str]] = []
        # Named ones last, on top of the others.
        for answer in sorted(answers, key=lambda own: own.rank in names):
            right, name = answer.response.correct, names.get(answer.rank)
            values = answer.trace.running().tolist()
            kind = "right" if right else "wrong"
            colour = RIGHT if right else WRONG
            style: Any = {"color": colour, "linestyle": "-" if right else (0, (4, 2))}
            width, alpha = (1.9, 1.0) if name else (0.8, 0.35)
            label = None if kind in labelled or not name else kind
            axes.plot(range(1, len(values) + 1), values, linewidth=width, alpha=alpha, label=label, **style)
            axes.plot(len(values), values[-1], ".", markersize=6 if name else 3, alpha=alpha, color=colour)
            if name:
                labelled.add(kind)
                ends.append((len(values), values[-1], name, colour))
        _name_ends(axes, ends)
        axes.set_xlabel("scored tokens")
        axes.set_ylabel("score so far")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.margins(x=0.03)
        handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        kinds = [kind for kind in ("right", "wrong") if kind in handles]
        axes.legend(
            [handles[kind] for kind in kinds], kinds, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0)
        )
        return figure


def _band(
    axes: Any, entries: Sequence[int | str], values: Sequence[Estimate], colour: str, label: str, style: str
) -> None:
    """A line through the layers; entries that are no layers stand alone."""
    layers = [place for place, entry in enumerate(entries) if isinstance(entry, int)]
    others = [place for place in range(len(entries)) if place not in layers]
    mean, low, high = ([getattr(own, name) for own in values] for name in ("mean", "low", "high"))
    if layers:
        own = {name: [row[place] for place in layers] for name, row in (("mean", mean), ("low", low), ("high", high))}
        axes.fill_between(layers, own["low"], own["high"], color=colour, alpha=0.13, linewidth=0)
        axes.plot(layers, own["mean"], style, marker=".", color=colour, label=label)
    for place in others:
        spread = [[mean[place] - low[place]], [high[place] - mean[place]]]
        axes.errorbar(place, mean[place], spread, fmt="o", color=colour, label=None if layers else label)


def _name_ends(axes: Any, ends: Sequence[tuple[int, float, str, str]]) -> None:
    """Writes the names of lines (length, last value, name, colour) where they end; those that meet share a place."""
    low, high = axes.get_ylim()
    taken: dict[tuple[int, int], int] = {}
    for length, value, name, colour in sorted(ends, key=lambda end: end[2]):
        place = (length, round(12 * (value - low) / (high - low)))
        offset = taken[place] = taken.get(place, -1) + 1
        style = {"textcoords": "offset points", "va": "center", "fontweight": "bold", "color": colour}
        axes.annotate(name, (length, value), xytext=(5 + 10 * offset, 0), **style)


def _name_entries(axes: Any, entries: Sequence[int | str]) -> None:
    step = -(-len(entries) // SHOWN_NAMES)
    places = [place for place, entry in enumerate(entries) if place % step == 0 or isinstance(entry, str)]
    axes.set_xticks(places, [str(entries[place]).replace("_", "\n") for place in places])
    axes.set_xlabel("layer (0 is the first layer's input)")
    axes.set_xlim(-0.6, len(entries) - 0.4)
