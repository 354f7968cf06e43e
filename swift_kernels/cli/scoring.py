"""`swift-kernels score`: reading answers from JSONL, and giving the same lines back with scores."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from swift_kernels.cli.render import score_facts
from swift_kernels.evaluation.tasks import read_jsonl


def read_answers(path: Path) -> list[dict[str, Any]]:
    """The objects of the file, checked before any is scored; errors name the line."""
    rows = []
    for place, row in read_jsonl(path):
        if not _is_text(row.get("prompt")) or not row["prompt"]:
            raise ValueError(f"{place}: no 'prompt' that is text or token ids, and not empty")
        if ("response" in row) == ("responses" in row):
            raise ValueError(f"{place}: expected either 'response' or 'responses', the object has {sorted(row)}")
        several = "responses" in row
        responses = row["responses"] if several else [row["response"]]
        if not isinstance(responses, list) or not responses or not all(map(_is_text, responses)):
            raise ValueError(f"{place}: {'responses' if several else 'response'} is not text or token ids")
        if not isinstance(row.get("finished", True), bool):
            raise ValueError(f"{place}: finished is not true or false")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} is empty: expected a JSON object a line")
    return rows


def score_lines(
    model: Any,
    tokenizer: Any,
    head: Any,
    rows: Sequence[dict[str, Any]],
    batch_size: int,
    allow_mismatch: bool,
    on_progress: Callable[[int], None],
) -> Iterator[str]:
    """Yields each row as a JSON line with its score, several batches' worth of rows at a time."""
    from swift_kernels.integrations.transformers import score_texts

    # Enough at once that sorting by length fills the batches well, few enough that results come soon.
    step = 8 * batch_size
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        answers = [(row, response) for row in part for response in row.get("responses", [row.get("response")])]
        values = iter(
            score_texts(
                model,
                tokenizer,
                head,
                [row["prompt"] for row, _ in answers],
                [response for _, response in answers],
                finished=[row.get("finished", True) for row, _ in answers],
                batch_size=batch_size,
                allow_mismatch=allow_mismatch,
            ).tolist()
        )
        for row in part:
            own = [score_facts(head, next(values)) for _ in row.get("responses", [None])]
            if "responses" in row:
                row = {**row, **{_SEVERAL[key]: [facts[key] for facts in own] for key in own[0]}}
            else:
                row = {**row, **own[0]}
            yield json.dumps(row, ensure_ascii=False)
        on_progress(start + len(part))


_SEVERAL = {"score": "scores", "p_correct": "p_correct"}


def _is_text(value: Any) -> bool:
    """Text, or a list of token ids."""
    return isinstance(value, str) or (isinstance(value, list) and all(type(token) is int for token in value))
