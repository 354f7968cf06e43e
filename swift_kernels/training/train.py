"""From rollouts to a head: features once, the fit, its figures, and the model card."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from swift_kernels import files, hub
from swift_kernels.checkpoint import CONFIG_NAME, WEIGHTS_NAME
from swift_kernels.evaluation.evaluate import Evaluation, evaluate, score_rollouts
from swift_kernels.fingerprint import compare_model, model_name
from swift_kernels.head import SwiftHead
from swift_kernels.integrations.models import hub_id
from swift_kernels.progress import Progress
from swift_kernels.training import card
from swift_kernels.training.activations import Activations, Group, OnTheFly, collect, scored_lengths
from swift_kernels.training.fit import Epoch, Example, Fit, Recipe, fit_heads
from swift_kernels.training.rollouts import Rollout, RolloutError, RolloutFile, tokenized
from swift_kernels.training.split import check_learnable, split_examples
from swift_kernels.training.standardize import StoredFeatures
from swift_kernels.training.store import Store
from swift_kernels.training.stored import (
    check_same_answers,
    check_same_layout,
    entries_of,
    make_head,
    responses_of,
    score_stored,
    unsketched,
)

CARD_NAME = "README.md"
CHECKPOINT_NAME = "unfinished-fit.safetensors"


@dataclass(frozen=True)
class TrainedHead:
    """A trained head and what is known of it.

    Attributes:
        head: with task and metrics in its config.
        fit: how the fit went.
        validation: on the problems that early stopping looked at, so it flatters the head a little; of the head before
            it was refitted to all problems. A recipe that splits by candidate has trained on other answers to them.
        test: on the problems of the test rollouts, if there were any.
        data: what it was trained on.
        llm_tokens: how many tokens the LLM was fed in this run for the features of the fit; a test is left out.
    """

    head: SwiftHead
    fit: Fit
    recipe: Recipe
    validation: Evaluation
    test: Evaluation | None
    data: dict[str, Any]
    llm_tokens: int = 0

    def facts(self) -> dict[str, Any]:
        return {
            "data": self.data,
            "recipe": asdict(self.recipe),
            "epochs": [asdict(epoch) for epoch in self.fit.history],
            "best_epoch": self.fit.best.number,
            "kept_epoch": self.fit.kept.number,
            "stopped_early": self.fit.stopped_early,
            "ridge_penalty": self.fit.penalty,
            "llm_tokens": self.llm_tokens,
            "validation": self.validation.to_dict(),
            "test": None if self.test is None else self.test.to_dict(),
        }

    def save(self, folder: str | Path, repo_id: str | None = None) -> None:
        """Writes the checkpoint and its card; each file is replaced atomically. `repo_id` is for the card."""
        self.head.save_pretrained(str(folder))
        text = card.model_card(self.head.config, self.fit, self.recipe, self.data, self.validation, self.test, repo_id)
        files.write_text(Path(folder) / CARD_NAME, text)

    def push(self, folder: str | Path, repo_id: str) -> str:
        """Uploads what `save` wrote to the Hub and returns the address of the commit.

        Raises:
            HubError: it failed; the message says how to push the folder later.
        """
        try:
            return hub.upload(folder, repo_id, [CONFIG_NAME, WEIGHTS_NAME, CARD_NAME])
        except hub.HubError as error:
            command = shlex.join(["hf", "upload", repo_id, str(folder)])
            raise hub.HubError(f"{error}; {folder} is whole, `{command}` pushes it") from error


def train_head(
    model: Any,
    tokenizer: Any,
    rollouts: RolloutFile,
    *,
    layers: str | Sequence[int] = "all",
    gate: bool = True,
    top_logprobs: int | None = None,
    recipe: Recipe | None = None,
    test: RolloutFile | None = None,
    model_name: str | None = None,
    checkpoint: Path | None = None,
    on_the_fly: bool = False,
    progress: Progress,
    note: Callable[[str], None],
) -> TrainedHead:
    """Trains a head for `model` on stored rollouts, and evaluates it on those of other problems, if given.

    `model_name`, for the card, is what the command line calls the model; `checkpoint` as in `fit_heads`. The model runs
    once over the answers, or, `on_the_fly`, again in every epoch, and then its features are kept nowhere.

    Raises:
        NothingToLearnError: the answers are all right or all wrong, or there are too few problems.
        RolloutError: the rollouts are another model's, or `test` shares problems with the training data.
    """
    recipe = recipe or Recipe()
    for file in (rollouts, test):
        if file is not None:
            check_same_model(file, model)
            for line in file.notes:
                note(line)
    if test is not None:
        check_disjoint(rollouts, test)
    items = tokenized(rollouts.rollouts, tokenizer)
    # What cannot be learnt is said before the model runs over the answers: that may take hours.
    check_learnable([candidate.correct for item in items for candidate in item.candidates])
    head = SwiftHead.for_model(model, layers, gate=gate, task=rollouts.task, top_logprobs=top_logprobs)
    groups, examples = _distinct(items)
    lengths = scored_lengths(model, head.config, groups)
    split_examples([example for example in examples if lengths[example.response]], recipe)
    activations: Activations | OnTheFly
    if on_the_fly:
        activations = OnTheFly(model, head.config, groups)
    else:
        with progress("hidden states", len(groups)) as update:
            activations = collect(model, head.config, groups, on_progress=update)
    result, validation = _fit(head, activations, examples, items, recipe, checkpoint, progress, note)
    tested = None
    if test is not None:
        test_items = tokenized(test.rollouts, tokenizer)
        with progress("test", len(test_items)) as update:
            scores = score_rollouts(model, head, test_items, on_progress=update)
        tested = evaluate(test_items, scores)
    data = {**_data(head, rollouts, test, result, model_name), "on_the_fly": on_the_fly}
    return _trained(head, result, recipe, validation, tested, data, activations.llm_tokens)


def train_stored_head(
    store: Store,
    rollouts: RolloutFile,
    *,
    layers: str | Sequence[int] = "all",
    gate: bool = True,
    recipe: Recipe | None = None,
    test: RolloutFile | None = None,
    test_store: Store | None = None,
    model_name: str | None = None,
    checkpoint: Path | None = None,
    progress: Progress,
    note: Callable[[str], None],
) -> TrainedHead:
    """Trains a head on an activation store, as `train_head` does, without running the LLM.

    `rollouts` and `store` were written together, and so were `test` and `test_store`. A head that was fitted to
    sketches is returned at the full width.

    Raises:
        StoreError: store and rollouts do not belong together, or layers are asked for that are not stored.
    """
    recipe = recipe or Recipe()
    check_same_answers(store, rollouts)
    head = make_head(store, layers, gate, rollouts.task)
    if test is not None and test_store is not None:
        check_disjoint(rollouts, test)
        check_same_answers(test_store, test)
        check_same_layout(store, test_store)
    items = rollouts.rollouts
    examples = [
        Example(response, candidate.correct, item.key)
        for item, responses in zip(items, responses_of(store, items), strict=True)
        for candidate, response in zip(item.candidates, responses, strict=True)
    ]
    activations = store.part(entries_of(store, head))
    result, validation = _fit(head, activations, examples, items, recipe, checkpoint, progress, note)
    tested = None
    if test is not None and test_store is not None:
        with progress("test", len(test.rollouts)) as update:
            tested = evaluate(test.rollouts, score_stored(test_store, head, test.rollouts, update))
    data = {
        **_data(head, rollouts, test, result, model_name),
        "stores": [store.path.name, test_store and test_store.path.name],
    }
    data["layout"] = asdict(store.layout)
    return _trained(unsketched(head, store), result, recipe, validation, tested, data)


def _fit(
    head: SwiftHead,
    activations: StoredFeatures,
    examples: Sequence[Example],
    items: Sequence[Rollout],
    recipe: Recipe,
    checkpoint: Path | None,
    progress: Progress,
    note: Callable[[str], None],
) -> tuple[Fit, Evaluation]:
    """Fits the head to the answers that have a scored token; evaluates what was validated on the problems held back."""
    learnable = [example for example in examples if activations.lengths[example.response]]
    if len(learnable) < len(examples):
        note(f"{len(examples) - len(learnable)} of {len(examples)} answers have no scored token and were left out")
    with progress("fit", recipe.epochs) as update:

        def tell(_head: int, epoch: Epoch, best: Epoch) -> None:
            update(epoch.number, f"{epoch.held_out}, best so far epoch {best.number}")

        [result] = fit_heads([head], activations, learnable, [recipe], on_epoch=tell, checkpoint=checkpoint)
    return result, _evaluate_activations(result.validated or head, activations, examples, items, result.validation_keys)


def _data(
    head: SwiftHead, rollouts: RolloutFile, test: RolloutFile | None, result: Fit, model_name: str | None
) -> dict[str, Any]:
    """What the head was made from, for its card."""
    candidates = [candidate for item in rollouts.rollouts for candidate in item.candidates]
    return {
        "rollouts": rollouts.path.name,
        "header": _without_model(rollouts.header),
        "problems": len(rollouts.rollouts),
        "candidates": len(candidates),
        "correct": sum(candidate.correct for candidate in candidates),
        "validation_problems": len(result.validation_keys),
        "model": model_name or (head.config.base_model or {}).get("name"),
        "base_model": None if model_name is None else hub_id(model_name),
        "layout": None,
        "on_the_fly": False,
        "test_rollouts": None if test is None else test.path.name,
        "test_header": None if test is None else _without_model(test.header),
        "test_problems": None if test is None else len(test.rollouts),
    }


def _trained(
    head: SwiftHead,
    result: Fit,
    recipe: Recipe,
    validation: Evaluation,
    tested: Evaluation | None,
    data: dict[str, Any],
    llm_tokens: int = 0,
) -> TrainedHead:
    metrics = {
        "best_epoch": result.best.number,
        "kept_epoch": result.kept.number,
        "validation_loss": round(result.kept.validation_loss, 6),
        "validation": _summary(validation),
        **({} if tested is None else {"test": _summary(tested)}),
    }
    return TrainedHead(head.with_config(metrics=metrics), result, recipe, validation, tested, data, llm_tokens)


def check_same_model(rollouts: RolloutFile, model: Any) -> None:
    """Raises when the rollouts record another model: its hidden states would not be those of the answers."""
    recorded = rollouts.header.get("model")
    if recorded is None:
        return
    difference, same_model = compare_model(recorded, model)
    if not same_model:
        raise RolloutError(
            f"{rollouts.path} was generated by {recorded['name']}, the model is "
            f"{model_name(model)} ({difference}): use the model that wrote the answers"
        )


def _without_model(header: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in header.items() if key != "model"}


def check_disjoint(rollouts: RolloutFile, test: RolloutFile) -> None:
    """Raises when the test has problems of the training data, by the keys of their task."""
    shared = {item.key for item in rollouts.rollouts} & {item.key for item in test.rollouts}
    if shared:
        raise RolloutError(
            f"{test.path} shares {len(shared)} problems with {rollouts.path}, such as {sorted(shared)[0]!r}: the test "
            "needs problems the head has not seen"
        )


def _distinct(items: Sequence[Rollout]) -> tuple[list[Group], list[Example]]:
    """The distinct answers to each problem, and an example for each candidate in order."""
    groups: list[Group] = []
    examples = []
    first = 0
    for item in items:
        distinct: dict[tuple[int, ...], int] = {}
        for candidate in item.candidates:
            response = distinct.setdefault(tuple(candidate.token_ids or ()), first + len(distinct))
            examples.append(Example(response, candidate.correct, item.key))
        groups.append((item.prompt_token_ids or [], list(distinct)))
        first += len(distinct)
    return groups, examples


@torch.no_grad()
def _evaluate_activations(
    head: SwiftHead,
    activations: StoredFeatures,
    examples: Sequence[Example],
    items: Sequence[Rollout],
    keys: set[str],
) -> Evaluation:
    remaining = iter(examples)
    scores, chosen = [], []
    for item in items:
        own = [next(remaining) for _ in item.candidates]
        if item.key in keys:
            chosen.append(item)
            # Equal answers are one response, which is read once: it may be the LLM that computes it.
            distinct, place = torch.tensor([example.response for example in own]).unique(return_inverse=True)
            scores.append(head(*activations.batch(distinct, head.weight.device))[place].tolist())
    return evaluate(chosen, scores)


def _summary(evaluation: Evaluation) -> dict[str, Any]:
    """What a head's config records of an evaluation."""
    facts = evaluation.to_dict()
    kept = {
        "problems": evaluation.problems,
        "n": evaluation.n,
        "accuracy": facts["accuracy"][evaluation.n],
        "differences": facts["differences"],
        "auc": facts["auc"],
    }
    return json.loads(json.dumps(kept), parse_float=lambda text: round(float(text), 4))
