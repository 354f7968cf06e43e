from __future__ import annotations

import pytest
import torch

from swift_kernels import SwiftHead, best_of_n, score_texts
from swift_kernels.features import scored_tokens


@pytest.mark.parametrize(
    ("response", "span", "expected"),
    [
        ([7, 8, 9], "fed", [0, 1]),
        ([7, 8, 1], "fed", [0, 1]),
        ([1], "fed", []),
        ([7], "fed", []),
        ([], "fed", []),
        ([7, 1, 9], "fed", [0]),
        ([7, 8, 1], "all", [0, 1, 2]),
    ],
    ids=["truncated", "finished", "eos-only", "one", "empty", "eos-inside", "all"],
)
def test_which_tokens_count(response, span, expected):
    assert scored_tokens(response, [1, 2], span) == expected


def test_other_end_of_sequence_ids_than_the_models(model, head):
    """As `generate(eos_token_id=9)` would: 9 ends an answer, and the model's own ids are tokens like any other."""
    prompt, response = [7, 8], [20, 1, 30, 9]
    own = score_texts(model, None, head, [prompt], [response])
    given = score_texts(model, None, head, [prompt], [response], eos_token_id=9)
    assert scored_tokens(response, [1, 2, 3, 4], "fed") == [0, 2]
    assert scored_tokens(response, [9], "fed") == [0, 1, 2]
    assert not torch.equal(own, given)


@pytest.mark.parametrize("batch_size", [1, 2, 64])
@pytest.mark.parametrize("layers", ["all", [2], "logits", "top_logprobs"], ids=str)
def test_scores_do_not_depend_on_the_batch(model, layers, batch_size):
    torch.manual_seed(0)
    head = SwiftHead.for_model(model, layers)
    prompts = [[7, 8, 9], [10], [11, 12, 13, 14, 15, 16], [9, 9]]
    responses = [[20, 21, 22, 1], [30, 31, 32], [40, 1], [50, 51, 52, 53, 54]]
    alone = torch.cat([score_texts(model, None, head, [p], [r]) for p, r in zip(prompts, responses, strict=True)])
    together = score_texts(model, None, head, prompts, responses, batch_size=batch_size)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_answers_without_scored_tokens_have_no_score(model, head):
    scores = score_texts(model, None, head, [[7], [7], [7], [7]], [[1], [9], [], [9, 10]])
    assert scores.isnan().tolist() == [True, True, True, False]
    assert score_texts(model, None, head, [], []).shape == (0,)


@pytest.mark.parametrize(
    ("prompts", "responses", "options", "message"),
    [
        ([[7]], [], {}, "1 prompts and 0 responses"),
        ([[7], []], [[8], [8]], {}, r"prompts\[1\] is empty"),
        ([""], [[8]], {}, r"prompts\[0\] is empty"),
        (
            [[7] * 120],
            [[8] * 20],
            {},
            r"prompts\[0\] and its response has 139 tokens: LlamaForCausalLM takes at most 128",
        ),
        ([[7, 600]], [[8]], {}, r"prompts\[0\] has token id 600: expected 0\.\.95"),
        ([[7]], [[8], [-6]][1:], {}, r"responses\[0\] has token id -6"),
        ("text", ["a"], {}, "put a single text into a list"),
        ([[7]], [[8]], {"batch_size": 0}, "batch_size is 0"),
        ([[7]], [[8]], {"finished": [True, True]}, "finished has 2 values"),
    ],
    ids=[
        "count",
        "empty-ids",
        "empty-text",
        "context",
        "vocabulary",
        "negative",
        "bare-text",
        "batch-size",
        "finished",
    ],
)
def test_bad_input_is_named(model, head, prompts, responses, options, message):
    tokenizer = lambda text, **_: {"input_ids": [ord(character) % 90 + 6 for character in text]}  # noqa: E731
    with pytest.raises(ValueError, match=message):
        score_texts(model, tokenizer, head, prompts, responses, **options)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("a prompt", {"n": 0}, "n is 0"),
        ("", {}, "prompt is empty"),
        ("a prompt", {"n": 2, "do_sample": False}, "expected n=1 or sampling"),
        ("a prompt", {"batch_size": 0}, "batch_size is 0"),
        ("long " * 128, {}, "takes at most"),
    ],
    ids=["n", "empty", "greedy", "batch-size", "context"],
)
def test_best_of_n_names_what_is_wrong(model, head, prompt, options, message):
    class Words:
        pad_token_id = 0

        def __call__(self, text, return_tensors):
            ids = torch.tensor([[6 + len(word) for word in text.split()]])
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    with pytest.raises(ValueError, match=message):
        best_of_n(model, Words(), prompt, head, **options)
