"""`swift-kernels best-of`, `score` and `demo`: picking among new answers, scoring old ones, and showing both."""

from __future__ import annotations

import errno
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("typer")

from swift_kernels import files
from tests.commands import assert_refused, run


class TestBestOf:
    def test_prints_the_best_and_all(
        self, capsys: pytest.CaptureFixture[str], model_folder: Path, head_folder: Path
    ) -> None:
        args = ["best-of", "--model", model_folder, "--head", head_folder, "--prompt", "What is 3 + 4?", "--n", "5"]
        args += ["--task", "sums", "--seed", "1"]
        code, out, _ = run(capsys, *args, "--json")
        facts = json.loads(out)
        assert code == 0
        assert len(facts["candidates"]) == 5
        scores = [candidate["score"] for candidate in facts["candidates"]]
        assert facts["score"] == max(score for score in scores if score is not None)
        code, out, _ = run(capsys, *args)
        assert code == 0
        assert "score" in out

    def test_reads_the_prompt_from_stdin(
        self,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
        model_folder: Path,
        head_folder: Path,
    ) -> None:
        import io

        monkeypatch.setattr(sys, "stdin", io.StringIO("Once upon"))
        args = ["--model", model_folder, "--head", head_folder, "--prompt", "-", "--n", "2", "--max-new-tokens", "4"]
        assert run(capsys, "best-of", *args)[0] == 0


ANSWERS = [
    {"prompt": "1+1=", "response": "2", "note": "kept"},
    {"prompt": "1+1=", "responses": ["2", "3.", [20, 21, 22]]},
    {"prompt": [5, 6], "response": [7, 8], "finished": False},
    {"prompt": "1+1=", "response": ""},
]


class TestScore:
    @pytest.fixture
    def answers(self, tmp_path: Path) -> Path:
        path = tmp_path / "answers.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in ANSWERS))
        return path

    @pytest.fixture
    def args(self, answers: Path, model_folder: Path, head_folder: Path) -> list[Any]:
        return ["score", answers, "--model", model_folder, "--head", head_folder]

    def test_gives_the_lines_back_with_scores(self, capsys: pytest.CaptureFixture[str], args: list[Any]) -> None:
        code, out, _ = run(capsys, *args)
        rows = [json.loads(line) for line in out.splitlines()]
        assert code == 0
        assert [{key: row[key] for key in given} for row, given in zip(rows, ANSWERS, strict=True)] == ANSWERS
        assert [list(row)[-1] for row in rows] == ["score", "scores", "score", "score"]
        assert rows[0]["score"] == pytest.approx(rows[1]["scores"][0], abs=1e-5)
        # Nothing was fed of an empty answer.
        assert rows[3]["score"] is None

    def test_writes_a_file(self, capsys: pytest.CaptureFixture[str], args: list[Any], tmp_path: Path) -> None:
        code, out, _ = run(capsys, *args, "--output", tmp_path / "scored.jsonl", "--json")
        assert code == 0
        assert json.loads(out)["lines"] == 4
        assert len((tmp_path / "scored.jsonl").read_text().splitlines()) == 4

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("{", "not JSON"),
            ('{"response": "2"}', "no 'prompt'"),
            ('{"prompt": "", "response": "2"}', "no 'prompt'"),
            ('{"prompt": "a"}', "expected either 'response' or 'responses'"),
            ('{"prompt": "a", "response": "b", "responses": ["c"]}', "expected either 'response' or 'responses'"),
            ('{"prompt": "a", "responses": "b"}', "responses is not text or token ids"),
            ('{"prompt": "a", "response": 4}', "response is not text or token ids"),
            ('{"prompt": "a", "response": "b", "finished": "yes"}', "finished is not true or false"),
        ],
        ids=["json", "no-prompt", "empty-prompt", "neither", "both", "one", "number", "finished"],
    )
    def test_bad_lines_are_named(
        self, capsys: pytest.CaptureFixture[str], args: list[Any], answers: Path, line: str, message: str
    ) -> None:
        with answers.open("a") as file:
            file.write(line + "\n")
        result = run(capsys, *args)
        assert_refused(result, f"{answers}:5: ")
        assert message in result[2]

    @pytest.mark.parametrize(
        ("error", "code", "message"),
        [
            (OSError(errno.ENOSPC, "No space left on device"), 1, "No space left on device"),
            (KeyboardInterrupt(), 130, "interrupted"),
        ],
        ids=["full-disk", "ctrl-c"],
    )
    def test_the_old_file_survives(
        self,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
        args: list[Any],
        tmp_path: Path,
        error: BaseException,
        code: int,
        message: str,
    ) -> None:
        output = tmp_path / "out" / "scored.jsonl"
        files.write_text(output, "old\n")

        def fail(descriptor: int) -> None:
            raise error

        monkeypatch.setattr(files.os, "fsync", fail)
        found, out, err = run(capsys, *args, "--output", output)
        assert (found, out) == (code, "")
        assert message in err.splitlines()[-1]
        assert [path.name for path in output.parent.iterdir()] == ["scored.jsonl"]
        assert output.read_text() == "old\n"


class TestDemo:
    def test_shows_candidates_tokens_selectors_and_costs(
        self, capsys: pytest.CaptureFixture[str], model_folder: Path, head_folder: Path
    ) -> None:
        args = ["demo", "--model", model_folder, "--head", head_folder, "--problems", "3", "--n", "4"]
        code, out, _ = run(capsys, *args)
        assert code == 0
        for part in ("picked by", "gate", "reward", "majority vote", "oracle", "sign-flip", "tokens/s", "bytes"):
            assert part in out
        assert max(map(len, out.splitlines())) <= 100
        assert "\x1b" not in out

        code, out, _ = run(capsys, *args, "--json")
        facts = json.loads(out)
        assert code == 0
        assert facts["evaluation"]["problems"] == 3
        assert facts["bytes_held_by_scoring"]["sequences"] == 12 * 12
        for candidate in facts["problem"]["candidates"]:
            weights = torch.tensor(candidate["gate_reward"]).reshape(-1, 2)
            if candidate["score"] is not None:
                pooled = (weights[:, 0] * weights[:, 1]).sum() / weights[:, 0].sum()
                assert pooled.item() == pytest.approx(candidate["score"], rel=1e-4, abs=1e-5)
