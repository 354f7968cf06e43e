from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from swift_kernels import SwiftHead, score_texts
from swift_kernels.integrations.shared_prompt import forward_responses, score_responses
from tests.architectures import NAMED, OTHERS, tiny_model

PROMPT = [7, 30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40]
"""Longer than the sliding window of the models that have one."""
RESPONSES = [[50, 51, 52, 53, 1], [60], [], [61, 62], list(range(40, 60)), [50, 51, 52, 53, 54], [2]]


@pytest.mark.parametrize("layers", ["all", [-2], "logits", "top_logprobs"], ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_scores_are_those_of_whole_sequences(name: str, layers: Any) -> None:
    check(tiny_model(name), layers)


@pytest.mark.parametrize("name", [*NAMED, *OTHERS])
def test_architectures(name: str) -> None:
    check(tiny_model(name), "all")


def check(model: Any, layers: Any) -> None:
    torch.manual_seed(0)
    head = SwiftHead.for_model(model, layers)
    expected = score_texts(model, None, head, [PROMPT] * len(RESPONSES), RESPONSES)
    found = score_responses(model, head, PROMPT, RESPONSES, batch_size=3)
    assert torch.equal(found.isnan(), expected.isnan())
    # The same values through another order of additions in attention.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_every_scored_token_is_handed_over_once() -> None:
    model = tiny_model("llama")
    head = SwiftHead.for_model(model, [0, 2])
    seen: list[tuple[int, int]] = []
    cu_seqlens = forward_responses(
        model,
        head.config,
        PROMPT,
        RESPONSES,
        lambda places, k, entry: seen.extend((k, place) for place in places.tolist()),
        batch_size=2,
    )
    tokens = int(cu_seqlens[-1])
    assert cu_seqlens.diff().tolist() == [4, 0, 0, 1, 19, 4, 0]
    assert sorted(seen) == [(k, place) for k in (0, 1) for place in range(tokens)]


def test_nothing_scored_and_bad_prompts() -> None:
    model = tiny_model("llama")
    head = SwiftHead.for_model(model)
    assert all(map(math.isnan, score_responses(model, head, PROMPT, [[5], []]).tolist()))
    with pytest.raises(ValueError, match="the prompt is empty"):
        score_responses(model, head, [], [[5, 6]])
    with pytest.raises(ValueError, match="takes at most 128"):
        score_responses(model, head, PROMPT, [[9] * 200])
