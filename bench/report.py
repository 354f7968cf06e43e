"""Tables and figures from the results folder: `results/<device>/README.md`, and the README's between two markers.

    python -m bench.report [--add results.tar.gz ...] [--check]

With --add the cases of archives that `bench.gpu` made are added to the results first: those measured under the same
conditions to a file that is there, newer ones in place of older. With --check nothing is written, and the exit status
is 1 where a file is not what the results make it.
"""

from __future__ import annotations

import argparse
import json
import tarfile
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

from bench import plots, tables
from bench.results import RESULTS, Case, Result
from bench.shapes import LLAMA_8B
from bench.tables import in_bytes, in_units, times
from bench.targets import Results, best_rival, targets_table

README = Path(__file__).parents[1] / "README.md"
DISTURBED = "disturbed"
"""In place of a figure, where too few samples were undisturbed."""

BEGIN, END = "<!-- measured: made by `python -m bench.report` -->", "<!-- end of measured -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a file differs")
    parser.add_argument("--add", type=Path, nargs="+", default=[], metavar="ARCHIVE", help="of bench.gpu: its results")
    options = parser.parse_args()
    for archive in options.add:
        add(archive, RESULTS)
    every = load_all(RESULTS)
    texts = {folder / "README.md": device_page(results) for folder, results in every.items()}
    texts[README] = with_block(README.read_text(), readme_block(every))
    if options.check:
        stale = [path for path, text in texts.items() if not path.exists() or path.read_text() != text]
        for path in stale:
            print(f"{path} is not what the results make it: run python -m bench.report")
        raise SystemExit(1 if stale else 0)
    for path, text in texts.items():
        temporary = path.with_suffix(".tmp")
        temporary.write_text(text)
        temporary.replace(path)
        print(path)
    for folder, results in every.items():
        for name, result in results.items():
            print(plots.plot_if_possible(result, folder / f"{name}.png"))


def add(archive: Path, folder: Path) -> None:
    """Adds the results of an archive to those in a folder, and says what became of each file."""
    with tempfile.TemporaryDirectory() as unpacked:
        try:
            with tarfile.open(archive) as packed:
                packed.extractall(unpacked, filter="data")
        except (OSError, tarfile.TarError, zlib.error, EOFError) as error:
            raise SystemExit(f"{archive} cannot be read ({error}): expected results.tar.gz of bench.gpu") from None
        for device, found in load_all(Path(unpacked)).items():
            for name, result in found.items():
                print(f"{device.name}/{name}.json: {add_result(result, folder / device.name)}")


def add_result(result: Result, folder: Path) -> str:
    """Adds its cases to those of the same name in a folder; says what it did."""
    path = folder / f"{result.name}.json"
    if path.exists():
        before = Result.load(path)
        if not result.continues(before):
            commits = (before.environment["commit"], result.environment["commit"])
            raise SystemExit(
                f"{path} was measured under other conditions, at {commits[0]} and not at {commits[1]}: move it away, "
                "or measure what it holds again"
            )
        older = [case for case in before.cases if all(case.labels != each.labels for each in result.cases)]
        result.cases = [*older, *result.cases]
    result.save(folder)
    return f"{len(result.cases)} cases"


def load_all(folder: Path) -> dict[Path, Results]:
    """The results of every device, the one measured last first. Quick runs hold no figures, and are left out."""
    every: dict[Path, Results] = {}
    for path in sorted(folder.glob("*/*.json")):
        content = json.loads(path.read_text())
        if "cases" in content and not content["settings"]["quick"]:
            every.setdefault(path.parent, {})[path.stem] = Result.load(path)
    return dict(sorted(every.items(), key=lambda item: last_date(item[1]), reverse=True))


def last_date(results: Results) -> str:
    return max(result.environment["date"] for result in results.values())


def device_page(results: Results) -> str:
    """Every case of a device as a row a contender, and the figures."""
    environment = next(iter(results.values())).environment
    parts = [f"# {environment['device']}\n", "Made by `python -m bench.report` from the files beside it.\n"]
    for name, result in results.items():
        environment = result.environment
        parts.append(f"## {name}\n")
        parts.append(
            f"{environment['date']}, commit {tables.short(environment['commit'])}, torch {environment['torch']}, "
            f"{environment['threads']} threads; clock: {result.settings['clock']}\n"
        )
        parts.append(f"![{name}]({name}.png)\n")
        for case in result.cases:
            caption = tables.caption(case)
            parts.append(f"**{case.title()}**" + (f" ({caption})" if caption else "") + "\n")
            parts.append(tables.markdown(tables.rows_of(case)))
    return "\n".join(parts)


def with_block(text: str, block: str) -> str:
    """The README with what stands between its markers replaced."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{README} has no markers {BEGIN!r} and {END!r}: put them where the tables belong")
    return f"{before}{BEGIN}\n\n{block}\n{END}{after}"


def readme_block(every: dict[Path, Results]) -> str:
    cuda = next((results for results in every.values() if _is_cuda(results)), {})
    cpu = next((results for results in every.values() if not _is_cuda(results)), {})
    parts = [targets_table(cuda, cpu)]
    for folder, results in every.items():
        environment = next(iter(results.values())).environment
        parts.append(f"On {environment['device']}, {environment['threads']} threads, torch {environment['torch']}; ")
        parts[-1] += f"[all figures](bench/results/{folder.name}/README.md):\n"
        parts += [make(results[name]) for name, make in SECTIONS.items() if name in results]
        if "score_step" in results:
            parts.append(f"![a decode step against rows](bench/results/{folder.name}/score_step.png)\n")
    return "\n".join(parts)


def _is_cuda(results: Results) -> bool:
    return any(result.environment["driver"] for result in results.values())


def score_step_section(result: Result) -> str:
    rows = [["One decode step, cold", "ours", "best rival takes", "upstream takes", "share of floor"]]
    entries = list(dict.fromkeys(case.labels["entries"] for case in result.cases))
    # Measured in the order of what they tell, and read in that of their rows.
    for case in sorted(
        result.cases, key=lambda case: (entries.index(case.labels["entries"]), int(case.labels["rows"]))
    ):
        mine, best, theirs = case.summary("swift_kernels"), best_rival(case), case.ratio("upstream")
        if case.labels["cache"] != "cold" or case.labels["model"] != LLAMA_8B.name or not (mine and best and theirs):
            continue
        title = case.title("entries", "rows", "clock")
        share = share_of_floor(case, "swift_kernels")
        rows.append([title, in_units([mine.median])[0], f"{best[1].text()}, {best[0]}", theirs.text(), share])
    return tables.markdown(rows)


def decode_section(result: Result) -> str:
    columns = ("gather", "norm", "naive")
    rows = [
        ["Decoding, speed of the bare model", "bare, tokens/s", 'fuse="gather"', 'fuse="norm"', "output_hidden_states"]
    ]
    for case in result.cases:
        bare = case.summary("bare")
        if bare is None:
            continue
        ratios = [case.ratio(name) if name in case.samples else None for name in columns]
        title = case.title("model", "rows", "tokens of context", "mode")
        speed = f"{int(case.labels['rows']) / bare.median:,.0f}"
        rows.append([title, speed, *(ratio.text(percent=True) if ratio else "" for ratio in ratios)])
    return tables.markdown(rows)


def score_sequence_section(result: Result) -> str:
    rows = [
        [
            "Whole answers",
            "ours",
            "per layer, fp32, takes",
            "upstream takes",
            "share of floor",
            "peak, ours",
            "upstream's",
        ]
    ]
    for case in result.cases:
        mine, share = case.summary("swift_kernels"), share_of_floor(case, "swift_kernels")
        ratios = [case.ratio(name) for name in ("per layer, fp32", "upstream")]
        if mine is None:
            continue
        peaks = case.metrics["peak bytes"]
        title = case.title("tokens", "heads", "mode")
        compared = [ratio.text() if ratio else DISTURBED for ratio in ratios]
        memory = [in_bytes(peaks[name]) for name in ("swift_kernels", "upstream")]
        rows.append([title, in_units([mine.median])[0], *compared, share, *memory])
    return tables.markdown(rows)


def best_of_n_section(result: Result) -> str:
    first = result.cases[0]
    names = [name for name in first.samples if name != first.reference]
    rows = [["From prompt to picked answer", "generate alone", *(f"{name} takes" for name in names)]]
    for case in sorted(result.cases, key=lambda case: int(case.labels["answers"])):
        alone = case.summary(case.reference)
        ratios = [case.ratio(name) for name in names]
        title = f"{case.labels['model']}, N = {case.labels['answers']}, {case.labels['new tokens']} tokens"
        compared = [ratio.text() if ratio else DISTURBED for ratio in ratios]
        rows.append([title, in_units([alone.median])[0] if alone else DISTURBED, *compared])
    return tables.markdown(rows)


def share_of_floor(case: Case, name: str) -> str:
    """As "75% of 36 GB/s": memory is not equally fast at all times, so each share says of what."""
    share, floor = case.share_of_floor(name), case.floor()
    if share is None or floor is None:
        return ""
    moves_bytes = case.moved and floor[0].startswith(("memory", "cache"))
    return f"{share:.0%}" + (f" of {case.moved / floor[1] / 1e9:.0f} GB/s" if case.moved and moves_bytes else "")


def memory_section(result: Result) -> str:
    rows = [["Held for one sequence", "ours", "output_hidden_states", "times"]]
    for case in result.cases:
        mine, theirs = (case.samples[name][0] or 0 for name in ("swift_kernels", "output_hidden_states"))
        rows.append([f"{case.labels['tokens']:,} tokens", in_bytes(mine), in_bytes(theirs), times(theirs, mine)])
    return tables.markdown(rows)


def launch_cost_section(result: Result) -> str:
    rows = [["Host time up to the driver's launch call", "ours", "through the dispatcher", "Triton's own kernel[grid]"]]
    for case in result.cases:
        names = {
            "score_step": (
                "SwiftHead.step",
                "instead: the op, through the dispatcher",
                "instead: kernel[grid](tensors)",
            )
        }
        norm = ("schema.rms_norm_score", "instead: rms_norm_score, through the dispatcher", "")
        shown = [case.summary(name) if name else None for name in names.get(str(case.labels["op"]), norm)]
        rows.append([str(case.labels["op"]), *(in_units([found.median])[0] if found else "" for found in shown)])
    return tables.markdown(rows)


def greedy_difference_section(result: Result) -> str:
    rows = [["Greedy answers that change, bfloat16", "of answers", "changed"]]
    for case in result.cases:
        for name, (changed, *_) in case.samples.items():
            if name != case.reference:
                rows.append([f"{case.labels['model']}, {name}", f"{case.labels['answers']:,}", f"{changed or 0:.0f}"])
    return tables.markdown(rows)


SECTIONS: dict[str, Callable[[Result], str]] = {
    "score_step": score_step_section,
    "decode": decode_section,
    "score_sequence": score_sequence_section,
    "best_of_n": best_of_n_section,
    "memory": memory_section,
    "launch_cost": launch_cost_section,
    "greedy_difference": greedy_difference_section,
}


if __name__ == "__main__":
    main()
