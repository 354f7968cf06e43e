"""Traces add up to the scores of those who score, and token texts to the answer."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from swift_kernels import SwiftHead, score_texts
from swift_kernels.checkpoint import ModelMismatchError
from swift_kernels.evaluation.evaluate import score_rollouts
from swift_kernels.evaluation.traces import Trace, token_texts, trace_model, trace_store
from swift_kernels.integrations import models
from swift_kernels.integrations.models import ModelError
from swift_kernels.processes import Processes
from swift_kernels.training.collection import collect_rollouts
from swift_kernels.training.rollouts import Rollout, read
from swift_kernels.training.store import Store
from swift_kernels.training.stored import check_same_base, score_stored, unreadable
from tests import tiny
from tests.training.test_collection import make_job

EPS = torch.finfo(torch.float32).eps
HEADS: dict[str, dict[str, Any]] = {
    "gated": {},
    "no gate": {"gate": False},
    "two layers": {"layers": [0, -1]},
    "logits": {"layers": "logits"},
    "top_logprobs": {"layers": "top_logprobs"},
}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.model()


def collected(model: Any, folder: Path, **layout: Any) -> tuple[Store, list[Rollout]]:
    job = make_job(model, tiny.tokenizer(), folder, **layout)
    collect_rollouts(job, Processes(), lambda *_: None, lambda _: None)
    return Store(folder / "store"), read(job.output).rollouts


def make_head(model: Any, **options: Any) -> SwiftHead:
    torch.manual_seed(3)
    return SwiftHead.for_model(model, **options).requires_grad_(False)


def check_running(trace: Trace) -> None:
    """The last score so far is the score, within what float32 sums of so many terms may be off."""
    if not len(trace.gate_reward):
        assert math.isnan(trace.score)
        return
    gate, reward = trace.gate_reward.double().unbind(1)
    assert ((gate > 0) & (gate <= 1)).all()
    # Two sums of n terms, each off by at most n eps of its terms' magnitudes, and a product and a quotient rounded.
    bound = (2 * len(gate) + 2) * EPS * float((gate * reward.abs()).sum() / gate.sum())
    assert abs(float(trace.running()[-1]) - trace.score) <= bound
    assert float(trace.running()[0]) == pytest.approx(float(reward[0]))
    assert float(trace.pull(0.25).sum()) == pytest.approx(trace.score - 0.25, abs=1e-5)


@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
def test_traces_end_in_the_scores(model: Any, tmp_path: Path, options: dict[str, Any]) -> None:
    layers = options.get("layers", "all")
    store, rollouts = collected(model, tmp_path, layers=layers, dtype="float32")
    # An answer twice, one of nothing and one that ended at once.
    first = rollouts[0].candidates[0]
    extra = [first, replace(first, token_ids=[]), replace(first, token_ids=[1])]
    longer = [replace(rollouts[0], candidates=[*rollouts[0].candidates, *extra]), *rollouts[1:]]
    head = make_head(model, **options)
    done: list[int] = []
    found = trace_model(model, head, longer, on_progress=done.append)
    assert done == [1, 2, 3, 4, 5, 6, 7]
    scores = score_rollouts(model, head, longer)
    for own, expected, item in zip(found, scores, longer, strict=True):
        assert [trace.score for trace in own] == pytest.approx(expected, abs=0, nan_ok=True)
        prompts: list[list[int]] = [item.prompt_token_ids or []] * len(own)
        texts = score_texts(model, None, head, prompts, [candidate.token_ids or [] for candidate in item.candidates])
        # The same values through another order of additions in attention.
        assert [trace.score for trace in own] == pytest.approx(texts.tolist(), rel=1e-4, abs=1e-4, nan_ok=True)
        for trace in own:
            check_running(trace)
    assert unreadable(store, head) is None
    done.clear()
    from_store = trace_store(store, head, rollouts, on_progress=done.append)
    assert done == [1, 2, 3, 4, 5, 6, 7]
    for own, expected, by_model in zip(from_store, score_stored(store, head, rollouts), found, strict=True):
        assert [trace.score for trace in own] == pytest.approx(expected, abs=0, nan_ok=True)
        for trace, other in zip(own, by_model, strict=False):
            check_running(trace)
            # What is left is float32's rounding in the model.
            torch.testing.assert_close(trace.gate_reward, other.gate_reward, rtol=1e-4, atol=1e-4)


def test_why_a_store_cannot_be_read_is_told(model: Any, tmp_path: Path) -> None:
    store, _ = collected(model, tmp_path / "some", layers=[0, 2])
    reason = unreadable(store, make_head(model))
    assert reason == "it does not hold 1, which the head reads"
    reason = unreadable(store, make_head(model, layers="logits"))
    assert reason == "it does not hold logits, which the head reads"
    assert unreadable(store, make_head(model, layers=[2])) is None
    assert "it holds tokens of span 'fed'" in (unreadable(store, make_head(model, layers=[2], span="all")) or "")
    other = tiny.model(seed=1)
    with pytest.raises(ModelMismatchError, match=r"the head was trained on .*, .*store holds features of"):
        check_same_base(store, make_head(other, layers=[2]))
    sketched, _ = collected(model, tmp_path / "sketch", layers="all", sketch="pca:4")
    reason = unreadable(sketched, make_head(model))
    assert reason == "it is a sketch (pca:4)"


TEXTS = {
    "words": " The answer is 42.\n\n  So  it is\tdone.",
    "leading space": "  two",
    "accents and kana": "naïve café こんにちは",
    "emoji": "👩‍👩‍👧 🇨🇭 👍🏽!",
    "combining": "e\u0301 a\u030a \u200b.",
    "rare": "𒀭 ⸎ ꙮ",
    "markup": "<script>alert('x')</script> <|im_end|>",
    "nothing": "",
}


@pytest.mark.parametrize("name", ["smollm2", "gemma3-270m"])
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_token_texts_are_exact(tokenizers: dict[str, Any], name: str, text: str) -> None:
    tokenizer = tokenizers[name]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = token_texts(tokenizer, ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("name", ["smollm2", "gemma3-270m"])
def test_tokens_that_make_no_sense_together(tokenizers: dict[str, Any], name: str) -> None:
    tokenizer = tokenizers[name]
    generator = torch.Generator().manual_seed(0)
    halves = tokenizer("ꙮ", add_special_tokens=False)["input_ids"]
    assert len(halves) > 1
    for _ in range(20):
        ids = torch.randint(len(tokenizer), (30,), generator=generator).tolist()
        ids = [*halves[:1], *ids[:15], *halves[:-1], *ids[15:], *halves[:1]]
        assert "".join(token_texts(tokenizer, ids)) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def test_a_character_belongs_to_the_token_that_completes_it(tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers["smollm2"]
    ids = tokenizer("a 👍 b", add_special_tokens=False)["input_ids"]
    pieces = token_texts(tokenizer, ids)
    assert pieces[0] == "a"
    assert pieces[-1] == " b"
    assert [piece for piece in pieces[1:-1] if piece.strip()] == [next(p for p in pieces if "👍" in p)]
    assert "" in pieces


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Any]:
    try:
        # Without their weights, which take longer to read than all of these tests.
        return {name: AutoTokenizer.from_pretrained(models._converted(name)) for name in ("smollm2", "gemma3-270m")}
    except ModelError as error:
        pytest.skip(str(error))
