"""Best-of-N: sample N answers, score them while they are decoded, return the best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from swift_kernels.head import SwiftHead
from swift_kernels.integrations.compatibility import check_context
from swift_kernels.integrations.transformers import attach
from swift_kernels.selection.pick import best_index


@dataclass(frozen=True)
class Candidate:
    """One sampled answer.

    Attributes:
        text: without special tokens.
        score: gate-weighted mean reward; NaN when no token was scored.
        token_count: tokens the score rests on.
        finished: whether it ended by itself, not for lack of length.
        token_ids: as sampled, end-of-sequence included.
    """

    text: str
    score: float
    token_count: int
    finished: bool
    token_ids: list[int]


@dataclass(frozen=True)
class BestOfN:
    """The best of the candidates, and all of them in the order of sampling."""

    best: Candidate
    candidates: list[Candidate]

    @property
    def text(self) -> str:
        return self.best.text

    @property
    def score(self) -> float:
        return self.best.score


def best_of_n(
    model: Any,
    tokenizer: Any,
    prompt: str | Sequence[dict[str, str]],
    head: SwiftHead,
    n: int = 16,
    *,
    max_new_tokens: int = 256,
    batch_size: int | None = None,
    allow_mismatch: bool = False,
    **generate_kwargs: Any,
) -> BestOfN:
    """Samples `n` answers to `prompt` and picks the one `head` scores best.

    Args:
        model, head: as for `attach`.
        tokenizer: the model's.
        prompt: text, or a list of chat messages for the tokenizer's chat template.
        n: number of answers.
        max_new_tokens: most tokens an answer may have.
        batch_size: answers decoded at once; all of them unless told otherwise.
        generate_kwargs: for `model.generate`; sampling is on.
    """
    if n < 1:
        raise ValueError(f"n is {n}: expected at least 1")
    if n > 1 and generate_kwargs.get("do_sample") is False:
        raise ValueError(f"do_sample=False gives one answer {n} times over: expected n=1 or sampling")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: expected at least 1")
    if not prompt:
        raise ValueError("the prompt is empty: expected text or chat messages")
    if isinstance(prompt, str):
        encoded = tokenizer(prompt, return_tensors="pt")
    else:
        encoded = tokenizer.apply_chat_template(
            list(prompt), add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
    device = next(model.parameters()).device
    inputs = {name: encoded[name].to(device) for name in ("input_ids", "attention_mask")}
    length = inputs["input_ids"].shape[1]
    if length == 0:
        raise ValueError("the prompt has no tokens: expected at least one")
    check_context(model, length + 1)
    options = {"do_sample": True, "max_new_tokens": max_new_tokens, "tokenizer": tokenizer, **generate_kwargs}
    if options.get("pad_token_id") is None and model.generation_config.pad_token_id is None:
        options["pad_token_id"] = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    candidates: list[Candidate] = []
    with attach(model, head, allow_mismatch=allow_mismatch) as scorer:
        while len(candidates) < n:
            rows = min(batch_size or n, n - len(candidates))
            output = model.generate(**inputs, num_return_sequences=rows, **options)
            sequences = output if isinstance(output, torch.Tensor) else output.sequences
            facts = zip(
                sequences[:, length:].tolist(),
                scorer.response_lengths().tolist(),
                scorer.scores().tolist(),
                scorer.token_counts().tolist(),
                scorer.finished().tolist(),
                strict=True,
            )
            for token_ids, sampled, score, token_count, finished in facts:
                token_ids = token_ids[:sampled]
                text = tokenizer.decode(token_ids, skip_special_tokens=True)
                candidates.append(Candidate(text, score, token_count, finished, token_ids))
    return BestOfN(candidates[best_index([candidate.score for candidate in candidates])], candidates)
