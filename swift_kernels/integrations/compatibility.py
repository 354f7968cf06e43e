"""Whether a head and a sequence fit a model; all that both ways of scoring need to know about it."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from swift_kernels import features
from swift_kernels.checkpoint import check_model
from swift_kernels.head import SwiftHead, check_finite


def check_head(model: Any, head: SwiftHead, *, allow_mismatch: bool = False) -> None:
    """Raises when the features of `head` cannot be read from `model`, or it was trained on another model."""
    config, layout, name = head.config, features.model_layout(model), type(model).__name__
    features.check_devices(model)
    check_finite(head, "the head cannot score")
    check_model(head, model, allow_mismatch=allow_mismatch)
    if config.features == features.LOGITS:
        if config.widths != (layout.vocab_size,):
            raise ValueError(f"the head reads {config.widths[0]} logits, {name} has {layout.vocab_size}")
    elif config.top_logprobs is not None:
        features.check_top(config.top_logprobs, layout.vocab_size)
    else:
        if config.layers is None or config.num_hidden_layers != layout.num_hidden_layers:
            raise ValueError(
                f"the head is for {config.num_hidden_layers} layers (indices {config.layers}), {name} has "
                f"{layout.num_hidden_layers}: make it with SwiftHead.for_model(model, layers)"
            )
        widths = tuple(layout.widths[index] for index in config.layers)
        if config.widths != widths:
            raise ValueError(f"the head reads widths {list(config.widths)}, {name} has {list(widths)}")
        hidden = [index for index in config.layers if not layout.readable[index]]
        if hidden:
            raise features.UnsupportedModelError(
                f"{name} does not show hidden_states{hidden} where its layers begin or its decoder ends: scoring them "
                "would read other values than the head was trained on; choose other layers"
            )


def eos_token_ids(model: Any, eos: int | Sequence[int] | None = None) -> list[int]:
    """The end-of-sequence ids that `generate` stops at: those given to it, or those of the generation config."""
    eos = model.generation_config.eos_token_id if eos is None else eos
    if eos is None:
        return []
    return [eos] if isinstance(eos, int) else list(eos)


def check_context(model: Any, length: int, what: str = "a sequence") -> None:
    """Raises when `what`, of `length` tokens, does not fit the model's context."""
    limit = getattr(features.text_config(model), "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise ValueError(f"{what} has {length} tokens: {type(model).__name__} takes at most {limit}")


def check_token_ids(model: Any, token_ids: Sequence[int], what: str) -> None:
    """Raises when `what` has an id outside of the model's vocabulary."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    wrong = next((token for token in token_ids if not 0 <= token < vocabulary), None)
    if wrong is not None:
        raise ValueError(f"{what} has token id {wrong}: expected 0..{vocabulary - 1}")


def forward_options(model: Any, feature_source: str) -> dict[str, Any]:
    """Keeps a forward that is read for its hidden states from computing a vocabulary of logits for every token."""
    if feature_source not in features.FROM_LOGITS and "logits_to_keep" in inspect.signature(model.forward).parameters:
        return {"logits_to_keep": 1}
    return {}
