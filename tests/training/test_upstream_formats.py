"""Rollouts and heads as the authors' code writes them give the scores that their formula gives."""

from __future__ import annotations

import json
import random
import string
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from swift_kernels import SwiftHead
from swift_kernels.evaluation.evaluate import evaluate, score_rollouts
from swift_kernels.training.rollouts import read, tokenized
from tests.oracle import EPS, dot_depth
from tests.test_reference import UpstreamRewardModel

PROBLEMS, ANSWERS = 6, 4

FEATURE_ERROR = 1e-5
"""Relative and absolute: how far hidden states computed in batches are off, by the test of the activations."""


def make_answers() -> tuple[list[str], list[list[str]], list[list[bool]]]:
    """Prompts, responses of very different lengths, and grades; no two responses are alike."""
    generator = random.Random(0)
    responses = [
        ["".join(generator.choices(string.ascii_letters, k=generator.randint(1, 40))) for _ in range(ANSWERS)]
        for _ in range(PROBLEMS)
    ]
    grades = [[generator.random() < 0.5 for _ in range(ANSWERS)] for _ in range(PROBLEMS)]
    return [f"What is {index}+1?" for index in range(PROBLEMS)], responses, grades


def all_in_an_entry() -> list[dict[str, Any]]:
    return [
        {
            "prompt": prompt,
            "reference": "2",
            "dataset": "MATH",
            "completions": completions,
            "correctness": correctness,
            "steps": [[text] for text in completions],
        }
        for prompt, completions, correctness in zip(*make_answers(), strict=True)
    ]


def one_an_entry() -> list[dict[str, Any]]:
    return [
        {
            "task": "math",
            "idx": index,
            "prompt": prompt,
            "response": text,
            "steps": [text],
            "extracted_output": text[:1],
            "reference": "2",
            "correctness": correct,
        }
        for index, (prompt, responses, correctness) in enumerate(zip(*make_answers(), strict=True))
        for text, correct in zip(responses, correctness, strict=True)
    ]


@torch.no_grad()
def upstream_score(
    model: Any, tokenizer: Any, reward_model: UpstreamRewardModel, layers: list[int], prompt: str, response: str
) -> tuple[float, float]:
    """The authors' score of an answer, one at a time, and how far another order of operations may be off.

    With n = `dot_depth`, a logit is off by n eps sum |W x| for each side's rounding, and by sum |W dx| for features
    that are off by dx. A gate logit enters the score with weight g (r - score) / sum g, a reward with g / sum g; sums
    over t tokens add (t + 4) eps of the mean |r|, as in `oracle`.
    """
    prompt_ids = tokenizer(prompt)["input_ids"]
    response_ids = tokenizer(response)["input_ids"]
    # All tokens of the text were fed; the end-of-sequence token after them was not.
    output = model(torch.tensor([prompt_ids + response_ids]), output_hidden_states=True)
    states = [output.hidden_states[layer][0, len(prompt_ids) :].float() for layer in layers]
    features = torch.cat(states, dim=1)
    score = reward_model(features[None], [len(features)])[0]

    layer = reward_model.fused_layer if reward_model.gate else reward_model.reward_layer
    weight, bias = layer.weight.double().abs(), layer.bias.double().abs()
    size = features.double().abs()
    depth = dot_depth([state.shape[1] for state in states])
    error = 2 * depth * EPS * (size @ weight.T + bias) + FEATURE_ERROR * ((1 + size) @ weight.T)
    logits = layer(features).double()
    gate = logits[:, 0].sigmoid() if reward_model.gate else torch.ones(len(logits), dtype=torch.float64)
    reward = logits[:, -1]
    total = error[:, -1] + 2 * (len(reward) + 4) * EPS * reward.abs()
    if reward_model.gate:
        total = total + error[:, 0] * (reward - score).abs()
    return score.item(), ((gate * total).sum() / gate.sum()).item()


@pytest.mark.parametrize("layout", [all_in_an_entry, one_an_entry], ids=["train", "test"])
@pytest.mark.parametrize("layers", [[0, 1, 2], [0, 2]], ids=["all", "two"])
@pytest.mark.parametrize("gate", [True, False], ids=["fused_layer", "reward_layer"])
def test_scores_and_picks_are_the_authors(
    model: Any, tokenizer: Any, tmp_path: Path, layout: Any, layers: list[int], gate: bool
) -> None:
    prompts, responses, grades = make_answers()
    torch.manual_seed(0)
    reward_model = UpstreamRewardModel(16 * len(layers), gate)
    torch.save(reward_model.state_dict(), tmp_path / "reward_model_ce.pt")
    (tmp_path / "math.json").write_text(json.dumps(layout(), indent=2))

    head = SwiftHead.from_upstream(tmp_path / "reward_model_ce.pt", model=model, layers=layers)
    items = tokenized(read(tmp_path / "math.json").rollouts, tokenizer)
    assert [[candidate.text for candidate in item.candidates] for item in items] == responses
    found = torch.tensor(score_rollouts(model, head, items))
    pairs = [
        [upstream_score(model, tokenizer, reward_model, layers, prompt, response) for response in row]
        for prompt, row in zip(prompts, responses, strict=True)
    ]
    expected, bound = torch.tensor(pairs).unbind(dim=2)
    assert ((found - expected).abs() <= bound).all(), ((found - expected).abs() / bound).max()

    # Best-of-N is a matter of the order alone, which the bounds do not reach.
    ranked = expected.sort(dim=1).values
    assert ranked.diff(dim=1).min() > 2 * bound.max()
    evaluation = evaluate(items, found.tolist())
    assert evaluation.accuracy[1]["swift"].mean == pytest.approx(mean(torch.tensor(grades)))
    picks = expected.argmax(dim=1)
    picked = torch.tensor(grades)[torch.arange(PROBLEMS), picks]
    assert evaluation.accuracy[ANSWERS]["swift"].mean == pytest.approx(mean(picked))
    # Of the pairs that may be drawn, each equally likely, the better one is picked.
    two = [
        torch.tensor(grades)[row, i if expected[row, i] > expected[row, j] else j]
        for row in range(PROBLEMS)
        for i in range(ANSWERS)
        for j in range(i)
    ]
    assert evaluation.accuracy[2]["swift"].mean == pytest.approx(mean(torch.stack(two)))


def mean(grades: Tensor) -> float:
    return grades.double().mean().item()
