"""Compiles ahead what tests and benchmarks launch on an sm_90, where no GPU is, into an archive that `make gpu` uses.

    python -m tests.aot.prebuild [--output build/gpu/kernels.tar.gz]

The tests run on the driver that drives nothing, with all their shapes and dtypes; since nothing is computed there, what
they assert is evaluated and not insisted on. What only a GPU is asked to do, at real shapes, is launched beside it, and
`attach` is warmed up for every architecture that it is tested with. In the end a second process unpacks the archive in
another folder and goes through all of it again, twice: the exit status is 1 if it compiles anything, or calls the C
compiler more often without the command `file`. With Triton 3.6 it never calls it; later versions link their launcher
once for every place where libcuda lies.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import hashlib
import importlib
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import triton
import triton.runtime.build
from triton import knobs
from triton.runtime.cache import get_cache_manager

from bench import kernel_cache
from tests.aot.fake_driver import fake_driver

ROOT = Path(__file__).resolve().parents[2]
ONE_ROW = 1
"""No kernel is compiled for a number of rows."""
WITHOUT_FILE = ("64bit", "")
"""What `platform.architecture` returns where the command `file` is missing."""

Counts = dict[str, Any]
"""Of one part: `tests`, `hits` (found in the cache), `compiled`, `compiler_calls`, `seconds`, `compiling` (seconds)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=kernel_cache.ARCHIVE)
    parser.add_argument("--part", choices=PARTS, help="only this, into Triton's own cache; prints counts as JSON")
    parser.add_argument("--without-file", action="store_true", help="as where the command `file` is missing")
    options = parser.parse_args()
    if options.part:
        architecture = WITHOUT_FILE if options.without_file else platform.architecture()
        with mock.patch.object(platform, "architecture", return_value=architecture):
            print(json.dumps(count(PARTS[options.part])))
        return
    with tempfile.TemporaryDirectory() as folder:
        first, second = Path(folder) / "first", Path(folder) / "second"
        begun = time.monotonic()
        made = run_parts(ROOT, first)
        versions = {"triton": triton.__version__, "torch": torch.__version__, "target": "sm_90"}
        kernel_cache.pack(first, options.output, {**versions, "parts": made})
        size = options.output.stat().st_size / 1e6
        print(f"{total(made, 'compiled')} builds in {time.monotonic() - begun:.0f} s, {size:.1f} MB: {options.output}")
        ignored = shutil.ignore_patterns(".*", "build", "results", "__pycache__")
        shutil.copytree(ROOT, second / "tree", ignore=ignored)
        kernel_cache.unpack(options.output, second / "cache")
        found = [run_parts(second / "tree", second / "cache", *more) for more in ((), ("--without-file",))]
    for where, parts in zip(("in another folder", "there without the command `file`"), found, strict=True):
        hits, compiled, calls = (total(parts, what) for what in ("hits", "compiled", "compiler_calls"))
        print(f"{where}: {hits} hits, {compiled} compiled, {calls} gcc calls")
    fewest, without_file = (total(parts, "compiler_calls") for parts in found)
    raise SystemExit(any(total(parts, "compiled") for parts in found) or without_file > fewest)


def run_parts(tree: Path, cache: Path, *options: str) -> dict[str, Counts]:
    """Each part in a process of its own, as many at a time as there are cores."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}

    def run(part: str) -> Counts:
        command = [sys.executable, "-m", "tests.aot.prebuild", *options, "--part", part]
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{part}: exit status {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
        counts = json.loads(done.stdout.splitlines()[-1])
        print(f"{part}: {', '.join(f'{value} {what}' for what, value in counts.items())}", flush=True)
        return counts

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(PARTS, pool.map(run, PARTS), strict=True))


def total(parts: dict[str, Counts], what: str) -> int:
    return sum(counts[what] for counts in parts.values())


def count(part: Callable[[], int]) -> Counts:
    """Runs a part on the fake driver and counts what it makes Triton do."""
    outcomes = {"hits": 0, "compiled": 0, "compiler_calls": 0, "compiling": 0.0}

    def listen(*, times: Any, cache_hit: bool, **_: Any) -> None:
        outcomes["hits" if cache_hit else "compiled"] += 1
        outcomes["compiling"] = round(outcomes["compiling"] + times.total / 1e6, 2)

    stock = triton.runtime.build._build

    def build(name: str, source: str, *args: Any, **kwargs: Any) -> str:
        outcomes["compiler_calls"] += 1
        library = stock(name, source, *args, **kwargs)
        # What Triton calls it depends on what the command `file` says of Python: also where that is missing.
        key = Path(source).read_text() + ",".join([platform.machine(), platform.system(), *WITHOUT_FILE])
        cache = get_cache_manager(hashlib.sha256(key.encode()).hexdigest())
        cache.put(Path(library).read_bytes(), name + sysconfig.get_config_var("EXT_SUFFIX"), binary=True)
        return library

    begun = time.monotonic()
    with (
        mock.patch.object(triton.runtime.build, "_build", build),
        mock.patch.object(knobs.compilation, "listener", listen),
        mock.patch.object(torch.testing, "assert_close"),
        fake_driver(),
        torch.no_grad(),
    ):
        tests = part()
    return {"tests": tests, **outcomes, "seconds": round(time.monotonic() - begun, 1)}


class _Unasserted(ast.NodeTransformer):
    """Evaluates what is asserted, and goes on."""

    def visit_Assert(self, node: ast.Assert) -> ast.Expr:
        return ast.copy_location(ast.Expr(node.test), node)


def import_unasserted(name: str) -> Any:
    """Imports a module of the tests with nothing asserted in it, for whoever imports it next as well."""
    path = ROOT / (name.replace(".", "/") + ".py")
    module = types.ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module
    exec(compile(_Unasserted().visit(ast.parse(path.read_text())), path, "exec"), vars(module))
    return module


@contextlib.contextmanager
def as_interpreted() -> Iterator[None]:
    """Inside, the kernel tests are imported as where there is no CUDA; the kernels themselves are imported before."""
    for op in ("score_step", "rms_norm_score", "project", "pool"):
        importlib.import_module(f"swift_kernels.ops.{op}")
    with mock.patch.object(knobs.runtime, "interpret", True):
        yield


def run_tests(op: str, launch_real_shapes: Callable[[Any], None]) -> int:
    """All tests of an op that run without a GPU, and what those that need one launch at real shapes."""
    with as_interpreted():
        import_unasserted("tests.oracle")
        module = import_unasserted(f"tests.ops.test_{op}")
    collected: list[pytest.Item] = []

    class Collector:
        def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
            collected[:] = items

    with torch.enable_grad(), contextlib.redirect_stdout(io.StringIO()):
        arguments = ["-p", "no:cacheprovider", "--tb=no", f"tests/ops/test_{op}.py"]
        pytest.main([*arguments, "--rootdir", str(ROOT)], plugins=[Collector()])
    launch_real_shapes(module)
    return len(collected)


def real_steps(tests: Any) -> None:
    for widths in tests.REAL:
        step = tests.random_step(widths, ONE_ROW)
        step.run()
        step.run(torch.zeros(ONE_ROW, 2))


def real_norms(tests: Any) -> None:
    for dtype in tests.checks.HIDDEN_STATE_DTYPES:
        for width in (576, 2304, 2560, 4096, 8192, 16384):
            for mode in tests.MODES.values():
                rows, norm_weight = tests.random_rows(ONE_ROW, width, dtype), tests.random_norm_weight(width, dtype)
                tests.rms_norm_triton(rows, norm_weight, tests.NORM_EPS, *mode)
    for widths in ((4096,) * 33, (576,) * 31, (8192,) * 81):
        step = tests.random_step(widths, ONE_ROW)
        step.run()
        step.run(torch.zeros(ONE_ROW, 2))


def real_sequences(tests: Any) -> None:
    for outputs in (2, 16):
        for widths in ((4096,) * 33, (576,) * 31, (128256,), (50257,)):
            entries = tests.random_entries(ONE_ROW, widths)
            tests.project_triton(entries, *tests.random_head(widths, outputs))
            tests.project_backward_triton(entries, tests.randn(ONE_ROW, outputs))


def warm_up_attach() -> int:
    """Scorers of every architecture that `tests/integrations/test_gpu.py` attaches to."""
    from swift_kernels import SwiftHead, attach
    from tests.architectures import NAMED, tiny_model
    from tests.integrations.test_norm_path import EVERY

    cases = [(name, "all", "gather", torch.float32) for name in NAMED]
    cases += [(name, "all", "norm", torch.float32) for name in EVERY]
    cases += [("llama", source, "gather", torch.float32) for source in ("logits", "top_logprobs")]
    for name in ("llama", "gemma3_text"):
        for dtype in (torch.bfloat16, torch.float16):
            cases += [(name, "all", fuse, dtype) for fuse in ("gather", "norm")]
    for name, source, fuse, dtype in cases:
        model = tiny_model(name, dtype)
        with attach(model, SwiftHead.for_model(model, source), fuse=fuse) as scorer:
            scorer.warmup(ONE_ROW)
    return len(cases)


def warm_up_benchmarks() -> int:
    """What benchmarks of a decode step launch beyond the tests: the norms of Llama-3.1-8B that close no step."""
    from bench.shapes import SHAPES, Shape, llama
    from swift_kernels import SwiftHead, attach

    cases = 0
    for shape in SHAPES.values():
        for entries in ("all", "4", "logits"):
            SwiftHead(shape.widths(entries)).warmup("cpu", torch.bfloat16)
            cases += 1
    model = llama(Shape("as wide as Llama-3.1-8B", 2, 4096, 128, 32, 8, 512), torch.device("cpu"))
    for fuse in ("gather", "norm"):
        with attach(model, SwiftHead.for_model(model), fuse=fuse) as scorer:
            scorer.warmup(ONE_ROW)
            cases += 1
    return cases


PARTS: dict[str, Callable[[], int]] = {
    "tests/ops/test_score_step.py": lambda: run_tests("score_step", real_steps),
    "tests/ops/test_rms_norm_score.py": lambda: run_tests("rms_norm_score", real_norms),
    "tests/ops/test_sequence.py": lambda: run_tests("sequence", real_sequences),
    "tests/integrations/test_gpu.py": warm_up_attach,
    "bench": warm_up_benchmarks,
}


if __name__ == "__main__":
    main()
