"""Teacher forcing for many responses to one prompt: the prompt runs once, the responses continue from its cache.

`teacher_forcing.forward_packed` feeds the prompt again with every response, which for short answers to long prompts is
nearly all of the work.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from swift_kernels import features, schema
from swift_kernels.head import HeadConfig, SwiftHead
from swift_kernels.integrations.compatibility import (
    check_context,
    check_head,
    check_token_ids,
    eos_token_ids,
    forward_options,
)


@torch.no_grad()
def forward_responses(
    model: Any,
    config: HeadConfig,
    prompt: Sequence[int],
    responses: Sequence[Sequence[int]],
    consume: Callable[[Tensor, int, Tensor], None],
    *,
    batch_size: int = 16,
    on_fed: Callable[[int], None] | None = None,
) -> Tensor:
    """Hands over the scored tokens' features, entry by entry, a batch of responses at a time; keeps none.

    Args:
        consume: called with the indices of a batch's scored tokens among those of all responses, with k, and with the
            k-th selected entry, `[tokens, width]`, of those tokens.
        on_fed: told, for each forward, how many tokens it was fed, padding left out.

    Returns:
        int64 `[responses + 1]` cumulative numbers of scored tokens.
    """
    if not prompt:
        raise ValueError("the prompt is empty: expected at least one token")
    eos = eos_token_ids(model)
    scored = [features.scored_tokens(response, eos, config.span) for response in responses]
    offsets = [0, *itertools.accumulate(map(len, scored))]
    cu_seqlens = torch.tensor(offsets)
    live = [index for index, tokens in enumerate(scored) if tokens]
    if not live:
        return cu_seqlens
    check_context(model, len(prompt) + max(scored[index][-1] + 1 for index in live))
    check_token_ids(model, prompt, "the prompt")
    for index in live:
        check_token_ids(model, responses[index], f"response {index}")
    device = next(model.parameters()).device
    options = {"use_cache": True, **forward_options(model, config.features)}
    with features.reading(prompt, alone=True):  # nobody else reads this
        prompt_cache = model(input_ids=torch.tensor([list(prompt)], device=device), **options).past_key_values
    if on_fed is not None:
        on_fed(len(prompt))
    # Of like length together: a forward is as long as its longest response.
    live.sort(key=lambda index: scored[index][-1])
    for start in range(0, len(live), batch_size):
        batch = live[start : start + batch_size]
        last = start + batch_size >= len(live)
        cache = prompt_cache if last else copy.deepcopy(prompt_cache)
        cache.batch_repeat_interleave(len(batch))
        fed = [list(responses[index][: scored[index][-1] + 1]) for index in batch]
        longest = max(map(len, fed))
        # Padding on the right follows what is scored, and cannot reach it.
        token_ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids in fed], device=device)
        rows = torch.tensor([row for row, index in enumerate(batch) for _ in scored[index]], device=device)
        columns = torch.tensor([token for index in batch for token in scored[index]], device=device)
        following = torch.tensor(
            [(*responses[index], 0)[token + 1] for index in batch for token in scored[index]], device=device
        )
        places = torch.cat([torch.arange(offsets[index], offsets[index + 1]) for index in batch])

        def hand_over(
            k: int,
            entry: Tensor,
            places: Tensor = places,
            picked: tuple[Tensor, Tensor, Tensor] = (rows, columns, following),
        ) -> None:
            consume(places, k, features.pick(config.features, config.widths[k], entry, *picked))

        with features.read(model, config.features, config.layers, hand_over):
            model(input_ids=token_ids, past_key_values=cache, **options)
        if on_fed is not None:
            on_fed(sum(map(len, fed)))
    return cu_seqlens


def score_responses(
    model: Any,
    head: SwiftHead,
    prompt: Sequence[int],
    responses: Sequence[Sequence[int]],
    *,
    batch_size: int = 16,
    allow_mismatch: bool = False,
) -> Tensor:
    """float32 `[responses]` scores on the CPU, NaN where no token counts; token ids as `score_texts` takes them."""
    return trace_responses(model, head, prompt, responses, batch_size=batch_size, allow_mismatch=allow_mismatch)[0]


def trace_responses(
    model: Any,
    head: SwiftHead,
    prompt: Sequence[int],
    responses: Sequence[Sequence[int]],
    *,
    batch_size: int = 16,
    allow_mismatch: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The scores of `score_responses` with what they are made of, on the CPU.

    Returns:
        float32 `[responses]` scores; float32 `[tokens, 2]`, sigmoid gate and reward of the scored tokens; and int64
        `[responses + 1]`, cumulative numbers of these.
    """
    model = features.generating_model(model)
    check_head(model, head, allow_mismatch=allow_mismatch)
    eos = eos_token_ids(model)
    tokens = sum(len(features.scored_tokens(response, eos, head.config.span)) for response in responses)
    logits = head.bias.detach().float().cpu().repeat(tokens, 1)
    columns = [part.contiguous() for part in head.weight.detach().split(head.config.widths, dim=1)]

    def add(places: Tensor, k: int, entry: Tensor) -> None:
        weight = columns[k].to(entry.device)
        logits[places] += schema.project([entry], weight, weight.new_zeros(weight.shape[0])).cpu()

    cu_seqlens = forward_responses(model, head.config, prompt, responses, add, batch_size=batch_size)
    scores, gate_reward = schema.pool(logits, cu_seqlens, head.config.gate)
    return scores[:, 0], gate_reward[:, 0], cu_seqlens
