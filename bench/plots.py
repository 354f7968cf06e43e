"""Pictures of results: every sample, medians with intervals, and the floor."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench import tables
from bench.results import Case, Result
from bench.summary import Summary, find_outliers

OURS = "#0b5fa5"
OTHERS = ("#c44e52", "#8c8c8c", "#dd8452", "#55a868", "#937860", "#8172b3", "#64b5cd", "#ccb974", "#4c4c4c", "#da8bc3")
MINE = ("swift_kernels", "gather", "norm", "SwiftHead.step", "schema.rms_norm_score")


def plot_if_possible(result: Result, path: Path) -> str:
    """Draws the result; says where, or what is missing to draw it."""
    if importlib.util.find_spec("matplotlib") is None:
        return "no plot: it needs matplotlib, pip install 'swift_kernels[bench]'; bench.report draws it later"
    plot(result, path)
    return f"plot: {path}"


def plot(result: Result, path: Path) -> None:
    """Writes the picture of one result, complete or not at all."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = DRAW.get(result.name, draw_strips)(result, pyplot)
        environment = result.environment
        commit = tables.short(environment["commit"])
        note = f"{environment['device']}, {environment['threads']} threads, torch {environment['torch']}, {commit}"
        if result.settings["quick"]:
            note = "A QUICK RUN: NO FIGURES. " + note
        figure.text(0.005, 0.008, note, fontsize=7, color="#555555")
        figure.get_layout_engine().set(rect=(0, 0.3 / figure.get_figheight(), 1, 1 - 0.3 / figure.get_figheight()))
        for axis in figure.axes:
            _plain_numbers(axis)
        temporary = path.with_suffix(".tmp.png")
        figure.savefig(temporary, dpi=110)
        pyplot.close(figure)
    temporary.replace(path)


def draw_score_step(result: Result, pyplot: Any) -> Any:
    """Time against rows at the first shape, and how many times ours the rivals take in every case."""
    first = result.cases[0]
    fixed = {key: value for key, value in first.labels.items() if key != "rows"}
    series = sorted(
        (case for case in result.cases if fixed.items() <= case.labels.items()),
        key=lambda case: int(case.labels["rows"]),
    )
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(14, 2.5 + max(3.2, 0.3 * len(result.cases))), layout="constrained", width_ratios=(1, 1.1)
    )
    colours = {name: colour for case in result.cases for name, colour in colours_of(case).items()} | colours_of(first)
    for name in first.samples:
        found = [(int(case.labels["rows"]), case.summary(name)) for case in series if name in case.samples]
        points = [(rows, summary) for rows, summary in found if summary]
        if not points:
            continue
        rows = [point[0] for point in points]
        mine = name in MINE
        style = ":" if "call after call" in name else "-"
        medians = [summary.median * 1e6 for _, summary in points]
        left.plot(rows, medians, style, color=colours[name], marker="o", ms=4, lw=1.1 + 1.3 * mine, label=name)
        low, high = ([getattr(summary, end) * 1e6 for _, summary in points] for end in ("low", "high"))
        left.fill_between(rows, low, high, color=colours[name], alpha=0.2, lw=0)
    floors = [(int(case.labels["rows"]), floor[1] * 1e6) for case in series if (floor := case.floor())]
    left.plot(*zip(*floors, strict=True), color="black", ls="--", lw=1, label="floor") if floors else None
    left.set(xscale="log", yscale="log", xlabel="rows of a step", ylabel="time of a step (us)")
    left.set_xticks([int(case.labels["rows"]) for case in series], [str(case.labels["rows"]) for case in series])
    left.minorticks_off()
    left.set_title(", ".join(str(value) for value in fixed.values()), loc="left")
    left.legend(fontsize=7, frameon=False)
    for place, case in enumerate(reversed(result.cases)):
        ratios = {name: case.ratio(name) for name in case.samples if name not in MINE and "call after call" not in name}
        for name, ratio in ratios.items():
            if ratio:
                right.plot([ratio.low, ratio.high], [place, place], color=colours[name], lw=1)
                right.plot(ratio.median, place, "o", color=colours[name], ms=4)
    right.axvline(1, color=OURS, lw=2)
    right.set(xscale="log", xlabel="times the time of swift_kernels, in the same round (its interval as a line)")
    right.set_yticks(range(len(result.cases)), [case.title() for case in reversed(result.cases)], fontsize=7)
    return figure


def draw_strips(result: Result, pyplot: Any) -> Any:
    """Every sample of every contender, a panel a case, in the unit that suits the longest."""
    longest = max(sample for case in result.cases for samples in case.samples.values() for sample in samples if sample)
    scale, unit = (1e3, "ms") if longest > 1e-3 else (1e6, "us")

    def times(case: Case, name: str) -> list[float | None]:
        return [sample and sample * scale for sample in case.samples[name]]

    return _panels(result, pyplot, f"time ({unit})", times, scale=scale)


def draw_decode(result: Result, pyplot: Any) -> Any:
    """Speed in percent of the bare model's in the same turn."""

    def speeds(case: Case, name: str) -> list[float | None]:
        pairs = zip(case.samples[case.reference], case.samples[name], strict=True)
        return [100 * bare / own if bare and own else None for bare, own in pairs]

    return _panels(result, pyplot, "tokens/s, in % of the bare model's in the same turn", speeds, mark=100)


def draw_best_of_n(result: Result, pyplot: Any) -> Any:
    """Time, memory and FLOPs against N."""
    cases = sorted(result.cases, key=lambda case: int(case.labels["answers"]))
    figure, axes = pyplot.subplots(1, 3, figsize=(14, 4.6), layout="constrained")
    names = list(cases[0].samples)
    colours = colours_of(cases[0])
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        places = [place + (index - (len(names) - 1) / 2) * width for place in range(len(cases))]
        summaries = [case.summary(name) for case in cases]
        held = [
            (case.metrics["peak bytes"].get(name, 0) + case.metrics["own bytes"].get(name, 0)) / 1e6 for case in cases
        ]
        flops = [case.metrics["FLOPs"].get(name, 0) / 1e12 for case in cases]
        axes[0].bar(
            places, [summary.median if summary else 0 for summary in summaries], width, color=colours[name], label=name
        )
        for place, summary in zip(places, summaries, strict=True):
            if summary:
                axes[0].plot([place, place], [summary.low, summary.high], color="black", lw=1)
        axes[1].bar(places, held, width, color=colours[name])
        axes[2].bar(places, flops, width, color=colours[name])
    for axis, label in zip(
        axes,
        ("time from prompt to answer (s)", "peak memory and weights, but the model's (MB)", "arithmetic (TFLOP)"),
        strict=True,
    ):
        axis.set_xticks(range(len(cases)), [str(case.labels["answers"]) for case in cases])
        axis.set(xlabel="answers, N", ylabel=label, **({} if axis is axes[0] else {"yscale": "log"}))
    axes[0].legend(fontsize=8, frameon=False)
    labels = cases[0].labels
    axes[0].set_title(f"{labels['model']}, {labels['new tokens']} tokens an answer", loc="left")
    return figure


def draw_memory(result: Result, pyplot: Any) -> Any:
    """Bytes against tokens."""
    figure, axis = pyplot.subplots(figsize=(10, 4.8), layout="constrained")
    cases = sorted(result.cases, key=lambda case: int(case.labels["tokens"]))
    tokens = [int(case.labels["tokens"]) for case in cases]
    colours = colours_of(cases[0])
    for name in cases[0].samples:
        axis.plot(tokens, [case.samples[name][0] for case in cases], "o-", color=colours[name], label=f"{name}, held")
        resident = [case.metrics["resident bytes"][name] for case in cases]
        axis.plot(tokens, resident, "x:", color=colours[name], label=f"{name}, growth of the process", lw=1)
    axis.set(xscale="log", yscale="symlog", xlabel="tokens of the answer", ylabel="bytes of one sequence")
    axis.set_ylim(0, 10 * max(case.samples[name][0] or 1 for case in cases for name in case.samples))
    axis.set_xticks(tokens, [f"{count:,}" for count in tokens])
    axis.minorticks_off()
    axis.set_title(f"{cases[0].labels['model']}, {cases[0].labels['entries']}", loc="left")
    figure.legend(fontsize=8, frameon=False, loc="outside right center")
    return figure


def draw_counts(result: Result, pyplot: Any) -> Any:
    """Counted figures as bars."""
    case = result.cases[0]
    figure, axis = pyplot.subplots(figsize=(7.5, 2.6), layout="constrained")
    colours = colours_of(case)
    axis.barh(list(case.samples), [values[0] or 0 for values in case.samples.values()], color=list(colours.values()))
    axis.invert_yaxis()
    axis.set(xlabel=f"{case.unit}, of {case.labels['answers']}")
    axis.set_title(case.title(), loc="left")
    return figure


DRAW: dict[str, Callable[[Result, Any], Any]] = {
    "score_step": draw_score_step,
    "decode": draw_decode,
    "best_of_n": draw_best_of_n,
    "memory": draw_memory,
    "greedy_difference": draw_counts,
}


def _plain_numbers(axis: Any) -> None:
    """Logarithmic axes that say 200, not 2 x 10^2."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for side in (axis.xaxis, axis.yaxis):
        if side.get_scale() == "log" and isinstance(side.get_major_locator(), LogLocator):
            low, high = side.get_view_interval()
            narrow = high < 100 * low
            side.set_major_locator(LogLocator(subs=(1, 2, 5) if narrow else (1,)))
            side.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
            side.set_minor_formatter(NullFormatter())


def colours_of(case: Case) -> dict[str, str]:
    """Ours in one colour everywhere, what the others are compared with in black."""
    others = iter(OTHERS * 2)

    def colour(name: str) -> str:
        if name.split(",")[0] in MINE:
            return OURS
        return "#222222" if name == case.reference else next(others)

    return {name: colour(name) for name in case.samples}


def _panels(
    result: Result,
    pyplot: Any,
    label: str,
    values: Callable[[Case, str], Sequence[float | None]],
    mark: float | None = None,
    scale: float = 1.0,
) -> Any:
    """A strip a case. `mark` is what all are compared with, `scale` from seconds to what is drawn."""
    columns = min(2, len(result.cases))
    grid = -(-len(result.cases) // columns)
    tallest = max(len(case.samples) for case in result.cases)
    figure, axes = pyplot.subplots(
        grid, columns, figsize=(7 * columns, grid * (1.1 + 0.3 * tallest)), layout="constrained", squeeze=False
    )
    for axis in axes.flat[len(result.cases) :]:
        axis.set_visible(False)
    for axis, case in zip(axes.flat, result.cases, strict=False):
        _strip(axis, case, {name: values(case, name) for name in case.samples})
        axis.set_title(case.title(), loc="left", fontsize=9)
        axis.set_xlabel(label)
        if mark is not None:
            axis.axvline(mark, color="black", lw=0.8)
            continue
        if floor := case.floor():
            axis.axvline(floor[1] * scale, color="black", ls="--", lw=1)
        spans = [sample for samples in case.samples.values() for sample in samples if sample]
        if spans and max(spans) > 8 * min(spans):
            axis.set_xscale("log")
    return figure


def _strip(axis: Any, case: Case, every: dict[str, Sequence[float | None]]) -> None:
    """A line a contender: its samples as dots, outliers hollow, the median a tick with its interval."""
    colours = colours_of(case)
    for place, (name, samples) in enumerate(every.items()):
        kept = [sample for sample in samples if sample is not None]
        if not kept:
            continue
        outliers = set(find_outliers(kept))
        for number, sample in enumerate(kept):
            height = place + 0.5 * ((number % 7) / 6 - 0.5)
            hollow = {"mfc": "none"} if sample in outliers else {"mec": "none"}
            axis.plot(
                sample,
                height,
                "o",
                ms=3.5,
                color=colours[name],
                alpha=0.35 if sample not in outliers else 0.9,
                **hollow,
            )
        if summary := Summary.of(samples):
            axis.plot([summary.low, summary.high], [place, place], color="black", lw=2.5, solid_capstyle="butt")
            axis.plot([summary.median] * 2, [place - 0.33, place + 0.33], color="black", lw=1.5)
    axis.set_yticks(range(len(every)), list(every))
    axis.set_ylim(len(every) - 0.4, -0.6)
