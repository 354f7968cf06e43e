"""The compiled ops of whole sequences, looked at for GPUs that are not here, and what a call of theirs launches."""

from __future__ import annotations

import shutil
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton.knobs

from swift_kernels.ops.pool import pool_backward_triton, pool_triton
from swift_kernels.ops.project import GRAD_BLOCK, project_backward_triton, project_triton
from tests.aot.audit import TARGETS, Audit, audit
from tests.aot.fake_driver import FakeDriver, fake_driver
from tests.aot.variants_sequence import SMALL, Other, Variant, build

if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET=1 replaces the compiler", allow_module_level=True)

FORWARD, BACKWARD = Variant("project", (4096,) * 33), Variant("backward", (4096,) * 33)
EVERYWHERE = [(variant, target) for variant in (FORWARD, BACKWARD) for target in TARGETS]
"""One head of Llama-3.1-8B on every target; all others on sm_90."""


def audit_build(variant: Variant | Other, target: str) -> Audit:
    what = build(variant, target)
    return audit(what.kernel, what.arguments, target, **what.options)


@pytest.mark.parametrize(
    ("variant", "target"), EVERYWHERE + [(v, "sm_90") for v in SMALL if (v, "sm_90") not in EVERYWHERE], ids=str
)
def test_nothing_spills(variant, target):
    report = audit_build(variant, target)
    assert (report.spills, report.local_bytes) == (0, 0)


@pytest.mark.parametrize(
    ("variant", "target"),
    [(v, t) for v, t in EVERYWHERE if t != "gfx942"]
    + [
        (v, "sm_90")
        for v in SMALL
        if isinstance(v, Variant) and v not in (FORWARD, BACKWARD) and all(width % 8 == 0 for width in v.widths)
    ],
    ids=str,
)
def test_hidden_states_are_read_16_bytes_at_a_time_and_once_for_all_outputs(variant, target):
    report = audit_build(variant, target)
    # Forward, a thread holds 1/32 of a row of a chunk in 16-bit dtypes, one row of each of two tiles. Backward,
    # it holds 8 columns of four rows. In fp32 there are twice as many loads.
    loads = 8 if variant.op == "project" else 4
    assert report.load_bits["hidden_states"] == {128: loads * variant.dtype.itemsize // 2}
    ptx, sass = report.wide_loads
    assert ptx == sass


@pytest.mark.parametrize("op", ["project", "backward"])
def test_odd_widths_compile_alike_whatever_the_alignment(op):
    """Else the order of additions, and the last bits of a score, would follow the alignment of a batch's tensors."""
    what = build(Variant(op, (1021,) * 2), "sm_90")
    unaligned = {**what.arguments, "hidden_states": ("*bf16",) * 2}
    reports = [
        audit(what.kernel, {**arguments, "row_strides": (stride,)}, "sm_90", **what.options)
        for arguments, stride in ((what.arguments, "i32:16"), (unaligned, "i32"))
    ]
    assert reports[0].load_bits == reports[1].load_bits
    assert set(reports[0].load_bits["hidden_states"]) == {16}


def test_programs_fit_a_multiprocessor_of_an_h200():
    """Two of 256 threads forward, each with eight loads of the hidden states under way in every thread, and four of 128
    threads backward, each with four."""
    assert 2 * 256 * audit_build(FORWARD, "sm_90").registers <= 65_536
    assert 4 * 128 * audit_build(BACKWARD, "sm_90").registers <= 65_536


@pytest.fixture
def driver():
    if torch.cuda.is_available() or not shutil.which("cc"):
        pytest.skip("needs a C compiler, and no GPU")
    with fake_driver() as driver:
        yield driver


def entries_of(tokens: int, widths: Sequence[int] = (64, 1032), padding: int = 0, offset: int = 0) -> list[Tensor]:
    return [
        torch.zeros(tokens * (width + padding) + offset, dtype=torch.bfloat16)[offset:].view(tokens, width + padding)[
            :, :width
        ]
        for width in widths
    ]


def call_all(entries: list[Tensor], outputs: int = 2, cu_dtype: torch.dtype = torch.int64) -> None:
    """Every op of a batch with one sequence. Nothing runs: results are what was in memory."""
    tokens, features = entries[0].shape[0], sum(entry.shape[1] for entry in entries)
    cu_seqlens = torch.tensor([0, tokens], dtype=cu_dtype)
    logits = project_triton(entries, torch.zeros(outputs, features), torch.zeros(outputs))
    scores, gate_reward = pool_triton(logits, cu_seqlens, True)
    grad_logits = pool_backward_triton(torch.zeros_like(scores), scores, gate_reward, cu_seqlens, True)
    project_backward_triton(entries, grad_logits)


def test_no_number_of_tokens_and_no_alignment_compiles_anything(driver: FakeDriver):
    call_all(entries_of(3))
    compiled = len(driver.compilations)
    # Those six kernels, of which adding parts has one build with a bias and one without.
    call_all(entries_of(GRAD_BLOCK + 1))
    assert (compiled, len(driver.compilations)) == (5, 6)
    for tokens in (1, 2, 16, 17, GRAD_BLOCK, 4 * GRAD_BLOCK, 20 * GRAD_BLOCK + 3):
        call_all(entries_of(tokens))
    for padding, offset in ((16, 0), (1, 0), (0, 8), (0, 3), (3, 5)):
        call_all(entries_of(5, (64, 1032), padding, offset))
    assert len(driver.compilations) == 6, driver.compilations[6:]


def test_output_counts_share_builds(driver: FakeDriver):
    call_all(entries_of(GRAD_BLOCK + 1), outputs=6)
    compiled = len(driver.compilations)
    call_all(entries_of(5), outputs=8)
    assert len(driver.compilations) == compiled


def test_outputs_share_reads_in_groups(driver: FakeDriver):
    """16 outputs forward and 8 backward; 4 backward where odd widths make a thread load columns one by one."""
    for widths, forward, backward in (((64,), 2, 3), ((67,), 2, 6)):
        before = driver.launch_count
        project_triton(entries_of(5, widths), torch.zeros(22, widths[0]), torch.zeros(22))
        launches = [driver.last(back).kernel for back in reversed(range(driver.launch_count - before))]
        assert launches == ["_project_kernel", "_add_parts_kernel"] * forward
        before = driver.launch_count
        project_backward_triton(entries_of(5, widths), torch.zeros(5, 22))
        launches = [driver.last(back).kernel for back in reversed(range(driver.launch_count - before))]
        assert launches == ["_project_backward_kernel"] * backward


def test_nothing_is_launched_for_no_tokens_no_columns_and_no_sequences(driver: FakeDriver):
    call_all(entries_of(0))  # of which only the score of the empty sequence has to be written
    assert [driver.last().kernel, driver.launch_count] == ["_pool_kernel", 1]
    project_triton(entries_of(3, (0,)), torch.zeros(2, 0), torch.zeros(2))
    project_backward_triton(entries_of(3, (0,)), torch.zeros(3, 2))
    pool_triton(torch.zeros(0, 2), torch.zeros(1, dtype=torch.int64), True)
    assert driver.launch_count == 1
