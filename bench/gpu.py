"""Everything that needs a GPU, in stages that each end within nine minutes: `make gpu STAGE=1`, then 2 and 3.

Stage 1 runs the CUDA tests, stage 2 the headline rows of the benchmarks, stage 3 the full sweeps and the stress run.
Results are saved as they come, under `bench/results/<device>/`; the exit status is 1 if anything failed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import common
import torch

ROOT = Path(__file__).resolve().parents[1]
LIMIT_SECONDS = 9 * 60
PYTEST = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]

STAGES = {
    1: {
        "kernel tests": [*PYTEST, "tests/ops", "--deselect", "tests/ops/test_interpreter.py", "-k", "not 100_000"],
        "attach tests": [*PYTEST, "tests/integrations/test_gpu.py"],
    },
    2: {
        "score_step": [sys.executable, "bench/score_step.py", "--rows", "1,64,256"],
        "score_sequence": [sys.executable, "bench/score_sequence.py"],
        "launch_cost": [sys.executable, "bench/launch_cost.py"],
        "decode": [sys.executable, "bench/decode.py", "--model", "8b", "--rows", "64", "--rounds", "15"],
    },
    3: {
        "memcheck": [
            *("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"),
            *(*PYTEST, "tests/ops", "--deselect", "tests/ops/test_interpreter.py", "-k", "one-row or one_row"),
        ],
        "decode": [sys.executable, "bench/decode.py", "--model", "8b", "--rows", "1", "--rounds", "15"],
        "score_step": [sys.executable, "bench/score_step.py", "--rows", "1,2,4,8,16,32,64,128,256,512"],
        "stress": [sys.executable, "bench/gpu_stress.py", "--launches", "100000"],
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", type=int, choices=STAGES, default=1)
    stage = parser.parse_args().stage
    if not torch.cuda.is_available():
        raise SystemExit("make gpu needs a CUDA device, and torch sees none: run it where there is one")
    deadline = time.monotonic() + LIMIT_SECONDS
    outcomes = {}
    for name, command in STAGES[stage].items():
        outcomes[name] = run(command, deadline - time.monotonic())
        print(f"{name}: exit status {outcomes[name]['status']} after {outcomes[name]['seconds']} s", flush=True)
    device = torch.device("cuda")
    result = {"environment": common.environment(device), "outcomes": outcomes}
    print(common.write_result(device, f"stage_{stage}", result))
    raise SystemExit(any(outcome["status"] != 0 for outcome in outcomes.values()))


def run(command: list[str], limit: float) -> dict[str, object]:
    """Runs one command, its output shown and its end kept; status 124 when the stage's time is over."""
    start = time.monotonic()
    tail: list[str] = []
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
            tail = [*tail[-59:], line.rstrip()]
            if time.monotonic() - start > limit:
                process.kill()
                return {"status": 124, "seconds": round(time.monotonic() - start, 1), "tail": tail}
        status = process.wait(timeout=max(1.0, limit - (time.monotonic() - start)))
    except subprocess.TimeoutExpired:
        process.kill()
        status = 124
    return {"status": status, "seconds": round(time.monotonic() - start, 1), "tail": tail}


if __name__ == "__main__":
    main()
