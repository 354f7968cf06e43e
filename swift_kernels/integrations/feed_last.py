"""The forward step that heads of `span="all"` need after `generate` has returned."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

_CACHE_NAMES = ("cache", "past_key_values")
"""What transformers calls the cache: newer releases the first, older ones the second."""


class FeedLast:
    """Feeds the last sampled token once more after `generate`, for heads of span "all"."""

    def __init__(self, scorer: Any) -> None:
        self.scorer = scorer
        self.inputs: dict[str, Any] = {}
        self.handle = scorer.model.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, _module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        if not self.scorer._is_read():  # another thread's
            return
        names = (*_CACHE_NAMES, "attention_mask", "position_ids")
        self.inputs = {name: kwargs[name] for name in names if kwargs.get(name) is not None}

    def remove(self) -> None:
        self.handle.remove()
        self.inputs = {}

    @torch.no_grad()
    def run(self, output: Any) -> None:
        scorer, run = self.scorer, self.scorer._run
        assert run is not None
        inputs = dict(self.inputs)
        returned = not isinstance(output, Tensor)
        sequences = output.sequences if returned else output
        if run.length > sequences.shape[1]:
            return  # a stop that was noticed a forward late: that one has fed it, and `generate` took its token back
        if scorer._whole_sequences:
            token_ids = sequences
        else:
            token_ids = sequences[:, -1:]
            if returned:  # the caller's cache keeps its length
                inputs.update({name: copy.deepcopy(inputs[name]) for name in _CACHE_NAMES if name in inputs})
        if "attention_mask" in inputs:
            mask = inputs["attention_mask"]
            inputs["attention_mask"] = torch.cat([mask, mask.new_ones(mask.shape[0], 1)], dim=1)
        if "position_ids" in inputs:
            before = inputs["position_ids"]
            following = before[..., -1:] + 1
            whole = scorer._whole_sequences
            inputs["position_ids"] = torch.cat([before, following], dim=-1) if whole else following
        scorer.model(input_ids=token_ids, use_cache=not scorer._whole_sequences, **inputs)
        scorer._keep(run)
