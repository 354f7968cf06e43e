"""The process behind `gym_scorer.Scorer`: scores answers to problems of reasoning-gym."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from swift_kernels.evaluation.worker import serve


@cache
def scorer_of(dataset: str, config: str) -> Any:
    """A dataset whose `score_answer` takes any entry of the same configuration."""
    import reasoning_gym

    return reasoning_gym.create_dataset(dataset, size=1, seed=0, **json.loads(config))


def answer(question: tuple[str, dict[str, Any], str, Any]) -> float:
    """The score of a model's answer to an entry of a dataset."""
    dataset, config, given, entry = question
    return float(scorer_of(dataset, json.dumps(config, sort_keys=True)).score_answer(given, entry))


def _prepare() -> None:
    import reasoning_gym  # noqa: F401


def main() -> None:
    serve(answer, _prepare)


if __name__ == "__main__":
    main()
