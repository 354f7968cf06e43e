"""SmolLM2-135M and Gemma-3-270M with their real weights."""

from __future__ import annotations

import pytest
import torch

from swift_kernels import SwiftHead, attach, best_of_n, score_texts
from tests.integrations.helpers import check_parity, generate, responses_of, unpadded

QUESTIONS = [
    "Question: What is 12 + 5?\nAnswer: 12 + 5 = 17\n\nQuestion: What is 31 + 7?\nAnswer:",
    "The capital of France is",
    "One, two, three,",
]


@pytest.fixture(scope="module")
def inputs(real_model):
    _, tokenizer = real_model
    encoded = tokenizer(QUESTIONS, return_tensors="pt", padding=True, padding_side="left")
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


@pytest.fixture(scope="module")
def head(real_model):
    torch.manual_seed(0)
    return SwiftHead.for_model(real_model[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"top_p": 0.9},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 8},
        {"stop_strings": ["\n", ".", " 3"]},
    ],
    ids=lambda options: ",".join(options),
)
def test_parity(real_model, head, inputs, options):
    model, tokenizer = real_model
    if "stop_strings" in options:
        options = {**options, "tokenizer": tokenizer}
    check_parity(model, head, inputs, copies=2, max_new_tokens=12, **options)


def test_fused_norms(real_model, head, inputs):
    """Both levels of parity with the scores taken inside the norms, and logits within 1e-5 of the stock model's."""
    model, _ = real_model
    scorer = check_parity(model, head, inputs, copies=1, max_new_tokens=8, fuse="norm")
    assert "ran so far: norm" in scorer.describe()
    tokens = inputs["input_ids"][:, -1:]
    with torch.no_grad():
        stock = model(input_ids=tokens, use_cache=False).logits
        with attach(model, head, fuse="norm") as scorer:
            scorer.begin(torch.arange(tokens.shape[0]))
            fused = model(input_ids=tokens, use_cache=False).logits
            assert scorer.token_counts().tolist() == [1] * tokens.shape[0]
    torch.testing.assert_close(fused, stock, rtol=0, atol=1e-5 * stock.abs().max().item())


@pytest.mark.parametrize("layers", [[16, -1], "logits", "top_logprobs"], ids=["subset", "logits", "top-logprobs"])
def test_parity_features(real_model, inputs, layers):
    model, _ = real_model
    check_parity(model, SwiftHead.for_model(model, layers), inputs, copies=1, max_new_tokens=8)


def test_the_log_probability_of_sampled_tokens(real_model, inputs):
    """A head that reads nothing else scores the mean over the raw logits, before any processor; rows that end at a stop
    string include what ended them. A sum over the vocabulary rounds by at most V/16 eps, and that of 12 tokens less."""
    model, tokenizer = real_model
    head = SwiftHead.for_model(model, "top_logprobs", gate=False)
    with torch.no_grad():
        head.bias.zero_()
        head.weight.zero_()
        head.weight[0, -1] = 1.0
    options = {"top_p": 0.9, "temperature": 0.8, "stop_strings": ["\n", "."], "tokenizer": tokenizer}
    with attach(model, head) as scorer:
        output = generate(model, inputs, max_new_tokens=12, **options, return_dict_in_generate=True, output_logits=True)
    responses = responses_of(scorer, output.sequences, inputs["input_ids"].shape[1])
    logprobs = torch.stack(output.logits, dim=1).double().log_softmax(-1)
    own = [
        row[range(1, len(ids)), ids[1:]].mean() if len(ids) > 1 else torch.tensor(torch.nan, dtype=torch.float64)
        for row, ids in zip(logprobs, responses, strict=True)
    ]
    tolerance = logprobs.shape[-1] / 16 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(scorer.scores().double(), torch.stack(own), rtol=0, atol=tolerance, equal_nan=True)
    forced = score_texts(model, None, head, unpadded(inputs, 1), responses)
    torch.testing.assert_close(scorer.scores(), forced, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_rows_ended_by_a_stop_string(real_model, head, inputs):
    model, tokenizer = real_model
    with attach(model, head) as scorer:
        output = generate(
            model, inputs, do_sample=False, max_new_tokens=12, stop_strings=["\n", ","], tokenizer=tokenizer
        )
    responses = responses_of(scorer, output, inputs["input_ids"].shape[1])
    ended = [any(stop in tokenizer.decode(response) for stop in ("\n", ",")) for response in responses]
    assert any(ended)
    assert scorer.finished().tolist() == ended
    assert scorer.token_counts().tolist() == [len(response) - 1 for response in responses]


def test_texts_score_as_their_tokens_do(real_model, head, inputs):
    """`score_texts` on text equals it on ids where the tokenizer gives the same ids again."""
    model, tokenizer = real_model
    prompts = unpadded(inputs, 1)
    responses = [" 38", " Paris, of course", " four, five"]
    ids = [tokenizer(response, add_special_tokens=False)["input_ids"] for response in responses]
    end = model.generation_config.eos_token_id
    end = end[0] if isinstance(end, list) else end
    from_text = score_texts(model, tokenizer, head, QUESTIONS, responses)
    torch.testing.assert_close(
        from_text, score_texts(model, tokenizer, head, prompts, [[*row, end] for row in ids]), rtol=0, atol=0
    )
    truncated = score_texts(model, tokenizer, head, QUESTIONS, responses, finished=False)
    torch.testing.assert_close(truncated, score_texts(model, tokenizer, head, prompts, ids), rtol=0, atol=0)
    alone = torch.cat(
        [score_texts(model, tokenizer, head, [q], [r]) for q, r in zip(QUESTIONS, responses, strict=True)]
    )
    torch.testing.assert_close(from_text, alone, rtol=1e-4, atol=1e-5)


def test_best_of_n(real_model, head):
    model, tokenizer = real_model
    torch.manual_seed(0)
    best = best_of_n(model, tokenizer, QUESTIONS[0], head, n=5, batch_size=2, max_new_tokens=8)
    assert len(best.candidates) == 5
    assert best.score == max(candidate.score for candidate in best.candidates)
    assert best.text == tokenizer.decode(best.best.token_ids, skip_special_tokens=True)
    prompt = tokenizer(QUESTIONS[0])["input_ids"]
    again = score_texts(model, tokenizer, head, [prompt] * 5, [candidate.token_ids for candidate in best.candidates])
    torch.testing.assert_close(
        torch.tensor([candidate.score for candidate in best.candidates]), again, rtol=1e-3, atol=1e-4
    )
