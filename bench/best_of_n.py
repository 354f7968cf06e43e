"""Measures Best-of-N from the prompt to the picked answer: N answers are generated and one is chosen.

    python -m bench.best_of_n [--n 4,16,64] [--new-tokens 128] [--layers N]

    generate alone        nobody chooses: what all the others need as well
    swift_kernels         scored while decoding, with attach(model, head)
    hidden states kept    generate(output_hidden_states=True), and the head over them at the end
    upstream              as the authors: a second forward pass over the answers with output_hidden_states, every layer
                          to float32, concatenated, then the head
    reward model          a sequence classifier of Llama-3.1-8B's shape reads every answer

On a GPU the generating model has the shape of Llama-3.1-8B and random weights; on a CPU it is SmolLM2, and the reward
model is cut to one layer. All answers have the full number of tokens. Whoever uses the head has to give every answer
the same score, on the very tokens that are timed, and in float32 on a small model. FLOPs are those that
torch.utils.flop_counter sees, and the dot products of our own kernel. The floor is reading the parameters once a token.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench import harness, shapes
from bench.floors import Floors
from bench.harness import Bench
from bench.peaks import peak_bytes
from bench.results import Case, Labels
from bench.summary import Sample
from swift_kernels import SwiftHead, attach, reference
from swift_kernels.integrations.flops import flop_counter

PROMPT = {"cpu": 16, "cuda": 256}
NEW_TOKENS = {"cpu": 12, "cuda": 64}
EVERY_N = {"cpu": (16, 4), "cuda": (16, 4, 64)}
"""The most usual first. 64 takes a CPU minutes: `--n 64 --resume` adds it."""
READ_AT_ONCE = 16
"""Answers in a batch of a second forward pass."""
SAMPLES = 6

Way = Callable[[], "tuple[int, Tensor | None]"]
"""Generates, and returns the index of the answer picked, and the scores `[N]`."""


@dataclass
class Pipeline:
    """A generating model with its prompt, a head and a reward model."""

    model: Any
    head: SwiftHead
    reward_model: Any
    prompt: Tensor
    n: int
    new_tokens: int

    def generate(self, **options: Any) -> Any:
        torch.manual_seed(self.n)  # the same answers, whoever picks
        return self.model.generate(
            input_ids=self.prompt,
            attention_mask=torch.ones_like(self.prompt),
            do_sample=True,
            num_return_sequences=self.n,
            max_new_tokens=self.new_tokens,
            min_new_tokens=self.new_tokens,
            **options,
        )

    def alone(self) -> tuple[int, None]:
        return self.generate().shape[0] - 1, None

    def ours(self) -> tuple[int, Tensor]:
        with attach(self.model, self.head) as scorer:
            self.generate()
        return _pick(scorer.scores())

    def kept(self) -> tuple[int, Tensor]:
        output = self.generate(output_hidden_states=True, return_dict_in_generate=True)
        # The first step is the prefill; each later one fed a token of the answer, the last one is never fed.
        features = [torch.cat([state[:, -1] for state in step], dim=1).float() for step in output.hidden_states[1:]]
        return _pick(self._scores(torch.stack(features, dim=1)))

    def upstream(self) -> tuple[int, Tensor]:
        scores = []
        for answers in self.generate().split(READ_AT_ONCE):
            states = self.model(answers, output_hidden_states=True, logits_to_keep=1).hidden_states
            features = torch.cat([state.float() for state in states], dim=2)
            scores.append(self._scores(features[:, self.prompt.shape[1] : -1]))
        return _pick(torch.cat(scores))

    def by_reward_model(self) -> tuple[int, Tensor]:
        answers = self.generate().split(READ_AT_ONCE)
        return _pick(torch.cat([self.reward_model(answer).logits[:, 0] for answer in answers]))

    def _scores(self, features: Tensor) -> Tensor:
        """From float32 features `[answers, tokens, F]`, as the authors' head has them."""
        gate, reward = reference.gate_and_reward(torch.nn.functional.linear(features, self.head.weight, self.head.bias))
        return (gate * reward).sum(1) / gate.sum(1).clamp(min=1e-8)


def _pick(scores: Tensor) -> tuple[int, Tensor]:
    return int(scores.argmax()), scores


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument(
        "--n", type=harness.counts, help="answers, comma-separated; 16,4 on a CPU and 16,4,64 on a GPU unless told"
    )
    parser.add_argument(
        "--new-tokens", type=harness.count, help="of an answer; 12 on a CPU and 64 on a GPU unless told"
    )
    parser.add_argument(
        "--layers", type=harness.count, help="of the reward model; 1 on a CPU and 32 on a GPU unless told"
    )
    options = parser.parse_args()
    with torch.no_grad(), Bench("best_of_n", options) as bench:
        every_n = options.n or ((2, 3) if bench.quick else EVERY_N[bench.device.type])
        new_tokens = options.new_tokens or (4 if bench.quick else NEW_TOKENS[bench.device.type])
        made: tuple[Any, Any, str] | None = None
        for n in every_n:
            name = "tiny" if bench.quick else "SmolLM2-135M" if bench.device.type == "cpu" else shapes.LLAMA_8B.name
            labels: Labels = {
                "model": name,
                "answers": n,
                "tokens of prompt": PROMPT[bench.device.type],
                "new tokens": new_tokens,
            }
            with bench.going_on(name):
                if bench.wants(labels):
                    made = made or make_models(bench, options.layers)
                    measure(bench, labels, *made)


def make_models(bench: Bench, layers: int | None) -> tuple[Any, Any, str]:
    """The generating model, the reward model, and what tables call that."""
    if bench.quick:
        tiny = shapes.TINY
        return shapes.llama(tiny, bench.device), shapes.llama(tiny, bench.device, labels=1), "reward model, tiny"
    cut = shapes.LLAMA_8B.cut(layers or (1 if bench.device.type == "cpu" else None))
    name = "reward model" + cut.name.removeprefix(shapes.LLAMA_8B.name)
    if bench.device.type == "cpu":
        from swift_kernels.integrations.models import load_model

        return load_model("smollm2", torch.bfloat16, bench.device)[0], shapes.llama(cut, bench.device, labels=1), name
    return shapes.llama(shapes.LLAMA_8B, bench.device), shapes.llama(cut, bench.device, labels=1), name


def measure(bench: Bench, labels: Labels, model: Any, reward_model: Any, reward_name: str) -> None:
    prompt = make_prompt(model, int(labels["tokens of prompt"]))
    new_tokens = int(labels["new tokens"])
    pipeline = Pipeline(model, make_head(model), reward_model, prompt, int(labels["answers"]), new_tokens)
    ways: dict[str, Way] = {
        "generate alone": pipeline.alone,
        "swift_kernels": pipeline.ours,
        "hidden states kept": pipeline.kept,
        "upstream": pipeline.upstream,
        reward_name: pipeline.by_reward_model,
    }
    check(float32_pipeline(bench.device), 1e-4)
    check(pipeline, 0.03)
    ways[reward_name]()

    def turn(way: Way) -> Callable[[int], Sample]:
        return lambda _: bench.clock(way)

    moved = new_tokens * sum(parameter.nbytes for parameter in model.parameters())
    floors = Floors(bench.clock, bench.device, moved, quick=bench.quick)
    samples = harness.take_turns({name: turn(way) for name, way in ways.items()}, bench.samples(SAMPLES), floors)
    peaks, flops = {}, {}
    for name, way in ways.items():
        flops[name], peaks[name] = flops_and_peak(way, bench.device)
    weights = {"swift_kernels": float(pipeline.head.weight.nbytes + pipeline.head.bias.nbytes)}
    weights["upstream"] = weights["hidden states kept"] = weights["swift_kernels"]
    weights[reward_name] = float(sum(parameter.nbytes for parameter in reward_model.parameters()))
    metrics = {"peak bytes": peaks, "own bytes": weights, "FLOPs": flops}
    bench.add(Case(labels, "generate alone", samples, moved=moved, floors=floors.seconds, metrics=metrics))


def make_prompt(model: Any, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, model.config.vocab_size, (1, tokens), generator=generator).to(model.device)


def make_head(model: Any) -> SwiftHead:
    """Weights without rank or meaning, of the size that a trained head's have."""
    head = SwiftHead.for_model(model)
    head.weight.copy_(torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(0)))
    head.weight.mul_(head.config.num_features**-0.5)
    return head


def float32_pipeline(device: torch.device) -> Pipeline:
    model = shapes.llama(shapes.TINY, device, torch.float32)
    return Pipeline(model, make_head(model), None, make_prompt(model, 40), 5, 12)


def check(pipeline: Pipeline, tolerance: float) -> None:
    """Exits unless all that use the head give every answer the same score.

    The unit is the root mean square of the rewards of the prompt. In bfloat16 a pass over the whole answer adds in
    another order than steps do: last bits differ in every layer, the model amplifies that, and scores are compared to
    3%; in float32 to 1e-4, as the contract says. Hidden states that were kept are those of the steps.
    """
    states = pipeline.model(pipeline.prompt, output_hidden_states=True).hidden_states
    rewards = reference.project([state[0] for state in states], pipeline.head.weight, pipeline.head.bias)[:, 1]
    unit = float(rewards.square().mean().sqrt())
    _, mine = pipeline.ours()
    for name, way, allowed in (
        ("hidden states kept", pipeline.kept, min(tolerance, 1e-3)),
        ("upstream", pipeline.upstream, tolerance),
    ):
        error = float((way()[1] - mine).abs().max()) / unit
        print(f"{name}: scores within {error:.1e} of the rewards' size of ours", file=sys.stderr)
        if not error <= allowed:
            sys.exit(
                f"{name}: scores differ from ours by {error:.1e} of the rewards' size, {allowed} allowed; not timed"
            )


def flops_and_peak(way: Way, device: torch.device) -> tuple[float, float]:
    """FLOPs of one run, and the memory it needs beyond what is held before."""
    flops: list[int] = []
    # Twice: what a process has resident at its height varies with what its allocators happen to keep.
    peak = max(peak_bytes(lambda: flops.append(count_flops(way)), device), peak_bytes(way, device))
    return float(flops[0]), float(peak)


def count_flops(way: Way) -> int:
    def score_step(hidden_states: list[list[int]], weight: list[int], *_: object, **__: object) -> int:
        return 2 * hidden_states[0][0] * weight[0] * weight[1]

    with flop_counter({torch.ops.swift_kernels.score_step: score_step}) as counter:
        way()
    return counter.get_total_flops()


if __name__ == "__main__":
    main()
