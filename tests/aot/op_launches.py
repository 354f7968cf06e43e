"""Counts what a function launches, reads and writes on a GPU that is not there: op by op, or from Inductor's code.

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

import ast
import math
from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Step = Callable[..., Tensor]
Count = dict[str, Any]
"""`launches`, `bytes`, and the launches of each of the `kernels`."""


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


def count_eager(step: Step, inputs: dict[str, Any]) -> Count:
    with OpCounter() as counter:
        step(**inputs)
    return {"launches": counter.launches, "bytes": counter.bytes, "kernels": dict(counter.kernels.most_common())}


def count_compiled(step: Step, inputs: dict[str, Any]) -> Count:
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
        return bytes_moved(call.target, args, kwargs, call.meta.get("val"))  # none of what returns nothing
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
