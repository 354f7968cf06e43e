"""Scoring a token one step late, for heads of `top_logprobs`: they read how likely the token after it was.

In `generate` the logits of a forward wait until the stopping criteria tell what was sampled from them. A hand-written
loop tells nothing: there they wait, in buffers that stay in place for a recorded graph, until the next token is fed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from swift_kernels import features
from swift_kernels.checks import check_slots, debug_checks
from swift_kernels.head import SwiftHead
from swift_kernels.integrations.generation import NotScoredError
from swift_kernels.state import ScoreState


def input_ids(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The token ids int64 `[rows, tokens]` that a model was called with."""
    token_ids = args[0] if args else kwargs.get("input_ids")
    if token_ids is None:
        raise ValueError("the model was called without input_ids: a top_logprobs head has to know the tokens it is fed")
    return token_ids


class TopLogprobs:
    """The logits that wait for the token sampled from them, and the step that scores them."""

    def __init__(self, head: SwiftHead, vocab_size: int) -> None:
        assert head.config.top_logprobs is not None
        self._head, self._k, self._vocab_size = head, head.config.top_logprobs, vocab_size
        self._held: list[Tensor] = []
        self._logits: Tensor | None = None
        self._waits: Tensor | None = None

    def hold(self, logits: Tensor) -> None:
        """Takes the logits `[rows, vocabulary]` of a forward that `generate` ran."""
        self._held.append(logits)

    def settle(self, token_ids: Tensor, state: ScoreState, slots: Tensor, gate_reward: Tensor | None) -> None:
        """Scores the forward that ran last, from which `generate` has sampled `token_ids` (int64 `[rows]`).

        Raises:
            NotScoredError: more forwards than one ran.
        """
        held, self._held = self._held, []
        if len(held) != 1:
            raise NotScoredError(
                f"{len(held)} forwards ran for one sampled token: something else ran the model during generate (a "
                "logits processor?)"
            )
        self._step(held[0], token_ids, state, slots, gate_reward)

    def forget(self) -> None:
        """Drops what a `generate` that was broken off left behind."""
        self._held.clear()

    def begin(self, slots: int) -> None:
        """Makes the buffers of a hand-written loop, or empties those of a fitting size, as a recorded graph knows them.

        There is a spare place, for rows that are skipped: nothing there ever waits.
        """
        if self._waits is None or self._waits.shape[0] != slots + 1:
            device = self._head.weight.device
            with torch.inference_mode(False):
                self._logits = torch.zeros(slots + 1, self._vocab_size, device=device)
                self._waits = torch.zeros(slots + 1, dtype=torch.bool, device=device)
        else:
            self._waits.zero_()

    def waits(self) -> bool:
        """Whether a loop's logits wait in any slot for the token that follows."""
        return self._waits is not None and bool(self._waits.any())

    def buffers(self) -> list[Tensor]:
        return [buffer for buffer in (self._logits, self._waits) if buffer is not None]

    def feed(
        self, logits: Tensor, token_ids: Tensor, state: ScoreState, slots: Tensor, gate_reward: Tensor | None
    ) -> None:
        """Takes a loop's one-position forward: what it fed settles what waits in its slots, and its logits wait next.

        Args:
            logits: `[rows, vocabulary]`.
            token_ids: int64 `[rows]`, what was fed.
            slots: int64 `[rows]`, negative to skip a row.
        """
        assert self._logits is not None
        assert self._waits is not None
        self.commit(token_ids, state, slots, gate_reward)
        places = self._places(slots)
        self._logits.index_copy_(0, places, logits.float())
        self._waits.index_copy_(0, places, places < self._waits.shape[0] - 1)

    def commit(self, token_ids: Tensor, state: ScoreState, slots: Tensor, gate_reward: Tensor | None) -> None:
        """Scores what waits in `slots`, whose next tokens are `token_ids`; both int64 `[rows]`."""
        assert self._logits is not None
        assert self._waits is not None
        if token_ids.dtype != torch.int64 or token_ids.shape != slots.shape or token_ids.device != slots.device:
            raise ValueError(
                f"token_ids is {token_ids.dtype} of shape {list(token_ids.shape)} on {token_ids.device}: expected "
                f"int64 {list(slots.shape)} on {slots.device}, one a slot"
            )
        if (slots.device.type == "cpu" or debug_checks()) and not torch.compiler.is_compiling():
            check_slots(slots, state.slots)
        places = self._places(slots)
        waiting = torch.where(self._waits.index_select(0, places), slots, -1)
        self._step(self._logits.index_select(0, places), token_ids, state, waiting, gate_reward)
        self._waits.index_fill_(0, places, False)

    def _places(self, slots: Tensor) -> Tensor:
        assert self._waits is not None
        spare = self._waits.shape[0] - 1
        return torch.where((slots < 0) | (slots >= spare), spare, slots)

    def _step(
        self, logits: Tensor, token_ids: Tensor, state: ScoreState, slots: Tensor, gate_reward: Tensor | None
    ) -> None:
        # A row that is skipped may be fed any padding, also one that is no token of the vocabulary.
        token_ids = torch.where(slots < 0, 0, token_ids)
        self._head.step([features.top_logprobs(logits, self._k, token_ids)], state, slots, gate_reward)
