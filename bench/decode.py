"""Tokens a second of decoding, with and without scoring, in pairs of runs that take turns.

    python bench/decode.py [--model smollm2|8b] [--layers N] [--rows 64] [--quick] [--json] [--device cpu]

`8b` has the shape of Llama-3.1-8B and random weights: two layers of it on the CPU, all 32 on a GPU. Contenders:

    bare          the stock model
    gather        attach(model, head), one kernel beside the model at each step
    norm          attach(model, head, fuse="norm"), inside the model's norms
    norm, bare    the same fused norms, which score no row
    naive         output_hidden_states, and the authors' way at each step: every layer to float32, cat, nn.Linear

On a GPU also `graph, bare`, `graph, gather` and `graph, norm`: the same step captured into a CUDA graph and replayed.
Every figure is the median over runs of the ratio to the run of `bare` (or `graph, bare`) that it is paired with.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import common
import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from swift_kernels import SwiftHead, attach, reference, schema

PROMPT, STEPS = 16, 16
"""Tokens of the prompt, and decoded in each timed run."""

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
        self.scorers: dict[str, Any] = {}
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


@contextmanager
def contender(name: str, decoder: Decoder, head: SwiftHead) -> Iterator[Callable[[], Any]]:
    """One decode step as `name` does it."""
    model = decoder.model
    with ExitStack() as stack:
        step: Callable[[], Any] = decoder.step
        if name == "naive":
            step = naive(decoder, head)
        elif "gather" in name or "norm" in name:
            scorer = stack.enter_context(attach(model, head, fuse="norm" if "norm" in name else "gather"))
            scorer.warmup(decoder.rows)
            skipped = torch.full_like(decoder.slots, -1)
            scorer.begin(skipped if name == "norm, bare" else decoder.slots)
            decoder.scorers[name] = scorer  # a graph writes into its state after it has been detached
        if name.startswith("graph"):
            graph = captured(step, decoder)
            step = graph.replay
        yield step


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
    parser.add_argument("--rounds", type=int, default=25, help="runs of each contender")
    parser.add_argument("--quick", action="store_true", help="5 rounds")
    parser.add_argument("--json", action="store_true", help="print the result as JSON instead of a table")
    parser.add_argument("--device", help="cpu or cuda; by default cuda where there is one")
    options = parser.parse_args()
    device = common.choose_device(options.device)
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
            "steps": STEPS,
            **measure(model, head, options.rows, 5 if options.quick else options.rounds, device),
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
    decoder = Decoder(model, rows)
    cuda = device.type == "cuda"
    seconds: Callable[[Callable[[], Any]], float | None] = common.cuda_seconds if cuda else common.seconds
    groups = [CONTENDERS, GRAPHS] if cuda else [CONTENDERS]
    samples: dict[str, list[float | None]] = {}
    for group in groups:
        # A graph is captured once; in eager mode each contender attaches and detaches in turn, apart from the clock.
        graphs = {name: record(name, decoder, head) for name in group if name.startswith("graph")}
        samples.update({name: [] for name in group})
        for turn in range(rounds + 1):
            print(f"\rround {turn} of {rounds}", end="", file=sys.stderr)
            for name in group[turn % len(group) :] + group[: turn % len(group)]:
                with nullcontext(graphs[name]) if name in graphs else contender(name, decoder, head) as step:
                    decoder.rewind()
                    elapsed = seconds(functools.partial(run, step))
                if turn:  # the first round warms up
                    samples[name].append(elapsed)
        print(file=sys.stderr)
    return {"seconds": samples}


def record(name: str, decoder: Decoder, head: SwiftHead) -> Callable[[], Any]:
    """The graph of a contender, which can be replayed after the model has been detached."""
    with contender(name, decoder, head) as step:
        return step


def run(step: Callable[[], Any]) -> None:
    for _ in range(STEPS):
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
    tokens = result["rows"] * result["steps"]
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
