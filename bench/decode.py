"""Tokens a second of decoding, with and without scoring, step by step in turn.

    python bench/decode.py [--model smollm2|8b] [--layers N] [--rows 64] [--quick] [--json] [--device cpu]

`8b` has the shape of Llama-3.1-8B and random weights: two layers of it on the CPU, all 32 on a GPU. Contenders:

    bare          the stock model
    gather        attach(model, head), one kernel beside the model at each step
    norm          attach(model, head, fuse="norm"), inside the model's norms
    norm, bare    the same fused norms, which score no row
    naive         output_hidden_states, and the authors' way at each step: every layer to float32, cat, nn.Linear

On a GPU also `graph, bare`, `graph, gather` and `graph, norm`: the same step captured into a CUDA graph and replayed.
Each contender has modules and a cache of its own around the same parameters, and all take turns: at every step on the
CPU, whose speed drifts within seconds, and every 16 steps on a GPU, which is not to wait in between. A figure is the
median ratio to `bare` (or `graph, bare`) in the same turn.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import statistics
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import common
import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from swift_kernels import SwiftHead, attach, reference, schema

PROMPT, STEPS = 16, 16
"""Tokens of the prompt, and decoded in each timed run."""

ROUNDS = {"cpu": 15, "cuda": 25}

CONTENDERS = ("bare", "gather", "norm", "norm, bare", "naive")
GRAPHS = ("graph, bare", "graph, gather", "graph, norm")


class Decoder:
    """A model, a static cache, and one decode step on buffers that stay where they are."""

    def __init__(self, model: Any, rows: int) -> None:
        device = model.device
        self.model, self.rows = model, rows
        self.length = PROMPT + STEPS
        self.cache: Any = StaticCache(config=model.config, max_cache_len=self.length)
        self.places = torch.arange(self.length, device=device)[None, None, None]
        self.position = torch.zeros(1, 1, dtype=torch.int64, device=device)
        self.token = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self.slots = torch.arange(rows, device=device)
        generator = torch.Generator().manual_seed(0)
        vocabulary = model.config.vocab_size
        self.prompt = torch.randint(vocabulary, (rows, PROMPT), generator=generator).to(device)
        for start in range(0, PROMPT, 4):  # in parts, to keep the memory of the prefill small
            columns = torch.arange(start, start + 4, device=device)
            model(
                input_ids=self.prompt[:, start : start + 4],
                position_ids=columns[None],
                attention_mask=(self.places <= columns[None, None, :, None]).expand(rows, 1, -1, -1),
                past_key_values=self.cache,
                logits_to_keep=1,
            )

    def rewind(self) -> None:
        """Back to the end of the prompt, in the same buffers: the mask hides what the cache holds beyond it."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(PROMPT)
        self.token.copy_(self.prompt[:, :1])
        self.position.fill_(PROMPT)

    def step(self, **options: Any) -> Any:
        output = self.model(
            input_ids=self.token,
            position_ids=self.position,
            attention_mask=(self.places <= self.position).expand(self.rows, 1, 1, self.length),
            past_key_values=self.cache,
            **options,
        )
        self.token.copy_(output.logits[:, -1].argmax(-1, keepdim=True))
        self.position.add_(1)
        return output


@dataclass
class Contender:
    decoder: Decoder
    step: Callable[[], Any]
    scorer: Any = None


def contender(name: str, model: Any, head: SwiftHead, rows: int, stack: ExitStack) -> Contender:
    """One decode step as `name` does it, until the stack is closed."""
    # Modules of its own: attaching to them, or asking them for hidden states, is not noticed elsewhere.
    model = copy.deepcopy(model, {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]})
    decoder = Decoder(model, rows)
    step: Callable[[], Any] = decoder.step
    scorer = None
    if name == "naive":
        step = naive(decoder, head)
    elif "gather" in name or "norm" in name:
        scorer = stack.enter_context(attach(model, head, fuse="norm" if "norm" in name else "gather"))
        scorer.warmup(rows)
        scorer.begin(torch.full_like(decoder.slots, -1) if name == "norm, bare" else decoder.slots)
    if name.startswith("graph"):
        step = captured(step, decoder).replay
    return Contender(decoder, step, scorer)


def captured(step: Callable[[], Any], decoder: Decoder) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    decoder.rewind()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def naive(decoder: Decoder, head: SwiftHead) -> Callable[[], None]:
    linear = torch.nn.Linear(head.config.num_features, 2, device=head.weight.device)
    linear.load_state_dict(head.state_dict())
    sums = torch.zeros(decoder.rows, 2, device=head.weight.device)
    token_count = torch.zeros(decoder.rows, dtype=torch.int32, device=head.weight.device)

    def step() -> None:
        states = decoder.step(output_hidden_states=True).hidden_states
        logits = linear(torch.cat([state[:, -1].float() for state in states], dim=1))
        gate, reward = reference.gate_and_reward(logits)
        sums.add_(torch.stack([gate * reward, gate], dim=1))
        token_count.add_(1)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("smollm2", "8b"), default="smollm2")
    parser.add_argument("--layers", type=int, help="of the 8b shape; 2 on the CPU and 32 on a GPU unless told")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--rounds", type=int, help=f"of {STEPS} tokens; 15 on the CPU and 25 on a GPU unless told")
    parser.add_argument("--quick", action="store_true", help="5 rounds")
    parser.add_argument("--json", action="store_true", help="print the result as JSON instead of a table")
    parser.add_argument("--device", help="cpu or cuda; by default cuda where there is one")
    options = parser.parse_args()
    device = common.choose_device(options.device)
    rounds = 5 if options.quick else options.rounds or ROUNDS[device.type]
    layers = options.layers or (2 if device.type == "cpu" else 32)
    with torch.no_grad():
        model = make_model(options.model, layers, device)
        head = SwiftHead.for_model(model)
        result = {
            "environment": common.environment(device),
            "implementation": schema.implementation(device.type),
            "model": options.model,
            "layers": model.config.num_hidden_layers,
            "dtype": str(model.dtype),
            "rows": options.rows,
            "prompt": PROMPT,
            "tokens_a_round": STEPS,
            **measure(model, head, options.rows, rounds, device),
        }
    path = common.write_result(device, f"decode_{options.model}_{options.rows}_rows", result)
    if options.json:
        print(json.dumps(result))
    else:
        print_table(result)
        print(f"every sample: {path}")


def make_model(name: str, layers: int, device: torch.device) -> Any:
    if name == "smollm2":
        from swift_kernels.integrations.models import load_model

        return load_model("smollm2", torch.bfloat16, device)[0]
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def measure(model: Any, head: SwiftHead, rows: int, rounds: int, device: torch.device) -> dict[str, Any]:
    cuda = device.type == "cuda"
    seconds: Callable[[Callable[[], Any]], float | None] = common.cuda_seconds if cuda else common.seconds
    steps = STEPS if cuda else 1
    samples: dict[str, list[float | None]] = {}
    for group in [CONTENDERS, GRAPHS] if cuda else [CONTENDERS]:
        samples.update({name: [] for name in group})
        with ExitStack() as stack:
            contenders = {name: contender(name, model, head, rows, stack) for name in group}
            for turn in range(rounds + 1):
                print(f"\rround {turn} of {rounds}", end="", file=sys.stderr)
                for each in contenders.values():
                    each.decoder.rewind()
                for part in range(STEPS // steps):
                    order = group[part % len(group) :] + group[: part % len(group)]
                    for name in order if turn % 2 else order[::-1]:
                        elapsed = seconds(functools.partial(run, contenders[name].step, steps))
                        if turn:  # the first round warms up
                            samples[name].append(elapsed)
            print(file=sys.stderr)
            for name, each in contenders.items():
                if each.scorer is not None:
                    check(name, each.scorer.scores())
    return {"steps_of_a_sample": steps, "seconds": samples}


def check(name: str, scores: torch.Tensor) -> None:
    """Exits unless every row has been scored, or none where none was to be."""
    expected = 0 if name == "norm, bare" else scores.numel()
    if int(scores.isfinite().sum()) != expected:
        sys.exit(f"{name}: {int(scores.isfinite().sum())} rows have a score, expected {expected}; no figure")


def run(step: Callable[[], Any], steps: int) -> None:
    for _ in range(steps):
        step()


def print_table(result: dict[str, Any]) -> None:
    environment = result["environment"]
    console = Console(width=max(110, Console().width))
    table = Table(
        title=f"{result['rows']} rows decoded by {result['model']} ({result['layers']} layers, {result['dtype']}), "
        f"{result['implementation']!r}, on {environment['device']}, {environment['threads']} threads",
        title_justify="left",
    )
    for column in ("", "tokens/s", "of bare", "95% interval", "pairs"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    tokens = result["rows"] * result["steps_of_a_sample"]
    for name, samples in result["seconds"].items():
        bare = result["seconds"]["graph, bare" if name.startswith("graph") else "bare"]
        ratios = [before / after for before, after in zip(bare, samples, strict=True) if before and after]
        taken = [sample for sample in samples if sample]
        if len(ratios) < 3:
            table.add_row(name, "disturbed", "", "", str(len(ratios)))
            continue
        ratio = common.Summary.of(ratios)
        table.add_row(
            name,
            f"{tokens / statistics.median(taken):.1f}",
            f"{ratio.median:.2%}",
            f"{ratio.low:.2%} .. {ratio.high:.2%}",
            str(len(ratios)),
        )
    console.print(table)


if __name__ == "__main__":
    main()
