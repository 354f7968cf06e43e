"""Measures whole decode steps of a model, with and without scoring.

    python -m bench.decode [--models smollm2,8b,8b/2] [--rows 64] [--contexts 16,2048] [--how eager,compiled]

8b stands for the shape of Llama-3.1-8B with random weights, 8b/2 for two layers of it. Contenders:

    bare          the stock model
    gather        attach(model, head): one kernel beside the model at each step
    norm          attach(model, head, fuse="norm"): inside the model's norms
    norm, bare    the same fused norms, which score no row
    naive         output_hidden_states, and the authors' way at each step: every layer to float32, cat, nn.Linear

each of them eager, under torch.compile with a static cache, and as CUDA graphs of both. Each has modules of its own
around the same parameters, and all take turns: at every step on a CPU, whose speed drifts within seconds, every 16
steps on a GPU, which is not to wait in between. There they share one cache, which each rewinds when its turn begins.
Before anything is timed, all that score are compared:
one that differs is not timed, and the run fails in the end. The floor is reading parameters and cache once.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache

from bench import harness, shapes
from bench.clocks import Call, Replay
from bench.floors import Floors
from bench.harness import Bench
from bench.results import Case, Labels
from bench.summary import Sample
from swift_kernels import SwiftHead, attach, reference

PROMPT, STEPS = 16, 16
"""Tokens that are really prefilled, and decoded from there before the cache is rewound."""

SAMPLES = {"cpu": 15, "cuda": 25}
LONG = 2048
CONTENDERS = {
    "eager": ("bare", "gather", "norm", "norm, bare", "naive"),
    # Compiled, "norm" gathers: a norm that the compiler cannot see into would keep it from fusing what is around it.
    "compiled": ("bare", "gather", "naive"),
}
OTHER_BYTES = 8e9
"""Of a GPU's memory, for what is not parameters or cache: floors, activations and logits."""

TOLERANCE = {"gather": 1e-3, "norm": 0.03}
"""Between scores, in units of the rewards' root mean square. Eager `gather` sees the hidden states that `naive` sees,
and differs by float32's order of additions. Norms that add in another order, and compilers, move last bits of bfloat16
in every layer, which a model amplifies; what is scored wrongly is off by the order of 1."""


class Decoder:
    """A model, a static cache, and one decode step on buffers that stay where they are."""

    def __init__(self, model: Any, rows: int, context: int, cache: Any = None) -> None:
        """`cache` is that of another decoder, filled already."""
        device = model.device
        self.model, self.rows, self.context = model, rows, context
        self.length = context + STEPS
        self.cache: Any = cache or StaticCache(config=model.config, max_cache_len=self.length)
        self.places = torch.arange(self.length, device=device)[None, None, None]
        self.position = torch.zeros(1, 1, dtype=torch.int64, device=device)
        self.sampled = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self.slots = torch.arange(rows, device=device)
        generator = torch.Generator().manual_seed(0)
        self.prompt = torch.randint(model.config.vocab_size, (rows, PROMPT), generator=generator).to(device)
        if cache is None:
            self._fill()

    def _fill(self) -> None:
        """The cache as it is after the context."""
        model, rows, device = self.model, self.rows, self.model.device
        for start in range(0, PROMPT, 4):  # in parts, to keep the memory of the prefill small
            columns = torch.arange(start, start + 4, device=device)
            model(
                input_ids=self.prompt[:, start : start + 4],
                position_ids=columns[None],
                attention_mask=(self.places <= columns[None, None, :, None]).expand(rows, 1, -1, -1),
                past_key_values=self.cache,
                logits_to_keep=1,
            )
        # The rest of a long context need not make sense; it has to be read.
        noise = torch.Generator(device).manual_seed(1)
        layers: Any = self.cache.layers
        for layer in layers:
            for entry in (layer.keys, layer.values):
                entry[:, :, PROMPT : self.context].normal_(generator=noise)

    def rewind(self) -> None:
        """Back to the end of the context, in the same buffers: the mask hides what the cache holds beyond it."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.context)
        self.position.fill_(self.context)

    def step(self, **options: Any) -> Any:
        output = self.model(
            # Not what was sampled: one last bit in a logit would send contenders on different ways.
            input_ids=self.prompt[:, :1],
            position_ids=self.position,
            attention_mask=(self.places <= self.position).expand(self.rows, 1, 1, self.length),
            past_key_values=self.cache,
            **options,
        )
        self.sampled.copy_(output.logits[:, -1].argmax(-1, keepdim=True))
        self.position.add_(1)
        return output


class Contender:
    """One way to decode a step, until the stack is closed."""

    def __init__(self, name: str, how: str, model: Any, head: SwiftHead, decoder_of: Any, stack: ExitStack) -> None:
        # Modules of its own: attaching to them, or asking them for hidden states, is not noticed elsewhere.
        tensors = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
        own = copy.deepcopy(model, tensors)
        self.name = name
        self.decoder: Decoder = decoder_of(own)
        self.step: Call = self.decoder.step
        self._scorer: Any = None
        self._slots = self.decoder.slots
        self._sums = torch.zeros(self.decoder.rows, 2, device=model.device)
        self._token_count = torch.zeros(self.decoder.rows, dtype=torch.int32, device=model.device)
        if name == "naive":
            self.step = self._naive_step(head)
        elif name != "bare":
            self._scorer = stack.enter_context(attach(own, head, fuse="norm" if "norm" in name else "gather"))
            self._scorer.warmup(self.decoder.rows)
            if "bare" in name:
                self._slots = torch.full_like(self._slots, -1)
        self.reset()
        if how == "compiled":
            self.step()  # transformers installs what captures hidden states in the first call, which cannot be traced
            self.reset()
            self.step = torch.compile(self.step, fullgraph=True, dynamic=False)

    def _naive_step(self, head: SwiftHead) -> Call:
        linear = torch.nn.Linear(head.config.num_features, 2, device=head.weight.device)
        linear.load_state_dict(head.state_dict())

        def step() -> None:
            states = self.decoder.step(output_hidden_states=True).hidden_states
            logits = linear(torch.cat([state[:, -1].float() for state in states], dim=1))
            gate, reward = reference.gate_and_reward(logits)
            self._sums.add_(torch.stack([gate * reward, gate], dim=1))
            self._token_count.add_(1)

        return step

    def reset(self) -> None:
        """Back to the first step, with nothing scored."""
        self.decoder.rewind()
        self._sums.zero_()
        self._token_count.zero_()
        if self._scorer is not None:
            self._scorer.begin(self._slots)

    def scores(self) -> tuple[Tensor, Tensor]:
        """And how many tokens they rest on."""
        if self._scorer is None:
            return reference.finalize(self._sums, self._token_count), self._token_count.clone()
        return self._scorer.scores(), self._scorer.token_counts()

    def captured(self) -> Call:
        """The step as a CUDA graph, on the same buffers."""
        self.reset()  # it is called before it is captured, and what was timed before has filled the cache
        replay = Replay([self.step], self.decoder.model.device)
        self.reset()
        return replay


def main() -> None:
    parser = harness.parser(__doc__)
    names = ("smollm2", "8b", *(f"8b/{layers}" for layers in range(1, shapes.LLAMA_8B.layers)))
    some, counts = harness.choices, harness.counts
    parser.add_argument("--models", type=some(*names), metavar="NAMES", help="smollm2, 8b, or 8b/N for N of its layers")
    parser.add_argument("--rows", type=counts, help="comma-separated")
    parser.add_argument("--contexts", type=counts, default=[16], help="tokens in the cache; 16 unless told")
    parser.add_argument("--how", type=some(*CONTENDERS), default=["eager"], help="comma-separated: eager, compiled")
    parser.add_argument("--sweep", action="store_true", help=f"1 to 256 rows, {PROMPT} and {LONG} tokens, all modes")
    options = parser.parse_args()
    with torch.no_grad(), Bench("decode", options) as bench:
        models: dict[str, tuple[Any, str]] = {}
        for model, how, rows, context in plan(options, bench):
            with bench.going_on(model):
                if model not in models:
                    models.clear()  # one at a time in memory
                    models[model] = make_model(model, bench)
                measure(bench, *models[model], how, rows, context)


def plan(options: argparse.Namespace, bench: Bench) -> Iterator[tuple[str, str, int, int]]:
    """Model, how, rows and context, the most telling first."""
    if bench.quick:
        yield from (("tiny", "eager", 2, 16), ("tiny", "compiled", 2, 20))
    elif options.models or options.rows:
        models, rows = options.models or ["8b"], options.rows or [64]
        yield from itertools.product(models, options.how, rows, options.contexts)
    elif bench.device.type == "cpu":
        yield ("smollm2", "eager", 64, PROMPT)
        yield from (("8b/2", "eager", 64, PROMPT), ("8b/2", "compiled", 64, PROMPT))
    else:
        # Compiling 32 layers, three times over, would take the minutes that the other cases need.
        headline = [("8b", "eager", 64, PROMPT), ("8b", "eager", 1, PROMPT), ("8b/8", "compiled", 64, PROMPT)]
        yield from headline
        if options.sweep:
            eager = itertools.product(["8b"], ["eager"], (256, 64, 8, 1), (PROMPT, LONG))
            compiled = itertools.product(["8b/8"], ["compiled"], (1, 256, 8), (PROMPT,))
            yield from (point for point in itertools.chain(eager, compiled) if point not in headline)


def make_model(name: str, bench: Bench) -> tuple[Any, str]:
    """The model, and what tables call it."""
    if name == "smollm2":
        from swift_kernels.integrations.models import load_model

        return load_model(name, torch.bfloat16, bench.device)[0], "SmolLM2-135M"
    layers = name.partition("/")[2]
    shape = shapes.TINY if name == "tiny" else shapes.LLAMA_8B.cut(int(layers) if layers else None)
    return shapes.llama(shape, bench.device), shape.name


def measure(bench: Bench, model: Any, name: str, how: str, rows: int, context: int) -> None:
    """Adds the case of steps that are called, and on a GPU that of graphs of the same steps."""
    modes = [how, f"{how}, CUDA graph"] if bench.device.type == "cuda" or bench.quick else [how]
    every: list[Labels] = [{"model": name, "rows": rows, "tokens of context": context, "mode": mode} for mode in modes]
    config = model.config
    head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * head_width * model.dtype.itemsize
    cache_bytes *= rows * context
    wanted = [labels for labels in every if bench.wants(labels)]
    if not wanted:
        return
    if bench.device.type == "cuda" and cache_bytes + OTHER_BYTES > torch.cuda.mem_get_info()[0]:
        bench.leave_out(wanted, f"the cache takes {cache_bytes / 1e9:.0f} GB, more than this GPU has left")
        return
    moved = cache_bytes + sum(tensor.nbytes for tensor in model.parameters())
    if not config.tie_word_embeddings:  # of the input embeddings only the rows of the tokens
        moved -= model.get_input_embeddings().weight.nbytes
    head = SwiftHead.for_model(model)
    torch.compiler.reset()
    with ExitStack() as stack:
        decoder_of = partial(Decoder, rows=rows, context=context)
        contenders: list[Contender] = []
        for each in CONTENDERS[how]:
            shared = contenders[0].decoder.cache if contenders and bench.device.type == "cuda" else None
            contenders.append(Contender(each, how, model, head, partial(decoder_of, cache=shared), stack))
        wrong = faults(contenders, how, [each.step for each in contenders], head)
        for labels in wanted:
            steps = [each.step for each in contenders]
            if labels["mode"] != how:
                steps = [each.captured() for each in contenders]
                wrong |= faults(contenders, how, steps, head)
            floors = Floors(bench.clock, bench.device, moved, quick=bench.quick)
            turns = {
                each.name: turn(bench, each, step)
                for each, step in zip(contenders, steps, strict=True)
                if each.name not in wrong
            }
            samples = harness.take_turns(turns, bench.samples(SAMPLES[bench.device.type]), floors)
            note = "; ".join(f"not timed: {fault}" for fault in wrong.values())
            bench.add(Case(labels, "bare", samples, moved=moved, floors=floors.seconds, faster=True, note=note))
        if wrong:
            raise SystemExit("; ".join(wrong.values()))


def turn(bench: Bench, contender: Contender, step: Call) -> Callable[[int], Sample]:
    """A step on a CPU, or the mean of as many as the cache has room for on a GPU."""
    steps = STEPS if bench.device.type == "cuda" else 1

    def sample(number: int) -> Sample:
        if number * steps % STEPS == 0:
            contender.decoder.rewind()
        elapsed = bench.clock(lambda: [step() for _ in range(steps)])
        return elapsed and elapsed / steps

    return sample


def faults(contenders: list[Contender], how: str, steps: list[Call], head: SwiftHead) -> dict[str, str]:
    """What is wrong with the scores of each contender that gives a row another score than `naive` gives it."""
    found = {}
    for contender, step in zip(contenders, steps, strict=True):
        contender.reset()
        for _ in range(STEPS):
            step()
        found[contender.name] = contender.scores()
        contender.reset()
    expected = found["naive"][0]
    unit = reward_magnitude(contenders[0], head)
    wrong = {}
    for name, (scores, token_count) in found.items():
        if name == "bare":
            continue
        if name == "norm, bare":
            if scores.isfinite().any():
                wrong[name] = f"{name} scores rows that it was told to skip"
            continue
        error = float((scores - expected).abs().max()) / unit
        tolerance = TOLERANCE["norm" if how == "compiled" else name] if name != "naive" else 0.0
        print(f"{name}: scores within {error:.1e} of the rewards' size of naive's", file=sys.stderr)
        if not error <= tolerance or not (token_count == STEPS).all():
            wrong[name] = (
                f"{name}: scores are off by {error:.1e} of the rewards' size, at most {tolerance} was expected, over "
                f"{token_count.unique().tolist()} tokens of {STEPS}"
            )
    return wrong


def reward_magnitude(contender: Contender, head: SwiftHead) -> float:
    """Root mean square of the rewards of one step."""
    contender.reset()
    states = contender.decoder.model(
        input_ids=contender.decoder.prompt, output_hidden_states=True, logits_to_keep=1
    ).hidden_states
    rewards = reference.project([state.flatten(0, 1) for state in states], head.weight, head.bias)[:, 1]
    return float(rewards.square().mean().sqrt())


if __name__ == "__main__":
    main()
