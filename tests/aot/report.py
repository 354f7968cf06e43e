"""`make audit`: every kernel's variants on every target, held against `baseline.json`.

    python -m tests.aot.audit [--full] [--update] [--kernel NAME] [--target sm_90] [--json FILE]

Exits with 1 and names variant and figure where a build spills, uses local memory, breaks the memory order, loads in
narrower pieces than the baseline says, or takes over REGISTER_SLACK registers more. Registers are compared only under
the Triton version that the baseline was made with: its compilers differ.
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

Figures = dict[str, Any]
"""What `audit.Audit` holds, as JSON has it."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="every variant, instead of a representative few")
    parser.add_argument("--update", action="store_true", help="rewrite the baseline from these builds")
    parser.add_argument("--kernel", action="append", choices=KERNELS, help="default: all of them")
    parser.add_argument("--target", action="append", choices=TARGETS, help="default: all of them")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    options = parser.parse_args(arguments)
    if options.update and (options.full or options.kernel or options.target):
        parser.error("--update rewrites the whole baseline: it takes no other choice")

    console = Console(width=170)
    builds, failures = compile_all(options.kernel or list(KERNELS), options.target or list(TARGETS), options.full)
    console.print(table_of(builds))
    if options.json:
        options.json.write_text(json.dumps({"triton": triton.__version__, "builds": builds}, indent=1) + "\n")
    if options.update:
        write_baseline(builds)
    failures += compare_all(builds, json.loads(BASELINE.read_text()), full=options.full)
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
        failures += [f"{name}: {worse}" for worse in compare(figures, known or {}, same_compilers)]
    return failures


def compare(figures: Figures, known: Figures, same_compilers: bool) -> list[str]:
    """What is worse in a build than it may be, by its figures in the baseline."""
    worse = []
    if figures["spills"]:
        worse.append(f"{figures['spills']} spills")
    if figures["local_bytes"]:
        worse.append(f"{figures['local_bytes']} bytes of local memory")
    worse += figures["order_faults"]
    for argument, expected in known.get("load_bits", {}).items():
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


def write_baseline(builds: Mapping[str, Figures]) -> None:
    """One build a line, for diffs to be read."""
    lines = (
        f"  {json.dumps(name)}: {json.dumps({figure: figures[figure] for figure in KEPT}, sort_keys=True)}"
        for name, figures in sorted(builds.items())
    )
    text = f'{{\n "triton": {json.dumps(triton.__version__)},\n "builds": {{\n' + ",\n".join(lines) + "\n }\n}\n"
    BASELINE.write_text(text)


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
