"""Answers of which one feature tells right from wrong, and what a head makes of them."""

from __future__ import annotations

from typing import Any

import torch

from swift_kernels import SwiftHead
from swift_kernels.training.activations import Activations
from swift_kernels.training.fit import Example, Recipe
from swift_kernels.training.losses import get_loss, within_problem_auc

QUICK = Recipe(learning_rate=0.05, epochs=30, patience=30, batch_size=4, start="random", loss="bce", refit=False)


def separable(
    problems: int = 10, noise: float = 0.0, dtype: torch.dtype = torch.float32
) -> tuple[Activations, list[Example]]:
    """Four responses a problem; the first feature tells right from wrong."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 6, (4 * problems,), generator=generator).tolist()
    made = Activations([3, 2], lengths, dtype)
    made.values.copy_(torch.randn(sum(lengths), 5, generator=generator))
    examples = []
    for response in range(4 * problems):
        right = response % 4 < 2
        start, end = made.cu_seqlens[response : response + 2].tolist()
        made.values[start:end, 0] = (1.0 if right else -1.0) + noise * torch.randn(end - start, generator=generator)
        examples.append(Example(response, right, f"problem {response // 4}"))
    return made, examples


def held_out(result: Any, examples: list[Example]) -> list[Example]:
    return [example for example in examples if example.key in result.validation_keys]


def facts_of(head: SwiftHead, activations: Activations, examples: list[Example], loss: str) -> tuple[float, float]:
    """Loss and within-problem AUC of a head on some examples."""
    scores = head(*activations.batch(torch.tensor([example.response for example in examples])))
    labels = torch.tensor([float(example.correct) for example in examples])
    group = torch.tensor([int(example.key.removeprefix("problem ")) for example in examples])
    return get_loss(loss)(scores, labels, group).item(), within_problem_auc(scores, labels, group).item()
