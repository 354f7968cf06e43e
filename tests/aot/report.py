"""`make audit`: every kernel's variants on every target, held against `baseline.json`.

    python -m tests.aot.audit [--full] [--update | --note] [--kernel NAME] [--target sm_90] [--json FILE]

Exits with 1 and names variant and figure where a build spills, uses local memory, breaks the memory order, loads in
narrower pieces than the baseline says, or takes over REGISTER_SLACK registers more. Registers are compared only under
the Triton version that the baseline was made with: its compilers differ. What an older version does worse is noted in
the baseline by --note, under its name, and passes there; a broken memory order never does.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

import triton
from rich.console import Console
from rich.progress import track
from rich.table import Table

from tests.aot.audit import TARGETS, audit
from tests.aot.variants import KERNELS

BASELINE = Path(__file__).with_name("baseline.json")
REGISTER_SLACK = 8
"""Of a small change elsewhere in a kernel, and far from what costs a multiprocessor one of its programs."""
KEPT = ("registers", "spills", "local_bytes", "shared_bytes", "load_bits")
MAY_DIFFER = ("spills", "local_bytes", "load_bits")
"""What another Triton may do worse, once it is noted."""

Figures = dict[str, Any]
"""What `audit.Audit` holds, as JSON has it."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="every variant, instead of a representative few")
    parser.add_argument("--update", action="store_true", help="rewrite the baseline from these builds")
    parser.add_argument("--note", action="store_true", help="note in the baseline what this other Triton does worse")
    parser.add_argument("--kernel", action="append", choices=KERNELS, help="default: all of them")
    parser.add_argument("--target", action="append", choices=TARGETS, help="default: all of them")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    options = parser.parse_args(arguments)
    if (options.update or options.note) and (options.full or options.kernel or options.target):
        parser.error("--update and --note rewrite the whole baseline: they take no other choice")
    if options.note and (made_with := json.loads(BASELINE.read_text())["triton"]) == triton.__version__:
        parser.error(f"--note is for another Triton than {made_with}, which the baseline is of: mend the kernel")

    console = Console(width=170)
    builds, failures = compile_all(options.kernel or list(KERNELS), options.target or list(TARGETS), options.full)
    console.print(table_of(builds))
    if options.json:
        options.json.write_text(json.dumps({"triton": triton.__version__, "builds": builds}, indent=1) + "\n")
    if options.update:
        others = json.loads(BASELINE.read_text())["others"] if BASELINE.exists() else {}
        others.pop(triton.__version__, None)
        kept = {name: {figure: figures[figure] for figure in KEPT} for name, figures in builds.items()}
        write_baseline({"triton": triton.__version__, "builds": kept, "others": others})
    baseline = json.loads(BASELINE.read_text())
    if options.note:
        baseline["others"].pop(triton.__version__, None)
        worse = {line.partition(": ")[0] for line in compare_all(builds, baseline, full=False)}
        noted = {name: {figure: builds[name][figure] for figure in MAY_DIFFER} for name in worse}
        write_baseline({**baseline, "others": {**baseline["others"], triton.__version__: noted}})
        baseline = json.loads(BASELINE.read_text())
    failures += compare_all(builds, baseline, full=options.full)
    for failure in failures:
        console.print(failure, style="bold red", markup=False, soft_wrap=True)
    console.print(f"{len(builds)} builds with Triton {triton.__version__}, {len(failures)} failures")
    raise SystemExit(1 if failures else 0)


def compile_all(kernels: Sequence[str], targets: Sequence[str], full: bool) -> tuple[dict[str, Figures], list[str]]:
    """Figures of every build by "kernel | variant | target", and what did not compile."""
    builds: dict[str, Figures] = {}
    failures = []
    # Fresh processes: PyTorch's threads do not survive a fork.
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        running: dict[Future[Figures], str] = {}
        for kernel in kernels:
            module = importlib.import_module(KERNELS[kernel])
            for variant in module.FULL if full else module.SMALL:
                for target in targets:
                    builds[f"{kernel} | {variant} | {target}"] = {}  # in this order, whichever is ready first
                    running[pool.submit(compile_one, kernel, variant, target)] = f"{kernel} | {variant} | {target}"
        for future in track(
            as_completed(running), "compiling", len(running), console=Console(stderr=True), transient=True
        ):
            name = running[future]
            if error := future.exception():
                failures.append(f"{name}: does not compile: {error}")
                del builds[name]
            else:
                builds[name] = future.result()
    return builds, failures


def compile_one(kernel: str, variant: Any, target: str) -> Figures:
    build = importlib.import_module(KERNELS[kernel]).build(variant, target)
    figures = asdict(audit(build.kernel, build.arguments, target, **build.options))
    # Strides go into addresses too.
    pointers = {name for name, value in build.arguments.items() if "*" in str(value)} | {"all"}
    figures["load_bits"] = {name: bits for name, bits in figures["load_bits"].items() if name in pointers}
    if not build.counts_arrivals:
        figures["order_faults"] = []
    return json.loads(json.dumps(figures, sort_keys=True))


def compare_all(builds: Mapping[str, Figures], baseline: Mapping[str, Any], full: bool) -> list[str]:
    """One line for each figure that is worse than it may be. Of a full run the baseline knows only some builds."""
    same_compilers = baseline["triton"] == triton.__version__
    failures = []
    for name, figures in builds.items():
        known = baseline["builds"].get(name)
        if known is None and not full:
            failures.append(f"{name}: not in {BASELINE.name}: run with --update")
        noted = noted_of_this_triton(name, baseline)
        failures += [f"{name}: {worse}" for worse in compare(figures, known or {}, noted, same_compilers)]
    return failures


def noted_of_this_triton(name: str, baseline: Mapping[str, Any] | None = None) -> Figures:
    """What the installed Triton is known to do worse in one build; of the committed baseline unless told."""
    baseline = baseline or json.loads(BASELINE.read_text())
    return baseline["others"].get(triton.__version__, {}).get(name, {})


def compare(figures: Figures, known: Figures, noted: Figures, same_compilers: bool) -> list[str]:
    """What is worse in a build than it may be, by its figures in the baseline and what is noted of this Triton."""
    worse = []
    if figures["spills"] > noted.get("spills", 0):
        worse.append(f"{figures['spills']} spills")
    if figures["local_bytes"] > noted.get("local_bytes", 0):
        worse.append(f"{figures['local_bytes']} bytes of local memory")
    worse += figures["order_faults"]
    for argument, expected in (known | noted).get("load_bits", {}).items():
        loads = figures["load_bits"].get(argument, expected)
        widest, narrowest = max(map(int, expected)), min(map(int, expected))
        split = same_compilers and _split(loads, widest) > _split(expected, widest)
        if max(map(int, loads)) < widest or min(map(int, loads)) < narrowest or split:
            worse.append(f"{argument} is loaded by {in_words(loads)}, in the baseline by {in_words(expected)}")
    if same_compilers and known and figures["registers"] > known["registers"] + REGISTER_SLACK:
        worse.append(f"{figures['registers']} registers, in the baseline {known['registers']}")
    return worse


def _split(loads: Mapping[str, int], widest: int) -> float:
    """The share of loads narrower than the widest."""
    return 1 - loads.get(str(widest), 0) / sum(loads.values())


def in_words(loads: Mapping[str, int]) -> str:
    return ", ".join(f"{loads[bits]} x {bits} bits" for bits in sorted(loads, key=int))


def write_baseline(baseline: Mapping[str, Any]) -> None:
    """One build a line, for diffs to be read."""

    def lines(builds: Mapping[str, Figures], indent: str) -> str:
        every = (
            f"{indent}{json.dumps(name)}: {json.dumps(figures, sort_keys=True)}"
            for name, figures in sorted(builds.items())
        )
        return "{\n" + ",\n".join(every) + f"\n{indent[1:]}}}" if builds else "{}"

    lines_of_others = ",\n".join(
        f"  {json.dumps(version)}: {lines(builds, '   ')}" for version, builds in sorted(baseline["others"].items())
    )
    others = "{\n" + lines_of_others + "\n }" if lines_of_others else "{}"
    builds = lines(baseline["builds"], "  ")
    BASELINE.write_text(
        f'{{\n "triton": {json.dumps(baseline["triton"])},\n "builds": {builds},\n "others": {others}\n}}\n'
    )


def table_of(builds: Mapping[str, Figures]) -> Table:
    table = Table("kernel", "variant", "target", "registers", "spills", "local", "shared", "loads in bits", "order")
    for name, figures in builds.items():
        loads = (
            f"{argument.removesuffix('_ptr')} {'/'.join(sorted(bits, key=int))}"
            for argument, bits in figures["load_bits"].items()
        )
        numbers = (figures[figure] for figure in ("registers", "spills", "local_bytes", "shared_bytes"))
        order = "; ".join(figures["order_faults"]) or "ok"
        table.add_row(*name.split(" | "), *map(str, numbers), ", ".join(loads), order)
    return table
