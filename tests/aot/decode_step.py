"""What one decode step launches, reads and writes on a GPU: counted, on a machine without one.

    python -m tests.aot.decode_step [--layers N] [--json FILE] [--update]

The model is transformers' own LlamaForCausalLM in the shape of Llama-3.1-8B, in bfloat16, with 64 rows, one new token
each and 1,024 tokens in the cache. Its tensors are fake ones on "cuda": shapes and dtypes, no memory, no arithmetic.

Variants: `bare`, the model alone; `gather` and `norm`, inside `attach(model, head, fuse=...)` with `scorer.begin`;
`naive`, as the authors score: every hidden state asked for, copied to float32, concatenated, one nn.Linear. Compiled
also `dots`, the dot products in plain PyTorch inside the traced forward, which Inductor may fuse with the model's own
reductions, and `opaque`, the fused norms kept as calls that Inductor cannot fuse.

**Eager.** Every op that reaches the dispatcher below autograd, where composite ones (linear, matmul, to) have
become what runs. Views, metadata and allocations launch nothing; each op of `ONE_LAUNCH` launches one kernel (cat one
for each 128 tensors); any other op is an error here, not a guess. Attention goes where a GPU sends it: without a mask
to FlashAttention, with one to the memory-efficient kernel after the mask is made additive. What a library decides at
run time is not counted: a GEMM that cuBLAS splits along K, or attention split along the cache, launches one more
kernel.

**Compiled.** Inductor's own Triton code for sm_90, from `torch.compile(fullgraph=True)`: the calls in the generated
`call` function, which is generated and not run. Replay by a CUDA graph launches the same kernels.

**Bytes.** For each launch what it must read and write, each byte once: the elements that its inputs and outputs address
(an expanded dimension once, of an embedding or a cache only the rows it touches), and what is updated in place both
read and written. All rows count as live. In Inductor's kernels an index that is no sum of products counts the smaller
of the loop and the buffer, and a second pass over a row that a kernel makes itself counts nothing.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import ctypes
import dataclasses
import json
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import transformers
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.initialization import no_init_weights

from bench import rivals
from swift_kernels import SwiftHead, attach, features
from swift_kernels.head import HeadConfig
from swift_kernels.integrations import compatibility, norm_path

BASELINE = Path(__file__).with_name("decode_step_baseline.json")
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

Step = Callable[..., Tensor]
Count = dict[str, Any]


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
            counted = (_count_eager if mode == "eager" else _count_compiled)(step, _inputs(model, cache))
    return {"mode": mode, "cache": cache, "layers": layers, "variant": variant, **counted}


def count_all(layers: int = 32, compiled_layers: Sequence[int] = (4, 8)) -> list[Count]:
    """Every variant: eager with both caches, and compiled at each depth."""
    counts = [count("eager", variant, layers, cache) for cache in ("dynamic", "static") for variant in EAGER]
    return counts + [count("compiled", variant, depth) for depth in compiled_layers for variant in COMPILED]


def baseline() -> list[Count]:
    """The committed counts."""
    return json.loads(BASELINE.read_text())["counts"]


def worse(counts: list[Count], before: list[Count]) -> list[str]:
    """What launches or moves more than before, or was not counted then; a line each."""
    known = {_key(entry): entry for entry in before}
    lines = []
    for entry in counts:
        key = _key(entry)
        if key not in known:
            lines.append(f"{key}: not in the baseline, which --update writes")
            continue
        lines += [
            f"{key}: {entry[what]:,} {what}, {known[key][what]:,} in the baseline"
            for what in ("launches", "bytes")
            if entry[what] > known[key][what]
        ]
    return lines


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


def _always(norms: norm_path.NormPath, _entry: Tensor) -> bool:
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

    with features.tap(model, features.HIDDEN_STATES, head.config.layers, consume):
        yield


# Eager: one op, its launches and its bytes

ALLOCATIONS = frozenset(
    f"aten::{name}" for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
)
ONE_LAUNCH = frozenset(
    [f"swift_kernels::{name}" for name in ("score_step", "rms_norm", "rms_norm_score")]
    + [
        f"aten::{name}"
        for name in (
            *("_to_copy", "clone", "copy_", "fill_", "zero_", "arange", "scalar_tensor", "zeros", "full", "ones"),
            *("add", "add_", "sub", "mul", "mul_", "div", "neg", "pow", "rsqrt", "reciprocal", "sqrt", "exp", "cos"),
            *("sin", "silu", "sigmoid", "where", "le", "lt", "ge", "gt", "eq", "bitwise_and", "logical_and"),
            *("clamp_min", "mean", "sum", "embedding", "index", "index_select", "index_copy_", "index_add_"),
            *("mm", "bmm", "addmm", "stack"),
            *("_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention"),
        )
    ]
)
CAT_BATCH = 128
"""Tensors that one launch of CUDA's cat takes, where they are contiguous and of one dtype."""
WRITTEN_UNREAD = frozenset(("aten::copy_", "aten::fill_", "aten::zero_", "aten::index_copy_"))
ROWS_OF = frozenset(("aten::embedding", "aten::index", "aten::index_select"))
"""Ops that read of their first argument what they return."""


class OpCounter(TorchDispatchMode):
    """Counts the launches and bytes of every op on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.bytes = 0

    @property
    def launches(self) -> int:
        return self.kernels.total()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        count = launches(op, args, kwargs or {}, result)
        if count:
            self.kernels[op.overloadpacket._qualified_op_name] += count
            self.bytes += bytes_moved(op, args, kwargs or {}, result)
        return result


def launches(op: Any, args: Any, kwargs: Any, result: Any) -> int:
    """How many kernels an op launches.

    Raises:
        NotImplementedError: nobody has said so for this op.
    """
    name = op.overloadpacket._qualified_op_name
    inputs, outputs = _tensors((args, kwargs)), _tensors(result)
    devices = {tensor.device.type for tensor in (*inputs, *outputs)}
    if "cuda" not in devices or op.namespace == "prim" or name in ALLOCATIONS:
        return 0
    writes = any(argument.alias_info is not None and argument.alias_info.is_write for argument in op._schema.arguments)
    storages = {tensor.untyped_storage()._cdata for tensor in inputs}
    if not writes and outputs and all(tensor.untyped_storage()._cdata in storages for tensor in outputs):
        return 0  # a view
    if name == "aten::_to_copy" and len(devices) > 1:
        raise NotImplementedError(f"{op} copies between host and device, which a decode step must not")
    if name == "aten::cat":
        return math.ceil(len(args[0]) / CAT_BATCH)
    if name in ONE_LAUNCH:
        return 1
    raise NotImplementedError(f"{op}: say in ONE_LAUNCH whether it launches one kernel")


def bytes_moved(op: Any, args: Any, kwargs: Any, result: Any) -> int:
    """Bytes an op reads and writes, each once; what it updates in place, both."""
    name = op.overloadpacket._qualified_op_name
    arguments = {argument.name: value for argument, value in zip(op._schema.arguments, args, strict=False)} | kwargs
    if name == "swift_kernels::rms_norm_score":
        return _rms_norm_score_bytes(arguments, result)
    written = [
        argument.name for argument in op._schema.arguments if argument.alias_info and argument.alias_info.is_write
    ]
    reads, writes = {}, {}
    for argument, value in arguments.items():
        for tensor in _tensors(value):
            if argument not in written or name not in WRITTEN_UNREAD:
                reads[_region(tensor)] = addressed_bytes(tensor)
            if argument in written:
                writes[_region(tensor)] = addressed_bytes(tensor)
    touched = {tensor.untyped_storage()._cdata for argument in written for tensor in _tensors(arguments.get(argument))}
    for tensor in _tensors(result):
        if tensor.untyped_storage()._cdata not in touched:
            writes[_region(tensor)] = addressed_bytes(tensor)
    if name in ROWS_OF:
        reads[_region(args[0])] = addressed_bytes(result)
    elif name == "aten::index_copy_":
        writes[_region(args[0])] = addressed_bytes(args[3])
    return sum(reads.values()) + sum(writes.values())


def _rms_norm_score_bytes(arguments: dict[str, Any], result: Tensor) -> int:
    """Of the weight an entry's columns alone; bias, sums and counts where the last one closes the step."""
    entry, weight = arguments["hidden_states"], arguments["weight"]
    row = weight.shape[0] * arguments["partials"].element_size()  # bytes of one entry's partial sums
    moved = sum(map(addressed_bytes, (entry, result, arguments["norm_weight"], arguments["slots"])))
    moved += weight.shape[0] * entry.shape[1] * weight.element_size() + entry.shape[0] * row
    if arguments["last"]:
        moved += addressed_bytes(arguments["bias"]) + arguments["entry"] * entry.shape[0] * row
        moved += 2 * sum(addressed_bytes(arguments[name]) for name in ("sums", "token_count"))
    if arguments.get("gate_reward") is not None and arguments["last"]:
        moved += addressed_bytes(arguments["gate_reward"])
    return moved


def addressed_bytes(tensor: Tensor) -> int:
    """Bytes of the elements that a view addresses; an expanded dimension counts once."""
    sizes = (1 if stride == 0 else size for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return math.prod(sizes) * tensor.element_size() if tensor.numel() else 0


def _region(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tuple(tensor.shape), tensor.stride()


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _count_eager(step: Step, inputs: dict[str, Any]) -> Count:
    with OpCounter() as counter:
        step(**inputs)
    return {"launches": counter.launches, "bytes": counter.bytes, "kernels": dict(counter.kernels.most_common())}


# Compiled: the code that Inductor writes


def _count_compiled(step: Step, inputs: dict[str, Any]) -> Count:
    from torch._inductor import config
    from torch._inductor.exc import InductorError
    from torch._inductor.graph import GraphLowering

    counts: list[Count] = []

    def generate(graph: Any) -> None:
        counts.append(_count_graph(graph))
        raise _GeneratedError

    torch._dynamo.reset()
    with (
        mock.patch.object(GraphLowering, "_compile_to_module", generate),
        config.patch(fx_graph_cache=False, fx_graph_remote_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        try:
            torch.compile(step, fullgraph=True, dynamic=False)(**inputs)
        except InductorError:
            if not counts:
                raise
    torch._dynamo.reset()
    assert len(counts) == 1
    return counts[0]


class _GeneratedError(Exception):
    """Ends a compilation whose code is there: it is not to be loaded."""


def _count_graph(graph: Any) -> Count:
    code, _ = graph.codegen()
    kernels = called_kernels(code.value)
    nodes = [node for node in graph.scheduler.nodes if _launches_of_node(node)]
    if len(nodes) != kernels.total():
        raise AssertionError(f"the code launches {kernels}, the scheduler knows {len(nodes)} kernels")
    return {
        "launches": kernels.total(),
        "bytes": sum(_node_bytes(node, graph) for node in nodes),
        "kernels": dict(kernels.most_common()),
    }


SILENT_CALLS = frozenset(
    (
        *("args.clear", "assert_size_stride", "assert_alignment", "copy_if_misaligned", "empty_strided_cuda"),
        *("get_raw_stream", "reinterpret_tensor", "torch.cuda._DeviceGuard", "torch.cuda.set_device"),
    )
)
"""Calls of generated code that launch nothing, given aligned inputs."""


def called_kernels(code: str) -> Counter[str]:
    """The kernels that the `call` function of Inductor's code launches: "triton", or the op of a library's."""
    kernels: Counter[str] = Counter()
    [call] = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.FunctionDef) and node.name == "call"]
    for node in ast.walk(call):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        if name.endswith(".run"):
            kernels["triton"] += 1
        elif name.startswith("extern_kernels."):
            kernels["aten::" + name.removeprefix("extern_kernels.")] += 1
        elif name.startswith("torch.ops."):
            namespace, op = name.split(".")[2:4]
            kernels[f"{namespace}::{op}"] += 1
        elif name not in SILENT_CALLS:
            raise NotImplementedError(f"{ast.unparse(node)}: say in SILENT_CALLS if it launches nothing")
    unknown = kernels.keys() - ONE_LAUNCH - {"triton"}
    if unknown:
        raise NotImplementedError(f"{unknown}: say in ONE_LAUNCH whether they launch one kernel")
    return kernels


def _launches_of_node(node: Any) -> bool:
    from torch._inductor import ir
    from torch._inductor.scheduler import NopKernelSchedulerNode

    return not isinstance(node, NopKernelSchedulerNode) and not isinstance(node.node, ir.MultiOutput)


def _node_bytes(node: Any, graph: Any) -> int:
    from torch._inductor.dependencies import MemoryDep
    from torch._inductor.scheduler import ExternKernelSchedulerNode

    if isinstance(node, ExternKernelSchedulerNode):
        call = node.node.fx_node
        args, kwargs = torch.fx.map_arg((call.args, call.kwargs), lambda argument: argument.meta["val"])
        return bytes_moved(call.target, args, kwargs, call.meta["val"])
    made = {dependency.name for dependency in node.read_writes.writes}
    elements: Counter[tuple[str, str]] = Counter()
    for kind, dependencies in (("read", node.read_writes.reads), ("write", node.read_writes.writes)):
        for dependency in dependencies:
            unseen = dependency.name in (made if kind == "read" else graph.removed_buffers)
            if isinstance(dependency, MemoryDep) and not unseen:
                variables = dependency.index.free_symbols
                sizes = [
                    int(size)
                    for variable, size in dependency.ranges.items()
                    if variable in variables or dependency.is_indirect()
                ]
                elements[kind, dependency.name] += math.prod(sizes)
    return sum(
        min(number, int(graph.get_numel(name))) * graph.get_dtype(name).itemsize
        for (_, name), number in elements.items()
    )


# A GPU that is not there

H200 = SimpleNamespace(
    name="NVIDIA H200",
    major=9,
    minor=0,
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    shared_memory_per_block_optin=232448,
    warp_size=32,
    total_memory=141 << 30,
)


@contextlib.contextmanager
def fake_gpu() -> Iterator[None]:
    """Inside, tensors on "cuda" are fake ones, and Inductor writes Triton code for an H200."""
    import triton
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor import scheduler
    from torch._inductor.fx_passes.joint_graph import UniformValueConstantFolder
    from torch._inductor.runtime.hints import DeviceProperties
    from triton.backends.compiler import GPUTarget

    deduce = UniformValueConstantFolder._deduce_value

    def deduce_on_host(folder: Any, node: Any) -> Any:
        with _OnHost():
            return deduce(folder, node)

    properties = staticmethod(lambda device=None: H200)
    target = GPUTarget("cuda", 90, 32)
    driver = SimpleNamespace(get_current_target=lambda: target, get_current_device=lambda: 0)
    _register_device_guard()
    DeviceProperties.create.cache_clear()
    torch.utils._triton.triton_hash_with_backend.cache_clear()
    with contextlib.ExitStack() as stack:
        for patch in (
            mock.patch.object(torch.cuda, "get_device_properties", return_value=H200),
            mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0)),
            mock.patch.object(CudaInterface, "get_device_properties", properties),
            mock.patch.object(CudaInterface.Worker, "get_device_properties", properties),
            mock.patch.object(CudaInterface, "is_bf16_supported", staticmethod(lambda *_, **__: True)),
            mock.patch.object(scheduler, "has_triton", return_value=True),
            mock.patch.object(triton.runtime.driver, "_active", driver),
            mock.patch.object(UniformValueConstantFolder, "_deduce_value", deduce_on_host),
        ):
            stack.enter_context(patch)
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)
        library = stack.enter_context(torch.library._scoped_library("aten", "IMPL"))
        for key in ("CUDA", "AutogradCUDA"):
            library.impl("scaled_dot_product_attention", _attention, key)
        stack.enter_context(FakeTensorMode())
        try:
            yield
        finally:
            DeviceProperties.create.cache_clear()
            torch.utils._triton.triton_hash_with_backend.cache_clear()


class _OnHost(TorchDispatchMode):
    """Inductor computes constants where the graph would: that is moved to the CPU."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return op(*args, **({**kwargs, "device": torch.device("cpu")} if kwargs.get("device") else kwargs))


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The ops that `scaled_dot_product_attention` runs on a GPU; a build for the CPU would take its plain one."""
    if attn_mask is None:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        output = flash(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
        heads, length, width = output.shape[1:]  # laid out as [batch, length, heads, width]
        return output.as_strided(output.shape, (length * heads * width, width, heads * width, 1))
    assert not enable_gqa, "with a mask and fewer key heads, a GPU takes the plain attention"
    if attn_mask.dtype == torch.bool:
        attn_mask = torch.where(attn_mask, 0.0, torch.scalar_tensor(-math.inf, dtype=query.dtype, device=query.device))
    attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(query, key, value, attn_mask, False, dropout_p, is_causal, scale=scale)[0]


def _register_device_guard() -> None:
    """Lets a PyTorch built without CUDA index fake tensors on "cuda".

    Indexing enters the guard of its tensor's device. FakeTensorMode puts one that does nothing in place of a CUDA guard
    that has no devices, but a build for the CPU has none to replace: it gets that of the meta device.
    """
    library = ctypes.CDLL(str(next(Path(torch.__file__).parent.glob("lib/libc10.*"))))
    devices = torch._C._autograd.DeviceType
    registry = (ctypes.c_void_p * 20).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    cuda, meta = int(devices.CUDA), int(devices.Meta)
    if not registry[cuda]:
        registry[cuda] = registry[meta]


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
    versions = {"torch": torch.__version__.partition("+")[0], "transformers": transformers.__version__}
    if options.json:
        options.json.write_text(json.dumps({**versions, "counts": counts}, indent=1) + "\n")
    if options.update:
        kept = {_key(entry): entry for entry in (baseline() if BASELINE.exists() else [])}
        kept |= {_key(entry): entry for entry in counts}
        ordered = sorted(kept.values(), key=lambda entry: (entry["mode"] != "eager", entry["cache"], entry["layers"]))
        BASELINE.write_text(json.dumps({**versions, "counts": ordered}, indent=1) + "\n")
    faults = worse(counts, baseline())
    for fault in faults:
        console.print(f"[red]{fault}")
    if faults:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
