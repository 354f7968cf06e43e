"""Measures scoring whole answers, and the gradients that training needs, at the shape of Llama-3.1-8B (33 x 4096,
bfloat16) against the authors' way and a better-written one; with one head, and with eight in one pass.

    python -m bench.score_sequence [--sequences 16] [--mean-length 64] [--heads 1,8]

Contenders take turns within a round; the hidden states are larger than any cache. Before anything is timed, scores and
gradients of all must agree with a float64 reference; where they do not, no figure is printed. Peak memory is that of
one call, beyond the inputs.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from bench import harness
from bench.floors import Floors
from bench.harness import Bench
from bench.peaks import peak_bytes
from bench.results import Case, Labels
from bench.shapes import LLAMA_8B, TINY
from bench.summary import Sample
from swift_kernels import reference, schema

DTYPE = torch.bfloat16
SEQUENCES = {"cpu": 16, "cuda": 64}
MEAN_LENGTH = {"cpu": 64, "cuda": 256}
"""The hidden states take 277 MB on a CPU, 4.4 GB on a GPU; upstream's path some eight times as much on top."""

INPUT_BYTES = 300 << 20
"""Inputs that are rotated through where one is smaller."""

SAMPLES = 8

MODES = ("forward", "forward + backward")

Scores = Callable[[Sequence[Tensor], Tensor], Tensor]


@dataclass
class Packed:
    """The hidden states of some answers, one after the other."""

    hidden_states: list[Tensor]
    cu_seqlens: Tensor

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.hidden_states)


@dataclass
class Contender:
    """One way to score packed sequences; `parameters` are the weight and the bias it has gradients for."""

    name: str
    scores: Scores
    parameters: list[Tensor]

    def forward(self, packed: Packed) -> Tensor:
        with torch.no_grad():
            return self.scores(packed.hidden_states, packed.cu_seqlens)

    def backward(self, packed: Packed) -> tuple[Tensor, ...]:
        scores = self.scores(packed.hidden_states, packed.cu_seqlens)
        return torch.autograd.grad(scores, self.parameters, make_grad_scores(scores.shape, scores.device))

    def call(self, mode: str) -> Callable[[Packed], object]:
        return self.forward if mode == MODES[0] else self.backward


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--sequences", type=harness.count, help="16 on a CPU, 64 on a GPU")
    parser.add_argument("--mean-length", type=harness.count, help="tokens of a sequence; 64 on a CPU, 256 on a GPU")
    parser.add_argument(
        "--heads", type=harness.counts, default=[1, 8], help="numbers of heads that share a pass; 1,8 unless told"
    )
    options = parser.parse_args()
    with Bench("score_sequence", options) as bench:
        sequences = options.sequences or SEQUENCES[bench.device.type]
        mean = options.mean_length or MEAN_LENGTH[bench.device.type]
        lengths = make_lengths(*((3, 5) if bench.quick else (sequences, mean)))
        shape = TINY if bench.quick else LLAMA_8B
        widths = shape.widths("all")
        sets: list[Packed] = []
        for heads in options.heads:
            with bench.going_on(shape.name):
                every = make_labels(shape.name, widths, lengths, heads)
                if wanted := [labels for labels in every if bench.wants(labels)]:
                    sets = sets or make_sets(bench, lengths, widths)
                    measure(bench, wanted, widths, sets)


def make_sets(bench: Bench, lengths: Sequence[int], widths: Sequence[int]) -> list[Packed]:
    """Hidden states that take turns, where one of them would stay in the caches."""
    first = make_packed(lengths, widths, bench.device, 0)
    more = range(1, 2 if bench.quick else -(-INPUT_BYTES // first.nbytes))
    return [first, *(make_packed(lengths, widths, bench.device, seed) for seed in more)]


def make_labels(model: str, widths: Sequence[int], lengths: Sequence[int], heads: int) -> list[Labels]:
    """Those of the two cases of so many heads."""
    shared: Labels = {"model": model, "entries": f"{len(widths)} x {widths[0]}", "sequences": len(lengths)}
    return [{**shared, "tokens": sum(lengths), "heads": heads, "mode": mode} for mode in MODES]


def measure(bench: Bench, wanted: Sequence[Labels], widths: Sequence[int], sets: Sequence[Packed]) -> None:
    device, heads = bench.device, int(wanted[0]["heads"])
    contenders = [make(widths, *make_parameters(widths, heads, device)) for make in (ours, upstream, per_layer)]
    check(contenders, sets[0], heads)
    next_input = itertools.cycle(sets).__next__
    for labels in wanted:
        mode = str(labels["mode"])

        def turn(contender: Contender, mode: str = mode) -> Callable[[int], Sample]:
            return lambda _: bench.clock(functools.partial(contender.call(mode), next_input()))

        # What has to be read: the hidden states once in each direction, and the weights.
        moved = (1 + MODES.index(mode)) * sets[0].nbytes + contenders[0].parameters[0].nbytes
        floors = Floors(bench.clock, device, moved, quick=bench.quick)
        samples = harness.take_turns({each.name: turn(each) for each in contenders}, bench.samples(SAMPLES), floors)
        peaks = {
            each.name: float(peak_bytes(functools.partial(each.call(mode), sets[0]), device)) for each in contenders
        }
        metrics = {"peak bytes": peaks}
        bench.add(Case(labels, contenders[0].name, samples, moved=moved, floors=floors.seconds, metrics=metrics))


def make_lengths(sequences: int, mean: int) -> list[int]:
    """From a quarter of the mean to seven quarters of it, in an order that is not sorted."""
    lengths = [
        max(1, round(mean * (0.25 + 1.5 * index / (sequences - 1)))) if sequences > 1 else mean
        for index in range(sequences)
    ]
    return [*lengths[::2], *lengths[1::2]]


def make_packed(lengths: Sequence[int], widths: Sequence[int], device: torch.device, seed: int) -> Packed:
    generator = torch.Generator(device).manual_seed(seed)
    tokens = sum(lengths)
    # Each as wide as it will be: a buffer in float32 for all would stay with the process, and hide what comes later.
    hidden_states = [torch.empty(tokens, width, dtype=DTYPE, device=device) for width in widths]
    for entry in hidden_states:
        entry.normal_(generator=generator)
    return Packed(hidden_states, torch.tensor([0, *itertools.accumulate(lengths)], device=device))


@functools.cache
def make_grad_scores(shape: torch.Size, device: torch.device) -> Tensor:
    """The gradient that scores get from what would follow: `[sequences, heads]`."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)


def make_parameters(widths: Sequence[int], heads: int, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = sum(widths)
    weight = torch.randn(2 * heads, features, generator=generator) / features**0.5
    return weight.to(device), torch.randn(2 * heads, generator=generator).to(device)


def ours(widths: Sequence[int], weight: Tensor, bias: Tensor) -> Contender:
    def scores(hidden_states: Sequence[Tensor], cu_seqlens: Tensor) -> Tensor:
        return schema.score_sequence(hidden_states, weight, bias, cu_seqlens)[0]

    return Contender("swift_kernels", scores, [weight.requires_grad_(), bias.requires_grad_()])


def upstream(widths: Sequence[int], weight: Tensor, bias: Tensor) -> Contender:
    """As the authors' code does: every layer to float32, concatenated, padded, through one nn.Linear."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device)
    with torch.no_grad():
        linear.weight.copy_(weight)
        linear.bias.copy_(bias)

    def scores(hidden_states: Sequence[Tensor], cu_seqlens: Tensor) -> Tensor:
        features = torch.cat([entry.float() for entry in hidden_states], dim=1)
        lengths = cu_seqlens.diff()
        padded = nn.utils.rnn.pad_sequence(list(features.split(lengths.tolist())), batch_first=True)
        mask = torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]
        output = linear(padded)
        gates = torch.sigmoid(output[..., 0::2]) * mask[..., None]
        return (gates * output[..., 1::2]).sum(1) / gates.sum(1).clamp(min=1e-8)

    return Contender("upstream", scores, [linear.weight, linear.bias])


def per_layer(widths: Sequence[int], weight: Tensor, bias: Tensor) -> Contender:
    """Neither concatenates nor pads: one F.linear a layer, and the sums of each sequence by index_add."""

    def scores(hidden_states: Sequence[Tensor], cu_seqlens: Tensor) -> Tensor:
        output = bias
        for entry, columns in zip(hidden_states, weight.split(list(widths), dim=1), strict=True):
            output = output + F.linear(entry.float(), columns)
        lengths = cu_seqlens.diff()
        sequence = torch.repeat_interleave(lengths, output_size=output.shape[0])
        gates = torch.sigmoid(output[:, 0::2])
        terms = torch.stack([gates * output[:, 1::2], gates])
        rewards, gate_sums = terms.new_zeros(2, lengths.numel(), gates.shape[1]).index_add(1, sequence, terms)
        return rewards / gate_sums.clamp(min=1e-8)

    return Contender("per layer, fp32", scores, [weight.requires_grad_(), bias.requires_grad_()])


def check(contenders: Sequence[Contender], packed: Packed, heads: int) -> None:
    """Exits unless scores and gradients are those of the float64 reference.

    The unit of a score is eps times the gate-weighted mean of sum |W x|; that of a gradient is what an error of eps in
    the gradient of every logit, and of eps sum |W x| in the logit, may add up to. The factor 4 allows for a gate as
    wrong as the reward; an error in what is computed exceeds it a thousandfold.
    """
    eps = torch.finfo(torch.float32).eps
    weight, bias = (parameter.detach().double() for parameter in contenders[0].parameters)
    cu_seqlens, hidden_states = packed.cu_seqlens, packed.hidden_states
    with torch.no_grad():
        logits = reference.project(hidden_states, weight, bias)
        scores, gate_reward = reference.pool(logits, cu_seqlens)
        grad_scores = make_grad_scores(torch.Size([cu_seqlens.numel() - 1, heads]), weight.device).double()
        grad_logits = reference.pool_backward(grad_scores, scores, gate_reward, cu_seqlens)
        magnitude = torch.zeros_like(logits)
        widths = [entry.shape[1] for entry in hidden_states]
        for entry, columns in zip(hidden_states, weight.split(widths, dim=1), strict=True):
            magnitude += entry.double().abs() @ columns.abs().T
        # Of a head's two outputs the larger; shares[:, 1::2] are the derivatives for the rewards.
        larger = torch.maximum(magnitude[:, 0::2], magnitude[:, 1::2])
        unit, _ = reference.pool(torch.stack([logits[:, 0::2], larger], dim=-1).flatten(1), cu_seqlens)
        shares = reference.pool_backward(grad_scores.abs(), torch.zeros_like(scores), gate_reward, cu_seqlens)
        grad_units = grad_logits.abs() + (shares[:, 1::2] * larger).repeat_interleave(2, dim=1)
        expected = {
            "scores": (scores, unit),
            "the gradient of the weight": (
                reference.project_backward(hidden_states, grad_logits),
                reference.project_backward([entry.abs() for entry in hidden_states], grad_units),
            ),
            "the gradient of the bias": (grad_logits.sum(0), grad_units.sum(0)),
        }
    for contender in contenders:
        results = (contender.forward(packed), *contender.backward(packed))
        for (what, (value, unit)), result in zip(expected.items(), results, strict=True):
            error = (result - value).abs() / (eps * unit)
            if not (error <= 4).all():
                sys.exit(f"{contender.name}: {what} is off by {float(error.max()):.1f} units of rounding; not timed")


if __name__ == "__main__":
    main()
