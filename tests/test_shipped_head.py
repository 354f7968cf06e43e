from __future__ import annotations

from typing import Any

import pytest
import torch

from swift_kernels import SwiftHead
from swift_kernels.checkpoint import PACKAGED_HEADS
from swift_kernels.evaluation.evaluate import evaluate, score_rollouts
from swift_kernels.evaluation.tasks import Sums
from swift_kernels.training.generation import Sampling, generate_rollouts

FOLDER = PACKAGED_HEADS / "smollm2-135m-sums"


def test_comes_with_its_card_and_figures_on_unseen_problems() -> None:
    head = SwiftHead.from_pretrained(str(FOLDER))
    assert head.config.layers == tuple(range(31))
    assert sum(parameter.numel() for parameter in head.parameters()) == 35_714
    assert head.weight.dtype == torch.float32
    test = head.config.metrics["test"]
    assert test["differences"]["swift - random"]["low"] > 0
    card = (FOLDER / "README.md").read_text()
    for section in ("## Data", "## Recipe", "## Results", "## Made with", "## Limits"):
        assert section in card
    assert f"On {test['problems']} problems it never saw" in card


@pytest.mark.slow
def test_ranks_the_models_own_answers_to_unseen_sums(smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2
    head = SwiftHead.from_pretrained(str(FOLDER), model=model)
    task = Sums()
    sampling = Sampling(n=8, max_new_tokens=task.max_new_tokens, seed=1)
    rollouts = list(generate_rollouts(model, tokenizer, task, task.problems("test", 8, seed=5), sampling))
    result = evaluate(rollouts, score_rollouts(model, head, rollouts))
    assert result.mixed_problems >= 4
    # 0.89 over 300 problems; a head that knows nothing would have 0.5.
    assert result.auc.mean > 0.65
