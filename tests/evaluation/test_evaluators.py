"""Finding by reading which scorers hand text to an evaluator."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("sympy")

from swift_kernels.evaluation.evaluators import evaluators
from tests.evaluation import scorers_to_read
from tests.evaluation.scorers_to_read import EXECUTING, PLAIN


@pytest.mark.parametrize("scorer", EXECUTING, ids=lambda scorer: scorer.__name__)
def test_evaluators_are_found(scorer: type) -> None:
    assert evaluators(scorer)


@pytest.mark.parametrize("scorer", PLAIN, ids=lambda scorer: scorer.__name__)
def test_a_plain_scorer_has_none(scorer: type) -> None:
    assert evaluators(scorer) == set()


def test_they_are_named() -> None:
    assert evaluators(scorers_to_read.CallsHelpers) == {"eval"}
    assert evaluators(scorers_to_read.ParsesByAlias) == {"sympy.parsing.sympy_parser.parse_expr"}
    assert evaluators(scorers_to_read.StartsAProcess) == {"subprocess.run"}


def test_what_cannot_be_read_counts_as_one() -> None:
    scope: dict[str, Any] = {"__name__": "made"}
    exec("class Made:\n    def score_answer(self, answer, entry): return 0.0", scope)
    assert evaluators(scope["Made"]) == {"unknown: Made.score_answer has no source"}
