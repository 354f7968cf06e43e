from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from swift_kernels.evaluation.rewards import (
    ProblemRewards,
    RewardCost,
    RewardFileError,
    Rewards,
    RewardWriter,
    read_rewards,
)
from swift_kernels.training.rollouts import Response, Rollout

NAN = math.nan

HEADER = {
    "reward_model": {"name": "org/rm", "architecture": "X", "parameters": 7},
    "label": 0,
    "weights": "abc",
    "device": "cpu",
    "rollouts": {"task": "sums", "sampling": {"n": 3}},
}


def problem(identity: str, answers: int = 3) -> Rollout:
    texts = [f"answer {index} to {identity}" for index in range(answers)]
    return Rollout(identity, identity, "What?", "17", None, [Response(None, t, True, False, None) for t in texts])


ROLLOUTS = [problem("a"), problem("b", 2), problem("12")]


def found(*rewards: float, too_long: int = 0) -> ProblemRewards:
    return ProblemRewards(list(rewards), answers=2, too_long=too_long, tokens=10, seconds=0.5, flops=1000)


FOUND = {"a": found(1.5, NAN, -2.0, too_long=1), "b": found(math.inf, 0.25), "12": found(0.0, 1.0, 2.0)}


def write(path: Path, *identities: str, header: dict[str, Any] = HEADER, rollouts: Any = ROLLOUTS) -> set[str]:
    with RewardWriter(path, header, rollouts) as writer:
        before = set(writer.done)
        for rollout in rollouts:
            if rollout.id in identities and rollout.id not in before:
                writer.write(rollout, FOUND[rollout.id])
    return before


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def line(identity: Any, values: Any, **more: Any) -> dict[str, Any]:
    return {"id": identity, "rewards": values, **more}


def assert_values(rewards: Rewards, expected: list[list[float]]) -> None:
    assert len(rewards.values) == len(expected)
    for row, values in zip(rewards.values, expected, strict=True):
        assert row == pytest.approx(values, nan_ok=True)


class TestReading:
    def test_what_was_written(self, tmp_path: Path) -> None:
        path = tmp_path / "deep" / "r.jsonl"
        write(path, "a", "b", "12")
        rewards = read_rewards(path, ROLLOUTS)
        assert rewards.name == "org/rm"
        # What is not finite is no number in JSON, and no reward.
        assert_values(rewards, [[1.5, NAN, -2.0], [NAN, 0.25], [0.0, 1.0, 2.0]])
        assert rewards.cost == RewardCost(parameters=7, seconds=1.5, tokens=30, flops=3000, device="cpu", answers=6)
        assert rewards.notes == [
            f"{path}: 2 of 8 answers have no reward, 1 of them as they are too long for the reward model, and are "
            "never picked by it"
        ]

    def test_the_cost_is_that_of_the_problems_asked_for(self, tmp_path: Path) -> None:
        path = tmp_path / "r.jsonl"
        write(path, "a", "b", "12")
        cost = read_rewards(path, ROLLOUTS[1:]).cost
        assert cost == RewardCost(parameters=7, seconds=1.0, tokens=20, flops=2000, device="cpu", answers=4)

    def test_lines_of_others_in_any_order(self, tmp_path: Path) -> None:
        path = lines(
            tmp_path / "mine.jsonl", line(12, [1, 2, -math.inf]), "", line("b", [0.5, None]), line("a", [NAN] * 3)
        )
        rewards = read_rewards(path, ROLLOUTS)
        assert (rewards.name, rewards.cost) == ("mine", None)
        assert_values(rewards, [[NAN] * 3, [0.5, NAN], [1, 2, -math.inf]])
        assert rewards.notes == [f"{path}: 4 of 8 answers have no reward and are never picked by it"]

    def test_another_column(self, tmp_path: Path) -> None:
        path = lines(tmp_path / "r.jsonl", {"id": "b", "helpful": [1, 2], "rewards": "none"})
        assert read_rewards(path, ROLLOUTS[1:2], "helpful").values == [[1, 2]]

    def test_other_and_missing_problems_are_noted(self, tmp_path: Path) -> None:
        path = lines(tmp_path / "r.jsonl", line("x", [1]), line("b", [1, 2]), line("y", "whatever"))
        rewards = read_rewards(path, ROLLOUTS)
        assert_values(rewards, [[NAN] * 3, [1, 2], [NAN] * 3])
        assert rewards.notes == [
            f"{path}: 2 of 3 lines are of problems that are not in the rollouts, such as 'x', and were left out",
            f"{path}: 2 of 3 problems have no rewards, such as 'a'",
        ]

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            (line("a", [1, 2]), "2 numbers in 'rewards', but problem 'a' has 3 candidates: expected one each"),
            (line("a", [1, "2", 3]), r"rewards\[1\] is '2': expected a number, or null"),
            (line("a", [1, 2, True]), r"rewards\[2\] is True: expected a number"),
            (line("a", 0.5), "rewards is 0.5: expected a list of numbers"),
            ({"id": "a", "scores": [1, 2, 3]}, r"no 'rewards': the object has \['id', 'scores'\]"),
            ({"rewards": [1, 2, 3]}, "id is None: expected the id of a problem"),
            (line(True, [1, 2, 3]), "id is True"),
            (line("b", [3, 4]), r"problem 'b' is in .*r\.jsonl:1 already"),
            (line("a", [1, 2, 3], digest="0" * 16), "these are rewards of other answers to problem 'a'"),
            ("{", "not JSON"),
            ("[1]", "a list: expected an object"),
        ],
        ids=[
            "length", "text", "boolean", "no-list", "no-column", "no-id", "boolean-id", "twice", "other-answers",
            "torn", "list",
        ],
    )  # fmt: skip
    def test_bad_lines_are_named(self, tmp_path: Path, row: Any, message: str) -> None:
        path = lines(tmp_path / "r.jsonl", line("b", [1, 2]), row)
        with pytest.raises(ValueError, match=message) as caught:
            read_rewards(path, ROLLOUTS)
        assert str(caught.value).startswith(f"{path}:2: ")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                {"format": "swift_kernels.rollouts"},
                "1: format 'swift_kernels.rollouts': expected 'swift_kernels.rewards'",
            ),
            ({"version": 2}, "1: format version 2: this version reads 1"),
            ({"reward_model": None}, "1: the header is damaged"),
            ({"device": 3}, "1: the header is damaged"),
        ],
        ids=["format", "version", "model", "device"],
    )
    def test_other_headers_are_refused(self, tmp_path: Path, change: dict[str, Any], message: str) -> None:
        write(tmp_path / "r.jsonl", "a")
        header, row = map(json.loads, (tmp_path / "r.jsonl").read_text().splitlines())
        path = lines(tmp_path / "r.jsonl", {**header, **change}, row)
        with pytest.raises(RewardFileError, match=message):
            read_rewards(path, ROLLOUTS)

    @pytest.mark.parametrize("value", [None, "1", -1, True, 1.5], ids=str)
    def test_a_damaged_cost_is_refused(self, tmp_path: Path, value: Any) -> None:
        write(tmp_path / "r.jsonl", "a")
        header, row = map(json.loads, (tmp_path / "r.jsonl").read_text().splitlines())
        path = lines(tmp_path / "r.jsonl", header, {**row, "flops": value})
        with pytest.raises(RewardFileError, match=f"2: flops is {value!r}: expected a number"):
            read_rewards(path, ROLLOUTS)

    @pytest.mark.parametrize("rows", [[], [line("x", [1, 2, 3])]], ids=["empty", "others"])
    def test_none_of_the_problems(self, tmp_path: Path, rows: list[Any]) -> None:
        with pytest.raises(
            RewardFileError, match=f"none of its {len(rows)} problems is in the rollouts, whose first is 'a'"
        ):
            read_rewards(lines(tmp_path / "r.jsonl", *rows), ROLLOUTS)

    def test_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(RewardFileError, match="does not exist: expected a file written by `swift-kernels reward`"):
            read_rewards(tmp_path / "r.jsonl", ROLLOUTS)


class TestWriting:
    @pytest.mark.parametrize("content", ['{"three": "years of work"}', "a note", "\0", "[1]"])
    def test_a_file_of_something_else_is_left_alone(self, tmp_path: Path, content: str) -> None:
        path = tmp_path / "r.jsonl"
        path.write_text(content)
        with pytest.raises(RewardFileError, match="bytes of something else: expected a file of `swift-kernels reward`"):
            RewardWriter(path, HEADER, ROLLOUTS)
        assert path.read_text() == content

    def test_every_cut_is_continued_to_the_same_file(self, tmp_path: Path) -> None:
        path = tmp_path / "r.jsonl"
        write(path, "a", "b", "12")
        whole = path.read_bytes()
        done = set()
        for cut in range(0, len(whole), 7):
            path.write_bytes(whole[:cut])
            done.add(frozenset(write(path, "a", "b", "12")))
            assert path.read_bytes() == whole
        assert done == {frozenset(), frozenset("a"), frozenset("ab")}

    def test_more_problems_go_on(self, tmp_path: Path) -> None:
        path = tmp_path / "r.jsonl"
        write(path, "a", rollouts=ROLLOUTS[:1])
        assert write(path, "a", "b", "12") == {"a"}
        assert len(read_rewards(path, ROLLOUTS).values) == 3

    @pytest.mark.parametrize(
        ("header", "rollouts", "message"),
        [
            ({**HEADER, "label": 1}, ROLLOUTS, "made with other settings: label is 0 there and 1 here"),
            ({**HEADER, "reward_model": {"name": "other"}}, ROLLOUTS, "reward_model is org/rm there and other here"),
            ({**HEADER, "weights": "def"}, ROLLOUTS, 'weights is "abc" there and "def" here'),
            ({**HEADER, "rollouts": {"task": "gcd"}}, ROLLOUTS, r'rollouts\.task is "sums" there and "gcd" here'),
            (HEADER, ROLLOUTS[1:], "2: problem 'a' is not in these rollouts"),
            (HEADER, [replace(ROLLOUTS[0], prompt="Why?")], "2: these are rewards of other answers to problem 'a'"),
            (HEADER, [problem("a", 4)], "2: 3 numbers in 'rewards', but problem 'a' has 4 candidates"),
        ],
        ids=["label", "model", "weights", "sampling", "problems", "prompt", "candidates"],
    )
    def test_other_settings_are_refused_and_nothing_changes(
        self, tmp_path: Path, header: dict[str, Any], rollouts: list[Rollout], message: str
    ) -> None:
        path = tmp_path / "r.jsonl"
        write(path, "a")
        before = path.read_bytes()
        with pytest.raises(RewardFileError, match=message):
            RewardWriter(path, header, rollouts)
        assert path.read_bytes() == before

    @pytest.mark.parametrize(
        ("content", "message"),
        [(b'{"id": "a"}\n', "1: format None: expected"), (b"\x93NUMPY\n", "1: not UTF-8"), (b"[]\n", "1: a list")],
        ids=["other-jsonl", "binary", "list"],
    )
    def test_other_files_are_not_overwritten(self, tmp_path: Path, content: bytes, message: str) -> None:
        path = tmp_path / "r"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            RewardWriter(path, HEADER, ROLLOUTS)
        assert path.read_bytes() == content
