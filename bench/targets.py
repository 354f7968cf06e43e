"""The figures that the design asks of the kernels, taken from results."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from bench import tables
from bench.results import Case, Result
from bench.shapes import LLAMA_8B
from bench.summary import Ratio
from bench.tables import in_bytes

NOT_MEASURED = "not measured"

Results = dict[str, Result]
"""Of one device, by name."""

Figure = Callable[[Results], "str | None"]
"""None where the results do not hold it."""


@dataclass(frozen=True)
class Target:
    what: str
    against: str
    reach: str
    figure: Figure
    cuda: bool = True
    cpu: bool = True
    """Where it can be measured at all."""


def _steps(results: Results, **labels: str | int) -> list[Case]:
    wanted = {"model": LLAMA_8B.name, "entries": "33 x 4096", "cache": "cold", **labels}
    if "score_step" not in results:
        return []
    found = [case for case in results["score_step"].cases if wanted.items() <= case.labels.items()]
    return sorted(found, key=lambda case: int(case.labels["rows"]))


def best_rival(case: Case) -> tuple[str, Ratio] | None:
    rivals = {name: case.ratio(name) for name in case.samples if not name.startswith("swift_kernels")}
    known = [(name, ratio) for name, ratio in rivals.items() if ratio]
    return min(known, key=lambda item: item[1].median) if known else None


def _against_upstream(results: Results) -> str | None:
    cases = [case for case in _steps(results, clock="called") if int(case.labels["rows"]) <= 64]
    ratios = [(case.labels["rows"], case.ratio("upstream")) for case in cases]
    return ", ".join(f"{_times(ratio)} ({rows})" for rows, ratio in ratios if ratio) or None


def _times(ratio: Ratio) -> str:
    return ratio.text().partition(" (")[0]


def _against_best(results: Results) -> str | None:
    cases = _steps(results, clock="replayed") or _steps(results, clock="called")
    found = [(case.labels["rows"], best_rival(case)) for case in cases]
    return ", ".join(f"{_times(best[1])} ({rows})" for rows, best in found if best) or None


def _share_of_copy(results: Results) -> str | None:
    for case in _steps(results, rows=256, clock="replayed"):
        copies, mine = case.floors.get("memory, copy"), case.summary("swift_kernels")
        if copies and mine:
            return f"{statistics.median(copies) / mine.median:.0%}"
    return None


def _share_of_floor(results: Results) -> str | None:
    for case in _steps(results, rows=64, clock="called"):
        in_turn = case.share_of_floor("swift_kernels")
        streamed = case.share_of_floor("swift_kernels, call after call")
        if in_turn and streamed:
            return f"{in_turn:.0%}, call after call {streamed:.0%}"
    return None


def _empty_kernel(results: Results) -> str | None:
    for case in _steps(results, rows=1, clock="replayed"):
        empty, mine = case.floors.get("empty kernel, replayed"), case.summary("swift_kernels")
        if empty and mine:
            return f"{mine.median / statistics.median(empty):.2f}x"
    return None


def _decode_graph(results: Results) -> str | None:
    return _decode(results, "eager, CUDA graph", ("gather", "bare"))


def _decode_norms(results: Results) -> str | None:
    return _decode(results, "eager", ("norm", "bare"), ("norm", "norm, bare"))


def _decode(results: Results, mode: str, *pairs: tuple[str, str]) -> str | None:
    """Speed of the first of each pair against the second's."""
    parts = []
    for case in results["decode"].cases if "decode" in results else []:
        model, _, layers = str(case.labels["model"]).partition(", ")
        if (model, case.labels["mode"]) != (LLAMA_8B.name, mode):
            continue
        samples = [(case.samples.get(bare, ()), case.samples.get(scored, ())) for scored, bare in pairs]
        ratios = [Ratio.of(*pair) if all(pair) else None for pair in samples]
        if all(ratios):
            shown = "; ".join(ratio.text(percent=True) for ratio in ratios if ratio)
            where = case.title("rows", "tokens of context") + (f", {layers}" if layers else "")
            parts.append(f"{shown} ({where})")
    return ", ".join(parts) or None


def _sequence(results: Results) -> str | None:
    case = results["score_sequence"].find(heads=1, mode="forward + backward") if "score_sequence" in results else None
    ratio = case.ratio("upstream") if case else None
    if case is None or ratio is None:
        return None
    peaks = case.metrics["peak bytes"]
    return f"{_times(ratio)}, peak 1/{peaks['upstream'] / max(peaks['swift_kernels'], 1):,.0f}"


def _memory(results: Results) -> str | None:
    if "memory" not in results:
        return None
    cases = results["memory"].cases
    return ", ".join(f"{in_bytes(case.samples['swift_kernels'][0] or 0)} ({case.labels['tokens']:,})" for case in cases)


TARGETS = (
    Target("score_step, launch included (rows)", "upstream's way", ">= 10x, rows <= 64", _against_upstream),
    Target("score_step, graph replay, on a CPU called (rows)", "best rival", ">= 2x", _against_best),
    Target("score_step, 1 row", "an empty kernel's replay", "<= 1.5x", _empty_kernel, cpu=False),
    Target("score_step, 256 rows, cold", "copy bandwidth", ">= 85%", _share_of_copy, cpu=False),
    Target("score_step, 64 rows, cold", "read bandwidth of the CPU", ">= 85%", _share_of_floor, cuda=False),
    Target("decode, CUDA graph, 8B shape", "without scores", ">= 99.5%", _decode_graph, cpu=False),
    Target("decode, eager, 8B shape, fused norms", "stock; the same unscored", "faster; >= 99.5%", _decode_norms),
    Target("score_sequence, forward + backward", "upstream's way", ">= 8x, peak <= 1/5", _sequence),
    Target("memory held (tokens)", "length of the answer", "constant", _memory),
)


def targets_table(cuda: Results, cpu: Results) -> str:
    """Target by target with its figure on a GPU and on a CPU."""
    rows = [["what", "against", "reach", "CUDA", "CPU"]]
    for target in TARGETS:
        on_cuda = target.figure(cuda) or NOT_MEASURED if target.cuda else ""
        on_cpu = target.figure(cpu) or NOT_MEASURED if target.cpu else ""
        rows.append([target.what, target.against, target.reach, on_cuda, on_cpu])
    return tables.markdown(rows)
