"""What a graph's launch takes the host is no part of a step's time, however long it takes, nor is what it waits for."""

from __future__ import annotations

import contextlib

import pytest
import torch

from bench import clocks, score_step
from bench.clocks import REPLAYED, Replay
from bench.harness import take_turns
from bench.rivals import ours
from bench.score_step import LONGER_WAIT, after_a_longer_wait, make_head, make_inputs, replays, round_bytes

CUDA = torch.device("cuda")
STEP = 5e-6


class Gpu:
    """The times of a host and of the stream of a GPU that runs what it is given, in order."""

    def __init__(self, launch: float, blocks: bool = False) -> None:
        self.now = self.free = 0.0
        self.launch, self.blocks = launch, blocks
        self.flushed = 0

    def sleep(self, cycles: int) -> None:
        self.free = max(self.free, self.now) + cycles / 2e9

    def flush(self) -> None:
        self.flushed += 1

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.time = max(gpu.free, gpu.now)

            def query(self) -> bool:
                return gpu.now >= self.time

            def synchronize(self) -> None:
                gpu.now = max(gpu.now, self.time)

            def elapsed_time(self, end: Event) -> float:
                return (end.time - self.time) * 1e3

        class Graph:
            def replay(self) -> None:
                gpu.now = (max(gpu.now, gpu.free) if gpu.blocks else gpu.now) + gpu.launch
                gpu.free = max(gpu.free, gpu.now) + REPLAYED * STEP

        class Stream:
            def wait_stream(self, other: object) -> None:
                pass

        for name, value in {
            "Event": Event,
            "CUDAGraph": Graph,
            "Stream": Stream,
            "_sleep": gpu.sleep,
            "current_stream": Stream,
            "stream": lambda stream: contextlib.nullcontext(),
            "graph": lambda graph: contextlib.nullcontext(),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)


@pytest.mark.parametrize("launch", [1e-6, 4e-4, 6e-4, 3e-3, 0.1], ids=lambda launch: f"{launch * 1e3:g} ms")
def test_a_launch_of_any_length_is_no_part_of_a_step(monkeypatch, launch):
    gpu = Gpu(launch)
    gpu.patch(monkeypatch)
    graph = Replay([lambda: None] * REPLAYED, CUDA, gpu.flush)
    assert graph.seconds_a_call() == pytest.approx(STEP)
    too_late = gpu.flushed - 1
    assert (too_late > 0) == (launch > clocks.BUSY_CYCLES / 2e9)
    assert graph.seconds_a_call() == pytest.approx(STEP)
    assert gpu.flushed == too_late + 2, "what was learnt of the launch is kept"
    assert after_a_longer_wait({"ours": graph}) == {"ours": pytest.approx(1.0)}


def test_a_launch_that_waits_for_what_ran_before_gives_no_sample(monkeypatch):
    gpu = Gpu(1e-5, blocks=True)
    gpu.patch(monkeypatch)
    graph = Replay([lambda: None] * REPLAYED, CUDA, gpu.flush)
    assert graph.seconds_a_call() is None
    tried = gpu.flushed
    assert tried < 10
    assert graph.seconds_a_call() is None
    assert gpu.flushed == tried, "it is not tried again"
    assert after_a_longer_wait({"rival": graph}) == {}
    quick = Replay([lambda: None] * REPLAYED, torch.device("cpu"))
    samples = take_turns({"rival": lambda _: graph.seconds_a_call(), "ours": lambda _: quick.seconds_a_call()}, 7)
    assert (samples["rival"], len(samples["ours"])) == ([None] * 7, 7), "the others do not wait for it"


def test_a_longer_wait_shows_a_launch_that_was_too_late(monkeypatch):
    """Were the GPU not asked whether it still waits, the launch would be part of the time, and this the figure."""
    gpu = Gpu(3e-3)
    gpu.patch(monkeypatch)
    monkeypatch.setattr(torch.cuda.Event, "query", lambda event: False)
    ratio = after_a_longer_wait({"rival": Replay([lambda: None] * REPLAYED, CUDA)})["rival"]
    assert gpu.launch < LONGER_WAIT * clocks.BUSY_CYCLES / 2e9
    assert ratio < 0.2


@pytest.mark.parametrize("rows", [1, 8, 64, 256, 512])
def test_a_graph_has_64_steps_at_any_number_of_rows_and_a_round_of_inputs_is_several_caches(rows, monkeypatch):
    """At a hundredth of the bytes, of inputs and of caches alike."""
    monkeypatch.setattr(score_step, "INPUT_BYTES", score_step.INPUT_BYTES // 100)
    device = torch.device("cpu")
    widths = [4096 // 100] * 33
    sets = make_inputs(rows, widths, device)
    bench = type("Bench", (), {"device": device, "quick": False})()
    weight, bias = make_head(widths)
    graphs, notes = replays([ours(weight, bias, rows, widths)], sets, "cold", bench)
    [graph] = graphs.values()
    assert notes == []
    assert len(graph._calls) == REPLAYED == 64
    assert sum(entry.nbytes for entries in sets for entry in entries) >= round_bytes(device)
    note = score_step._method(sets, "cold", bench)
    assert note.startswith(f"64 steps a graph on {min(len(sets), 64)} inputs in turn (")
    assert note.endswith("of others were read")


def test_a_round_is_several_times_the_cache_of_any_gpu(monkeypatch):
    for megabytes, expected in ((50, 300), (60, 300), (126, 630)):
        properties = type("Properties", (), {"L2_cache_size": megabytes << 20})
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, found=properties: found)
        assert round_bytes(CUDA) == expected << 20
