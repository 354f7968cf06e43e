"""What a step hands to CUDA, how it gets there and what it compiles, on a driver that launches nothing."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

import triton.knobs

from swift_kernels import SwiftHead, schema
from swift_kernels.ops import launch, score_step
from swift_kernels.state import ScoreState
from tests.aot.fake_driver import FakeDriver, fake_driver, forget

if triton.knobs.runtime.interpret or torch.cuda.is_available() or not shutil.which("cc"):
    pytest.skip("needs Triton's compiler, a C compiler, and no GPU", allow_module_level=True)

WIDTHS = (64, 1032)


@pytest.fixture(params=["guards", "keys"])
def driver(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """The fake driver, with nothing planned or compiled yet; plans are found through guards, or without."""
    if request.param == "keys":
        monkeypatch.setattr(launch, "TensorGuards", None)
    with fake_driver() as driver:
        yield driver


with_guards = pytest.mark.parametrize("driver", ["guards"], indirect=True)


@dataclass
class Step:
    hidden_states: list[Tensor]
    head: SwiftHead
    state: ScoreState
    slots: Tensor
    gate_reward: Tensor | None = None

    @property
    def arguments(self) -> tuple[Any, ...]:
        head, state = self.head, self.state
        scratch = (state.partials, state.arrivals)
        fixed = (head.weight, head.bias, self.slots, state.sums, state.token_count, *scratch, self.gate_reward)
        return (self.hidden_states, *fixed)

    def run(self) -> None:
        self.head.step(self.hidden_states, self.state, self.slots, self.gate_reward)


def make_step(
    widths: Sequence[int] = WIDTHS,
    rows: int = 3,
    dtype: torch.dtype = torch.bfloat16,
    padding: int = 0,
    gate_reward: bool = False,
    offset: int = 0,
) -> Step:
    """`offset` elements before the first of every entry, `padding` between the rows."""
    entries = [
        torch.zeros(rows * (width + padding) + offset, dtype=dtype)[offset:].view(rows, -1)[:, :width]
        for width in widths
    ]
    head = SwiftHead(widths)
    state = head.init_state(rows, max_rows=512)
    return Step(entries, head, state, torch.arange(rows), torch.zeros(rows, 2) if gate_reward else None)


STEPS: dict[str, dict[str, Any]] = {
    "33 x 4096": {"widths": (4096,) * 33, "rows": 64},
    "gate_reward": {"gate_reward": True},
    "float32": {"dtype": torch.float32},
    "padded rows": {"padding": 24},
    "padded by 16 bytes": {"padding": 8},
    "a stride of one load": {"widths": (8, 8)},
    "odd widths": {"widths": (67,), "rows": 33},
    "odd widths, unaligned": {"widths": (67, 64), "offset": 1},
}


@pytest.mark.parametrize("options", STEPS.values(), ids=STEPS)
def test_launches_are_what_triton_makes_of_the_same_step(driver: FakeDriver, options):
    step = make_step(**options)
    step.run()
    first = driver.last()
    addresses = [tensor.data_ptr() for tensor in score_step._tensors(*step.arguments)]
    assert [value for value in first.parameters if value in addresses] == addresses
    assert first.parameters[-1] == step.slots.shape[0]
    assert (first.threads, first.stream) == (256, driver.stream)
    for again in (step.run, step.run, lambda: score_step.score_step_triton(*step.arguments)):
        again()
        assert driver.last() == first
    forget()
    step.run()
    assert driver.last() == first
    assert (driver.launch_count, len(driver.compilations)) == (5, 1)


@with_guards
def test_a_launch_asks_cuda_about_no_pointer(driver: FakeDriver):
    step = make_step()
    step.run()
    asked = driver.pointer_queries
    step.run()
    assert driver.pointer_queries == asked


def test_after_one_step_no_number_of_rows_no_slots_and_no_alignment_compile_anything(driver: FakeDriver):
    head = SwiftHead(WIDTHS)
    head.warmup(dtype=torch.bfloat16, gate_reward=True)
    assert len(driver.compilations) == 2
    entries = [torch.zeros(512, width, dtype=torch.bfloat16) for width in WIDTHS]
    for unaligned in range(2):
        state = head.init_state(1, max_rows=512)
        state.sums = torch.zeros(2 + unaligned)[unaligned:].view(1, 2)
        gate_reward = torch.zeros(1024 + unaligned)[unaligned:].view(512, 2)
        for rows in range(1, 513):
            slots = torch.full((rows + unaligned,), rows % 5 - 1)[unaligned:]
            hidden_states = [entry[:rows] for entry in entries]
            head.step(hidden_states, state, slots)
            head.step(hidden_states, state, slots, gate_reward[:rows])
    assert len(driver.compilations) == 2
    assert driver.last().grid == (3, 16, 1)


def test_what_alignment_changes(driver: FakeDriver):
    """Entries are copied to where they can be read 16 bytes at a time; a weight that cannot be has its own build."""
    head = SwiftHead(WIDTHS)
    aligned, shifted = make_step(), make_step(offset=1)
    assert aligned.hidden_states[0].stride() == shifted.hidden_states[0].stride()
    aligned.run()
    first = driver.last()
    for step in (shifted, aligned, shifted):
        step.run()
        assert driver.last().build == first.build
        assert all(address % 16 == 0 for address in driver.last().parameters[:2])
    assert len(driver.compilations) == 1
    weight = torch.zeros(head.weight.numel() + 1)[1:].view_as(head.weight)
    for _ in range(2):
        schema.score_step(aligned.hidden_states, weight, *aligned.arguments[2:])
        assert driver.last().build != first.build
        aligned.run()
        assert driver.last() == first
    assert len(driver.compilations) == 2


@pytest.mark.parametrize("padding", [8, 16])
def test_rows_are_read_where_they_lie(driver: FakeDriver, padding):
    step = make_step()
    step.run()
    contiguous = driver.last()
    step.hidden_states = make_step(padding=padding).hidden_states
    for _ in range(2):
        step.run()
    padded = driver.last()
    assert padded.parameters[2:4] == tuple((width + padding) // 8 for width in WIDTHS)
    assert contiguous.parameters[2:4] == tuple(width // 8 for width in WIDTHS)
    forget()
    step.run()
    assert driver.last() == padded


# What a step is made of, and something else in its place that must not be launched with.
OTHERS: dict[str, Callable[[Step], None]] = {
    "one entry less": lambda step: step.hidden_states.pop(),
    "an entry of other rows": lambda step: step.hidden_states.__setitem__(1, step.hidden_states[1][:2]),
    "an entry of another width": lambda step: step.hidden_states.__setitem__(1, step.hidden_states[0]),
    "an entry of another dtype": lambda step: step.hidden_states.__setitem__(1, step.hidden_states[1].half()),
    "an entry of other strides": lambda step: step.hidden_states.__setitem__(1, step.hidden_states[1].T.contiguous().T),
    "an entry elsewhere": lambda step: step.hidden_states.__setitem__(1, step.hidden_states[1].to("meta")),
    "a head of another dtype": lambda step: setattr(step.head, "weight", nn.Parameter(step.head.weight.bfloat16())),
    "another bias": lambda step: setattr(step.head, "bias", nn.Parameter(step.head.bias[:1])),
    "fewer slots": lambda step: setattr(step, "slots", step.slots[:2]),
    "slots of another dtype": lambda step: setattr(step, "slots", step.slots.int()),
    "slots with gaps": lambda step: setattr(step, "slots", torch.zeros(3, 2).long()[:, 0]),
    "sums of another dtype": lambda step: setattr(step.state, "sums", step.state.sums.double()),
    "a short token_count": lambda step: setattr(step.state, "token_count", step.state.token_count[:1]),
    "short partials": lambda step: setattr(step.state, "partials", step.state.partials[:2]),
    "short arrivals": lambda step: setattr(step.state, "arrivals", step.state.arrivals[:2]),
    "gate_reward of other rows": lambda step: setattr(step, "gate_reward", torch.zeros(4, 2)),
}


@pytest.mark.parametrize("change", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("gate_reward", [False, True], ids=["", "gate_reward"])
@with_guards
def test_a_step_that_does_not_fit_is_refused_after_any_number_that_did(driver: FakeDriver, gate_reward, change):
    step = make_step(gate_reward=gate_reward)
    step.run()
    step.run()
    change(step)
    with pytest.raises(ValueError, match=r"expected|the same rows|one dtype and device"):
        step.run()
    assert driver.launch_count == 2


def test_a_capture_does_not_compile(driver: FakeDriver, monkeypatch):
    capturing = False
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    step, traced = make_step(), make_step(gate_reward=True)
    capturing = True
    with pytest.raises(RuntimeError, match=r"not compiled yet .* call SwiftHead.warmup\(\) before the capture"):
        step.run()
    capturing = False
    step.head.warmup(dtype=torch.bfloat16)
    capturing = True
    step.run()
    make_step(rows=77).run()
    with pytest.raises(RuntimeError, match="not compiled yet"):
        traced.run()
    assert len(driver.compilations) == 1


class Seen(TorchDispatchMode):
    """The ops that come by."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.ops.append(op.name())
        return None if "score_step" in op.name() else op(*args, **(kwargs or {}))


@with_guards
def test_modes_and_tracers_see_the_op_before_and_after_steps_that_skipped_the_dispatcher(driver: FakeDriver):
    step = make_step()
    flat = [*step.hidden_states, *step.arguments[1:-1]]

    def function(*tensors: Tensor) -> Tensor:
        schema.score_step(tensors[:2], *tensors[2:])
        return tensors[0] + 1

    def compiled() -> list[str]:
        graphs = []

        def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
            graphs.append(graph)
            return lambda *args: [args[0]]

        torch.compiler.reset()
        torch.compile(function, fullgraph=True, backend=backend)(*flat)
        return [str(node.target) for graph in graphs for node in graph.graph.nodes]

    def traced(mode: str) -> list[str]:
        with torch.no_grad():
            graph = make_fx(function, tracing_mode=mode)(*flat)
        return [str(node.target) for node in graph.graph.nodes]

    for _ in range(2):
        launched = driver.launch_count
        with Seen() as seen:
            function(*flat)
        with FakeTensorMode() as mode:
            assert function(*map(mode.from_tensor, flat)).shape == (3, 64)
        assert "swift_kernels::score_step" in seen.ops
        assert any("score_step" in op for op in compiled())
        assert any("score_step" in op for op in traced("fake"))
        assert driver.launch_count == launched
        assert any("score_step" in op for op in traced("real"))
        with pytest.raises(RuntimeError):
            torch.vmap(function)(*(tensor[None] for tensor in flat))
        launched = driver.launch_count
        function(*flat)
        assert driver.launch_count == launched + 1


@with_guards
@pytest.mark.parametrize(
    "context",
    [torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16)],
    ids=["inference_mode", "no_grad", "autocast"],
)
def test_the_dispatcher_is_skipped_under(driver: FakeDriver, monkeypatch, context):
    step = make_step()
    step.run()
    with context():
        step.run()
        monkeypatch.setattr(launch.Plans, "find_or_make", None)  # from now on guards find the plan
        step.run()
    step.run()
    assert driver.launch_count == 4


def test_the_hooks_of_profilers_are_called(driver: FakeDriver):
    step, told = make_step(), []
    step.run()
    hooks = triton.knobs.runtime.launch_enter_hook
    hook = told.append
    hooks.add(hook)
    try:
        step.run()
    finally:
        hooks.remove(hook)
    step.run()
    assert [metadata.get()["name"] for metadata in told] == ["_score_step_kernel"]
