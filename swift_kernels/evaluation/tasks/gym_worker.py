"""The process behind `gym_scorer.Scorer`: scores answers to problems of reasoning-gym."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from swift_kernels.evaluation.answer_grammar import is_expression, may_be_executed
from swift_kernels.evaluation.evaluators import evaluators
from swift_kernels.evaluation.worker import serve


@cache
def scorer_of(dataset: str, config: str) -> Any:
    """A dataset whose `score_answer` takes any entry of the same configuration."""
    import reasoning_gym

    return reasoning_gym.create_dataset(dataset, size=1, seed=0, **json.loads(config))


def answer(question: tuple[str, dict[str, Any], str, Any]) -> float:
    """The score of a model's answer to an entry of a dataset."""
    name, config, given, entry = question
    dataset = _member(scorer_of(name, json.dumps(config, sort_keys=True)), entry)
    if not may_be_executed(given, evaluators(type(dataset))):
        # Compared, never evaluated: the reference may be any text, such as one word.
        return float(given == entry["answer"])
    return float(dataset.score_answer(given, entry))


def _member(dataset: Any, entry: Any) -> Any:
    """The dataset that scores an entry of a composite one."""
    members = getattr(dataset, "datasets", None)
    return _member(members[entry["metadata"]["source_dataset"]], entry) if isinstance(members, dict) else dataset


def _prepare() -> None:
    import reasoning_gym
    import sympy
    from reasoning_gym.factory import DATASETS

    # What is found out or set up when first used, every fork would do anew.
    for dataset, _ in DATASETS.values():
        evaluators(dataset)
    grader = reasoning_gym.create_dataset("simple_integration", size=1, seed=0)
    grader.score_answer("x", grader[0])
    is_expression("sqrt(x)")
    sympy.simplify(sympy.sin(sympy.Symbol("x")) ** 2)


def main() -> None:
    serve(answer, _prepare)


if __name__ == "__main__":
    main()
