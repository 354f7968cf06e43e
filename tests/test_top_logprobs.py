"""`features.top_logprobs` against its definition in float64, and that no other row reaches a row."""

from __future__ import annotations

import pytest
import torch

from swift_kernels.features import LOGPROB_FLOOR, check_top, pick, top_logprobs


def definition(logits, k, next_ids):
    logprobs = logits.double().log_softmax(-1)
    top = logprobs.sort(dim=-1, descending=True).values[:, :k]
    entropy = -(top.exp() * top).sum(-1)
    sampled = logprobs[torch.arange(len(next_ids)), next_ids]
    return torch.cat([top, entropy[:, None], (top[:, 0] - top[:, 1])[:, None], sampled[:, None]], dim=1)


def random_rows(rows, vocabulary, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    logits = (5 * torch.randn(rows, vocabulary, generator=generator)).to(dtype)
    return logits, torch.randint(vocabulary, (rows,), generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(("vocabulary", "k"), [(2, 2), (96, 20), (1001, 5), (5000, 64)])
def test_columns_are_as_defined(vocabulary, k, dtype):
    """A sum of n exponentials, over at least 4 lanes, is off by n/4 + 4 roundings, and so is its logarithm; log p takes
    two differences, the entropy's terms an exponential and a product, and at most k additions."""
    logits, next_ids = random_rows(7, vocabulary, dtype)
    expected = definition(logits, k, next_ids)
    unit = torch.finfo(torch.float32).eps / 2
    error = unit * (vocabulary / 4 + 4 + 2 * (logits.double().amax(1) - logits.double().amin(1))[:, None])
    top = expected[:, :k]
    terms = top.exp() * ((1 + top.abs()) * error + (k + 4) * unit * top.abs())
    bound = torch.cat([error.expand(-1, k), terms.sum(1, keepdim=True), 2 * error, error], dim=1)
    found = top_logprobs(logits, k, next_ids)
    assert found.dtype == torch.float32
    assert found.shape == (7, k + 3)
    assert ((found.double() - expected).abs() <= bound).all()
    assert torch.equal(top_logprobs(logits, k), found[:, :-1])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("vocabulary", [96, 1001, 49152])
def test_a_row_is_bitwise_the_same_in_any_batch(vocabulary, threads):
    """Beside rows of NaN, at any row, as a slice of something larger, for any number of threads."""
    logits, next_ids = random_rows(33, vocabulary)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = torch.cat([top_logprobs(logits[row : row + 1], 20, next_ids[row : row + 1]) for row in range(33)])
        torch.set_num_threads(threads)
        assert torch.equal(top_logprobs(logits, 20, next_ids), alone)
        spoilt = torch.stack([logits, torch.full_like(logits, torch.nan)], dim=1)
        assert torch.equal(top_logprobs(spoilt[:, 0], 20, next_ids), alone)
        flat = top_logprobs(spoilt.flatten(0, 1), 20, next_ids.repeat_interleave(2))
        assert torch.equal(flat[::2], alone)
        assert flat[1::2].isnan().all()
    finally:
        torch.set_num_threads(before)


def test_impossible_tokens_have_finite_features():
    """A model may give tokens no chance at all, and a processor may force one of them."""
    logits = torch.full((1, 12), -torch.inf)
    logits[0, 3], logits[0, 4] = 2.0, 2.0
    found = top_logprobs(logits, 4, torch.tensor([7]))[0]
    half = torch.tensor(0.5).log()
    torch.testing.assert_close(found[:2], half.expand(2))
    assert found[2:4].tolist() == [LOGPROB_FLOOR] * 2
    torch.testing.assert_close(found[4], -half)
    assert found[5:].tolist() == [0.0, LOGPROB_FLOOR]


@pytest.mark.parametrize("k", [1, 0, -3, 97, True, 2.0])
def test_wrong_k(k):
    with pytest.raises(ValueError, match=rf"top_logprobs is {k!r}: expected 2\.\.96"):
        top_logprobs(torch.zeros(1, 96), k)
    with pytest.raises(ValueError, match="for a vocabulary of 96"):
        check_top(k, 96)


def test_long_sequences_are_taken_in_blocks(monkeypatch):
    monkeypatch.setattr("swift_kernels.features.LOGITS_BLOCK", 4)
    logits, next_ids = random_rows(10, 96)
    rows, columns = torch.zeros(10, dtype=torch.int64), torch.arange(10)
    assert torch.equal(
        pick("top_logprobs", 8, logits[None], rows, columns, next_ids), top_logprobs(logits, 5, next_ids)
    )
