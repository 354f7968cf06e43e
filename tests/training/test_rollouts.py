from __future__ import annotations

import errno
import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from swift_kernels.training.rollouts import Response, Rollout, RolloutError, RolloutWriter, read, tokenized

HEADER = {"model": {"name": "tiny"}, "task": "sums", "sampling": {"n": 2, "stop": ("\n",)}}


def item(identity: str) -> Rollout:
    answers = [Response([5, 6, 1], "ab", True, True, "17"), Response([7], "é…", False, False, None)]
    return Rollout(identity, f"key {identity}", "What?", "17", [3, 4], answers)


def write(path: Path, *identities: str, header: dict[str, Any] = HEADER) -> set[str]:
    with RolloutWriter(path, header) as writer:
        before = set(writer.done)
        for identity in identities:
            writer.write(item(identity))
    return before


def test_round_trip(tmp_path: Path) -> None:
    write(tmp_path / "deep" / "r.jsonl", "a", "b")
    content = read(tmp_path / "deep" / "r.jsonl")
    assert content.rollouts == [item("a"), item("b")]
    assert (content.task, content.notes) == ("sums", [])
    assert content.header["model"] == HEADER["model"]


def test_continues_after_the_last_whole_line(tmp_path: Path) -> None:
    path, whole = tmp_path / "r.jsonl", tmp_path / "whole.jsonl"
    write(whole, "a", "b", "c")
    write(path, "a", "b")
    path.write_bytes(path.read_bytes()[:-20])
    torn = read(path)
    assert [rollout.id for rollout in torn.rollouts] == ["a"]
    assert "the last line is torn" in torn.notes[0]
    assert write(path, "b", "c") == {"a"}
    assert path.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("kept", [0, 5], ids=["empty", "torn-header"])
def test_a_file_without_a_whole_line_is_begun_anew(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "r.jsonl"
    write(path, "a")
    whole = path.read_bytes()
    path.write_bytes(whole[:kept])
    assert write(path, "a") == set()
    assert path.read_bytes() == whole


def test_every_cut_is_continued_to_the_same_file(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    write(path, "a", "b")
    whole = path.read_bytes()
    for cut in range(0, len(whole), 7):
        path.write_bytes(whole[:cut])
        with RolloutWriter(path, HEADER) as writer:
            for identity in ("a", "b"):
                if identity not in writer.done:
                    writer.write(item(identity))
        assert path.read_bytes() == whole


HEADER_LINE = json.dumps({"format": "swift_kernels.rollouts", "version": 1, **HEADER}, separators=(",", ":"))
NOT_OURS = {
    "one line of JSON": json.dumps({"three": "years of work"}),
    "a note": "call home",
    "binary": "\0\1\2",
    "a space": " ",
    "an array": "[1, 2]",
    "indented": json.dumps({"format": "swift_kernels.rollouts"})[:20],
    "more than a header": HEADER_LINE + json.dumps(asdict(item("a"))),
    "a whole header of other settings": HEADER_LINE.replace("sums", "other"),
}


@pytest.mark.parametrize("content", NOT_OURS.values(), ids=NOT_OURS)
def test_a_file_of_something_else_is_left_alone(tmp_path: Path, content: str) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(content)
    with pytest.raises(RolloutError, match=r"r\.jsonl holds [\d,]+ bytes of something else: expected .* --output"):
        RolloutWriter(path, HEADER)
    assert path.read_text() == content


def test_a_torn_header_of_other_settings_is_begun_anew(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text(HEADER_LINE.replace("sums", "other")[:-5])
    write(tmp_path / "r.jsonl", "a")
    assert read(tmp_path / "r.jsonl").task == "sums"


def test_halves_of_characters_are_written_as_what_stands_for_them(tmp_path: Path) -> None:
    rollout = item("a")
    odd = replace(rollout, candidates=[replace(rollout.candidates[0], text="a\ud800b", answer="\udfff")])
    with RolloutWriter(tmp_path / "r.jsonl", HEADER) as writer:
        writer.write(odd)
    [candidate] = read(tmp_path / "r.jsonl").rollouts[0].candidates
    assert (candidate.text, candidate.answer) == ("a\ufffdb", "\ufffd")


def test_other_settings_are_refused_and_nothing_changes(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    write(path, "a")
    before = path.read_bytes()
    with pytest.raises(RolloutError, match=r'other settings: task is "sums" there and "other" here'):
        RolloutWriter(path, {**HEADER, "task": "other"})
    with pytest.raises(RolloutError, match="other settings: model is tiny there and big here"):
        RolloutWriter(path, {**HEADER, "model": {"name": "big"}})
    with pytest.raises(RolloutError, match=r"other settings: sampling\.n is 2 there and 3 here"):
        RolloutWriter(path, {**HEADER, "sampling": {"n": 3, "stop": ["\n"]}})
    assert path.read_bytes() == before


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=repr)
def test_a_line_that_cannot_be_written_leaves_no_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    path = tmp_path / "r.jsonl"
    write(path, "a")
    before = path.read_bytes()
    writer = RolloutWriter(path, HEADER)
    genuine, calls = os.write, []

    def half_then_fail(descriptor: int, data: bytes) -> int:
        calls.append(data)
        if len(calls) > 1:
            raise error
        return genuine(descriptor, data[: len(data) // 2])

    monkeypatch.setattr(os, "write", half_then_fail)
    with pytest.raises(type(error)):
        writer.write(item("b"))
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert writer.done == {"a"}
    writer.write(item("b"))
    writer.close()
    assert [rollout.id for rollout in read(path).rollouts] == ["a", "b"]


def confident(**changes: Any) -> str:
    """A line whose first answer, of three tokens, has confidences."""
    confidence = {"logprobs": [-0.1] * 3, "entropies": [0.1] * 3, "self_certainties": [0.1] * 3, **changes}
    return broken(candidates=[{**asdict(item("b").candidates[0]), "confidence": confidence}])


def broken(**changes: Any) -> str:
    return json.dumps({**asdict(item("b")), **changes})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[]", "a list: expected an object"),
        ('{"id": "b"}', "no 'candidates'"),
        (broken(candidates=[]), "candidates is empty"),
        (broken(candidates="none"), "candidates is a str"),
        (broken(prompt=3), "prompt is a int"),
        (broken(prompt_token_ids=[1.5]), "prompt_token_ids is not a list of token ids"),
        (broken(candidates=[{**asdict(item("b").candidates[0]), "correct": "yes"}]), "correct is a str: expected bool"),
        (broken(candidates=[{**asdict(item("b").candidates[0]), "token_ids": [-1]}]), "token_ids is not a list"),
        (broken(candidates=["yes"]), "a candidate is a str: expected dict"),
        (confident(logprobs=[0.1, 0.2]), "confidence: logprobs has 2 numbers for 3 token ids: expected one each"),
        (confident(entropies=[0.1] * 4), "confidence: entropies has 4 numbers for 3 token ids"),
        (confident(logprobs=[0.1, "high", 0.2]), "confidence: logprobs is not a list of numbers"),
        (confident(logprobs=[0.1, True, 0.2]), "confidence: logprobs is not a list of numbers"),
        (confident(logprobs=[0.1, float("nan"), 0.2]), "confidence: logprobs is not a list of numbers"),
        (confident(entropies=0.1), "confidence: entropies is not a list of numbers"),
        (broken(candidates=[{**asdict(item("b").candidates[0]), "confidence": {"logprobs": []}}]), "no 'entropies'"),
        (broken(id="a"), "problem 'a' is in the file twice"),
        (broken(prompt="\ud800"), r"it holds \\ud800, half a character"),
        (broken(prompt_token_ids=[2**64]), "prompt_token_ids is not a list of token ids"),
        (confident(entropies=[10**400] * 3), "confidence: entropies is not a list of numbers"),
        (broken(answer=1)[:-1] + ', "x": ' + "9" * 5000 + "}", "not JSON .Exceeds the limit"),
        ("[" * 100_000, "not JSON"),
    ],
    ids=[
        "json", "list", "missing", "empty", "text", "prompt", "prompt-ids", "label", "ids", "candidate", "short",
        "long", "words", "booleans", "nan", "number", "no-list", "twice", "half", "large-id", "large", "digits", "deep",
    ],
)  # fmt: skip
def test_bad_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "r.jsonl"
    write(path, "a")
    with path.open("a") as file:
        file.write(line + "\n" + broken(id="c") + "\n")
    with pytest.raises(ValueError, match=message) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}:3: ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"problem": "x"}\n', "no rollout header"),
        (b'{"format": "swift_kernels.rollouts", "version": 99}\n', "format version 99"),
        (b"", "has no whole line"),
        (b"\x93NUMPY\n", "not UTF-8"),
        (b"[]", "holds no problems"),
        (b"[1, 2", "is not JSON"),
        (b'[{"prompt": "x"}]', "entry 0 is not as the authors' code writes it"),
    ],
    ids=["other-jsonl", "version", "empty", "binary", "no-entries", "truncated", "odd-entry"],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "r"
    path.write_bytes(content)
    with pytest.raises(RolloutError, match=message):
        read(path)
    with pytest.raises(RolloutError, match="does not exist"):
        read(tmp_path / "nowhere")


UPSTREAM_TRAIN = [
    {
        "prompt": "What is 1+1?",
        "reference": "2",
        "dataset": "MATH",
        "completions": ["It is 2.", "It is 3."],
        "correctness": [True, False],
        "steps": [["It is 2."], ["It is 3."]],
    }
]
UPSTREAM_TEST = [
    {
        "task": "math",
        "idx": index // 2,
        "prompt": f"What is {index // 2}+1?",
        "response": f"It is {index}.",
        "steps": [f"It is {index}."],
        "extracted_output": str(index) if index else None,
        "reference": "2",
        "correctness": index == 2,
    }
    for index in range(4)
]


def test_reads_upstream_train_files(tmp_path: Path) -> None:
    path = tmp_path / "train_math.json"
    path.write_text(json.dumps(UPSTREAM_TRAIN, indent=2))
    content = read(path)
    assert len(content.rollouts) == 1
    assert [(c.text, c.correct, c.token_ids) for c in content.rollouts[0].candidates] == [
        ("It is 2.", True, None),
        ("It is 3.", False, None),
    ]
    assert "tokenised anew" in content.notes[0]


def test_reads_upstream_test_files(tmp_path: Path) -> None:
    path = tmp_path / "test_math.json"
    path.write_text(json.dumps(UPSTREAM_TEST))
    content = read(path)
    assert [rollout.id for rollout in content.rollouts] == ["0", "1"]
    assert [[c.answer for c in rollout.candidates] for rollout in content.rollouts] == [[None, "1"], ["2", "3"]]
    assert [[c.correct for c in rollout.candidates] for rollout in content.rollouts] == [[False] * 2, [True, False]]


def test_text_is_tokenised_with_the_end_of_sequence_of_finished_answers(tokenizer: Any) -> None:
    cut = Response(None, "It", False, False, None)
    whole = Response(None, "It", True, True, None)
    rollout = Rollout("0", "k", "What?", "2", None, [cut, whole])
    kept = replace(rollout, prompt_token_ids=[3], candidates=[replace(cut, token_ids=[9])])
    made, same = tokenized([rollout, kept], tokenizer)
    letters = tokenizer("It", add_special_tokens=False)["input_ids"]
    assert made.prompt_token_ids == tokenizer("What?")["input_ids"]
    assert [candidate.token_ids for candidate in made.candidates] == [letters, [*letters, tokenizer.eos_token_id]]
    assert same == kept
