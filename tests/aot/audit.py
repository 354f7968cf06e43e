"""What compilers make of a Triton kernel, for GPUs that are not here: registers, spills, load widths, memory order.

`variants.py` lists the kernels, and `report.py` holds them against their baseline: `python -m tests.aot.audit`.
Everything comes from the binary (SASS, AMDGCN); PTX only tells which argument a load's address derives from.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass
class Audit:
    target: str
    registers: int
    spills: int
    """Instructions that touch local memory (CUDA), or vector registers spilled (AMD)."""
    local_bytes: int
    shared_bytes: int
    load_bits: dict[str, dict[int, int]] = field(default_factory=dict)
    """For each argument: how many loads of each width have an address that derives from it; for "all" on AMD."""
    wide_loads: tuple[int, int] = (0, 0)
    """128-bit global loads in PTX and in SASS: ptxas has split none where they agree. CUDA only."""
    order_faults: list[str] = field(default_factory=list)
    """What is missing of: stores, barrier, release, counter, acquire, reads past L1."""


def compile_kernel(kernel: Any, arguments: Mapping[str, Any], target: str, **options: Any) -> Any:
    """Compiles a `triton.jit` function. Arguments as `triton.tools.compile` writes them: "*bf16:16", "i32", or a
    constant; tuples of these; ":16" says divisible by 16."""
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}

    def describe(value: Any, path: tuple[int, ...]) -> Any:
        if isinstance(value, tuple) and any(_is_type(item) for item in value):
            return tuple(describe(item, (*path, index)) for index, item in enumerate(value))
        if not _is_type(value):
            constants[path] = value
            return "constexpr"
        name, _, divisor = value.partition(":")
        if divisor:
            attributes[path] = [["tt.divisibility", int(divisor)]]
        return name

    for index, name in enumerate(kernel.arg_names):
        signature[name] = describe(arguments[name], (index,))
    return triton.compile(ASTSource(kernel, signature, constants, attributes), target=TARGETS[target], options=options)


def argument_names(kernel: Any, arguments: Mapping[str, Any]) -> list[str]:
    """The argument behind each parameter of the compiled function: tuples are flattened, constants left out."""
    names = []
    for name in kernel.arg_names:
        value = arguments[name]
        names += [name] * sum(_is_type(item) for item in (value if isinstance(value, tuple) else (value,)))
    return names


def audit(kernel: Any, arguments: Mapping[str, Any], target: str, **options: Any) -> Audit:
    compiled = compile_kernel(kernel, arguments, target, **options)
    if TARGETS[target].backend == "hip":
        return _audit_amdgcn(compiled.asm["amdgcn"], target)
    sass = disassemble(compiled.asm["cubin"])
    opcodes = [opcode for opcode, _ in instructions(sass)]
    usage = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", sass)}
    loads = list(global_loads(compiled.asm["ptx"], argument_names(kernel, arguments)))
    load_bits: dict[str, Counter[int]] = {}
    for origins, bits in loads:
        for origin in origins:
            load_bits.setdefault(origin, Counter())[bits] += 1
    return Audit(
        target=target,
        registers=usage["REG"],
        spills=sum(opcode.startswith(("LDL", "STL")) for opcode in opcodes),
        local_bytes=usage["STACK"] + usage["LOCAL"],
        shared_bytes=compiled.metadata.shared,
        load_bits={name: dict(bits) for name, bits in load_bits.items()},
        wide_loads=(
            sum(bits == 128 for _, bits in loads),
            sum(opcode.startswith("LDG") and ".128" in opcode for opcode in opcodes),
        ),
        order_faults=order_faults(opcodes),
    )


def disassemble(cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", "-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def instructions(sass: str) -> Iterator[tuple[str, str]]:
    """(opcode, operands) of every instruction, in order."""
    for match in re.finditer(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+ )?\s*([A-Z][\w.]*)([^;]*);", sass, re.MULTILINE):
        yield match[1], match[2].strip()


def global_loads(ptx: str, names: list[str]) -> Iterator[tuple[set[str], int]]:
    """(arguments whose value goes into the address, bits) of every global load, followed through the registers.

    Loaded values end the trail. A register is the union of all that is ever written to it.
    """
    sources: dict[str, set[str]] = {}
    loads: list[tuple[str, int]] = []
    for match in re.finditer(r"^\s*(?:@!?%\w+\s+)?([a-z][\w.:]*)\s+([^;]*);", ptx, re.MULTILINE):
        opcode, operands = match[1], match[2]
        if opcode.startswith("ld.global"):
            vector, width = re.search(r"(?:\.v(\d))?\.[a-z]+(\d+)$", opcode).groups()  # type: ignore[union-attr]
            loads.append((re.search(r"\[\s*(%\w+)", operands)[1], int(vector or 1) * int(width)))  # type: ignore[index]
            continue
        if opcode.startswith(("st.", "bra", "bar", "ret", "setp")):
            continue
        destination, _, rest = operands.partition(",")
        tokens = set(re.findall(r"%\w+|\w+_param_\d+", rest))
        for register in re.findall(r"%\w+", destination):
            sources.setdefault(register, set()).update(tokens)

    origins: dict[str, set[str]] = {}

    def trace(token: str) -> set[str]:
        if "_param_" in token:
            index = int(token.rpartition("_")[2])
            return {names[index]} if index < len(names) else set()
        if token not in origins:
            origins[token] = set()
            origins[token] = set().union(*(trace(source) for source in sources.get(token, ())))
        return origins[token]

    for register, bits in loads:
        yield trace(register), bits


def order_faults(opcodes: list[str]) -> list[str]:
    """Checks the last arrival pattern in SASS: stores, barrier, release, counter, acquire, barrier, reads past L1.

    The counter is the last atomic. ptxas makes a release of MEMBAR and an acquire of CCTL.IVALL, which empties L1.
    """
    atomics = [i for i, opcode in enumerate(opcodes) if opcode.startswith(("ATOMG", "ATOM."))]
    if not atomics:
        return ["no arrival counter"]
    counter = atomics[-1]
    before, after = opcodes[:counter], opcodes[counter + 1 :]
    stores = [i for i, opcode in enumerate(before) if opcode.startswith("STG")]
    first_load = next((i for i, opcode in enumerate(after) if opcode.startswith("LDG") and ".STRONG" in opcode), None)
    faults = []
    if not stores:
        return ["no partials are stored before the counter"]
    tail = before[stores[-1] + 1 :]
    barriers = [i for i, opcode in enumerate(tail) if opcode.startswith("BAR.")]
    fences = [i for i, opcode in enumerate(tail) if opcode.startswith("MEMBAR") and opcode.endswith((".GPU", ".SYS"))]
    if not barriers:
        faults.append("no barrier between the stores and the counter")
    if not fences or (barriers and fences[-1] < barriers[0]):
        faults.append("no release between the barrier and the counter")
    if ".STRONG.GPU" not in opcodes[counter] and ".STRONG.SYS" not in opcodes[counter]:
        faults.append(f"the counter is not of device scope: {opcodes[counter]}")
    if first_load is None:
        faults.append("the partials are read through L1")
        first_load = len(after)
    if "CCTL.IVALL" not in after[:first_load]:
        faults.append("no acquire between the counter and the reads")
    if not any(opcode.startswith("BAR.") for opcode in after[:first_load]):
        faults.append("no barrier between the counter and the reads")
    return faults


def _audit_amdgcn(text: str, target: str) -> Audit:
    def metadata(name: str) -> int:
        return int(re.search(rf"^\s*\.{name}:\s*(\d+)", text, re.MULTILINE)[1])  # type: ignore[index]

    loads = re.findall(r"^\s+(?:global|buffer)_load_(\w+)", text, re.MULTILINE)
    opcodes = re.findall(
        r"^\s+(global_store|global_atomic|s_barrier|buffer_wbl2|buffer_inv|s_waitcnt [^\n;]*vmcnt\(0\))",
        text,
        re.MULTILINE,
    )
    counter = max((i for i, opcode in enumerate(opcodes) if opcode == "global_atomic"), default=0)
    stores = [i for i, opcode in enumerate(opcodes[:counter]) if opcode == "global_store"]
    faults = []
    if not stores:
        faults.append("no partials are stored before the counter")
    else:
        # A barrier of AMD waits for no store: every wavefront has to, before the barrier that precedes the counter.
        tail = opcodes[stores[-1] + 1 : counter]
        barrier = max((i for i, opcode in enumerate(tail) if opcode == "s_barrier"), default=-1)
        if barrier < 0:
            faults.append("no barrier between the stores and the counter")
        elif "buffer_wbl2" not in tail[:barrier] or not any("vmcnt(0)" in opcode for opcode in tail[:barrier]):
            faults.append("wavefronts do not wait for their stores before the barrier")
        if "buffer_wbl2" not in tail[barrier + 1 :]:
            faults.append("no release between the barrier and the counter")
        if "buffer_inv" not in opcodes[counter:]:
            faults.append("no acquire after the counter")
    return Audit(
        target=target,
        registers=metadata("vgpr_count"),
        spills=metadata("vgpr_spill_count"),
        local_bytes=metadata("private_segment_fixed_size"),
        shared_bytes=metadata("group_segment_fixed_size"),
        load_bits={"all": dict(Counter(map(_bits_of, loads)))},
        order_faults=faults,
    )


def _bits_of(load: str) -> int:
    """Of a load as AMD names it: "dwordx4", "ushort", "short_d16_hi"."""
    if words := re.match(r"dword(?:x(\d))?$", load):
        return 32 * int(words[1] or 1)
    return 8 if "byte" in load else 16


def _is_type(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"(\*?(fp|bf|i|u)\d+)(:\d+)?", value) is not None


if __name__ == "__main__":
    from tests.aot.report import main

    main()
