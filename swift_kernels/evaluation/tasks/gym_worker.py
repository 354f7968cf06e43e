"""The process behind `gym_scorer.Scorer`: one pickled question in, one JSON score a line out."""

from __future__ import annotations

import json
import logging
import os
import pickle
import sys
from functools import cache
from pathlib import Path
from typing import Any


@cache
def scorer_of(dataset: str, config: str) -> Any:
    """A dataset whose `score_answer` takes any entry of the same configuration."""
    import reasoning_gym

    return reasoning_gym.create_dataset(dataset, size=1, seed=0, **json.loads(config))


def main() -> None:
    questions = sys.stdin.buffer
    # Whatever a library prints must not be taken for a score.
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    sys.stdout = sys.stderr
    import reasoning_gym  # noqa: F401  (the parent waits for this import once, not in its first question)

    logging.disable(logging.CRITICAL)
    print(json.dumps("ready"), file=replies, flush=True)
    while True:
        try:
            dataset, config, answer, entry = pickle.load(questions)
        except EOFError:
            return
        try:
            score = float(scorer_of(dataset, json.dumps(config, sort_keys=True)).score_answer(answer, entry))
        except Exception:  # an answer may be anything
            score = 0.0
        print(json.dumps(score), file=replies, flush=True)


if __name__ == "__main__":
    # Run as a file, its folder is on the path, where `hub` and `gym` would hide packages of these names.
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent]
    main()
