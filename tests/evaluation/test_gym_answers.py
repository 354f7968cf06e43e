"""What a model wrote is data: attacks on reasoning-gym's scorers, and ordinary answers that are graded as before."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("reasoning_gym")

import reasoning_gym

from swift_kernels.evaluation.tasks import get_task, gym_worker
from swift_kernels.evaluation.tasks.gym_scorer import Scorer
from tests.evaluation import ordinary

EVALUATING = (
    *("binary_matrix", "countdown", "intermediate_integration", "n_queens", "polynomial_multiplication", "puzzle24"),
    *("simple_integration", "spiral_matrix", "string_insertion"),
)
"""Datasets known to evaluate the answer itself."""

OTHERS = ("bitwise_arithmetic", "number_sorting")
"""Those that evaluate what the problem holds."""

CALLS = {
    "call": "__import__('pathlib').Path('{path}').touch()",
    "call in a list": "[__import__('pathlib').Path('{path}').touch()]",
    "call in nested lists": "[[__import__('pathlib').Path('{path}').touch()]]",
    "call by a comprehension": "[x for x in [__import__('pathlib').Path('{path}').touch()]]",
    "call behind a carriage return": "(1 #\r+__import__('pathlib').Path('{path}').touch())",
    "call in a format": "f\"{{__import__('pathlib').Path('{path}').touch()}}\"",
    "call in a string": "\"__import__('pathlib').Path('{path}').touch()\"",
    "call in a string in a list": "[\"__import__('pathlib').Path('{path}').touch()\"]",
    "call by a class of a literal": "().__class__.__base__.__subclasses__() and open('{path}', 'w')",
    "call of open": "open('{path}', 'w')",
    "call of sympy's evaluator": "sympify(\"__import__('pathlib').Path('{path}').touch()\")",
    "call of sympy's shorthand": "S(\"__import__('pathlib').Path('{path}').touch()\")",
    "call in a lambda": "(lambda: open('{path}', 'w'))()",
    "call by a condition": "1 if open('{path}', 'w') else 2",
    "call in wide letters": "\uff4fpen('{path}', 'w')",
    "call after a right answer": "{answer} + 0*len(str(open('{path}', 'w')))",
    "call after a plain number": "24 + 0*len(str(open('{path}', 'w')))",
}


@pytest.fixture(scope="module")
def scorer() -> Iterator[Scorer]:
    made = Scorer(time_limit=60.0)
    yield made
    made.close()


def entry_of(name: str, index: int = 0) -> Any:
    return reasoning_gym.create_dataset(name, size=index + 1, seed=0)[index]


def attacks(path: Path, entry: Any) -> dict[str, str]:
    return {name: call.format(path=path, answer=entry["answer"]) for name, call in CALLS.items()}


def test_reading_finds_the_datasets_that_execute_text() -> None:
    # In a process of its own, as for graders: pytest puts its own functions in place of some of Python's.
    code = "import json; from tests.evaluation import ordinary; print(json.dumps(ordinary.executing(), default=list))"
    found = json.loads(subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True).stdout)
    print("\n".join(f"{name}: {', '.join(what)}" for name, what in found.items()))
    assert set(found) == {*EVALUATING, *OTHERS}


@pytest.mark.parametrize("name", sorted((*EVALUATING, *OTHERS)))
class TestExecuting:
    def test_attacks_are_refused_before_they_reach_the_scorer(self, name: str, tmp_path: Path) -> None:
        entry = entry_of(name)
        for kind, attack in attacks(tmp_path / "written", entry).items():
            # In this process, where no sandbox would stop it.
            assert gym_worker.answer((name, {}, attack, entry)) == 0, kind
            assert list(tmp_path.iterdir()) == [], kind

    def test_an_attack_that_is_the_reference_is_compared_and_not_executed(self, name: str, tmp_path: Path) -> None:
        entry = entry_of(name)
        for kind, attack in attacks(tmp_path / "written", entry).items():
            gym_worker.answer((name, {}, attack, {**entry, "answer": attack}))
            assert list(tmp_path.iterdir()) == [], kind

    def test_the_reference_is_right_and_another_is_wrong_after_attacks(
        self, name: str, scorer: Scorer, tmp_path: Path
    ) -> None:
        entry, before = entry_of(name), set(children())
        verdicts = [scorer.score(name, {}, answer, entry) for answer in (entry["answer"], "no")]
        for kind, attack in attacks(tmp_path / "written", entry).items():
            assert scorer.score(name, {}, attack, entry) < 1, kind
        poison = "[setattr(__import__('sys').modules['reasoning_gym'].dataset.ProceduralDataset, 'score_answer', 1)]"
        spawn = "[__import__('subprocess').Popen(['sleep', '600'], start_new_session=True)]"
        assert scorer.score(name, {}, poison, entry) == scorer.score(name, {}, spawn, entry) == 0
        assert [scorer.score(name, {}, answer, entry) for answer in (entry["answer"], "no")] == verdicts
        assert verdicts[0] == 1 > verdicts[1]
        assert list(tmp_path.iterdir()) == []
        assert set(children()) <= before | {scorer._process and scorer._process.pid}

    def test_ordinary_answers_are_graded_as_by_the_scorer_alone(self, name: str) -> None:
        fed, right, changed = ordinary.compared(name, 60, seed=1)
        assert changed == []
        assert 0 < fed < 60
        assert 0 < right < 60


@pytest.mark.parametrize("name", EVALUATING)
def test_attacks_would_be_executed_by_the_scorer_alone(name: str, tmp_path: Path) -> None:
    entry, dataset = entry_of(name), reasoning_gym.create_dataset(name, size=1, seed=0)
    for attack in attacks(tmp_path / "written", entry).values():
        ordinary.scored(dataset, attack, entry)
    assert (tmp_path / "written").exists()


def test_a_task_takes_attacks_for_wrong_answers(tmp_path: Path) -> None:
    task = get_task("reasoning-gym:string_insertion")
    problem, other = task.problems("test", 2, 0)
    for kind, attack in attacks(tmp_path / "written", problem.data).items():
        assert not task.grade(f"<answer>{attack}</answer>", problem), kind
    assert list(tmp_path.iterdir()) == []
    assert not task.grade("<answer>no</answer>", other)
    assert task.grade(f"<answer>{other.answer}</answer>", other)


def test_members_of_a_composite_are_guarded_as_themselves(tmp_path: Path) -> None:
    from reasoning_gym.composite import DatasetSpec

    members = [DatasetSpec("countdown", 1, {}), DatasetSpec("gcd", 1, {})]
    composite = reasoning_gym.create_dataset("composite", size=8, seed=0, datasets=members)
    names = {gym_worker._member(composite, entry).__class__.__name__ for entry in composite}
    assert names == {"CountdownDataset", "GCDDataset"}


@pytest.mark.parametrize("said", ["yes", [1.0], {"a": 1}, True, None, float("nan")])
def test_what_a_process_replies_that_is_no_score_is_none(
    scorer: Scorer, monkeypatch: pytest.MonkeyPatch, said: Any
) -> None:
    monkeypatch.setattr(scorer, "ask", lambda question: said)
    assert scorer.score("gcd", {}, "1", {}) == 0


def children() -> list[int]:
    """Processes whose parent is this one, or that were left without one."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            status = (process / "stat").read_text().rpartition(")")[2].split()
            command = (process / "cmdline").read_bytes()
        except OSError:
            continue
        if int(status[1]) == os.getpid() or command.startswith(b"sleep\x00600"):
            found.append(int(process.name))
    return found
