"""What a head makes of an answer token by token: gates, rewards, the score so far, and the tokens' text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from swift_kernels import schema
from swift_kernels.head import SwiftHead
from swift_kernels.reference import GATE_SUM_FLOOR
from swift_kernels.training.rollouts import Rollout
from swift_kernels.training.store import Store
from swift_kernels.training.stored import entries_of, responses_of


@dataclass(frozen=True)
class Trace:
    """One answer, as a head reads it.

    Attributes:
        score: NaN where no token counts.
        gate_reward: float32 `[scored tokens, 2]`, sigmoid gate and reward; the gate is 1 for a head without one.
    """

    score: float
    gate_reward: Tensor

    def running(self) -> Tensor:
        """float64 `[scored tokens]`: the score after each token; the last is `score`, but for rounding."""
        gate, reward = self.gate_reward.double().unbind(1)
        return (gate * reward).cumsum(0) / gate.cumsum(0).clamp_min(GATE_SUM_FLOOR)

    def pull(self, centre: float) -> Tensor:
        """float64 `[scored tokens]`: how far each token moves the score from `centre`; they add up to the distance."""
        gate, reward = self.gate_reward.double().unbind(1)
        return gate * (reward - centre) / gate.sum().clamp_min(GATE_SUM_FLOOR)


@torch.no_grad()
def trace_model(
    model: Any,
    head: SwiftHead,
    rollouts: Sequence[Rollout],
    *,
    batch_size: int = 16,
    allow_mismatch: bool = False,
    on_progress: Callable[[int], None] | None = None,
) -> list[list[Trace]]:
    """Traces of all answers, a list a problem, by one teacher-forced pass; the scores are those of `score_responses`.

    Equal answers to one problem run once. `on_progress` is told how many problems are done.
    """
    from swift_kernels.integrations.shared_prompt import trace_responses

    found = []
    for rollout in rollouts:
        answers = [tuple(candidate.token_ids or ()) for candidate in rollout.candidates]
        unique = list(dict.fromkeys(answers))
        scores, gate_reward, cu_seqlens = trace_responses(
            model,
            head,
            rollout.prompt_token_ids or [],
            unique,
            batch_size=batch_size,
            allow_mismatch=allow_mismatch,
        )
        by_answer = dict(zip(unique, _traces(scores, gate_reward, cu_seqlens), strict=True))
        found.append([by_answer[answer] for answer in answers])
        if on_progress is not None:
            on_progress(len(found))
    return found


@torch.no_grad()
def trace_store(
    store: Store,
    head: SwiftHead,
    rollouts: Sequence[Rollout],
    *,
    on_progress: Callable[[int], None] | None = None,
) -> list[list[Trace]]:
    """As `trace_model`, from stored features, rounded as they were stored: the scores are those of `score_stored`."""
    part = store.part(entries_of(store, head))
    weight, bias = head.weight.detach().cpu(), head.bias.detach().cpu()
    found = []
    for responses in responses_of(store, rollouts):
        values, cu_seqlens = part.batch(torch.tensor(responses))
        scores, gate_reward = schema.score_sequence(values, weight, bias, cu_seqlens, head.config.gate)
        found.append(_traces(scores[:, 0], gate_reward[:, 0], cu_seqlens))
        if on_progress is not None:
            on_progress(len(found))
    return found


def token_texts(tokenizer: Any, token_ids: Sequence[int]) -> list[str]:
    """The text that each token adds; together they are the decoded answer, special tokens included.

    A token that ends in the middle of a character adds what is whole before it, and the character belongs to the token
    that completes it.
    """

    def decode(ids: Sequence[int]) -> str:
        return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    whole = decode(token_ids)
    ends = [0]
    for count in range(1, len(token_ids)):
        # What the last token left incomplete decodes to replacement characters, which the whole text does not have.
        ends.append(max(ends[-1], _common(whole, decode(token_ids[:count]))))
    return [whole[start:end] for start, end in zip(ends, [*ends[1:], len(whole)], strict=True)] if token_ids else []


def _common(text: str, other: str) -> int:
    """Length of the longest prefix that two texts share."""
    if text.startswith(other):
        return len(other)
    low, high = 0, min(len(text), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if text.startswith(other[:middle]) else (low, middle - 1)
    return low


def _traces(scores: Tensor, gate_reward: Tensor, cu_seqlens: Tensor) -> list[Trace]:
    tokens = gate_reward.split(cu_seqlens.diff().tolist())
    return [Trace(score, own) for score, own in zip(scores.tolist(), tokens, strict=True)]
