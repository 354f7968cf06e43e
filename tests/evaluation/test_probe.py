"""The probe finds what was planted, nothing where nothing was, and does not learn who is asked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")

from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from sklearn.model_selection import KFold

from swift_kernels.evaluation import probe as module
from swift_kernels.evaluation.probe import ProbeError, check_split, probe, probe_store
from swift_kernels.training.rollouts import Response, Rollout
from swift_kernels.training.store import Layout, ShardProblem, Store, StoreError, StoreWriter, digest

PROBLEMS, ANSWERS, WIDTH = 60, 6, 8


def data(seed: int = 0, problems: int = PROBLEMS) -> tuple[np.ndarray, list[str], np.random.Generator]:
    """Half of the answers to every problem are right."""
    generator = np.random.default_rng(seed)
    correct = np.tile(np.arange(ANSWERS) % 2 == 0, problems)
    return correct, [f"problem {index // ANSWERS}" for index in range(len(correct))], generator


def noise(generator: np.random.Generator, answers: int) -> np.ndarray:
    return generator.standard_normal((answers, WIDTH)).astype(np.float32)


def test_a_planted_signal_is_found_in_its_layer_alone() -> None:
    correct, keys, generator = data()
    layers = [noise(generator, len(correct)) for _ in range(3)]
    # Two deviations apart in one direction of many.
    layers[1][:, 3] += 2.0 * correct
    found = probe(enumerate(layers), correct, keys, dimensions=WIDTH)
    assert [entry.entry for entry in found] == [0, 1, 2]
    planted = found[1]
    # Two normals that are two deviations apart: AUC 0.921, accuracy 0.841; 360 answers leave some 0.02.
    assert planted.auc.mean == pytest.approx(0.921, abs=0.05)
    assert planted.within_auc.mean == pytest.approx(0.921, abs=0.05)
    assert planted.accuracy.mean == planted.balanced_accuracy.mean == pytest.approx(0.841, abs=0.06)
    assert planted.auc.low > 0.85
    for entry in (found[0], found[2]):
        assert entry.auc.low < 0.5 < entry.auc.high
        assert entry.within_auc.low < 0.5 < entry.within_auc.high


def test_shuffled_labels_leave_nothing_to_find() -> None:
    correct, keys, generator = data()
    values = noise(generator, len(correct))
    values[:, 0] += 2.0 * correct
    aucs = [probe([(0, values)], generator.permutation(correct), keys)[0].auc.mean for _ in range(5)]
    # One has a deviation of 0.031 with 360 answers, the mean of five 0.014.
    assert np.mean(aucs) == pytest.approx(0.5, abs=0.05)


def test_who_is_asked_does_not_help() -> None:
    """Each problem has features of its own and answers of one kind: to know it is to know them, and no more."""
    problems, width = 100, 60
    _, keys, generator = data(problems=problems)
    correct = np.repeat(generator.random(problems) < 0.5, ANSWERS)
    identity = np.repeat(generator.standard_normal((problems, width)), ANSWERS, axis=0)
    values = identity + 0.1 * generator.standard_normal((len(correct), width))
    ours = probe([(0, values)], correct, keys, dimensions=width)[0]
    # The problems are what varies: of 100 the AUC has a deviation of 0.058.
    assert ours.auc.mean == pytest.approx(0.5, abs=0.18)
    assert ours.auc.low < 0.5 < ours.auc.high
    plain = list(KFold(5, shuffle=True, random_state=0).split(values))
    scores, _ = module._out_of_fold(values, correct, plain, width)
    assert roc_auc_score(correct, scores) > 0.9
    for train, test in check_split(correct, keys, 5):
        assert not {keys[index] for index in train} & {keys[index] for index in test}
        assert sorted({*train, *test}) == list(range(len(keys)))


def test_figures_are_those_of_scikit_learn_and_intervals_go_by_problem() -> None:
    generator = np.random.default_rng(1)
    problem = np.sort(generator.integers(12, size=100))
    correct = generator.random(100) < 0.3 + 0.04 * problem
    # Few distinct values: ties count half.
    scores = np.round(generator.standard_normal(100) + correct, 1)
    bootstrap = module._Bootstrap(correct, problem, 12)
    accuracy, balanced, auc, _ = bootstrap.estimates(scores)
    assert accuracy.mean == pytest.approx(((scores > 0) == correct).mean())
    assert balanced.mean == pytest.approx(balanced_accuracy_score(correct, scores > 0))
    assert auc.mean == pytest.approx(roc_auc_score(correct, scores))
    # One draw by hand: problem p counts as often as it was drawn.
    drawn = bootstrap.weights[7]
    answers = np.concatenate([np.flatnonzero(problem == p) for p in range(12) for _ in range(int(drawn[p]))])
    pairs = (bootstrap.weights @ bootstrap._pairs(scores) * bootstrap.weights).sum(axis=1)[7]
    right = correct[answers].sum()
    expected = roc_auc_score(correct[answers], scores[answers])
    assert pairs / (right * (len(answers) - right)) == pytest.approx(expected)
    # Each answer nine times over is no news about problems: the same intervals, where answers would give a third.
    again = module._Bootstrap(np.repeat(correct, 9), np.repeat(problem, 9), 12).estimates(np.repeat(scores, 9))
    assert [vars(entry) for entry in again[:3]] == [pytest.approx(vars(entry)) for entry in (accuracy, balanced, auc)]


def test_entries_of_one_value_and_more_dimensions_than_there_are() -> None:
    correct, keys, _ = data(problems=10)
    flat = np.full((len(correct), 4), 7.0, dtype=np.float32)
    tall = np.zeros((len(correct), 500), dtype=np.float32)
    tall[:, 0] = correct
    constant, signal = probe([("flat", flat), ("tall", tall)], correct, keys, folds=2, dimensions=400)
    assert constant.auc.mean == constant.balanced_accuracy.mean == 0.5
    assert constant.dimensions == 4
    assert signal.auc.mean == 1.0
    # 30 answers are left to learn from, and 30 points span 29 directions.
    assert signal.dimensions == 29


CASES: dict[str, tuple[Any, int, str]] = {
    "none": ([], 5, "no answer with a scored token"),
    "all right": ([True] * 12, 2, "all 12 answers are right"),
    "all wrong": ([False] * 12, 2, "all 12 answers are wrong"),
    "few problems": ([True, False] * 6, 5, "2 problems for 5 folds"),
    "wrong answers to one problem": ([True] * 11 + [False], 2, "the wrong answers belong to 1 of 2 problems"),
    "right answers to one problem": ([True] + [False] * 11, 2, "the right answers belong to 1 of 2 problems"),
}


@pytest.mark.parametrize(("correct", "folds", "message"), CASES.values(), ids=CASES)
def test_what_cannot_be_probed_is_refused(correct: list[bool], folds: int, message: str) -> None:
    with pytest.raises(ProbeError, match=message):
        check_split(np.array(correct, dtype=bool), [str(index // 6) for index in range(len(correct))], folds)


def test_one_fold_is_refused() -> None:
    with pytest.raises(ValueError, match="folds is 1: expected at least 2"):
        check_split(np.array([True, False]), ["a", "b"], 1)


def write_store(folder: Path, problems: int = 12) -> tuple[Store, list[Rollout]]:
    """Layer 0 is noise, the last token of layer 2 tells right from wrong; every problem has an unscored answer."""
    generator = torch.Generator().manual_seed(0)
    layout = Layout(("hidden_states", "logits"), (6, 5, 7), (0, 2), 2, dtype="float32")
    writer = StoreWriter(folder, layout, {"name": "m"})
    rollouts = []
    for number in range(problems):
        # The last candidate is the first once more.
        ids = [[number + 2, 50 + answer, *[60 + answer] * answer] for answer in range(1, 4)] + [[1]]
        values = [torch.randn(len(own) - 1, 18, generator=generator) for own in ids]
        for answer, own in enumerate(values[:3]):
            own[-1, 6] = 20.0 * (answer % 2) - 10
        responses = [*range(4), 0]
        ids.append(ids[0])
        candidates = [Response(own, "x", True, place % 2 == 1, None) for place, own in enumerate(ids)]
        candidates[4] = replace(candidates[4], correct=False)
        rollouts.append(Rollout(f"p{number}", f"key {number}", "?", "1", [2], candidates))
        writer.write(f"{number:05}", [ShardProblem(f"p{number}", responses, digest(ids))], values)
    return Store(folder), rollouts


@pytest.mark.parametrize("group_bytes", [1, module.GROUP_BYTES], ids=["entry by entry", "at once"])
@pytest.mark.parametrize("pool", ["mean", "last"])
def test_a_store_is_pooled_answer_by_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pool: str, group_bytes: int
) -> None:
    monkeypatch.setattr(module, "GROUP_BYTES", group_bytes)
    store, rollouts = write_store(tmp_path)
    taken: dict[int | str, np.ndarray] = {}
    original = module._out_of_fold

    def record(values: np.ndarray, *rest: Any) -> Any:
        taken[store.layout.entries[len(taken)]] = values
        return original(values, *rest)

    monkeypatch.setattr(module, "_out_of_fold", record)
    steps: list[int] = []
    found, deviation = probe_store(store, rollouts, folds=3, pool=pool, on_progress=steps.append)
    assert steps == [1, 2, 3]
    assert (found.answers, found.unscored, found.problems, found.mixed_problems) == (48, 12, 12, 12)
    # Of four scored answers one is right.
    assert found.majority == pytest.approx(0.75)
    everything, cu_seqlens = store.batch(torch.arange(len(store.lengths)))
    whole = torch.cat(everything, dim=1)
    torch.testing.assert_close(deviation, whole.std(dim=0, correction=0), rtol=1e-5, atol=1e-6)
    rows = [4 * problem + response for problem in range(12) for response in (0, 1, 2, 0)]
    own = [whole[cu_seqlens[row] : cu_seqlens[row + 1]] for row in rows]
    expected = torch.stack([tokens.mean(dim=0) if pool == "mean" else tokens[-1] for tokens in own])
    np.testing.assert_allclose(np.hstack([taken[name] for name in (0, 2, "logits")]), expected, rtol=1e-5, atol=1e-5)
    assert found.best.entry == 2
    assert found.best.auc.mean > (0.95 if pool == "last" else 0.8)


def test_stores_that_cannot_be_probed(tmp_path: Path) -> None:
    store, rollouts = write_store(tmp_path)
    with pytest.raises(ValueError, match="pool is 'max': expected one of mean, last"):
        probe_store(store, rollouts, pool="max")
    with pytest.raises(ProbeError, match="12 problems for 13 folds"):
        probe_store(store, rollouts, folds=13)
    with pytest.raises(StoreError, match="has no problem 'new'"):
        probe_store(store, [replace(rollouts[0], id="new")])
    store._values[3] = store._values[3].clone()
    store._values[3][0, 2] = torch.inf
    with pytest.raises(StoreError, match="NaN or infinite"):
        probe_store(store, rollouts, folds=3)
