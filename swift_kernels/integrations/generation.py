"""What a `generate` of transformers did, row by row, and which modes of it can be scored."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class UnsupportedGenerationError(ValueError):
    """Scores would be wrong in this mode of generation; raised before anything is generated."""


class NotScoredError(RuntimeError):
    """A forward that should have been scored was not, or one was scored that should not have been."""


class Run:
    """What one `generate` has sampled so far; int64 and bool `[rows]` on the device."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self.rows = torch.arange(rows, device=device)
        self.skipped = torch.full((rows,), -1, device=device)
        self.live = torch.ones(rows, dtype=torch.bool, device=device)
        self.ended = torch.zeros(rows, dtype=torch.bool, device=device)
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        self.length = 0
        """Tokens of a row, the prompt's included, as of the last one sampled."""
        self.trace: list[tuple[Tensor, Tensor]] = []
        self.complete = False

    def advance(self, done: Tensor, ended: Tensor, slots: Tensor, feed_last: bool) -> None:
        """Takes note of one sampled token a row, and writes the slot of each row for the forward that feeds it.

        Five small kernels: on a GPU each costs the host as much as the scoring itself.
        """
        self.lengths += self.live
        self.ended |= self.live & ended
        if feed_last:
            torch.where(self.live, self.rows, self.skipped, out=slots)
        self.live.masked_fill_(done, False)
        if not feed_last:
            torch.where(self.live, self.rows, self.skipped, out=slots)

    def tensors(self) -> list[Tensor]:
        return [self.rows, self.skipped, self.live, self.ended, self.lengths]


def check_call(model: Any, generate: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuses calls of `generate` that never reach its stopping criteria: other decoding loops and engines."""
    arguments = inspect.signature(generate).bind(*args, **kwargs).arguments
    extra = arguments.get("kwargs", {})
    if arguments.get("custom_generate") is not None:
        raise UnsupportedGenerationError("custom_generate replaces the decoding loop: use scorer.begin(slots) in it")
    if arguments.get("assistant_model") is not None:
        raise UnsupportedGenerationError("assisted generation rolls tokens back: scores would count rejected ones")
    config = copy.deepcopy(arguments.get("generation_config") or model.generation_config)
    config.update(**extra)
    check_generation(config)


def check_generation(config: Any) -> None:
    mode = config.get_generation_mode()
    allowed = ("greedy_search", "sample")
    if mode.value not in allowed or getattr(config, "prompt_lookup_num_tokens", None):
        name = "assisted_generation" if mode.value in allowed else mode.value
        reasons = {
            "beam_search": "it moves rows between beams at every step",
            "beam_sample": "it moves rows between beams at every step",
            "assisted_generation": "it feeds tokens that are rolled back",
        }
        reason = reasons.get(name, "it does not decode token by token")
        raise UnsupportedGenerationError(
            f"{name.replace('_', ' ')} cannot be scored while decoding, {reason}: use greedy or sampling, or "
            "score_texts on its answers"
        )
    if config.cache_implementation == "paged":
        refuse_continuous_batching(None)
    if getattr(config, "guidance_scale", None) not in (None, 1, 1.0):
        raise UnsupportedGenerationError(
            "guidance_scale runs the model twice a step: use score_texts on the answers instead"
        )


def refuse_continuous_batching(_original: Any, *_args: Any, **_kwargs: Any) -> Any:
    raise UnsupportedGenerationError(
        "continuous batching packs many sequences into one row: use generate, or score_texts on its answers"
    )
