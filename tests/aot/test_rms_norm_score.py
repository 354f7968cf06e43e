"""The compiled norms, looked at for GPUs that are not here, and what a call of theirs launches."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

import triton.knobs

from swift_kernels import schema
from swift_kernels.ops.rms_norm_score import MAX_BLOCK, rms_norm_score_triton, rms_norm_triton
from tests.aot.audit import TARGETS, audit, compile_kernel, disassemble, instructions
from tests.aot.fake_driver import FakeDriver, fake_driver
from tests.aot.report import noted_of_this_triton
from tests.aot.variants_norm import SMALL, Variant, build

if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET=1 replaces the compiler", allow_module_level=True)

SCORED = Variant(4096, scored="input")
ALIGNED = [variant for variant in SMALL if variant.width % 8 == 0 and variant.width <= MAX_BLOCK]
EVERYWHERE = [(variant, target) for variant in (SCORED, SMALL[2]) for target in TARGETS]
"""The norm that a step calls most, and the one that closes it: on every target. All others on sm_90."""


@pytest.mark.parametrize(
    ("variant", "target"), EVERYWHERE + [(v, "sm_90") for v in SMALL if (v, "sm_90") not in EVERYWHERE], ids=str
)
def test_nothing_spills(variant, target):
    what = build(variant, target)
    report = audit(what.kernel, what.arguments, target, **what.options)
    noted = noted_of_this_triton(f"norm | {variant} | {target}")
    assert (report.spills, report.local_bytes) == (noted.get("spills", 0), noted.get("local_bytes", 0))


@pytest.mark.parametrize(
    ("variant", "target"),
    [(v, t) for v, t in EVERYWHERE if t != "gfx942"] + [(v, "sm_90") for v in ALIGNED if v not in (SCORED, SMALL[2])],
    ids=str,
)
def test_all_is_read_and_written_16_bytes_at_a_time_and_once(variant, target):
    what = build(variant, target)
    report = audit(what.kernel, what.arguments, target, **what.options)
    columns = what.arguments["BLOCK"] // (32 * what.options["num_warps"])  # of a thread
    loads = columns * variant.dtype.itemsize // 16
    assert report.load_bits["hidden_states_ptr"] == {128: loads}
    assert report.load_bits["norm_weight_ptr"] == {128: loads}
    if variant.scored:
        outputs = 2 if variant.gated else 1
        assert report.load_bits["weight_ptr"] == {128: outputs * columns * variant.weight_dtype.itemsize // 16}
    ptx, sass = report.wide_loads
    assert ptx == sass
    compiled = compile_kernel(what.kernel, what.arguments, target, **what.options)
    opcodes = [opcode for opcode, _ in instructions(disassemble(compiled.asm["cubin"]))]
    assert sum(opcode.startswith("STG") and ".128" in opcode for opcode in opcodes) == loads


def test_wide_rows_are_read_16_bytes_at_a_time():
    what = build(Variant(2 * MAX_BLOCK, scored="output", last=True), "sm_90")
    report = audit(what.kernel, what.arguments, "sm_90", **what.options)
    for argument in ("hidden_states_ptr", "norm_weight_ptr", "weight_ptr"):
        assert set(report.load_bits[argument]) == {128}


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: f"W {str(dtype)[6:]}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=lambda dtype: str(dtype)[6:])
def test_a_scored_row_is_laid_out_as_one_that_is_not(dtype, weight_dtype):
    """Else scoring would change the order in which squares are added up, and with it the last bits of the norm."""
    plain, scored = (
        build(Variant(576, dtype, scored=what, weight_dtype=weight_dtype), "sm_90") for what in (None, "input")
    )
    layouts = []
    for what in (plain, scored):
        ir = compile_kernel(what.kernel, what.arguments, "sm_90", **what.options).asm["ttgir"]
        squares = re.search(r'"tt.reduce"\(.*?\}\) : \(tensor<1024xf32, (#\w+)>\)', ir, re.DOTALL)[1]
        layouts.append(re.search(rf"^{squares} = (.*)$", ir, re.MULTILINE)[1])
    assert layouts[0] == layouts[1]


def test_three_scored_programs_fit_a_multiprocessor_of_an_h200():
    what = build(SCORED, "sm_90")
    registers = audit(what.kernel, what.arguments, "sm_90", **what.options).registers
    assert 3 * 32 * what.options["num_warps"] * registers <= 65_536


@pytest.fixture
def driver():
    if torch.cuda.is_available() or not shutil.which("cc"):
        pytest.skip("needs a C compiler, and no GPU")
    with fake_driver() as driver:
        yield driver


def rows_of(rows: int, width: int, padding: int = 0, offset: int = 0) -> Tensor:
    storage = torch.zeros(rows * (width + padding) + offset, dtype=torch.bfloat16)
    return storage[offset:].view(rows, width + padding)[:, :width]


def call(rows: Tensor, norm_weight: Tensor, head: tuple[Tensor, Tensor], entry: int, eps: float = 1e-5) -> list[Tensor]:
    """Scores the rows as `entry`; returns all tensors of the call but the norm's output."""
    count, width = rows.shape
    state = (torch.arange(count), torch.zeros(count, 2), torch.zeros(count, dtype=torch.int32), torch.zeros(99, 4, 2))
    rms_norm_score_triton(rows, norm_weight, eps, False, True, *head, entry, entry * width, False, False, *state)
    return [rows, norm_weight, *head, *state]


@pytest.mark.parametrize("width", [64, 67], ids=["16-byte loads", "odd width"])
def test_no_number_of_rows_no_entry_and_no_layout_compiles_anything(driver: FakeDriver, width):
    norm_weight = torch.zeros(width, dtype=torch.bfloat16)
    head = torch.zeros(2, 4 * width), torch.zeros(2)
    call(rows_of(3, width), norm_weight, head, 0)
    rms_norm_triton(rows_of(3, width), norm_weight, 1e-5, False, True)
    assert len(driver.compilations) == 2
    for rows in (1, 2, 16, 17, 48):
        for entry in (1, 2, 3):
            call(rows_of(rows, width), norm_weight, head, entry, eps=float(rows))
    for padding, offset in ((8, 0), (1, 0), (0, 8), (0, 3), (3, 5), (width, 0), (-1 + 16 - width % 16, 0)):
        call(rows_of(5, width, padding, offset), norm_weight, head, 0)
        rms_norm_triton(rows_of(5, width, padding, offset), norm_weight, 1e-6, False, True)
    shifted = torch.zeros(width + 1, dtype=torch.bfloat16)[1:]
    call(rows_of(5, width), shifted, (torch.zeros(8 * width + 1)[1:].view(2, -1), head[1]), 0)
    assert len(driver.compilations) == 2, driver.compilations[2:]


def test_a_launch_has_the_addresses_and_is_the_same_again(driver: FakeDriver):
    norm_weight, head = torch.zeros(64, dtype=torch.bfloat16), (torch.zeros(2, 256), torch.zeros(2))
    rows = rows_of(3, 64, padding=8)
    first_count = driver.launch_count
    for _ in range(3):
        tensors = call(rows, norm_weight, head, 2)
        launched = driver.last()
        assert launched.grid == (3, 1, 1)
        assert launched.parameters[: len(tensors)] == tuple(tensor.data_ptr() for tensor in tensors)
        # After the address of the output: row stride, the bits of eps, entry, first feature, entries of a row, slots.
        row_stride, _, *entry = launched.parameters[len(tensors) + 1 :]
        assert (row_stride, *entry) == (72, 2, 128, 4, 3)
    assert driver.launch_count == first_count + 3
    assert len(driver.compilations) == 1


def test_what_is_not_aligned_is_copied(driver: FakeDriver):
    norm_weight, head = torch.zeros(64, dtype=torch.bfloat16), (torch.zeros(2, 256), torch.zeros(2))
    call(rows_of(3, 64), norm_weight, head, 0)
    for padding, offset in ((1, 0), (0, 3)):
        rows = rows_of(3, 64, padding, offset)
        call(rows, norm_weight, head, 0)
        address, norm_weight_address = driver.last().parameters[:2]
        assert address % 16 == 0
        assert address != rows.data_ptr()
        assert norm_weight_address == norm_weight.data_ptr() or norm_weight_address % 16 == 0


def operations(rows: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Both ops on these rows, as a model's forward calls them."""
    count, width = rows.shape
    norm = (rows, torch.zeros(width, dtype=torch.bfloat16), 1e-5, False, True)
    head = (torch.zeros(2, 4 * width), torch.zeros(2))
    state = (torch.arange(count), torch.zeros(count, 2), torch.zeros(count, dtype=torch.int32), torch.zeros(99, 4, 2))
    return {
        "rms_norm": lambda: schema.rms_norm(*norm),
        "rms_norm_score": lambda: schema.rms_norm_score(*norm, *head, 0, 0, False, False, *state),
    }


@pytest.mark.parametrize("op", ["rms_norm", "rms_norm_score"])
@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad])
def test_decoding_skips_the_dispatcher(driver: FakeDriver, monkeypatch, op, context):
    run = operations(rows_of(3, 64))[op]
    monkeypatch.setattr(schema, "_select", None)  # what an op that is dispatched asks first
    with context():
        for _ in range(3):
            run()
    assert driver.launch_count == 3
    with pytest.raises(TypeError):
        run()  # with gradients, which the dispatcher would have to refuse or record


@pytest.mark.parametrize("op", ["rms_norm", "rms_norm_score"])
def test_what_has_to_see_the_op_sees_it(driver: FakeDriver, op):
    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function.name())
            return function(*args, **(kwargs or {}))

    run = operations(rows_of(3, 64))[op]
    with torch.no_grad():
        for _ in range(2):
            seen: list[str] = []
            with Seen():
                run()
            assert f"swift_kernels::{op}" in seen
            run()
        with pytest.raises(ValueError, match="meta"):
            operations(rows_of(3, 64).to("meta"))[op]()
    assert driver.launch_count == 4


def test_nothing_is_launched_for_no_rows(driver: FakeDriver):
    call(rows_of(0, 64), torch.zeros(64, dtype=torch.bfloat16), (torch.zeros(2, 256), torch.zeros(2)), 0)
    assert driver.launch_count == 0


def test_no_argument_is_specialised_on():
    what = build(SCORED, "sm_90")
    run_time = [name for name, value in what.arguments.items() if isinstance(value, str)]
    assert [
        name for name in run_time if not what.kernel.params[what.kernel.arg_names.index(name)].do_not_specialize
    ] == []
    assert not any(re.search(r":\d+$", what.arguments[name]) for name in run_time)
