"""Measures one scored decode step against what users would write, at the shapes of six models.

    python -m bench.score_step [--sweep] [--rows 1,64] [--models Llama-3.1-8B] [--entries all,4,logits]

Contenders take turns within a round. "cold": each call reads hidden states that have left the caches since they were
last read; "warm": those of the call before. "called" includes what it takes to get there; "replayed" is a CUDA graph of
64 steps, over their number, on inputs that take turns; before it others are read, as many as the L2 holds five times:
not written, so that nothing is left to be written back meanwhile. Before anything is timed, all must agree with a
float64 reference: a rival that does not is left out, with a note. "call after call" is ours without rivals in between,
each call on weights of its own.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from bench import harness
from bench.clocks import REPLAYED, Replay
from bench.floors import Floors
from bench.harness import Bench
from bench.results import Case, Labels
from bench.rivals import Contender, ours, rivals
from bench.shapes import LLAMA_8B, SHAPES, TINY
from bench.summary import FEWEST_SAMPLES, Sample
from bench.tables import in_bytes
from swift_kernels import reference, schema

DTYPE = torch.bfloat16
INPUT_BYTES, L2_SIZES = 300 << 20, 5
"""Inputs that are rotated through, and on a GPU as many of its L2 at least."""

SAMPLES = {1: 150, 8: 80, 64: 40}
"""Of each contender, by the number of rows; 25 at more."""

LONGER_WAIT, WAIT_ROWS = 10, 64
"""Graphs of steps of so many rows are timed with so much longer a wait as well, which must not change their time."""

ROWS = (64, 256, 1, 8, 512)
"""The most telling first, for a run that is cut short."""
FEW_ROWS = (1, 64, 512)
EVERY_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)

Point = tuple[str, str, int, str]
"""Model, entries, rows, cache."""


def main() -> None:
    parser = harness.parser(__doc__)
    some = harness.choices
    parser.add_argument("--rows", type=harness.counts, help=f"comma-separated; {','.join(map(str, ROWS))} unless told")
    parser.add_argument("--models", type=some(*SHAPES), help=f"comma-separated, of: {', '.join(SHAPES)}")
    parser.add_argument("--entries", type=some("all", "4", "logits"), help="comma-separated, of: all, 4, logits")
    parser.add_argument("--caches", type=some("cold", "warm"), help="comma-separated, of: cold, warm")
    parser.add_argument("--sweep", action="store_true", help="every shape, rows 1 to 512, cold and warm")
    options = parser.parse_args()
    # Four compiled rivals share a function's code, and each may be compiled for one row, for some, and for any.
    torch._dynamo.config.recompile_limit = 64
    with torch.no_grad(), Bench("score_step", options, implementation=_implementation(options)) as bench:
        # A sweep compiles a rival once a shape, as a server would, instead of once a number of rows.
        shape = None
        for model, entries, rows, cache in plan(options):
            if not options.sweep or shape != (model, entries):
                torch.compiler.reset()
            shape = model, entries
            with bench.going_on(model):
                measure(bench, model, entries, rows, cache, any_rows=options.sweep)


def _implementation(options: argparse.Namespace) -> str:
    return schema.implementation(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def plan(options: argparse.Namespace) -> Iterator[Point]:
    """What to measure, the most telling first."""
    chosen = (options.models, options.entries, options.rows, options.caches)
    if options.quick:
        yield from [(TINY.name, "all", 5, "cold"), (TINY.name, "logits", 1, "warm")]
    elif any(chosen):
        models, entries, rows, caches = chosen
        yield from itertools.product(models or [LLAMA_8B.name], entries or ["all"], rows or ROWS, caches or ["cold"])
    else:
        headline = [*itertools.product([LLAMA_8B.name], ["all"], ROWS, ["cold"])]
        headline += [
            (LLAMA_8B.name, "all", 64, "warm"),
            (LLAMA_8B.name, "4", 64, "cold"),
            (LLAMA_8B.name, "logits", 64, "cold"),
        ]
        yield from headline
        if options.sweep:
            every_row = itertools.product([LLAMA_8B.name], ["all"], EVERY_ROWS, ["cold"])
            warm = itertools.product([LLAMA_8B.name], ["all"], FEW_ROWS, ["warm"])
            parts = itertools.product([LLAMA_8B.name], ["4", "logits"], FEW_ROWS, ["cold", "warm"])
            others = [name for name in SHAPES if name != LLAMA_8B.name]
            shapes = itertools.product(others, ["all", "4"], FEW_ROWS, ["cold"])
            points = itertools.chain(every_row, warm, shapes, parts)
            yield from (point for point in points if point not in headline)


def measure(bench: Bench, model: str, entries: str, rows: int, cache: str, any_rows: bool = False) -> None:
    """Adds the cases of one point: called, and on a GPU replayed."""
    widths = (TINY if model == TINY.name else SHAPES[model]).widths(entries)
    shape = f"{len(widths)} x {widths[0]}"
    called: Labels = {"model": model, "entries": shape, "rows": rows, "cache": cache, "clock": "called"}
    replayed: Labels = {**called, "clock": "replayed"}
    if entries == "logits":
        called["entries"] = replayed["entries"] = f"logits, {widths[0]}"
    wanted = [labels for labels in (called, replayed) if _runs_here(bench, labels) and bench.wants(labels)]
    if not wanted:
        return
    weight, bias = (tensor.to(bench.device) for tensor in make_head(widths))
    sets = make_inputs(rows, widths, bench.device, 3 if bench.quick or cache == "warm" else None)
    contenders = [ours(weight, bias, rows, widths), *rivals(weight, bias, rows, widths, any_rows)]
    mine = contenders[0].name
    checked, notes = harness.without_faulty(contenders, lambda each: check(each, sets[:3], weight, bias), mine)
    contenders = [contender for contender in contenders if contender.name in checked]
    notes += ["rivals compiled for any number of rows"] * any_rows
    samples = bench.samples(SAMPLES.get(rows, 25))
    hidden_bytes = rows * sum(widths) * DTYPE.itemsize
    for labels in wanted:
        replay = labels is replayed
        # The steps of one graph share their weights, which stay in the L2.
        moved = hidden_bytes + (0 if replay else weight.nbytes)
        floors = Floors(bench.clock, bench.device, moved, cache, replay, bench.quick)
        own_notes, metrics = list(notes), {}
        if replay:
            graphs, lost = replays(contenders, sets, cache, bench)
            own_notes += lost
            samples_of = harness.take_turns({name: _replayed(graph) for name, graph in graphs.items()}, samples, floors)
            own_notes.append(_method(sets, cache, bench))
            if rows == WAIT_ROWS or bench.quick:
                metrics[f"times as long after {LONGER_WAIT} times the wait"] = after_a_longer_wait(graphs)
        else:
            turns = calls(contenders, (weight, bias), sets, cache, bench)
            samples_of = harness.take_turns(turns, samples, floors)
        bench.add(
            Case(
                labels,
                mine,
                samples_of,
                floors=floors.seconds,
                moved=moved,
                metrics=metrics,
                note="; ".join(own_notes),
            )
        )


def _runs_here(bench: Bench, labels: Labels) -> bool:
    """CUDA graphs need CUDA; a quick run goes through the same motions without."""
    return labels["clock"] == "called" or bench.device.type == "cuda" or bench.quick


def calls(
    contenders: Sequence[Contender],
    head: tuple[Tensor, Tensor],
    sets: Sequence[Sequence[Tensor]],
    cache: str,
    bench: Bench,
) -> dict[str, Callable[[int], Sample]]:
    """One call each: on the next hidden states, or once more on those of the call before."""
    next_input = itertools.cycle(sets).__next__

    def cold(contender: Contender) -> Callable[[int], Sample]:
        def sample(_turn: int) -> Sample:
            hidden_states = next_input()
            return bench.clock(lambda: contender.step(hidden_states))

        return sample

    def warm(contender: Contender) -> Callable[[int], Sample]:
        def sample(_turn: int) -> Sample:
            contender.step(sets[0])
            return bench.clock(lambda: contender.step(sets[0]))

        return sample

    turns = {contender.name: (cold if cache == "cold" else warm)(contender) for contender in contenders}
    if cache == "cold" and bench.device.type == "cpu":
        turns["swift_kernels, call after call"] = call_after_call(head, sets, bench)
    return turns


def call_after_call(
    head: tuple[Tensor, Tensor], sets: Sequence[Sequence[Tensor]], bench: Bench
) -> Callable[[int], Sample]:
    """Ours through all hidden states, with copies of the weights that have left the caches as well."""
    weight, bias = head
    widths = [entry.shape[1] for entry in sets[0]]
    copies = min(len(sets), -(-INPUT_BYTES // weight.nbytes))
    heads = [ours(weight.clone(), bias, sets[0][0].shape[0], widths) for _ in range(copies)]

    def every() -> None:
        for index, hidden_states in enumerate(sets):
            heads[index % copies].step(hidden_states)

    def sample(_turn: int) -> Sample:
        elapsed = bench.clock(every)
        return elapsed and elapsed / len(sets)

    return sample


def replays(
    contenders: Sequence[Contender], sets: Sequence[Sequence[Tensor]], cache: str, bench: Bench
) -> tuple[dict[str, Replay], list[str]]:
    """A graph of REPLAYED steps of each, and a note on those that cannot be captured.

    Cold: on hidden states that take turns, with the caches full of others before, which is what keeps a few small ones
    out of them. Others are read, not written: what was written would be written back while the graph runs.
    """
    every = [sets[step % len(sets) if cache == "cold" else 0] for step in range(REPLAYED)]
    others = torch.zeros(_flushed_bytes(bench) // 4, device=bench.device)

    def flush() -> None:
        if cache == "cold":
            others.sum()

    def capture(contender: Contender) -> Replay:
        return Replay([_bound(contender, hidden_states) for hidden_states in every], bench.device, flush)

    return harness.without_faulty(contenders, capture, contenders[0].name)


def _replayed(graph: Replay) -> Callable[[int], Sample]:
    return lambda _turn: graph.seconds_a_call()


def after_a_longer_wait(graphs: Mapping[str, Replay]) -> dict[str, float]:
    """How many times as long a step takes where the GPU waits longer for the launch: 1, if none was too late."""
    ratios = {}
    for name, graph in graphs.items():
        pairs = [(graph.seconds_a_call(), graph.seconds_a_call(wait=LONGER_WAIT)) for _ in range(FEWEST_SAMPLES)]
        if found := [longer / usual for usual, longer in pairs if usual and longer]:
            ratios[name] = statistics.median(found)
    return ratios


def _method(sets: Sequence[Sequence[Tensor]], cache: str, bench: Bench) -> str:
    """How a step was replayed, for whoever reads the figures."""
    if cache == "warm":
        return f"{REPLAYED} steps a graph, all on one input"
    inputs = sets[:REPLAYED]
    nbytes = sum(entry.nbytes for entries in inputs for entry in entries)
    return (
        f"{REPLAYED} steps a graph on {len(inputs)} inputs in turn ({in_bytes(nbytes)}), after "
        f"{in_bytes(_flushed_bytes(bench))} of others were read"
    )


def _flushed_bytes(bench: Bench) -> int:
    return round_bytes(bench.device) if bench.device.type == "cuda" else 4


def round_bytes(device: torch.device) -> int:
    """Of the inputs that take turns: several times what any cache holds."""
    if device.type != "cuda":
        return INPUT_BYTES
    return max(INPUT_BYTES, L2_SIZES * torch.cuda.get_device_properties(device).L2_cache_size)


def _bound(contender: Contender, hidden_states: Sequence[Tensor]) -> Callable[[], object]:
    return lambda: contender.step(hidden_states)


def make_head(widths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Weights that bfloat16 holds exactly, so that contenders in either dtype compute the same scores."""
    generator = torch.Generator().manual_seed(0)
    features = sum(widths)
    weight = (torch.randn(2, features, generator=generator) / features**0.5).bfloat16().float()
    return weight, torch.randn(2, generator=generator).bfloat16().float()


def make_inputs(rows: int, widths: Sequence[int], device: torch.device, sets: int | None = None) -> list[list[Tensor]]:
    generator = torch.Generator(device).manual_seed(rows)
    nbytes = rows * sum(widths) * DTYPE.itemsize
    return [
        [torch.empty(rows, width, dtype=DTYPE, device=device).normal_(generator=generator) for width in widths]
        for _ in range(sets or max(3, -(-round_bytes(device) // nbytes)))
    ]


def check(contender: Contender, tokens: Sequence[Sequence[Tensor]], weight: Tensor, bias: Tensor) -> None:
    """Exits unless the contender scores these tokens as the float64 reference does.

    The unit is what `logits_dtype` rounds: eps times sum |W x|, averaged over the tokens. The factor 4 allows for a
    gate as wrong as the reward; an error in what is computed exceeds it a thousandfold.
    """
    rows = tokens[0][0].shape[0]
    device = weight.device
    sums = torch.zeros(rows, 2, dtype=torch.float64, device=device)
    token_count = torch.zeros(rows, dtype=torch.int32, device=device)
    contender.reset()
    scale = torch.zeros(rows, dtype=torch.float64, device=device)
    for hidden_states in tokens:
        contender.step(hidden_states)
        reference.score_step(hidden_states, weight, bias, torch.arange(rows, device=device), sums, token_count)
        features = torch.cat(list(hidden_states), dim=1).double()
        scale += (features.abs() @ weight.double().abs().T).amax(dim=1) / len(tokens)
    error = (contender.scores() - reference.finalize(sums, token_count)).abs() / scale
    allowed = 4 * torch.finfo(contender.logits_dtype).eps
    if not (error <= allowed).all() or not torch.equal(contender.token_count, token_count):
        sys.exit(f"{contender.name} scores otherwise than the reference: {error.max():.1e} of sum |W x|; not timed")
    contender.reset()


if __name__ == "__main__":
    main()
