from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from swift_kernels.integrations import reward_model
from swift_kernels.integrations.reward_model import RewardModel, RewardModelError, load_reward_model
from tests import classifiers, tiny

PROMPT = "What is 2 + 2?"
ANSWERS = ["4", "It is 4, as 2 and 2 are.", "5", "four", "4", " 22"]

MADE: dict[str, Callable[[], tuple[Any, Any]]] = {
    "llama-right": classifiers.llama,
    "llama-left": lambda: classifiers.llama("left"),
    "llama-chat": lambda: classifiers.llama(chat=True),
    "gpt2-left": classifiers.gpt2,
    "gpt2-right": lambda: classifiers.gpt2("right"),
    "bert": classifiers.bert,
    "roberta": classifiers.roberta,
    "deberta": classifiers.deberta,
}
FAMILIES = pytest.mark.parametrize("family", MADE)


def expected_ids(tokenizer: Any, answer: str) -> list[int]:
    """What the model should read, by the letters."""
    letters = tokenizer.convert_tokens_to_ids
    if tokenizer.chat_template:
        return letters([*f"<user>{PROMPT}<assistant>{answer}"])
    if tokenizer.sep_token:
        return letters(["[CLS]", *PROMPT, "[SEP]", *answer, "[SEP]"])
    return letters([*PROMPT, *answer])


def alone(model: Any, tokenizer: Any, answer: str) -> torch.Tensor:
    """The model's logits for one answer, without padding."""
    ids = expected_ids(tokenizer, answer)
    options = {}
    if type(model).__name__.startswith("Bert"):
        first = len(PROMPT) + 2
        options["token_type_ids"] = torch.tensor([[0] * first + [1] * (len(ids) - first)])
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), **options).logits[0]


@FAMILIES
@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_reward_is_that_of_the_answer_alone(family: str, batch_size: int) -> None:
    model, tokenizer = MADE[family]()
    found = RewardModel(model, tokenizer, family).score(PROMPT, ANSWERS, batch_size)
    expected = [alone(model, tokenizer, answer).item() for answer in ANSWERS]
    assert max(expected) - min(expected) > 0.01
    assert found.rewards == pytest.approx(expected, abs=1e-5)
    assert found.answers == 5, "equal ones are read once"
    assert found.tokens == sum(len(expected_ids(tokenizer, answer)) for answer in set(ANSWERS))
    assert found.seconds > 0


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("batch_size", [1, 16])
def test_without_a_padding_id_the_last_token_counts_whatever_it_is(side: str, batch_size: int) -> None:
    # An answer that ends with the tokenizer's own padding, as where that is the end-of-sequence token.
    model, tokenizer = classifiers.llama(side, pad_token_id=None)
    tokenizer.pad_token = "!"
    answers = ["4!", "5 and more", "six?", "6"]
    expected = [alone(model, tokenizer, answer).item() for answer in answers]
    assert RewardModel(model, tokenizer, "rm").score(PROMPT, answers, batch_size).rewards == pytest.approx(
        expected, abs=1e-5
    )


@pytest.mark.parametrize("family", ["llama-right", "bert", "roberta"])
def test_an_answer_that_does_not_fit_has_no_reward(family: str) -> None:
    model, tokenizer = MADE[family]()
    context = tiny.CONTEXT if family == "llama-right" else classifiers.ENCODER_CONTEXT
    longest = "1" * (context - len(expected_ids(tokenizer, "")))
    rm = RewardModel(model, tokenizer, family)
    found = rm.score(PROMPT, [longest, longest + "1", "4", longest + "1"])
    assert rm.context == context
    assert [math.isnan(reward) for reward in found.rewards] == [False, True, False, True]
    assert (found.answers, found.too_long) == (2, 2)
    assert found.rewards[0] == pytest.approx(alone(model, tokenizer, longest).item(), abs=1e-5)


def test_without_any_answer_that_fits_there_is_no_cost() -> None:
    model, tokenizer = classifiers.llama(max_position_embeddings=8)
    found = RewardModel(model, tokenizer, "rm").score(PROMPT, ["4", "5"])
    assert all(map(math.isnan, found.rewards))
    assert replace(found, rewards=[], seconds=0) == reward_model.ProblemRewards([], 0, 2, 0, 0, 0)


@pytest.mark.parametrize(
    ("problem_type", "output"),
    [
        (None, "log-probability"),
        ("single_label_classification", "log-probability"),
        ("multi_label_classification", "logit"),
        ("regression", "logit"),
    ],
)
def test_a_label_of_several(problem_type: str | None, output: str) -> None:
    model, tokenizer = classifiers.bert(labels=3, problem_type=problem_type)
    rm = RewardModel(model, tokenizer, "rm", label=2)
    assert rm.output == output
    logits = torch.stack([alone(model, tokenizer, answer) for answer in ANSWERS])
    expected = logits.log_softmax(1) if output == "log-probability" else logits
    assert rm.score(PROMPT, ANSWERS).rewards == pytest.approx(expected[:, 2].tolist(), abs=1e-5)


@FAMILIES
def test_flops_are_those_of_the_forward(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = MADE[family]()
    rm = RewardModel(model, tokenizer, family)
    assert rm.score(PROMPT, ["4"]).flops > 0
    assert rm._flops is not None, "found by the probe"
    found = rm.score(PROMPT, ANSWERS, 4).flops
    # Each forward as it runs, with attention spelt out, which torch's own counter sees whole.
    if family != "deberta":
        model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        rm.score(PROMPT, ANSWERS, 4)
    assert found == counter.get_total_flops()
    monkeypatch.setattr(rm, "_flops", None)
    assert rm.score(PROMPT, ANSWERS, 4).flops == found


def test_flops_that_are_no_parabola_are_counted_as_they_run() -> None:
    model, tokenizer = classifiers.llama()
    genuine = model.forward

    def windowed(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        if input_ids.shape[1] > 40:
            torch.ones(4, 5) @ torch.ones(5, 6)
        return genuine(input_ids=input_ids, attention_mask=attention_mask)

    model.forward = windowed
    rm = RewardModel(model, tokenizer, "rm")
    plain = RewardModel(*classifiers.llama(), "rm")
    for answer, more in (("4", 0), ("4" * 60, 2 * 4 * 5 * 6)):
        assert rm.score(PROMPT, [answer]).flops == plain.score(PROMPT, [answer]).flops + more


class TestLoading:
    def test_settings(self, tmp_path: Path) -> None:
        model, tokenizer = classifiers.llama(labels=2, chat=True)
        rm = load_reward_model(str(classifiers.save(tmp_path / "rm", (model, tokenizer))), label=1, device="cpu")
        settings = rm.settings()
        assert len(settings.pop("weights")) == 16
        assert settings == {
            "reward_model": {
                "name": "rm",
                "architecture": "LlamaForSequenceClassification",
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
            },
            "label": 1,
            "output": "log-probability",
            "reads": "chat template",
            "dtype": "float32",
            "device": "cpu",
        }

    def test_other_weights_are_another_model(self) -> None:
        model, tokenizer = classifiers.bert()
        before = RewardModel(model, tokenizer, "rm").settings()
        with torch.no_grad():
            model.classifier.weight.mul_(1.5)
        assert RewardModel(model, tokenizer, "rm").settings() != before

    def test_bfloat16_gives_nearly_the_same_rewards(self, tmp_path: Path) -> None:
        model, tokenizer = classifiers.llama()
        folder = classifiers.save(tmp_path / "rm", (model, tokenizer))
        rm = load_reward_model(str(folder), dtype=torch.bfloat16, device="cpu")
        assert rm.settings()["dtype"] == "bfloat16"
        expected = RewardModel(model, tokenizer, "rm").score(PROMPT, ANSWERS).rewards
        spread = max(expected) - min(expected)
        assert rm.score(PROMPT, ANSWERS).rewards == pytest.approx(expected, abs=0.1 * spread)

    @pytest.mark.parametrize(
        ("made", "label", "message"),
        [
            (lambda: (tiny.model(), tiny.tokenizer()), None, r"is no sequence classifier, it lacks score\.weight"),
            (lambda: classifiers.bert(labels=2), None, r"has 2 labels \(0 LABEL_0, 1 LABEL_1\): say which"),
            (lambda: classifiers.bert(labels=2), 2, r"label is 2: expected 0\.\.1, .* has 2 of them"),
            (classifiers.bert, -1, r"label is -1: expected 0\.\.0"),
        ],
        ids=["language-model", "which-label", "label", "negative"],
    )
    def test_what_cannot_be_used(self, tmp_path: Path, made: Any, label: int | None, message: str) -> None:
        folder = classifiers.save(tmp_path / "rm", made())
        with pytest.raises(RewardModelError, match=message):
            load_reward_model(str(folder), label=label, device="cpu")

    def test_what_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(RewardModelError, match="does not exist: expected a folder or a Hub id"):
            load_reward_model(str(tmp_path / "nowhere"))
        with pytest.raises(RewardModelError, match=r"cannot be loaded: "):
            load_reward_model(str(tmp_path))

    @pytest.mark.parametrize(
        ("family", "left"),
        # Of the others transformers says itself that they lack their vocabulary.
        [("bert", False), ("llama-right", False), ("roberta", False), ("bert", True), ("roberta", True)],
    )
    def test_without_its_tokenizer(self, tmp_path: Path, family: str, left: bool) -> None:
        """A file of the tokenizer's that is `left`, without a vocabulary, is as good as none."""
        folder = classifiers.save(tmp_path / "rm", MADE[family]())
        for path in [path for path in folder.iterdir() if path.name not in ("config.json", "model.safetensors")]:
            path.unlink()
        if left:
            (folder / "tokenizer_config.json").write_text("{}")
        with pytest.raises(RewardModelError, match="has no vocabulary, every word would be unknown to it"):
            load_reward_model(str(folder), device="cpu")

    def test_weights_that_are_cut_off(self, tmp_path: Path) -> None:
        folder = classifiers.save(tmp_path / "rm", classifiers.bert())
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        with pytest.raises(RewardModelError, match="cannot be loaded: "):
            load_reward_model(str(folder), device="cpu")


class TestUnreadable:
    """What cannot be encoded has no reward, and costs the others nothing."""

    def test_a_tokenizer_of_another_model(self) -> None:
        found = RewardModel(classifiers.llama(vocab_size=50)[0], tiny.tokenizer(), "rm").score(PROMPT, ANSWERS)
        assert all(map(math.isnan, found.rewards))
        assert (found.answers, found.unreadable, found.too_long) == (0, 6, 0)
        assert found.why is not None
        assert "expected 0..49" in found.why

    def test_nothing_to_read(self) -> None:
        model, tokenizer = classifiers.llama()
        rm = RewardModel(model, tokenizer, "rm")
        nothing = rm.score("", ["", ""])
        assert replace(nothing, rewards=[], seconds=0) == reward_model.ProblemRewards(
            [], 0, 0, 0, 0, 0, 2, "prompt and answer have no tokens: expected at least one"
        )
        found = rm.score("", ["", "4", ""])
        assert [math.isnan(reward) for reward in found.rewards] == [True, False, True]
        assert (found.answers, found.unreadable, found.flops > 0) == (1, 2, True)
        assert found.rewards[1] == RewardModel(model, tokenizer, "rm").score("", ["4"]).rewards[0]
        assert rm._flops is not None, "probed with what can be read"

    def test_memory_is_no_fault_of_an_answer(self, monkeypatch: pytest.MonkeyPatch) -> None:
        rm = RewardModel(*classifiers.llama(), "rm")

        def fail(*_: Any) -> Any:
            raise MemoryError

        monkeypatch.setattr(rm, "_encode", fail)
        with pytest.raises(MemoryError):
            rm.score(PROMPT, ANSWERS)
