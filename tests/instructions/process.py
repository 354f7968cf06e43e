"""The process that is counted: runs cases between markers. Without valgrind it builds what they need, once.

    python -m tests.instructions.process '{"markers": FILE, "cases": [NAME, ...], "csrc": FOLDER, "triton_key": KEY}'

Prints Triton's key of its own files, if it was asked for.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from pathlib import Path

import torch

from swift_kernels import cpp
from tests.instructions.cases import CASES, Case


def main() -> None:
    options = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    torch.manual_seed(0)
    # The sources are what is counted, also where a library was built into the package.
    cpp._load_shipped = lambda: None
    if folder := options.get("csrc"):
        cpp._sources = lambda: sorted(path for path in Path(folder).iterdir() if path.suffix in (".cpp", ".h"))
    if key := options.get("triton_key"):
        _keep_triton_key(key)
    markers = ctypes.CDLL(options["markers"])
    gc.disable()
    with torch.no_grad():  # as models generate
        for name, case in CASES.items():
            if name in options["cases"]:
                count(name, case, markers)
    if "triton" in sys.modules:
        from triton.runtime.cache import triton_key

        print(triton_key())


def count(name: str, case: Case, markers: ctypes.CDLL) -> None:
    with case.make() as call:
        for _ in range(case.warm_up):
            call()
        gc.collect()
        markers.start_counting()
        for _ in range(case.calls):
            call()
        markers.end_counting(name.encode())


def _keep_triton_key(key: str) -> None:
    """Else Triton hashes half a gigabyte of itself, which under valgrind takes minutes."""
    from triton.runtime import cache

    cache.triton_key = lambda: key


if __name__ == "__main__":
    main()
