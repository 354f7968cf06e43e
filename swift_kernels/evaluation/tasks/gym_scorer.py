"""The scorers of reasoning-gym in a process of their own, without rights and under a time limit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from swift_kernels.evaluation.worker import TIME_LIMIT, Worker


class Scorer(Worker):
    """Scores answers in a child process, started when first used; threads take turns.

    `timeouts` counts the answers that were given up.
    """

    def __init__(self, time_limit: float = TIME_LIMIT) -> None:
        super().__init__(Path(__file__).with_name("gym_worker.py"), time_limit)

    def score(self, dataset: str, config: dict[str, Any], answer: str, entry: Any) -> float:
        """The score of an answer to `entry`, a problem of this dataset; 0 where the scorer fails or takes too long."""
        score = self.ask((dataset, config, answer, entry))
        # The process may have been taken over: whatever it says that is no score is none.
        return score if isinstance(score, float) and math.isfinite(score) else 0.0


SCORER = Scorer()
"""Of all tasks in this process: a child takes seconds to start."""
