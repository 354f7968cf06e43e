"""The C++ kernel against the float64 reference, its determinism contract, its errors, and how it is built."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from swift_kernels import checks, cpp, reference, schema
from swift_kernels.state import ScoreState

try:
    cpp.find_compiler()
except cpp.BuildError as error:
    if not cpp.shipped_library().exists():
        pytest.skip(f"no C++ kernel here: {error}", allow_module_level=True)

OP = torch.ops.swift_kernels.score_step.default
ISAS = ["portable", "avx2", "avx512"]
WIDTHS = [1, 7, 576, 1021, 1024, 1025, 2560]
FP32_UNIT_ROUNDOFF = torch.finfo(torch.float32).eps / 2


class Head(NamedTuple):
    weight: Tensor
    bias: Tensor


def make_head(widths: Sequence[int], outputs: int = 2, dtype: torch.dtype = torch.float32, seed: int = 0) -> Head:
    generator = torch.Generator().manual_seed(seed)
    features = sum(widths)
    weight = torch.randn(outputs, features, generator=generator) / math.sqrt(features)
    return Head(weight.to(dtype), torch.randn(outputs, generator=generator).to(dtype))


def make_hidden_states(
    rows: int, widths: Sequence[int], dtype: torch.dtype = torch.float32, seed: int = 1
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, width, generator=generator).to(dtype) for width in widths]


def step(hidden_states: Sequence[Tensor], head: Head, slots: Tensor, state: ScoreState) -> Tensor:
    """One step of the kernel, its scratch and output filled with NaN before; returns `gate_reward`."""
    gate_reward = torch.full((slots.shape[0], 2), math.nan)
    state.partials.fill_(math.nan)
    OP(list(hidden_states), *head, slots, state.sums, state.token_count, state.partials, state.arrivals, gate_reward)
    return gate_reward


def fresh_step(hidden_states: Sequence[Tensor], head: Head) -> Tensor:
    """[rows, 4]: gate, reward and the two sums of one step from an empty state, bit for bit as int32."""
    rows = hidden_states[0].shape[0]
    state = ScoreState(rows, [entry.shape[1] for entry in hidden_states])
    gate_reward = step(hidden_states, head, torch.arange(rows), state)
    return torch.cat([gate_reward, state.sums], dim=1).view(torch.int32)


def assert_within_rounding(gate_reward: Tensor, hidden_states: Sequence[Tensor], head: Head) -> None:
    """Compares gates and rewards with float64, within the rounding of float32 accumulation.

    Inputs convert to float32 exactly. A product passes through at most `depth` roundings on its way into the sum: its
    own (where there is no fused multiply-add), the additions of its accumulator (a chunk has 1024 columns, the fewest
    accumulators are 16: 64 of them), halving 16 lanes (4), the partials (4 accumulators, then 2 additions), the bias.
    So |error| <= depth * u / (1 - depth * u) * (sum |w x| + |bias|), with u the unit roundoff of float32.
    The slope of the sigmoid is at most 1/4; exp, its argument, the addition and the division each round once or twice.
    """
    features = torch.cat([entry.double() for entry in hidden_states], dim=1)
    weight, bias = head.weight.double(), head.bias.double()
    chunks = checks.partials_per_row([entry.shape[1] for entry in hidden_states])
    depth = (1 + 64 + 4 + math.ceil(chunks / 4) + 2 + 1) * FP32_UNIT_ROUNDOFF
    dot_bound = depth / (1 - depth) * (features.abs() @ weight.abs().T + bias.abs())
    gate, reward = reference.gate_and_reward(features @ weight.T + bias)
    assert ((gate_reward[:, 1] - reward).abs() <= dot_bound[:, -1]).all()
    if weight.shape[0] == 1:
        assert (gate_reward[:, 0] == 1).all()
    else:
        assert ((gate_reward[:, 0] - gate).abs() <= dot_bound[:, 0] / 4 + 8 * FP32_UNIT_ROUNDOFF * gate).all()


def assert_sums(state: ScoreState, steps: Sequence[tuple[Tensor, Tensor]]) -> None:
    """The sums against float64 sums of the gates and rewards that the kernel reported.

    Each term is a rounded product, then rounded once for every addition after it.
    """
    expected = torch.zeros_like(state.sums, dtype=torch.float64)
    magnitude = torch.zeros_like(expected)
    count = torch.zeros_like(state.token_count)
    for slots, gate_reward in steps:
        live = slots >= 0
        gate, reward = gate_reward[live].double().unbind(1)
        terms = torch.stack([gate * reward, gate], dim=1)
        expected.index_add_(0, slots[live], terms)
        magnitude.index_add_(0, slots[live], terms.abs())
        count.index_add_(0, slots[live], torch.ones_like(slots[live], dtype=torch.int32))
    roundings = len(steps) + 1
    assert ((state.sums - expected).abs() <= 1.01 * roundings * FP32_UNIT_ROUNDOFF * magnitude).all()
    assert torch.equal(state.token_count, count)


@pytest.fixture(autouse=True, scope="module")
def kernel_loaded() -> None:
    cpp.load()


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("SWIFT_KERNELS_CPU_ISA", request.param)
    try:
        fresh_step(make_hidden_states(1, [1]), make_head([1]))
    except ValueError as error:
        pytest.skip(str(error))
    return request.param


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_the_dispatcher_runs_the_cpp_kernel() -> None:
    assert schema.implementation("cpu") == "cpp"
    assert torch._C._dispatch_has_kernel_for_dispatch_key("swift_kernels::score_step", "CPU")
    assert cpp.load() == cpp.load()


@pytest.mark.parametrize("outputs", [2, 1], ids=["gated", "ungated"])
@pytest.mark.parametrize("weight_dtype", checks.WEIGHT_DTYPES, ids=lambda dtype: f"weight-{dtype}"[13:])
@pytest.mark.parametrize("dtype", checks.HIDDEN_STATE_DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_matches_float64(isa: str, dtype: torch.dtype, weight_dtype: torch.dtype, outputs: int) -> None:
    head = make_head(WIDTHS, outputs, weight_dtype)
    state = ScoreState(9, WIDTHS)
    slots = torch.tensor([4, -1, 0, 8, 2, -7, 1])
    steps = []
    for token in range(3):
        hidden_states = make_hidden_states(7, WIDTHS, dtype, seed=token)
        gate_reward = step(hidden_states, head, slots, state)
        live = slots >= 0
        assert_within_rounding(gate_reward[live], [entry[live] for entry in hidden_states], head)
        assert gate_reward[~live].isnan().all(), "a skipped row was written"
        steps.append((slots, gate_reward))
    assert_sums(state, steps)
    assert state.scores()[[3, 5, 6, 7]].isnan().all()


@pytest.mark.parametrize("rows", [1, 2, 5, 33, 257])
@pytest.mark.parametrize("width", [*WIDTHS, 4096])
def test_one_entry_of_any_width(isa: str, width: int, rows: int) -> None:
    head = make_head([width])
    hidden_states = make_hidden_states(rows, [width], torch.bfloat16)
    state = ScoreState(rows, [width])
    assert_within_rounding(step(hidden_states, head, torch.arange(rows), state), hidden_states, head)


def test_llama_8b_shape(isa: str) -> None:
    widths = [4096] * 33
    head = make_head(widths)
    hidden_states = make_hidden_states(5, widths, torch.bfloat16)
    state = ScoreState(5, widths)
    assert_within_rounding(step(hidden_states, head, torch.arange(5), state), hidden_states, head)


def test_rows_with_a_stride_of_their_own(isa: str) -> None:
    widths = [64, 1025, 7]
    head = make_head(widths)
    hidden_states = make_hidden_states(6, widths, torch.bfloat16)
    last_position = [torch.randn(6, 3, width).bfloat16() for width in widths]
    for whole, entry in zip(last_position, hidden_states, strict=True):
        whole[:, -1] = entry
    views = [whole[:, -1] for whole in last_position]
    views[0] = hidden_states[0].repeat_interleave(2, dim=0)[::2]
    assert not any(view.is_contiguous() for view in views)
    assert torch.equal(fresh_step(views, head), fresh_step(hidden_states, head))


def test_an_expanded_row_and_an_entry_of_no_width(isa: str) -> None:
    head = make_head([40])
    hidden_states = [torch.empty(3, 0), torch.randn(1, 40).expand(3, 40)]
    bits = fresh_step(hidden_states, head)
    assert torch.equal(bits[0], bits[2])
    assert torch.equal(bits, fresh_step([hidden_states[1].contiguous()], head))


def test_no_rows_and_only_skipped_rows(isa: str) -> None:
    widths = [5, 3]
    head = make_head(widths)
    state = ScoreState(2, widths)
    step([torch.empty(0, 5), torch.empty(0, 3)], head, torch.empty(0, dtype=torch.int64), state)
    gate_reward = step(make_hidden_states(2, widths), head, torch.tensor([-1, -1]), state)
    assert not state.sums.any()
    assert not state.token_count.any()
    assert gate_reward.isnan().all()


def test_non_finite_values_stay_in_their_row(isa: str) -> None:
    widths = [33, 1030]
    head = make_head(widths)
    hidden_states = make_hidden_states(9, widths)
    clean = fresh_step(hidden_states, head)
    hidden_states[0][2] = math.nan
    hidden_states[1][5, -1] = math.inf
    bits = fresh_step(hidden_states, head)
    untouched = torch.tensor([0, 1, 3, 4, 6, 7, 8])
    assert torch.equal(bits[untouched], clean[untouched])
    values = bits.view(torch.float32)
    assert values[2].isnan().all()
    assert not values[5, 1].isfinite()


@pytest.mark.parametrize("dtype", checks.HIDDEN_STATE_DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_a_score_is_bitwise_independent_of_its_batch(
    isa: str, dtype: torch.dtype, set_threads: Callable[[int], None]
) -> None:
    widths = [576, 1025, 2560]
    head = make_head(widths)
    every = make_hidden_states(257, widths, dtype)
    expected = fresh_step(every, head)
    generator = torch.Generator().manual_seed(3)
    for threads in (1, 2):
        set_threads(threads)
        for size in (1, 7, 64, 257):
            rows = torch.randperm(257, generator=generator)[:size]
            batch = [entry[rows] for entry in every]
            assert torch.equal(fresh_step(batch, head), expected[rows])
            poisoned = [torch.stack([entry, torch.full_like(entry, math.nan)], dim=1).flatten(0, 1) for entry in batch]
            assert torch.equal(fresh_step(poisoned, head)[::2], expected[rows])


def test_every_run_gives_the_same_bits(isa: str, set_threads: Callable[[int], None]) -> None:
    widths = [4096] * 5
    head = make_head(widths)
    hidden_states = make_hidden_states(13, widths, torch.bfloat16)
    set_threads(2)
    expected = fresh_step(hidden_states, head)
    assert all(torch.equal(fresh_step(hidden_states, head), expected) for _ in range(20))


def test_neighbours_that_are_skipped_change_nothing(isa: str) -> None:
    widths = [700, 1025]
    head = make_head(widths)
    hidden_states = make_hidden_states(40, widths, torch.float16)
    expected = fresh_step(hidden_states, head).view(torch.float32)[:, :2]
    slots = torch.where(torch.arange(40) % 3 == 0, -1, torch.arange(40))
    gate_reward = step(hidden_states, head, slots, ScoreState(40, widths))
    assert torch.equal(gate_reward[slots >= 0], expected[slots >= 0])


def _step_arguments() -> dict[str, object]:
    widths = [6, 4]
    state = ScoreState(5, widths)
    head = make_head(widths)
    return {
        "hidden_states": make_hidden_states(3, widths),
        "weight": head.weight,
        "bias": head.bias,
        "slots": torch.tensor([0, 3, 1]),
        "sums": state.sums,
        "token_count": state.token_count,
        "partials": state.partials,
        "arrivals": state.arrivals,
        "gate_reward": None,
    }


BAD_ARGUMENTS = {
    "no-entries": {"hidden_states": []},
    "entry-not-2d": {"hidden_states": [torch.zeros(3, 6), torch.zeros(3, 2, 2)]},
    "rows-differ": {"hidden_states": [torch.zeros(3, 6), torch.zeros(2, 4)]},
    "dtypes-differ": {"hidden_states": [torch.zeros(3, 6), torch.zeros(3, 4).half()]},
    "column-stride": {"hidden_states": [torch.zeros(3, 6), torch.zeros(4, 3).T]},
    "float64": {"hidden_states": [torch.zeros(3, 6).double(), torch.zeros(3, 4).double()]},
    "weight-too-narrow": {"weight": torch.zeros(2, 9)},
    "weight-three-outputs": {"weight": torch.zeros(3, 10)},
    "weight-1d": {"weight": torch.zeros(10)},
    "weight-not-contiguous": {"weight": torch.zeros(10, 2).T},
    "weight-float16": {"weight": torch.zeros(2, 10).half(), "bias": torch.zeros(2).half()},
    "bias-other-dtype": {"bias": torch.zeros(2).bfloat16()},
    "bias-too-long": {"bias": torch.zeros(3)},
    "slots-int32": {"slots": torch.tensor([0, 3, 1], dtype=torch.int32)},
    "slots-too-few": {"slots": torch.tensor([0, 3])},
    "slots-strided": {"slots": torch.tensor([0, 3, 1, 2, 2])[::2]},
    "slots-out-of-range": {"slots": torch.tensor([0, 5, 1])},
    "slots-repeated": {"slots": torch.tensor([1, -1, 1])},
    "sums-float64": {"sums": torch.zeros(5, 2).double()},
    "sums-three-columns": {"sums": torch.zeros(5, 3)},
    "token-count-int64": {"token_count": torch.zeros(5, dtype=torch.int64)},
    "token-count-too-long": {"token_count": torch.zeros(6, dtype=torch.int32)},
    "partials-too-few-rows": {"partials": torch.zeros(2, 2, 2)},
    "partials-of-other-widths": {"partials": torch.zeros(5, 3, 2)},
    "arrivals-too-few": {"arrivals": torch.zeros(2, dtype=torch.int32)},
    "gate-reward-float16": {"gate_reward": torch.zeros(3, 2).half()},
    "gate-reward-too-few-rows": {"gate_reward": torch.zeros(2, 2)},
}


def check_in_python(arguments: dict[str, object]) -> None:
    checks.check_step(**arguments)
    checks.check_slots(arguments["slots"], 5)


@pytest.mark.parametrize("bad", BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_bad_arguments_raise_the_message_of_the_schema_and_write_nothing(bad: dict[str, object]) -> None:
    arguments = _step_arguments() | bad
    with pytest.raises(ValueError, match=r"expected|every entry") as expected:
        check_in_python(arguments)
    sums, token_count = arguments["sums"], arguments["token_count"]
    assert isinstance(sums, Tensor)
    assert isinstance(token_count, Tensor)
    sums.fill_(7)
    token_count.fill_(7)
    with pytest.raises(ValueError, match=r"expected|every entry") as raised:
        OP(*arguments.values())
    assert str(raised.value) == str(expected.value)
    assert (sums == 7).all()
    assert (token_count == 7).all()


@pytest.mark.parametrize("name", ["sse", "AVX2 "])
def test_an_unknown_instruction_set_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWIFT_KERNELS_CPU_ISA", name)
    with pytest.raises(ValueError, match=f"SWIFT_KERNELS_CPU_ISA is {name}: expected avx512, avx2 or portable"):
        fresh_step(make_hidden_states(1, [1]), make_head([1]))


@pytest.mark.parametrize("outputs", [2, 1], ids=["gated", "ungated"])
@pytest.mark.parametrize("with_gate_reward", [True, False], ids=["gate_reward", "no-gate_reward"])
def test_opcheck(outputs: int, with_gate_reward: bool) -> None:
    widths = [6, 1025]
    state = ScoreState(4, widths)
    arguments = (
        make_hidden_states(3, widths, torch.bfloat16),
        *make_head(widths, outputs),
        torch.tensor([2, -1, 0]),
        state.sums,
        state.token_count,
        state.partials,
        state.arrivals,
        torch.zeros(3, 2) if with_gate_reward else None,
    )
    torch.library.opcheck(OP, arguments)


@pytest.mark.slow
def test_fullgraph_compile_equals_eager() -> None:
    widths = [48, 1030]
    head = make_head(widths)
    slots = torch.tensor([1, -1, 2, 0])
    projection = torch.randn(48, 1030, generator=torch.Generator().manual_seed(5))

    def loop_step(hidden: Tensor, state: ScoreState) -> Tensor:
        hidden_states = [hidden, hidden @ projection]
        schema.score_step(hidden_states, *head, slots, state.sums, state.token_count, state.partials, state.arrivals)
        return state.scores()

    compiled = torch.compile(loop_step, fullgraph=True)
    eager_state, compiled_state = ScoreState(3, widths, max_rows=4), ScoreState(3, widths, max_rows=4)
    for token in range(3):
        hidden = torch.randn(4, 48, generator=torch.Generator().manual_seed(token))
        assert torch.equal(compiled(hidden, compiled_state), loop_step(hidden, eager_state))
    assert torch.equal(compiled_state.sums, eager_state.sums)
    assert torch.equal(compiled_state.token_count, eager_state.token_count)


# How it is built. Each test runs in a process and a cache of its own.

SCORE_ONCE = """
import warnings
import torch
from swift_kernels import schema
from swift_kernels.state import ScoreState

state = ScoreState(1, [3])
arguments = (
    [torch.ones(1, 3)], torch.tensor([[0.0] * 3, [1.0] * 3]), torch.zeros(2), torch.tensor([0]),
    state.sums, state.token_count, state.partials, state.arrivals,
)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    schema.score_step(*arguments)
    schema.score_step(*arguments)
for warning in caught:
    print(warning.category.__name__, warning.message)
print(schema.implementation("cpu"), state.scores().item(), state.token_count.item())
"""


def score_once(**environment: str) -> subprocess.Popen[str]:
    root = str(Path(cpp.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, *sys.path]), **environment}
    environment.pop("SWIFT_KERNELS_IMPL", None)
    return subprocess.Popen(
        [sys.executable, "-c", SCORE_ONCE],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(process: subprocess.Popen[str]) -> list[str]:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert err == "", "loading the kernel is quiet"
    return out.splitlines()


def fake_compiler(folder: Path, script: str) -> str:
    compiler = folder / "compiler"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    return str(compiler)


needs_first_use_build = pytest.mark.skipif(
    cpp.shipped_library().exists(), reason="this installation ships its library and builds nothing"
)


@needs_first_use_build
def test_without_a_compiler_the_reference_runs_with_one_warning(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    process = score_once(PATH=str(tmp_path / "bin"), CXX="", SWIFT_KERNELS_CACHE=str(tmp_path))
    warning, result = finished(process)
    assert warning.startswith("RuntimeWarning swift_kernels scores on cpu with its plain PyTorch reference")
    assert "there is no C++ compiler; install g++" in warning
    assert result == "reference 3.0 2"


@needs_first_use_build
@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo 'In file included from x.h:1:'\necho 'x.cpp:3:5: error: boom' >&2\nexit 1", "x.cpp:3:5: error: boom"),
        ("exit 3", "exit status 3"),
    ],
    ids=["compile-error", "silent"],
)
def test_a_failing_compiler_is_reported_in_one_line(tmp_path: Path, script: str, reason: str) -> None:
    process = score_once(CXX=fake_compiler(tmp_path, script), SWIFT_KERNELS_CACHE=str(tmp_path / "cache"))
    warning, result = finished(process)
    assert warning.endswith(f"the C++ compiler fails: {reason}")
    assert result == "reference 3.0 2"
    assert not list((tmp_path / "cache").rglob("build-*")), "an unfinished build was left behind"


@needs_first_use_build
def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    warning, result = finished(score_once(SWIFT_KERNELS_CACHE=str(tmp_path / "file")))
    assert "set SWIFT_KERNELS_CACHE to a folder" in warning
    assert result == "reference 3.0 2"


@needs_first_use_build
def test_two_processes_may_build_at_once(tmp_path: Path) -> None:
    # Stands for a compiler that writes its output slowly: a reader must never see half a library.
    copy_slowly = f"""
while [ "$1" != -o ]; do [ "$1" = -shared ] && link=1; shift; done
[ -z "$link" ] && exit 0
head -c 5000 '{cpp.load()}' > "$2"; sleep 0.3; tail -c +5001 '{cpp.load()}' >> "$2"
"""
    environment = {"CXX": fake_compiler(tmp_path, copy_slowly), "SWIFT_KERNELS_CACHE": str(tmp_path / "cache")}
    processes = [score_once(**environment) for _ in range(2)]
    assert [finished(process) for process in processes] == [["cpp 3.0 2"]] * 2
    assert len(list((tmp_path / "cache").rglob("*.so"))) == 1


def test_threads_that_load_at_once_get_one_library() -> None:
    paths: list[Path] = []
    threads = [threading.Thread(target=lambda: paths.append(cpp.load())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(paths) == 4
    assert len(set(paths)) == 1
