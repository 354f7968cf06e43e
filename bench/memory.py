"""Measures the memory that scoring holds while an answer grows, to 32,768 tokens at the shape of Llama-3.1-8B.

    python -m bench.memory [--lengths 32,32768]

Hidden states of one sequence come token by token, as a model makes them. `output_hidden_states` keeps them all, as
transformers' generate does until it returns; ours scores each and lets it go. Held are the bytes of all tensors that
are needed later; "resident" is by how much more memory the process (or PyTorch's GPU allocator) has in use. Both then
score the answer, and have to agree.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from bench import harness
from bench.harness import Bench
from bench.peaks import held_bytes
from bench.results import Case, Labels
from bench.shapes import LLAMA_8B, TINY
from swift_kernels import SwiftHead, reference

LENGTHS = (32, 512, 4096, 32768)
DTYPE = torch.bfloat16

Keeper = Callable[[Iterator[list[Tensor]]], "tuple[Tensor, list[Tensor], list[Tensor]]"]
"""Takes one token's hidden states after the other; returns the score, what it held, and its scratch."""


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument(
        "--lengths", type=harness.counts, help=f"comma-separated; {','.join(map(str, LENGTHS))} unless told"
    )
    options = parser.parse_args()
    with torch.no_grad(), Bench("memory", options) as bench:
        shape = TINY if bench.quick else LLAMA_8B
        widths = shape.widths("all")
        head = SwiftHead(widths, device=bench.device)
        torch.manual_seed(0)
        head.weight.normal_(std=sum(widths) ** -0.5)
        lengths = options.lengths or ((8, 32) if bench.quick else LENGTHS)
        for length in lengths:
            labels: Labels = {"model": shape.name, "entries": f"{len(widths)} x {widths[0]}", "tokens": length}
            with bench.going_on(shape.name):
                if bench.wants(labels):
                    bench.add(measure(bench, head, labels, length))


def measure(bench: Bench, head: SwiftHead, labels: Labels, length: int) -> Case:
    widths = head.config.widths
    ours(head, tokens(widths, 2, bench.device))  # libraries and kernels load
    held: dict[str, list[float | None]] = {}
    resident, scratch, scores = {}, {}, {}
    for name, keep in (("swift_kernels", ours), ("output_hidden_states", output_hidden_states)):
        before = held_bytes(bench.device)
        score, kept, used = keep(head, tokens(widths, length, bench.device))
        resident[name] = float(max(0, held_bytes(bench.device) - before))
        held[name], scratch[name] = [float(nbytes(kept))], float(nbytes(used))
        scores[name] = score
        del kept, used
    check(scores, head, length)
    return Case(labels, "swift_kernels", held, "bytes", metrics={"resident bytes": resident, "scratch bytes": scratch})


def tokens(widths: Sequence[int], length: int, device: torch.device) -> Iterator[list[Tensor]]:
    """The hidden states of one token after the other, `[1, width]` each: four that take turns, in new memory."""
    generator = torch.Generator(device).manual_seed(length)
    states = [
        [torch.empty(1, width, dtype=DTYPE, device=device).normal_(generator=generator) for width in widths]
        for _ in range(4)
    ]
    for position in range(length):
        yield [entry.clone() for entry in states[position % 4]]


def ours(head: SwiftHead, stream: Iterator[list[Tensor]]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    state = head.init_state(1, head.weight.device)
    slots = torch.zeros(1, dtype=torch.int64, device=head.weight.device)
    for hidden_states in stream:
        head.step(hidden_states, state, slots)
    return head.scores(state), [state.sums, state.token_count], [state.partials, state.arrivals, slots]


def output_hidden_states(head: SwiftHead, stream: Iterator[list[Tensor]]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    kept = list(stream)
    sums, token_count = torch.zeros(1, 2, dtype=torch.float64), torch.zeros(1, dtype=torch.int32)
    for start in range(0, len(kept), 256):  # the reference is not what is measured: in parts
        part = [torch.cat(entries) for entries in zip(*kept[start : start + 256], strict=True)]
        gate, reward = reference.gate_and_reward(reference.project(part, head.weight, head.bias))
        sums += torch.stack([(gate * reward).sum(), gate.sum()]).double().cpu()
        token_count += gate.numel()
    return reference.finalize(sums, token_count), [entry for entries in kept for entry in entries], []


def nbytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def check(scores: dict[str, Tensor], head: SwiftHead, length: int) -> None:
    """Exits unless both give the same score, to float32's rounding.

    That of a reward goes by sum |W x|, which is near 0.64 sqrt(features). Each token adds half an eps of the two sums
    at most, always in the same direction where the same hidden states return; rewards are near 1.
    """
    mine, theirs = (float(score) for score in scores.values())
    allowed = torch.finfo(torch.float32).eps * (4 * head.config.num_features**0.5 + length)
    if not abs(mine - theirs) <= allowed:
        sys.exit(f"scores of {length} tokens are {mine} and {theirs}: more than {allowed:.1e} apart; no figure")


if __name__ == "__main__":
    main()
