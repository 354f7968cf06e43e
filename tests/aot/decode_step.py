"""What one decode step launches, reads and writes on a GPU: counted, on a machine without one.

    python -m tests.aot.decode_step [--layers N] [--json FILE] [--update]

The model is transformers' own LlamaForCausalLM in the shape of Llama-3.1-8B, in bfloat16, with 64 rows, one new token
each and 1,024 tokens in the cache. Its tensors are fake ones on "cuda": shapes and dtypes, no memory, no arithmetic.

Variants: `bare`, the model alone; `gather` and `norm`, inside `attach(model, head, fuse=...)` with `scorer.begin`;
`naive`, as the authors score: every hidden state asked for, copied to float32, concatenated, one nn.Linear. Compiled
also `dots`, the dot products in plain PyTorch inside the traced forward, which Inductor may fuse with the model's own
reductions, and `opaque`, the fused norms kept as calls that Inductor cannot fuse.

`op_launches.py` says how they are counted.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.initialization import no_init_weights

from bench import rivals
from swift_kernels import SwiftHead, attach, features
from swift_kernels.head import HeadConfig
from swift_kernels.integrations import compatibility, norm_path
from tests.aot.fake_gpu import fake_gpu
from tests.aot.op_launches import Count, Step, count_compiled, count_eager

BASELINE = Path(__file__).with_name("decode_step_baseline.json")
VERSIONS = {"torch": torch.__version__.partition("+")[0], "transformers": transformers.__version__}
WHAT = ("launches", "bytes")
LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
ROWS, CONTEXT, STATIC_LENGTH = 64, 1024, 1088
EAGER = ("bare", "gather", "norm", "naive")
COMPILED = ("bare", "gather", "norm", "naive", "dots", "opaque")


def count(mode: str, variant: str, layers: int = 32, cache: str | None = None) -> Count:
    """Counts one decode step.

    Args:
        mode: "eager" or "compiled".
        variant: one of `EAGER` or `COMPILED`.
        layers: decoder layers; all L + 1 hidden states are scored.
        cache: "dynamic", what `generate` uses, or "static", what it compiles; by default the one of the mode.

    Returns:
        What was counted, `launches`, `bytes`, and `kernels`: launches of each op, or kind of kernel.
    """
    cache = cache or ("dynamic" if mode == "eager" else "static")
    with fake_gpu():
        model = _model(layers)
        with torch.no_grad(), _variant(variant, model) as step:
            counted = (count_eager if mode == "eager" else count_compiled)(step, _inputs(model, cache))
    return {"mode": mode, "cache": cache, "layers": layers, "variant": variant, **counted}


def count_all(layers: int = 32, compiled_layers: Sequence[int] = (4, 8)) -> list[Count]:
    """Every variant: eager with both caches, and compiled at each depth."""
    counts = [count("eager", variant, layers, cache) for cache in ("dynamic", "static") for variant in EAGER]
    return counts + [count("compiled", variant, depth) for depth in compiled_layers for variant in COMPILED]


def baseline() -> list[Count]:
    """The committed counts."""
    return json.loads(BASELINE.read_text())["counts"]


def made_here() -> bool:
    """Whether the committed counts are of the versions of PyTorch and transformers that are installed."""
    committed = json.loads(BASELINE.read_text())
    return all(committed[library] == version for library, version in VERSIONS.items())


def worse(counts: list[Count], before: list[Count], same_versions: bool = True) -> list[str]:
    """What launches or moves more than before, or was not counted then; a line each.

    With other versions of PyTorch or transformers the bare model itself launches more or less, so there only what a
    variant adds to it is compared.
    """
    if not same_versions:
        counts, before = _added_to_bare(counts), _added_to_bare(before)
    known = {_key(entry): entry for entry in before}
    lines = []
    for entry in counts:
        key = _key(entry)
        if key not in known:
            lines.append(f"{key}: not in the baseline, which --update writes")
            continue
        lines += [
            f"{key}: {entry[what]:,} {what}, {known[key][what]:,} in the baseline"
            for what in WHAT
            if entry[what] > known[key][what]
        ]
    return lines


def _added_to_bare(counts: list[Count]) -> list[Count]:
    bare = {(entry["mode"], entry["cache"], entry["layers"]): entry for entry in counts if entry["variant"] == "bare"}
    return [
        {**entry, **{what: entry[what] - bare[entry["mode"], entry["cache"], entry["layers"]][what] for what in WHAT}}
        for entry in counts
    ]


def _key(entry: Count) -> str:
    return f"{entry['variant']}, {entry['mode']}, {entry['cache']} cache, {entry['layers']} layers"


# The model and its variants


def _config(layers: int, **changes: Any) -> LlamaConfig:
    return LlamaConfig(**{**LLAMA_8B, **changes}, num_hidden_layers=layers, dtype=torch.bfloat16)


def _model(layers: int) -> Any:
    with no_init_weights(), torch.device("cuda"):
        return LlamaForCausalLM._from_config(_config(layers)).eval().requires_grad_(False)


def _head(model: Any) -> SwiftHead:
    layers = model.config.num_hidden_layers
    widths = (model.config.hidden_size,) * (layers + 1)
    config = HeadConfig(widths=widths, layers=tuple(range(layers + 1)), num_hidden_layers=layers)
    with no_init_weights():
        return SwiftHead(config, device="cuda").requires_grad_(False)


def _inputs(model: Any, cache: str) -> dict[str, Any]:
    """One new token of every row, with the cache as `generate` has it after `CONTEXT` tokens."""
    config = model.config
    past = (
        DynamicCache(config=config) if cache == "dynamic" else StaticCache(config=config, max_cache_len=STATIC_LENGTH)
    )
    shape = (ROWS, config.num_key_value_heads, CONTEXT, config.head_dim)
    for layer in range(config.num_hidden_layers):
        keys = torch.empty(shape, dtype=torch.bfloat16, device="cuda")
        past.update(keys, torch.empty_like(keys), layer)
    token = torch.empty(ROWS, 1, dtype=torch.int64, device="cuda")
    return {"input_ids": token, "position_ids": token.clone(), "past_key_values": past, "use_cache": True}


@contextlib.contextmanager
def _variant(name: str, model: Any) -> Iterator[Step]:
    def bare(**inputs: Any) -> Tensor:
        return model(**inputs).logits

    head, slots = _head(model), torch.empty(ROWS, dtype=torch.int64, device="cuda")
    if name == "bare":
        yield bare
    elif name == "naive":
        with no_init_weights():
            upstream = rivals.upstream(head.weight, head.bias, ROWS)
        # The first call installs the hooks of transformers that keep the states, which Dynamo cannot trace.
        model(input_ids=torch.empty(1, 1, dtype=torch.int64, device="cuda"), output_hidden_states=True)

        def naive(**inputs: Any) -> Tensor:
            output = model(**inputs, output_hidden_states=True)
            upstream.step([entry[:, -1] for entry in output.hidden_states])
            return output.logits

        yield naive
    elif name == "dots":
        with _dots(model, head, slots):
            yield bare
    else:
        with contextlib.ExitStack() as patches:
            # The only questions that `attach` asks of values. That the norms of a Llama can be fused is found out on a
            # small one.
            patches.enter_context(mock.patch.object(compatibility, "check_finite"))
            if name != "gather":
                norms = _norms(model)
                patches.enter_context(mock.patch.object(norm_path, "find_norms", return_value=norms))
            if name == "opaque":  # otherwise a compiled forward gathers
                patches.enter_context(mock.patch.object(norm_path.NormPath, "scores", _always))
            with attach(model, head, fuse="gather" if name == "gather" else "norm") as scorer:
                scorer.begin(slots)
                yield bare


def _always(norms: norm_path.NormPath) -> bool:
    buffers = norms._buffers()
    assert buffers is not None
    norms._step, norms._left_layers = norms._make_step(*buffers), True
    return True


def _norms(model: Any) -> Any:
    """`find_norms` of a small model with values, for the modules of the same names in this one."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    from swift_kernels.norms import FusableNorm, Norms, find_norms

    with unset_fake_temporarily():
        sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4}
        small = LlamaForCausalLM(_config(model.config.num_hidden_layers, **sizes, num_key_value_heads=2)).bfloat16()
        names = {module: name for name, module in small.named_modules()}
        found = find_norms(small)

    def same(norm: FusableNorm | str) -> FusableNorm:
        assert isinstance(norm, FusableNorm), norm
        module, owner = (model.get_submodule(names[each]) for each in (norm.module, norm.owner))
        return dataclasses.replace(norm, module=module, owner=owner)

    return Norms([same(norm) for norm in found.entries], [same(norm) for norm in found.others])


@contextlib.contextmanager
def _dots(model: Any, head: SwiftHead, slots: Tensor) -> Iterator[None]:
    """`score_step` in plain PyTorch, written so that Inductor fuses all of it into the model's reductions.

    Two sums over the width, not one of `[rows, 2, width]`, have the shape of the norm's own; three buffers of one value
    a slot, not the `[slots, 2]` of `ScoreState`, have the shape of their results. What goes into as_strided Inductor
    stores when it is made, in the kernel of the norm; of a slice it learns too late, and adds the residuals up again.
    """
    weighted, gates, counts = (
        torch.empty(ROWS, dtype=dtype, device="cuda") for dtype in (*2 * [torch.float32], torch.int32)
    )
    width, last = model.config.hidden_size, len(head.config.widths) - 1
    logits: list[Tensor] = []

    def consume(k: int, entry: Tensor) -> None:
        rows = entry.as_strided((ROWS, width), (entry.stride(0), 1)).float()
        if k == 0:
            logits[:] = [head.bias[0], head.bias[1]]
        for output in range(2):
            columns = head.weight[output, k * width : (k + 1) * width]
            logits[output] = logits[output] + (rows * columns).sum(-1)
        if k == last:
            live, target = slots >= 0, slots.clamp_min(0)
            gate, reward = logits[0].sigmoid(), logits[1]
            weighted.index_add_(0, target, torch.where(live, gate * reward, 0.0))
            gates.index_add_(0, target, torch.where(live, gate, 0.0))
            counts.index_add_(0, target, live.int())

    with features.read(model, features.HIDDEN_STATES, head.config.layers, consume):
        yield


def tables(counts: list[Count]) -> list[Any]:
    """One table for each mode, cache and depth, each variant beside the bare model; then what a layer more adds."""
    from rich.table import Table

    groups: dict[tuple[str, str, int], dict[str, Count]] = {}
    for entry in counts:
        groups.setdefault((entry["mode"], entry["cache"], entry["layers"]), {})[entry["variant"]] = entry
    made = []
    for (mode, cache, layers), variants in groups.items():
        table = Table(title=f"{mode}, {cache} cache, {layers} layers counted", min_width=60)
        for column in ("variant", "launches", "against bare", "bytes", "against bare"):
            table.add_column(column, justify="left" if column == "variant" else "right")
        table.add_column("launches of", overflow="fold")
        bare = variants["bare"]
        for variant, entry in variants.items():
            table.add_row(
                variant,
                f"{entry['launches']:,}",
                f"{entry['launches'] - bare['launches']:+,}",
                f"{entry['bytes']:,}",
                f"{entry['bytes'] - bare['bytes']:+,}",
                _summary(entry["kernels"]),
            )
        made.append(table)
    for (mode, cache, layers), variants in groups.items():
        deeper = min((key for key in groups if key[:2] == (mode, cache) and key[2] > layers), default=None)
        if deeper is None:
            continue
        table = Table(title=f"{mode}, {cache} cache: a layer more, from {layers} to {deeper[2]}", min_width=60)
        for column in ("variant", "launches", "bytes"):
            table.add_column(column, justify="left" if column == "variant" else "right")
        for variant, entry in variants.items():
            steps = [
                Fraction(groups[deeper][variant][what] - entry[what], deeper[2] - layers)
                for what in ("launches", "bytes")
            ]
            table.add_row(variant, *(f"{float(step):,.2f}".removesuffix(".00") for step in steps))
        made.append(table)
    return made


def _summary(kernels: dict[str, int]) -> str:
    """Launches by what they are: the GEMMs, attention, those of this package, and the rest."""
    kinds: Counter[str] = Counter()
    for name, number in kernels.items():
        short = name.rpartition("::")[2]
        if short in ("mm", "bmm", "addmm"):
            kinds["GEMM"] += number
        elif "attention" in short:
            kinds["attention"] += number
        elif name.startswith("swift_kernels::") or name == "triton":
            kinds[short] += number
        else:
            kinds["other ops"] += number
    return ", ".join(f"{number} {kind}" for kind, number in kinds.most_common())


def main() -> None:
    from rich.console import Console

    parser = argparse.ArgumentParser(description="Counts what one decode step launches, reads and writes.")
    parser.add_argument("--layers", type=int, default=32, help="decoder layers of the eager step (32)")
    parser.add_argument("--compiled-layers", type=int, nargs="+", default=[4, 8], help="of the compiled one (4 8)")
    parser.add_argument("--json", type=Path, help="also write the counts to this file")
    parser.add_argument("--update", action="store_true", help="make these counts the baseline's, keeping its others")
    options = parser.parse_args()

    counts = count_all(options.layers, sorted(options.compiled_layers))
    console = Console(width=150)
    console.print(f"{ROWS} rows, one new token each, {CONTEXT:,} tokens in the cache, bfloat16, Llama-3.1-8B's widths")
    for table in tables(counts):
        console.print(table)
    if options.json:
        options.json.write_text(json.dumps({**VERSIONS, "counts": counts}, indent=1) + "\n")
    if options.update:
        kept = {_key(entry): entry for entry in (baseline() if BASELINE.exists() else [])}
        kept |= {_key(entry): entry for entry in counts}
        ordered = sorted(kept.values(), key=lambda entry: (entry["mode"] != "eager", entry["cache"], entry["layers"]))
        BASELINE.write_text(json.dumps({**VERSIONS, "counts": ordered}, indent=1) + "\n")
    faults = worse(counts, baseline(), made_here())
    for fault in faults:
        console.print(f"[red]{fault}")
    if faults:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
