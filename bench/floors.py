"""What a machine needs at the least: to move bytes, and to dispatch or launch what does nothing."""

from __future__ import annotations

import statistics
import time

import torch

from bench.clocks import REPLAYED, Call, Clock, Replay

FLOOR_BYTES = {"cpu": 1 << 28, "cuda": 1 << 31}
"""Far beyond any last-level cache, and on a GPU long enough that the launch does not count."""

SHARE_OF_TIME = 0.2
"""Of a case's time, for its floors."""


class Floors:
    """Floors of one case, sampled between its measurements: machines change from one minute to the next.

    `moved` bytes have to pass from memory (`cache="cold"`) or from the caches (`"warm"`). The rate is the best of
    torch's reductions and of a copy, of a buffer far larger than the caches or as large as what is moved. A step that
    moves next to nothing cannot beat an op that does nothing: dispatched, launched and waited for, or replayed
    (`graph`).
    """

    def __init__(
        self,
        clock: Clock,
        device: torch.device,
        moved: int,
        cache: str = "cold",
        graph: bool = False,
        quick: bool = False,
    ) -> None:
        self.seconds: dict[str, list[float]] = {}
        self._moved = moved
        self._start = time.perf_counter()
        self._spent = 0.0
        nbytes = FLOOR_BYTES[device.type] >> (6 if quick else 0) if cache == "cold" else max(4096, moved)
        buffer = torch.ones(nbytes // 4, device=device)
        target = torch.empty_like(buffer)
        place = "memory" if cache == "cold" else "cache"
        movers: dict[str, tuple[Call, int]] = {
            f"{place}, sum": (buffer.sum, nbytes),
            f"{place}, amax": (buffer.amax, nbytes),
            f"{place}, dot": (lambda: torch.dot(buffer, buffer), nbytes),
            f"{place}, copy": (lambda: target.copy_(buffer), 2 * nbytes),
        }
        # What is replayed is held against what is replayed: once where memory is read, many times where caches are.
        repeats = REPLAYED if graph and cache == "warm" else 1
        self._movers: dict[str, tuple[Call, Clock, int]] = {}
        for name, (call, count) in movers.items():
            call()
            replay = Replay([call] * repeats, device) if graph else None
            self._movers[name] = (replay, replay.seconds_a_call, count) if replay else (call, clock, count)
        self._idle: tuple[str, Call, Clock, int]
        if device.type != "cuda" and not graph:
            nothing = torch.empty(0)
            # Two orders of magnitude above the clock's resolution.
            self._idle = "empty op", lambda: [nothing.zero_() for _ in range(100)], clock, 100
        elif graph:
            replay = Replay([_empty_kernel(device)] * REPLAYED, device)
            self._idle = "empty kernel, replayed", replay, replay.seconds_a_call, 1
        else:
            one = torch.empty(1, device=device)
            self._idle = "smallest kernel, launched and waited for", one.zero_, clock, 1
        self._idle[1]()

    def sample(self, always: bool = False) -> None:
        """Adds a sample of each, if floors have not had their share of the time yet."""
        begun = time.perf_counter()
        if not always and self._spent > SHARE_OF_TIME * (begun - self._start):
            return
        for name, (call, clock, nbytes) in self._movers.items():
            if elapsed := clock(call):
                self.seconds.setdefault(name, []).append(elapsed * self._moved / nbytes)
        name, call, clock, calls = self._idle
        if elapsed := clock(call):
            self.seconds.setdefault(name, []).append(elapsed / calls)
        self._spent += time.perf_counter() - begun


def binding(seconds: dict[str, list[float]]) -> tuple[str, float] | None:
    """Name and median time of the floor that binds: the faster of the ways to move the bytes, or doing nothing."""
    medians = {name: statistics.median(samples) for name, samples in seconds.items() if samples}
    movers = {name: median for name, median in medians.items() if name.startswith(("memory", "cache"))}
    if not movers:
        return None
    fastest = min(movers, key=movers.__getitem__)
    candidates = {name: median for name, median in medians.items() if name not in movers or name == fastest}
    return max(candidates.items(), key=lambda item: item[1])


def _empty_kernel(device: torch.device) -> Call:
    if device.type != "cuda":
        return lambda: None
    import triton

    @triton.jit
    def empty() -> None:
        pass

    return lambda: empty[(1,)]()
