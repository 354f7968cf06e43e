from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from swift_kernels import SwiftHead, checkpoint
from swift_kernels.evaluation.evaluate import score_rollouts
from swift_kernels.evaluation.tasks import Sums
from swift_kernels.progress import Update
from swift_kernels.training import resume
from swift_kernels.training.fit import NothingToLearnError, Recipe
from swift_kernels.training.generation import Sampling, settings
from swift_kernels.training.rollouts import Response, Rollout, RolloutError, RolloutFile, RolloutWriter, read
from swift_kernels.training.train import train_head
from tests import tiny

RECIPE = Recipe(learning_rate=0.05, epochs=12, batch_size=8)


@contextlib.contextmanager
def silent(description: str, total: int) -> Iterator[Update]:
    yield lambda done, detail="": None


def make_file(path: Path, model: Any, tokenizer: Any, names: range, **changes: Any) -> RolloutFile:
    """Problems whose right answers hold another letter than the wrong ones."""
    header = settings(model, Sums(), Sampling(n=4, max_new_tokens=8), split="train", chat=False)
    with RolloutWriter(path, {**header, **changes}) as writer:
        for name in names:
            prompt = f"Problem {name}:"
            candidates = []
            for index in range(4):
                text = ("yes" if index < 2 else "no") + str((name + index) % 10)
                ids = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
                candidates.append(Response(ids, text, True, index < 2, text[:2]))
            writer.write(Rollout(str(name), f"key {name}", prompt, "ye", tokenizer(prompt)["input_ids"], candidates))
    return read(path)


def train(model: Any, tokenizer: Any, rollouts: RolloutFile, **options: Any) -> Any:
    return train_head(
        model, tokenizer, rollouts, **{"recipe": RECIPE, "progress": silent, "note": lambda text: None, **options}
    )


@pytest.mark.parametrize(
    ("layers", "gate"), [("all", True), ([1, -1], False), ("logits", True)], ids=["all", "two-no-gate", "logits"]
)
def test_trains_tests_and_writes_a_head_with_its_card(
    tmp_path: Path, model: Any, tokenizer: Any, layers: Any, gate: bool
) -> None:
    rollouts = make_file(tmp_path / "train.jsonl", model, tokenizer, range(12))
    test = make_file(tmp_path / "test.jsonl", model, tokenizer, range(100, 106), split="test")
    result = train(model, tokenizer, rollouts, layers=layers, gate=gate, test=test, model_name="tiny")
    assert result.test.auc.mean > 0.9
    assert (result.test.problems, result.data["problems"], result.data["validation_problems"]) == (6, 12, 2)

    result.save(tmp_path / "head")
    loaded = SwiftHead.from_pretrained(str(tmp_path / "head"), model=model)
    assert torch.equal(loaded.weight, result.head.weight)
    assert (loaded.config.task, loaded.config.gate) == ("sums", gate)
    assert loaded.config.metrics["test"]["accuracy"]["swift"]["mean"] == pytest.approx(
        result.test.accuracy[4]["swift"].mean, abs=1e-4
    )
    card = (tmp_path / "head" / "README.md").read_text()
    for part in (
        "48 answers to 12 problems",
        "50.0% of them right",
        "On 6 problems it never saw",
        "| picked by | N = 1 | N = 2 | N = 4 | SWIFT is ahead by | p |",
        "| random pick | 50.0 (50.0-50.0) | 50.0 (50.0-50.0) | 50.0 (50.0-50.0) | 50.0 (50.0 to 50.0) | 0.0",
        "No per-token confidence in these rollouts",
        "--problems 6 --n 4",
    ):
        assert part in card
    json.dumps(result.facts(), allow_nan=False)


def test_a_head_of_log_probabilities_and_its_card(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    """Of a random model: they say little about an answer, but the validation loss falls."""
    rollouts = make_file(tmp_path / "train.jsonl", model, tokenizer, range(12))
    options = {"layers": "top_logprobs", "top_logprobs": 5, "recipe": replace(RECIPE, patience=RECIPE.epochs)}
    result = train(model, tokenizer, rollouts, **options, model_name="tiny")
    assert result.head.config.top_logprobs == 5
    assert result.fit.best.validation_loss < 0.9 * result.fit.history[0].validation_loss
    result.save(tmp_path / "head")
    assert SwiftHead.from_pretrained(str(tmp_path / "head"), model=model).config == result.head.config
    card = (tmp_path / "head" / "README.md").read_text()
    assert "from its 5 largest log-probabilities" in card
    assert "--layers top_logprobs --top-logprobs 5 --gate" in card


def test_training_reads_what_scoring_reads(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    rollouts = make_file(tmp_path / "train.jsonl", model, tokenizer, range(8))
    result = train(model, tokenizer, rollouts)
    # The validation scores came from stored activations; these come from a forward of their own.
    scores = score_rollouts(model, result.head, rollouts.rollouts)
    right = torch.tensor([row[:2] for row in scores])
    wrong = torch.tensor([row[2:] for row in scores])
    assert (right.min(dim=1).values > wrong.max(dim=1).values).float().mean() > 0.9


@pytest.mark.parametrize("layers", ["all", [1], "logits", "top_logprobs"], ids=str)
def test_on_the_fly_gives_the_same_head_for_more_tokens(
    tmp_path: Path, model: Any, tokenizer: Any, layers: Any
) -> None:
    rollouts = make_file(tmp_path / "train.jsonl", model, tokenizer, range(12))
    recipe = replace(RECIPE, epochs=3, patience=3, refit=False)
    once = train(model, tokenizer, rollouts, layers=layers, recipe=recipe)
    again = train(model, tokenizer, rollouts, layers=layers, recipe=recipe, on_the_fly=True, model_name="tiny")
    assert again.fit.validation_keys == once.fit.validation_keys
    for name, value in again.head.state_dict().items():
        expected = once.head.state_dict()[name]
        # Features differ by 1e-5 at most; a ridge penalty of at least 0.01 lets 100 times that through, and so does
        # AdamW, which divides a gradient by its size.
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-3 * float(expected.abs().max()))
    answers = [candidate.token_ids for item in rollouts.rollouts for candidate in item.candidates]
    # All answers are distinct, and their last token is never fed.
    assert once.llm_tokens == sum(len(item.prompt_token_ids or ()) for item in rollouts.rollouts) + sum(
        len(ids or ()) - 1 for ids in answers
    )
    # A pass for the statistics, then one an epoch; a prompt is fed again with every batch that has answers to it.
    assert again.llm_tokens > (1 + recipe.epochs) * once.llm_tokens
    assert again.facts()["llm_tokens"] == again.llm_tokens
    again.save(tmp_path / "head")
    assert "--model tiny --on-the-fly --output" in (tmp_path / "head" / "README.md").read_text()


def test_a_fit_on_the_fly_goes_on_after_its_last_epoch(
    tmp_path: Path, model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rollouts = make_file(tmp_path / "train.jsonl", model, tokenizer, range(12))
    options = {"recipe": replace(RECIPE, epochs=3, patience=3), "on_the_fly": True}
    whole = train(model, tokenizer, rollouts, **options)
    genuine, saves = resume.save, []

    def killed(*args: Any) -> None:
        genuine(*args)
        saves.append(args)
        if len(saves) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(resume, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        train(model, tokenizer, rollouts, checkpoint=tmp_path / "fit", **options)
    resumed = train(model, tokenizer, rollouts, checkpoint=tmp_path / "fit", **options)
    assert torch.equal(resumed.head.weight, whole.head.weight)
    assert resumed.llm_tokens < whole.llm_tokens


def test_another_models_rollouts_are_refused(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    rollouts = make_file(tmp_path / "train.jsonl", model, tokenizer, range(4))
    with pytest.raises(RolloutError, match=r"train\.jsonl was generated by"):
        train(tiny.model(seed=1), tokenizer, rollouts)


def test_a_test_on_trained_problems_is_refused(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    rollouts = make_file(tmp_path / "train.jsonl", model, tokenizer, range(4))
    test = make_file(tmp_path / "test.jsonl", model, tokenizer, range(3, 6))
    with pytest.raises(RolloutError, match=r"test\.jsonl shares 1 problems with .*train\.jsonl, such as 'key 3'"):
        train(model, tokenizer, rollouts, test=test)


def test_what_cannot_be_learnt_is_said_before_the_model_runs(
    tmp_path: Path, model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rollouts = make_file(tmp_path / "train.jsonl", model, tokenizer, range(4))
    wrong = [
        replace(item, candidates=[replace(candidate, correct=False) for candidate in item.candidates])
        for item in rollouts.rollouts
    ]
    monkeypatch.setattr("swift_kernels.training.train.collect", lambda *args, **kwargs: pytest.fail("ran the model"))
    with pytest.raises(NothingToLearnError, match="all 16 answers are wrong"):
        train(model, tokenizer, replace(rollouts, rollouts=wrong))
    with pytest.raises(NothingToLearnError, match="there is 1 problem: expected at least 2"):
        train(model, tokenizer, replace(rollouts, rollouts=rollouts.rollouts[:1]))


def test_answers_without_scored_tokens_are_left_out(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    rollouts = make_file(tmp_path / "train.jsonl", model, tokenizer, range(8))
    empty = Response([tokenizer.eos_token_id], "", True, False, None)
    items = [replace(item, candidates=[*item.candidates, empty]) for item in rollouts.rollouts]
    notes: list[str] = []
    result = train(model, tokenizer, replace(rollouts, rollouts=items), note=notes.append)
    assert notes == ["8 of 40 answers have no scored token and were left out"]
    assert result.validation.unscored == result.validation.problems
    assert result.validation.accuracy[5]["swift"].mean == 1.0


def test_no_answer_with_a_scored_token(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    rollouts = make_file(tmp_path / "train.jsonl", model, tokenizer, range(4))
    items = [
        replace(item, candidates=[replace(candidate, token_ids=[7]) for candidate in item.candidates])
        for item in rollouts.rollouts
    ]
    with pytest.raises(NothingToLearnError, match="no answer with a scored token"):
        train(model, tokenizer, replace(rollouts, rollouts=items))


def test_upstream_rollouts_train_too(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    path = tmp_path / "train_math.json"
    entries = [
        {
            "prompt": f"Problem {index}:",
            "reference": "1",
            "dataset": "MATH",
            "completions": [f"yes{index}", f"no{index}"],
            "correctness": [True, False],
            "steps": [[], []],
        }
        for index in range(8)
    ]
    path.write_text(json.dumps(entries))
    notes: list[str] = []
    result = train(model, tokenizer, read(path), note=notes.append)
    assert "tokenised anew" in notes[0]
    assert result.head.config.task is None
    result.save(tmp_path / "head")
    assert checkpoint.load(tmp_path / "head").config.metrics["best_epoch"] == result.fit.best.number
