"""Which hidden states, logits or log-probabilities a head reads, and where a model keeps them.

Layer indices are those of Hugging Face's `hidden_states`: 0 is the input of the first decoder layer, l the input of
layer l, L (the number of layers) whatever the model returns last, nearly always the output of its final norm.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from swift_kernels.patching import patch
from swift_kernels.replica import replicate

HIDDEN_STATES = "hidden_states"
LOGITS = "logits"
TOP_LOGPROBS = "top_logprobs"
FEATURE_SOURCES = (HIDDEN_STATES, LOGITS, TOP_LOGPROBS)
FROM_LOGITS = (LOGITS, TOP_LOGPROBS)
"""The sources that are read off the model's logits; their heads have one entry and no layers."""
DEFAULT_TOP = 20
"""How many log-probabilities the usual APIs return at most."""
LOGPROB_FLOOR = -9999.0
"""What the usual APIs return for a token that is too unlikely; log-probabilities below it, -inf too, count as this."""
LOGITS_BLOCK = 256
"""Tokens of which log-probabilities over the whole vocabulary exist at once in teacher forcing."""
SHORT_FORWARD = 3
"""Tokens of a forward that shows what a model does."""


class UnsupportedModelError(ValueError):
    """The features that a head needs cannot be read from this model; the message says why."""


def resolve_layers(layers: str | Sequence[int], num_hidden_layers: int) -> tuple[int, ...]:
    """Turns "all" or indices (negative ones count from the end of 0..L) into ascending indices within 0..L."""
    entries = num_hidden_layers + 1
    if isinstance(layers, str):
        if layers != "all":
            raise ValueError(f'layers is {layers!r}: expected "all", "logits", "top_logprobs" or a list of indices')
        return tuple(range(entries))
    resolved = []
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, int) or not -entries <= layer < entries:
            raise ValueError(
                f"layer index {layer!r} is out of range: expected {-entries}..{entries - 1} for a model of "
                f"{num_hidden_layers} layers (0 is the first layer's input, {num_hidden_layers} the final output)"
            )
        resolved.append(layer % entries)
    if not resolved:
        raise ValueError("layers is empty: expected at least one index")
    if len(set(resolved)) != len(resolved):
        raise ValueError(f"layers {list(layers)} names an entry twice: expected distinct indices")
    return tuple(sorted(resolved))


@dataclass(frozen=True)
class ModelLayout:
    """Where a decoder-only model keeps what heads read, as one traced forward found it.

    Attributes:
        decoder: the module that runs the layers and returns the last hidden state.
        layers: the decoder layers, L of them.
        last: where `hidden_states[L]` comes from: "decoder" (output of `decoder`), "layer" (output of the last
            layer) or None.
        widths: width of each of the L + 1 entries.
        readable: for each entry, whether the traced forward found it bitwise where it will be read.
        vocab_size: width of the logits.
    """

    decoder: nn.Module
    layers: nn.ModuleList
    last: str | None
    widths: tuple[int, ...]
    readable: tuple[bool, ...]
    vocab_size: int

    @property
    def num_hidden_layers(self) -> int:
        return len(self.layers)

    def is_of(self, model: Any) -> bool:
        """Whether the model still has these layers, none cut off, and a vocabulary of this size."""
        projection = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        rows = getattr(projection, "out_features", self.vocab_size)
        return (
            _find_layers(model) == (self.decoder, self.layers)
            and len(self.widths) == len(self.layers) + 1
            and rows == self.vocab_size
        )


class _Inspection:
    """What is known of a model; one thread at a time finds it out."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.layout: ModelLayout | None = None


_INSPECTIONS: weakref.WeakKeyDictionary[nn.Module, _Inspection] = weakref.WeakKeyDictionary()
_INSPECTIONS_LOCK = threading.Lock()

_READERS: ContextVar[tuple[object, ...]] = ContextVar("readers", default=())
"""Who reads what models compute in this thread or task; what others run at the same time is none of theirs."""


def model_layout(model: Any) -> ModelLayout:
    """Finds a model's layers and checks with one short forward that what they are fed is what it returns.

    The forward takes three tokens, in a replica: the model, which another thread may be running, stays as it is. The
    result is remembered for as long as the model lives, or until its layers or its vocabulary change.

    Raises:
        UnsupportedModelError: for models without a list of layers, or whose hidden states are not [batch, tokens,
            width].
    """
    model = unwrapped(model)
    with _INSPECTIONS_LOCK:
        inspection = _INSPECTIONS.setdefault(model, _Inspection())
    with inspection.lock:
        if inspection.layout is None or not inspection.layout.is_of(model):
            inspection.layout = _trace(model)
        return inspection.layout


def unwrapped(model: Any) -> Any:
    """The model that generates, inside of wrappers such as those of torch.compile, PEFT and DDP; else the model itself.

    Raises:
        UnsupportedModelError: a wrapper adds what the model inside does not know of.
    """
    found = model
    for module in model.modules():
        for config in getattr(module, "peft_config", {}).values():
            if config.is_prompt_learning:
                raise UnsupportedModelError(
                    f"{type(module).__name__} has soft prompts ({config.peft_type.value}), which the model inside does "
                    "not see where answers are scored: score without the adapter, or train one of another kind (LoRA)"
                )
        if _generates(module):
            found = module
            break
    return found


def check_devices(model: Any) -> None:
    """Raises unless the whole model lies on one device."""
    devices = {parameter.device for parameter in model.parameters()}
    name = type(model).__name__
    if any(device.type == "meta" for device in devices):
        raise UnsupportedModelError(
            f"{name} has offloaded weights: scoring expects the whole model on one device, load it without offloading"
        )
    if len(devices) > 1:
        raise UnsupportedModelError(
            f"{name} lies on {sorted(map(str, devices))}: scoring expects the whole model on one device"
        )


def generating_model(model: Any) -> nn.Module:
    """As `unwrapped`; raises where nothing generates."""
    found = unwrapped(model)
    if not _generates(found):
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot generate: expected a causal language model of transformers"
        )
    return found


def _generates(module: nn.Module) -> bool:
    return any(base.__name__ == "GenerationMixin" for base in type(module).__mro__)


@contextmanager
def reading(reader: object, *, alone: bool = False) -> Iterator[None]:
    """Makes `reader` one that reads what this thread or task runs, or the only one.

    A thread of its own begins without readers; `contextvars.copy_context().run` gives it those of the one it is begun
    by, as `asyncio` does for its tasks and for `asyncio.to_thread`.
    """
    before = _READERS.get()
    _READERS.set((reader,) if alone else (*before, reader))
    try:
        yield
    finally:
        # Not by a token: a block may be left in another task than the one that entered it.
        _READERS.set(before if alone else tuple(other for other in _READERS.get() if other is not reader))


def reads_here(reader: object) -> Callable[[], bool]:
    """A function that tells whether `reader` reads what the present thread or task runs.

    Dynamo, which cannot trace a context variable, takes what it returns for a constant: what is traced is traced for
    those who read there and then.
    """

    @torch.compiler.assume_constant_result
    def is_read() -> bool:
        return reader in _READERS.get()

    return is_read


def readers() -> tuple[object, ...]:
    """Those of the present thread or task."""
    return _READERS.get()


def tap(
    model: Any,
    features: str,
    layers: Sequence[int] | None,
    consume: Callable[[int, Tensor], None],
    reader: object,
) -> ExitStack:
    """Calls `consume(k, entry)` with the k-th selected entry, in ascending k, in forwards of `model`.

    Of forwards in any thread these are the ones that `reader` reads, see `reading`. An entry is `[batch, tokens,
    width]`, the tensor that the model itself goes on with: it must not be changed. Closing what is returned leaves the
    model as it was. Of `top_logprobs` the entry is the logits: see `pick`.
    """
    is_read = reads_here(reader)

    def before(k: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if is_read():
            consume(k, layer_input(args, kwargs))
        return forward(*args, **kwargs)

    def after(k: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        if is_read():
            consume(k, output.logits if features in FROM_LOGITS else last_hidden_state(output))
        return output

    taps = ExitStack()
    if features in FROM_LOGITS:
        taps.callback(patch(model, "forward", functools.partial(after, 0)))
        return taps
    layout = model_layout(model)
    for k, index in enumerate(layers or ()):
        if index < layout.num_hidden_layers:
            taps.callback(patch(layout.layers[index], "forward", functools.partial(before, k)))
        else:
            source = layout.decoder if layout.last == "decoder" else layout.layers[-1]
            taps.callback(patch(source, "forward", functools.partial(after, k)))
    return taps


@contextmanager
def read(
    model: Any, features: str, layers: Sequence[int] | None, consume: Callable[[int, Tensor], None]
) -> Iterator[None]:
    """As `tap`, for the forwards that this thread or task runs within: nobody else reads these."""
    reader = object()
    with tap(model, features, layers, consume, reader), reading(reader, alone=True):
        yield


def check_top(k: int, vocab_size: int) -> None:
    """Raises unless `k` log-probabilities, and their gap, can be taken from a vocabulary."""
    if isinstance(k, bool) or not isinstance(k, int) or not 2 <= k <= vocab_size:
        raise ValueError(f"top_logprobs is {k!r}: expected 2..{vocab_size}, for a vocabulary of {vocab_size}")


def top_logprobs(logits: Tensor, k: int, next_ids: Tensor | None = None) -> Tensor:
    """What a closed API tells of each position: float32 `[rows, k + 2]`, or `[rows, k + 3]` with `next_ids`.

    The columns are the k largest log-probabilities in descending order, their truncated entropy `-sum p log p` over
    these k alone (in nats, p not renormalised), the largest minus the second largest, and the log-probability of the
    token that follows.

    Args:
        logits: `[rows, vocabulary]`, as the model returns them, before any sampling processor.
        k: 2 or more, at most the vocabulary.
        next_ids: int64 `[rows]`, the token that was sampled next.
    """
    vocab_size = logits.shape[-1]
    check_top(k, vocab_size)
    logits = logits.float()
    if vocab_size % 8:
        # CUDA's log_softmax adds in an order that follows a row's alignment: so each row has the same.
        logits = torch.nn.functional.pad(logits, (0, -vocab_size % 8), value=-torch.inf)
    logprobs = logits.log_softmax(-1)
    top = logprobs.topk(k, dim=-1).values.clamp_min(LOGPROB_FLOOR)
    columns = [top, _row_sums(-top.exp() * top), top[:, :1] - top[:, 1:2]]
    if next_ids is not None:
        columns.append(logprobs.gather(-1, next_ids[:, None]).clamp_min(LOGPROB_FLOOR))
    return torch.cat(columns, dim=-1)


def _row_sums(values: Tensor) -> Tensor:
    """`[rows, 1]`; unlike `sum`, in an order that no number of rows changes, on any device."""
    width = values.shape[1]
    values = torch.nn.functional.pad(values, (0, (1 << (width - 1).bit_length()) - width))
    while values.shape[1] > 1:
        first, second = values.chunk(2, dim=1)
        values = first + second
    return values


def pick(features: str, width: int, entry: Tensor, rows: Tensor, columns: Tensor, next_ids: Tensor) -> Tensor:
    """The features `[tokens, width]` of some tokens of an entry that `tap` handed over in teacher forcing.

    Args:
        entry: `[batch, tokens, width of the entry]`.
        rows, columns: int64 `[tokens]`, where they are in it.
        next_ids: int64 `[tokens]`, the token that follows each.
    """
    if features != TOP_LOGPROBS:
        return entry[rows, columns]
    blocks = zip(*(index.split(LOGITS_BLOCK) for index in (rows, columns, next_ids)), strict=True)
    return torch.cat([top_logprobs(entry[row, column], width - 3, following) for row, column, following in blocks])


def scored_tokens(response_ids: Sequence[int], eos_token_ids: Collection[int], span: str) -> list[int]:
    """Indices of the response tokens that count.

    `span="fed"`: those that `generate` feeds to the model, so all but the last one sampled, and never an
    end-of-sequence token. `span="all"`: every one.
    """
    if span == "all":
        return list(range(len(response_ids)))
    return [index for index, token in enumerate(response_ids[:-1]) if token not in eos_token_ids]


def text_config(model: Any) -> Any:
    """The configuration of the language model, also of a multi-modal one."""
    config = getattr(model, "config", None)
    if config is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no config: expected a decoder-only model of the transformers library"
        )
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def last_hidden_state(output: Any) -> Tensor:
    """The tensor a decoder or layer returned, from a ModelOutput, a tuple or as it is."""
    if isinstance(output, Tensor):
        return output
    value = getattr(output, "last_hidden_state", None)
    return output[0] if value is None else value


def layer_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states a decoder layer was called with."""
    return args[0] if args else kwargs["hidden_states"]


def _find_layers(model: Any) -> tuple[nn.Module, nn.ModuleList]:
    config = text_config(model)
    name = type(model).__name__
    count = getattr(config, "num_hidden_layers", None)
    if getattr(config, "is_encoder_decoder", False) or getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{name} is an encoder-decoder model: expected a decoder-only one")
    # What get_decoder returns may be the output projection, as ModernBERT's decoders call that so.
    roots = [model.get_decoder(), model] if hasattr(model, "get_decoder") else [model]
    for parent in (module for root in roots for module in root.modules()):
        for child in parent.children():
            if isinstance(child, nn.ModuleList) and len(child) == count:
                if len(set(child)) != count:
                    raise UnsupportedModelError(f"{name} runs one layer several times: its inputs cannot be told apart")
                return parent, child
    raise UnsupportedModelError(f"{name} has no list of {count} decoder layers: its hidden states cannot be read")


def _trace(model: Any) -> ModelLayout:
    replica, originals = replicate(model)
    decoder, layers = _find_layers(replica)
    name = type(model).__name__
    inputs: dict[int, Tensor] = {}
    versions: dict[int, int] = {}
    outputs: dict[str, Tensor] = {}

    def enter_layer(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs[index] = layer_input(args, kwargs)
        versions[index] = inputs[index]._version

    handles = [
        layer.register_forward_pre_hook(
            lambda _module, args, kwargs, index=index: enter_layer(index, args, kwargs), with_kwargs=True
        )
        for index, layer in enumerate(layers)
    ]
    handles += [
        module.register_forward_hook(
            lambda _module, _args, output, place=place: outputs.__setitem__(place, last_hidden_state(output))
        )
        for place, module in (("decoder", decoder), ("layer", layers[-1]))
    ]
    try:
        output = run_short_forward(replica, output_hidden_states=True)
    finally:
        for handle in handles:
            handle.remove()
    states = output.hidden_states
    if states is None or len(states) != len(layers) + 1:
        found = "none" if states is None else str(len(states))
        raise UnsupportedModelError(f"{name} returns {found} hidden_states for {len(layers)} layers: expected one more")
    if any(state.dim() != 3 for state in states):
        raise UnsupportedModelError(
            f"{name} has hidden states of shape {list(states[0].shape)}: expected [batch, tokens, width]"
        )
    if len(inputs) != len(layers):
        raise UnsupportedModelError(
            f"{name} does not run its layers as modules of its own: is its forward replaced? Reload it"
        )
    # A layer that adds to its input in place leaves another value behind than it took.
    readable = [
        _identical(inputs[index], states[index]) and inputs[index]._version == versions[index]
        for index in range(len(layers))
    ]
    last = next((place for place in ("decoder", "layer") if _identical(outputs.get(place), states[-1])), None)
    return ModelLayout(
        decoder=originals[decoder],
        layers=cast(nn.ModuleList, originals[layers]),
        last=last,
        widths=tuple(state.shape[-1] for state in states),
        readable=(*readable, last is not None),
        vocab_size=output.logits.shape[-1],
    )


def run_short_forward(replica: Any, **options: Any) -> Any:
    """A few tokens through a replica of a model, which nobody else reads."""
    device = replica.get_input_embeddings().weight.device
    token_ids = torch.arange(1, SHORT_FORWARD + 1, device=device).remainder(text_config(replica).vocab_size)[None]
    # Tensors made in inference mode would not count their changes.
    with reading(replica, alone=True), torch.inference_mode(False), torch.no_grad():
        return replica(input_ids=token_ids, use_cache=False, return_dict=True, **options)


def _identical(captured: Tensor | None, returned: Tensor) -> bool:
    return captured is not None and (captured is returned or torch.equal(captured, returned))
