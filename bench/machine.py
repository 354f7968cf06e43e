"""Says in a line each what there is to measure on and with: the GPU, versions, tools, and kernels compiled ahead.

python -m bench.machine
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess

import torch

from bench import kernel_cache, results

PACKAGES = (
    *("torch", "triton", "transformers", "numpy", "pytest", "pytest-xdist", "pytest-benchmark", "hypothesis"),
    *("rich", "typer", "matplotlib", "scikit-learn", "accelerate", "safetensors"),
)
TOOLS = ("gcc", "g++", "git", "make", "ninja", "nvcc", "nvidia-smi", "compute-sanitizer", "ncu")
SMI = "name,memory.total,memory.used,driver_version,clocks.sm,clocks.mem,power.limit,temperature.gpu,mig.mode.current"


def main() -> None:
    commit = results.git_commit()
    print(f"commit: {commit}" + ("; SWIFT_KERNELS_COMMIT names it" if commit == results.UNKNOWN else ""))
    print(f"gpu: {gpu()}")
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", f"--query-gpu={SMI}", "--format=csv"]
        print(subprocess.run(command, capture_output=True, text=True).stdout.strip())
    print(f"python: {platform.python_version()}, {platform.platform()}")
    print("packages:", ", ".join(f"{name} {results.version(name) or 'missing'}" for name in PACKAGES))
    print("tools:", ", ".join(f"{tool} {shutil.which(tool) or 'missing'}" for tool in TOOLS))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = shutil.disk_usage(results.RESULTS).free
    print(f"host: {os.cpu_count()} cores, {memory / 1e9:.0f} GB of memory, {free / 1e9:.0f} GB free on disk")
    print(f"kernels: {kernels()}")


def gpu() -> str:
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    properties = torch.cuda.get_device_properties(0)
    return (
        f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.total_memory / 1e9:.0f} GB, "
        f"{properties.multi_processor_count} multiprocessors, L2 of {properties.L2_cache_size / 1e6:.0f} MB"
    )


def kernels() -> str:
    """What was compiled ahead, and whether Triton can use it."""
    if not kernel_cache.ARCHIVE.exists():
        return "none compiled ahead: make gpu-prebuild does"
    try:
        facts = kernel_cache.facts_of(kernel_cache.ARCHIVE)
        builds = sum(part["compiled"] for part in facts["parts"].values())
        found = f"{builds} builds ahead, by Triton {facts['triton']} for {facts['target']}"
    except kernel_cache.UNREADABLE as error:
        return f"{kernel_cache.ARCHIVE.name} cannot be read ({error!r}): make gpu-prebuild makes it anew"
    here = results.version("triton")
    return found if here == facts["triton"] else f"{found}: of no use to Triton {here}, which compiles anew"


if __name__ == "__main__":
    main()
