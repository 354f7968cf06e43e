"""Scoring answers that exist already: one teacher-forced forward a batch, reduced layer by layer as it runs."""

from __future__ import annotations

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


def forward_packed(
    model: Any,
    config: HeadConfig,
    sequences: Sequence[tuple[Sequence[int], Sequence[int]]],
    consume: Callable[[int, Tensor], None],
    eos: Sequence[int] | None = None,
) -> Tensor:
    """One teacher-forced forward; hands over the scored tokens' features entry by entry and keeps none.

    Args:
        model: a decoder-only model.
        config: of the head: which entries, and which tokens count (`span`).
        sequences: (prompt ids, response ids) of each; an end-of-sequence token ends a response that finished.
        eos: ids that end an answer, if they are not those of the model's generation config.
        consume: called with k and the k-th selected entry, `[tokens, width]`, of the scored tokens of all sequences.

    Returns:
        int64 `[sequences + 1]` cumulative numbers of scored tokens.
    """
    device = next(model.parameters()).device
    eos = eos_token_ids(model) if eos is None else eos
    rows, columns, following, lengths, fed = [], [], [], [], []
    for row, (prompt, response) in enumerate(sequences):
        if not prompt:
            raise ValueError(f"the prompt of sequence {row} is empty: expected at least one token")
        scored = features.scored_tokens(response, eos, config.span)
        whole = [*prompt, *response]
        fed.append(whole[: len(prompt) + scored[-1] + 1] if scored else list(prompt))
        rows += [row] * len(scored)
        columns += [len(prompt) + index for index in scored]
        following += [response[index + 1] if index + 1 < len(response) else 0 for index in scored]
        lengths.append(len(scored))
    longest = max(map(len, fed))
    check_context(model, longest)
    token_ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids in fed], device=device)
    mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in fed], device=device)
    picked = [torch.tensor(index, device=device) for index in (rows, columns, following)]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    if not rows:
        return cu_seqlens
    options = forward_options(model, config.features)

    def hand_over(k: int, entry: Tensor) -> None:
        consume(k, features.pick(config.features, config.widths[k], entry, *picked))

    with torch.no_grad(), features.read(model, config.features, config.layers, hand_over):
        model(input_ids=token_ids, attention_mask=mask, use_cache=False, **options)
    return cu_seqlens


def score_texts(
    model: Any,
    tokenizer: Any,
    head: SwiftHead,
    prompts: Sequence[str | Sequence[int]],
    responses: Sequence[str | Sequence[int]],
    *,
    finished: bool | Sequence[bool] = True,
    eos_token_id: int | Sequence[int] | None = None,
    batch_size: int = 16,
    allow_mismatch: bool = False,
) -> Tensor:
    """Scores answers that exist already, in one forward a batch; no hidden state is kept.

    Args:
        model, head: as for `attach`.
        tokenizer: for prompts and responses given as text; token ids are taken as they are.
        prompts, responses: one of each per answer. Token ids of a response that finished end with the end-of-sequence
            token, as `generate` returns them, without padding.
        finished: whether a response given as text ended by itself, with the first end-of-sequence token where there
            are several; a truncated one's last token does not count.
        eos_token_id: the id or ids that end an answer, if they are not those of the model's generation config.
        batch_size: sequences a forward.

    Returns:
        float32 `[answers]` on the CPU; NaN for an answer without scored tokens.
    """
    if isinstance(prompts, str) or isinstance(responses, str):
        raise ValueError("prompts and responses are lists, one of each per answer: put a single text into a list")
    if len(prompts) != len(responses):
        raise ValueError(f"{len(prompts)} prompts and {len(responses)} responses: expected as many of each")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: expected at least 1")
    ended = [finished] * len(responses) if isinstance(finished, bool) else list(finished)
    if len(ended) != len(responses):
        raise ValueError(f"finished has {len(ended)} values for {len(responses)} responses")
    model = features.generating_model(model)
    check_head(model, head, allow_mismatch=allow_mismatch)
    if tokenizer is None and any(isinstance(text, str) for text in (*prompts, *responses)):
        raise ValueError("prompts or responses are text: expected the model's tokenizer, got None")
    eos = eos_token_ids(model, eos_token_id)
    end = eos[:1]
    sequences = []
    for index, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        prompt_ids = tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else list(prompt)
        if not prompt or not prompt_ids:
            raise ValueError(f"prompts[{index}] is empty: expected at least one token")
        if isinstance(response, str):
            response_ids = tokenizer(response, add_special_tokens=False)["input_ids"]
            if ended[index] and not end and head.config.top_logprobs is not None:
                raise ValueError(
                    f"responses[{index}] is a finished text, but no end-of-sequence token is known, and the head reads "
                    "its log-probability: give eos_token_id, token ids, or finished=False"
                )
            # Without an end-of-sequence token in the vocabulary, any id stands for the end: it is never fed.
            response_ids = [*response_ids, *(end or [0])] if ended[index] else response_ids
        else:
            response_ids = list(response)
        check_token_ids(model, prompt_ids, f"prompts[{index}]")
        check_token_ids(model, response_ids, f"responses[{index}]")
        check_context(model, len(prompt_ids) + max(len(response_ids) - 1, 0), f"prompts[{index}] and its response")
        sequences.append((prompt_ids, response_ids))
    device = next(model.parameters()).device
    weight, bias = head.weight.detach().to(device), head.bias.detach().to(device)
    columns = [part.contiguous() for part in weight.split(head.config.widths, dim=1)]
    scores = torch.full((len(sequences),), torch.nan)
    order = sorted(range(len(sequences)), key=lambda index: sum(map(len, sequences[index])))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        logits: list[Tensor] = [bias.float()]

        def add(k: int, entry: Tensor, logits: list[Tensor] = logits) -> None:
            logits[0] = logits[0] + schema.project([entry], columns[k], torch.zeros_like(bias))

        cu_seqlens = forward_packed(model, head.config, [sequences[index] for index in batch], add, eos)
        if int(cu_seqlens[-1]):
            scores[torch.tensor(batch)] = schema.pool(logits[0], cu_seqlens, head.config.gate)[0][:, 0].cpu()
    return scores
