"""Files that were damaged, or made to do harm: an error that names the file, or what was there, and nothing else."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from swift_kernels.cli.scoring import read_answers
from swift_kernels.evaluation.rewards import ProblemRewards, RewardWriter, read_rewards
from swift_kernels.evaluation.tasks import JsonlTask
from swift_kernels.training.rollouts import Confidence, Response, Rollout, RolloutWriter, read
from swift_kernels.training.sketch import random_sketch
from swift_kernels.training.store import HEADER_NAME, Layout, ShardProblem, Store, StoreError, StoreWriter, digest
from swift_kernels.training.stored import check_same_answers, make_head, score_stored
from tests import mutations
from tests.training.test_one_job import without_settings

WIDTHS = (6, 5, 7)


def problem(number: int) -> Rollout:
    ids = [[number + 2, 50 + answer, *[60 + answer] * answer] for answer in range(3)]
    candidates = [
        Response(own, f"é {number}", True, place % 2 == 1, "1", Confidence(*[[0.5] * len(own)] * 3))
        for place, own in enumerate([*ids, ids[0]])
    ]
    return Rollout(f"p{number}", f"key {number}", f"What is {number}?", "1", [2, 3], candidates)


ROLLOUTS = [problem(number) for number in range(4)]
MODEL = {"name": "m", "values": [0.5, 0.25]}
HEADER = {"task": "sums", "split": "train", "chat": False, "model": MODEL, "sampling": {"n": 4}}


def write_rollouts(path: Path) -> None:
    with RolloutWriter(path, HEADER) as writer:
        for rollout in ROLLOUTS:
            writer.write(rollout)


def write_store(folder: Path, sketched: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    sketch = {"method": "random", "dimensions": 4} if sketched else None
    layout = Layout(("hidden_states", "logits"), WIDTHS, (0, 2), 2, dtype="float32", sketch=sketch)
    projections = random_sketch(WIDTHS, 4) if sketched else None
    writer = StoreWriter(folder, layout, MODEL, projections, {"task": "sums"})
    for place in range(0, len(ROLLOUTS), 2):
        problems, responses = [], []
        for rollout in ROLLOUTS[place : place + 2]:
            ids = [candidate.token_ids or [] for candidate in rollout.candidates]
            problems.append(ShardProblem(rollout.id, [0, 1, 2, 0], digest(ids)))
            responses += [torch.randn(len(own) - 1, sum(layout.stored_widths), generator=generator) for own in ids[:3]]
        writer.write(f"{place:05}", problems, responses)


def scores_of(folder: Path, rollouts: Path) -> list[list[float]]:
    """As a head made from the store scores its answers, by layers and by logits."""
    store = Store(folder)
    check_same_answers(store, read(rollouts))
    torch.manual_seed(0)
    heads = [make_head(store, layers).requires_grad_(False) for layers in ("all", [2], "logits")]
    for head in heads:
        torch.nn.init.normal_(head.weight)
    return [[store.layout.span], *(score for head in heads for score in score_stored(store, head, ROLLOUTS))]


def damaged(files: dict[str, bytes], chance: random.Random) -> dict[str, bytes]:
    """The files of a store with one of them changed, lost, there twice or in another's place."""
    name = chance.choice(sorted(files))
    changed = dict(files)
    kind = chance.randrange(8)
    if kind == 0:
        del changed[name]
    elif kind == 1:
        other = chance.choice(sorted(files))
        changed[name], changed[other] = changed[other], changed[name]
    elif kind == 2:
        changed[f"00009{Path(name).suffix}"] = changed[name]
    elif name.endswith(".json") and kind > 3:
        changed[name] = mutations.of_json(changed[name], chance)
    else:
        changed[name] = mutations.of_bytes(changed[name], chance)
    return changed


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("sketched", [False, True], ids=["whole", "sketched"])
def test_a_damaged_store_is_named_or_scores_the_same(tmp_path: Path, sketched: bool, version: int) -> None:
    """Version 2 has no checksums of what it says of itself: it may be read otherwise, but nothing else may happen."""
    rollouts, folder = tmp_path / "r.jsonl", tmp_path / "store"
    write_rollouts(rollouts)
    write_store(folder, sketched)
    if version == 2:
        without_settings(folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    expected = scores_of(folder, rollouts)
    chance = random.Random(0)
    refused = 0
    for number in range(400):
        changed = damaged(files, chance)
        place = tmp_path / str(number)
        place.mkdir()
        for name, content in changed.items():
            (place / name).write_bytes(content)
        found, message = None, ""
        try:
            found = scores_of(place, rollouts)
        except StoreError as error:
            message = str(error)
            refused += 1
        assert version == 2 or found in (None, expected), f"mutation {number}"
        assert found is not None or str(place) in message
    assert refused > 200


def test_values_that_are_not_as_the_layout_says_are_refused(tmp_path: Path) -> None:
    write_store(tmp_path, sketched=False)
    without_settings(tmp_path)
    header = json.loads((tmp_path / HEADER_NAME).read_text())
    header["layout"]["widths"] = [5, 6, 8]
    (tmp_path / HEADER_NAME).write_text(json.dumps(header))
    with pytest.raises(
        StoreError, match=r"00000\.safetensors holds torch.float32 values of shape \[\d+, 18\]: expected"
    ):
        Store(tmp_path)


def read_rollouts(path: Path) -> Any:
    return [(rollout.id, rollout) for rollout in read(path).rollouts]


def again(path: Path) -> None:
    """What was read can be written, and is read again as it was."""
    content = read(path)
    other = path.with_suffix(".again")
    other.unlink(missing_ok=True)
    with RolloutWriter(other, {key: value for key, value in content.header.items() if key != "version"}) as writer:
        for rollout in content.rollouts:
            writer.write(rollout)
    assert repr(read(other).rollouts) == repr(content.rollouts)


def upstream(path: Path) -> None:
    rows = [
        {"prompt": "What is 1+1?", "reference": "2", "completions": ["2", "3"], "correctness": [True, False]},
        {"prompt": "What?", "reference": 2, "idx": 7, "response": "It", "extracted_output": None, "correctness": True},
    ]
    path.write_text(json.dumps(rows))


def write_rewards(path: Path) -> None:
    header = {"reward_model": {"name": "rm", "parameters": 7}, "device": "cpu", "rollouts": HEADER}
    with RewardWriter(path, header, ROLLOUTS) as writer:
        for rollout in ROLLOUTS:
            writer.write(rollout, ProblemRewards([0.5, 1.0, 2.0, 0.5], 3, 0, 10, 0.5, 1000))


def write_problems(path: Path) -> None:
    rows = [{"id": number, "problem": f"{number}+1?", "answer": number + 1, "more": [1.5, None]} for number in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_problems(path: Path) -> None:
    for made in JsonlTask(str(path)).problems("all", None):
        assert f"{made.question}{made.answer}{made.id}".encode()


def write_answers(path: Path) -> None:
    rows = [{"prompt": "1+1?", "responses": ["2", "3"]}, {"prompt": [1, 2], "response": [3], "finished": False}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


READERS: dict[str, tuple[Callable[[Path], None], Callable[[Path], Any], Any]] = {
    "rollouts": (write_rollouts, again, mutations.of_lines),
    "rollouts of the authors": (upstream, again, mutations.of_json),
    "rewards": (write_rewards, lambda path: read_rewards(path, ROLLOUTS), mutations.of_lines),
    "problems": (write_problems, read_problems, mutations.of_lines),
    "answers": (write_answers, read_answers, mutations.of_lines),
}


@pytest.mark.parametrize(("write", "use", "change"), READERS.values(), ids=READERS)
def test_damaged_lines_are_named_or_read(tmp_path: Path, write: Any, use: Any, change: Any) -> None:
    path = tmp_path / "file.jsonl"
    write(path)
    whole = path.read_bytes()
    use(path)
    chance = random.Random(1)
    refused = 0
    for number in range(400):
        path.write_bytes(change(whole, chance))
        message = str(path)
        try:
            use(path)
        except ValueError as error:
            message = str(error)
            refused += 1
        assert message.startswith(str(path)), f"mutation {number}"
    assert refused > 80
