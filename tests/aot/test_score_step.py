"""The compiled kernel, looked at for GPUs that are not here: `tests/aot/audit.py` says what is read where."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

import triton.knobs

from swift_kernels.ops.chunks import TILES
from tests.aot import broken
from tests.aot.audit import TARGETS, Audit, audit, order_faults
from tests.aot.variants_score_step import SMALL, Variant, build

if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET=1 replaces the compiler", allow_module_level=True)

CUDA = [name for name, target in TARGETS.items() if target.backend == "cuda"]


def audit_score_step(variant: Variant, target: str) -> Audit:
    what = build(variant, target)
    return audit(what.kernel, what.arguments, target, **what.options)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("variant", SMALL, ids=str)
def test_nothing_spills_and_the_memory_order_holds(variant, target):
    report = audit_score_step(variant, target)
    assert (report.spills, report.local_bytes) == (0, 0)
    assert report.order_faults == []


@pytest.mark.parametrize("target", CUDA)
@pytest.mark.parametrize("variant", [v for v in SMALL if all(w % 8 == 0 for w in v.widths)], ids=str)
def test_hidden_states_are_read_16_bytes_at_a_time(variant, target):
    report = audit_score_step(variant, target)
    # A thread holds 1/32 of a row of a chunk for each tile in 16-bit dtypes; twice as many loads in fp32.
    assert report.load_bits["hidden_states"] == {128: TILES * 4 * variant.dtype.itemsize // 2}
    ptx, sass = report.wide_loads
    assert ptx == sass


def test_two_programs_fit_a_multiprocessor_of_an_h200():
    # 65,536 registers: two programs of 256 threads need 128 a thread. One program alone has too few loads in flight.
    assert audit_score_step(SMALL[0], "sm_90").registers <= 128


def test_odd_widths_compile_alike_whatever_the_alignment():
    """Else the order of additions, and the last bits of a score, would follow the alignment of a batch's tensors."""
    what = build(Variant((1021,) * 2), "sm_90")
    unaligned = {**what.arguments, "hidden_states": ("*bf16",) * 2, "weight_ptr": "*fp32"}
    reports = [
        audit(what.kernel, {**arguments, "row_strides": (stride,)}, "sm_90", **what.options)
        for arguments, stride in ((what.arguments, "i32:16"), (unaligned, "i32"))
    ]
    assert reports[0].load_bits == reports[1].load_bits
    assert set(reports[0].load_bits["hidden_states"]) == {16}


NO_BARRIER = "no barrier between the stores and the counter"
NO_RELEASE = "no release between the barrier and the counter"
NO_ACQUIRE = "no acquire between the counter and the reads"
MISTAKES = {
    "none": ({}, []),
    "acquire": ({"SEM": "acquire"}, [NO_RELEASE]),
    "release": ({"SEM": "release"}, [NO_ACQUIRE]),
    "relaxed": ({"SEM": "relaxed"}, [NO_RELEASE, NO_ACQUIRE]),
    # Triton 3.9 puts a barrier of its own before an atomic that releases, 3.4 and 3.6 do not: no reason to rely on it.
    "no barrier": ({"SEM": "relaxed", "BARRIER": False}, [NO_BARRIER, NO_RELEASE, NO_ACQUIRE]),
    "through L1": ({"CACHE": ""}, ["the partials are read through L1"]),
}


@pytest.mark.parametrize("target", CUDA)
@pytest.mark.parametrize(("mistake", "faults"), MISTAKES.values(), ids=MISTAKES)
def test_the_audit_finds_mistakes_of_memory_order(mistake, faults, target):
    arguments = {"x_ptr": "*fp32", "partials_ptr": "*fp32", "arrivals_ptr": "*i32", "out_ptr": "*fp32"}
    arguments |= {"SEM": "acq_rel", "BARRIER": True, "CACHE": ".cg"} | mistake
    assert audit(broken.last_arrival, arguments, target, num_warps=8, enable_fp_fusion=True).order_faults == faults


IN_ORDER = [
    "STG.E",
    "BAR.SYNC",
    "MEMBAR.ALL.GPU",
    "ATOMG.E.ADD.STRONG.GPU",
    "CCTL.IVALL",
    "BAR.SYNC",
    "LDG.E.STRONG.GPU",
]


@pytest.mark.parametrize("missing", range(len(IN_ORDER)), ids=[f"{i}-{opcode}" for i, opcode in enumerate(IN_ORDER)])
def test_every_link_of_the_chain_is_needed(missing):
    assert order_faults(IN_ORDER) == []
    assert order_faults(IN_ORDER[:missing] + IN_ORDER[missing + 1 :]) != []


def test_the_audit_finds_wavefronts_that_do_not_wait():
    what = build(SMALL[0], "gfx942")
    report = audit(what.kernel, {**what.arguments, "RELEASE_EACH_WARP": False}, "gfx942", **what.options)
    assert report.order_faults == ["wavefronts do not wait for their stores before the barrier"]


def test_the_audit_finds_narrow_loads():
    arguments = {"x_ptr": "*bf16:16", "out_ptr": "*fp32", "width": "i32", "BLOCK": 1024}
    report = audit(broken.dot_of_run_time_width, arguments, "sm_90", num_warps=4, enable_fp_fusion=True)
    assert set(report.load_bits["x_ptr"]) == {16}


def test_the_audit_finds_spills():
    arguments = {"x_ptr": "*fp32:16", "out_ptr": "*fp32:16", "BLOCK": 8192}
    report = audit(broken.too_many_registers, arguments, "sm_90", num_warps=1, enable_fp_fusion=True)
    assert report.spills > 0
    assert report.local_bytes > 0
