"""The files in `results/<device>/`: what was measured, on what, and every sample."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import re
import subprocess
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import swift_kernels
from bench import floors
from bench.summary import Ratio, Sample, Summary

RESULTS = Path(__file__).parent / "results"

SAME = ("device", "driver", "commit", "threads", "swift_kernels", "torch", "triton", "transformers")
"""What must not differ between the cases of one file."""

UNKNOWN = "unknown"
"""The commit of a tree that nobody has named."""

Labels = dict[str, "str | int"]


@dataclass
class Case:
    """One comparison: contenders that took turns on the same work.

    Attributes:
        labels: what was compared, in the words of tables: {"rows": 64, "cache": "cold"}.
        reference: the contender that the others are compared with.
        samples: by contender; the same place is the same round in all of them.
        unit: of the samples, "s" or "bytes".
        moved: bytes that the work has to read and write at the least.
        floors: seconds that the machine's limits would take for this work, sampled in between, by name.
        metrics: further figures of a contender, by name: {"peak bytes": {"swift_kernels": 768}}.
        faster: whether a ratio is that of speeds, rather than of times.
        note: what else a reader has to know.
    """

    labels: Labels
    reference: str
    samples: dict[str, list[Sample]]
    unit: str = "s"
    moved: int | None = None
    floors: dict[str, list[float]] = field(default_factory=dict)
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    faster: bool = False
    note: str = ""

    def summary(self, name: str) -> Summary | None:
        return Summary.of(self.samples.get(name, ()))

    def ratio(self, name: str) -> Ratio | None:
        """To the reference: how many times its time, or its speed (`faster`)."""
        if name not in self.samples:  # a contender that failed
            return None
        own, other = self.samples[name], self.samples[self.reference]
        return Ratio.of(other, own) if self.faster else Ratio.of(own, other)

    def floor(self) -> tuple[str, float] | None:
        """The floor that binds, and its median time."""
        return floors.binding(self.floors)

    def share_of_floor(self, name: str) -> float | None:
        summary, floor = self.summary(name), self.floor()
        return floor[1] / summary.median if summary and floor else None

    def title(self, *labels: str) -> str:
        """These labels, or all, as "Llama-3.1-8B, 64 rows, cold"."""

        def words(label: str, value: str | int) -> str:
            if not isinstance(value, int):
                return value
            first, space, rest = label.partition(" ")
            return f"{value:,} {first.removesuffix('s') if value == 1 else first}{space}{rest}"

        return ", ".join(words(label, value) for label, value in self.labels.items() if label in labels or not labels)


@dataclass
class Result:
    """What one script measured."""

    name: str
    environment: dict[str, Any]
    settings: dict[str, Any]
    cases: list[Case] = field(default_factory=list)

    @staticmethod
    def load(path: Path) -> Result:
        content = json.loads(path.read_text())
        return Result(**{**content, "cases": [Case(**case) for case in content["cases"]]})

    def save(self, folder: Path) -> Path:
        """Writes `<folder>/<name>.json`, complete or not at all: a case a line."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.name}.json"
        content = dataclasses.asdict(self)
        cases = ",\n".join("  " + json.dumps(_rounded(case)) for case in content.pop("cases"))
        head = json.dumps(content, indent=1).removesuffix("\n}")
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(f'{head},\n "cases": [\n{cases}\n ]\n}}\n')
        temporary.replace(path)
        return path

    def find(self, **labels: str | int) -> Case | None:
        """The case with these labels, among others."""
        return next((case for case in self.cases if labels.items() <= case.labels.items()), None)

    def continues(self, other: Result) -> bool:
        """Whether `other` was measured under the same conditions, so that its cases need not be measured again."""
        here, there = self.environment, other.environment
        same = here["commit"] != UNKNOWN and all(here.get(key) == there.get(key) for key in SAME)
        return same and self.settings == other.settings and self.name == other.name


def folder_of(device: torch.device, results: Path = RESULTS) -> Path:
    return results / re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")


def environment(device: torch.device) -> dict[str, Any]:
    """What a reader needs to judge or to repeat a measurement."""
    return {
        "device": device_name(device),
        "driver": _driver() if device.type == "cuda" else None,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "swift_kernels": swift_kernels.__version__,
        "torch": torch.__version__,
        "triton": version("triton"),
        "transformers": version("transformers"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "commit": git_commit(),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "load_average": os.getloadavg(),
    }


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo") as cpuinfo:
            models = [line.split(":", 1)[1].strip() for line in cpuinfo if line.startswith("model name")]
    except OSError:
        models = []
    return f"{models[0] if models else platform.machine()} ({os.cpu_count()} cpus)"


def git_commit() -> str:
    """The commit that was measured, with "+changes" where the tree, but for results, differed from it."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        # What is measured, and what measures it: neither results nor the tables made from them.
        changes = git("status", "--porcelain", "--", ":/swift_kernels", ":/csrc", ":/bench", ":(exclude)results")
        return git("rev-parse", "HEAD") + ("+changes" if changes else "")
    except (OSError, subprocess.CalledProcessError):  # a copy of the tree says in this variable what it is a copy of
        return os.environ.get("SWIFT_KERNELS_COMMIT", UNKNOWN)


def is_known(commit: str) -> bool:
    """Whether the same name means the same tree: changes may be others each time."""
    return commit != UNKNOWN and not commit.endswith("+changes")


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.CalledProcessError):
        return None


def version(package: str) -> str | None:
    """Of an installed package; None where it is not there."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _rounded(value: Any) -> Any:
    """Samples to five digits: no clock here knows more."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value
