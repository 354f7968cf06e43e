"""Heads that read the same batches, trained side by side: one read of the data serves them all."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from swift_kernels import schema
from swift_kernels.head import SwiftHead
from swift_kernels.training import standardize
from swift_kernels.training.losses import get_loss, within_problem_auc
from swift_kernels.training.recipe import Recipe
from swift_kernels.training.split import Example, NothingToLearnError, Split, epoch_batches, split_examples
from swift_kernels.training.standardize import Statistics, StoredFeatures


@dataclass(frozen=True)
class Epoch:
    """Losses are means over the epoch's candidates, of the weights as they were at each step and at the end.

    `train_loss` is None for epoch 0, the ridge start. The AUC is None where no held-out problem has right and wrong
    answers.
    """

    number: int
    train_loss: float | None
    validation_loss: float
    validation_auc: float | None

    @property
    def held_out(self) -> str:
        """For people."""
        return f"held-out loss {self.validation_loss:.4f}" + (
            "" if self.validation_auc is None else f", AUC {self.validation_auc:.4f}"
        )

    def rank(self, stop: str) -> tuple[float, float]:
        """The greater, the better; the loss decides between equal AUCs, which are common on few problems."""
        return (self.validation_auc or 0.0 if stop == "auc" else 0.0, -self.validation_loss)


class RawWeights(NamedTuple):
    """Weights `[outputs, len(columns)]` and bias `[outputs]` for features as they are stored.

    `columns` are those of all that are read. Gate and reward, or without a gate any number of rewards, a score each.
    """

    columns: Tensor
    weight: Tensor
    bias: Tensor
    gate: bool


class Start(NamedTuple):
    """A ridge start: its penalty, as in `standardize.PENALTIES`, and what makes logits of its scores."""

    penalty: float
    scale: float
    shift: float


class Plan(NamedTuple):
    """What a first fit has found, for one on all problems: the ridge start, if any, and how many epochs."""

    start: Start | None
    epochs: int


class Run:
    """One head on its way: weights for the features as it is trained on them, their optimizer, and its history.

    A run with a plan has no held-out side, so it has no history either.
    """

    def __init__(
        self, head: SwiftHead, recipe: Recipe, entries: tuple[int, ...], columns: Tensor, plan: Plan | None
    ) -> None:
        self.head = head
        self.recipe = recipe
        self.entries = entries
        self.columns = columns
        self.plan = plan
        self.epoch = 0
        self.start = None if plan is None else plan.start
        dtype = torch.float64 if head.weight.dtype == torch.float64 else torch.float32
        with torch.random.fork_rng(devices=[head.weight.device] if head.weight.is_cuda else []):
            torch.manual_seed(recipe.seed)
            # The head itself changes when all is done.
            fresh = copy.deepcopy(head)
            fresh.reset_parameters()
        # AdamW moves every weight by about the learning rate a step: a gate of weights pace x w moves by less.
        self.pace = torch.ones(len(fresh.bias), dtype=dtype, device=fresh.bias.device)
        if head.config.gate:
            self.pace[0] = recipe.gate_pace
        self.weight = nn.Parameter(fresh.weight.detach().to(dtype) / self.pace[:, None])
        self.bias = nn.Parameter(fresh.bias.detach().to(dtype) / self.pace)
        self.optimizer = torch.optim.AdamW(
            [self.weight, self.bias], lr=recipe.learning_rate, weight_decay=recipe.weight_decay
        )
        self.history: list[Epoch] = []
        self.best_weights: tuple[Tensor, Tensor] | None = None

    @property
    def current(self) -> tuple[Tensor, Tensor]:
        """Weights `[outputs, features]` and bias of the head as it stands, differentiable."""
        return self.weight * self.pace[:, None], self.bias * self.pace

    @property
    def best(self) -> Epoch:
        # The first of equals.
        return max(self.history, key=lambda epoch: epoch.rank(self.recipe.stop))

    @property
    def kept(self) -> Epoch:
        return self.best if self.recipe.keep == "best" else self.history[-1]

    @property
    def stopped_early(self) -> bool:
        return self.history[-1].number - self.best.number >= self.recipe.patience

    @property
    def done(self) -> bool:
        if self.plan is not None:
            return self.epoch >= self.plan.epochs
        return bool(self.history) and (self.stopped_early or self.history[-1].number >= self.recipe.epochs)

    def record(self, epoch: Epoch) -> None:
        self.history.append(epoch)
        if self.kept is epoch:
            self.keep()

    def keep(self) -> None:
        weight, bias = self.current
        self.best_weights = weight.detach().clone(), bias.detach().clone()

    def start_from(self, weight: Tensor, start: Start) -> None:
        """Takes a ridge regression for standardised features; the gate starts at 0, half open for every token."""
        self.start = start
        with torch.no_grad():
            self.weight.zero_()
            self.bias.zero_()
            self.weight[-1].copy_(start.scale * weight)
            self.bias[-1].fill_(start.shift)


class _Entries:
    """Some of the entries of a store."""

    def __init__(self, store: StoredFeatures, entries: Sequence[int]) -> None:
        self.entries = tuple(entries)
        self.widths = tuple(store.widths[entry] for entry in entries)
        self.lengths = store.lengths
        self._store = store

    def batch(self, indices: Tensor, device: torch.device | str = "cpu") -> tuple[list[Tensor], Tensor]:
        entries, cu_seqlens = self._store.batch(indices, device)
        return [entries[entry] for entry in self.entries], cu_seqlens


class Sweep:
    """Heads of one `Recipe.reading`, with the split and the statistics that they share.

    With plans, one a head, nothing is held back: they train on all examples, each for as long as its plan says.
    """

    def __init__(
        self,
        heads: Sequence[SwiftHead],
        recipes: Sequence[Recipe],
        entries: Sequence[tuple[int, ...]],
        store: StoredFeatures,
        examples: Sequence[Example],
        plans: Sequence[Plan] | None = None,
    ) -> None:
        self.device = heads[0].weight.device
        self.keys = [example.key for example in examples]
        self.responses = torch.tensor([example.response for example in examples])
        self.labels = torch.tensor([float(example.correct) for example in examples])
        numbers = {key: number for number, key in enumerate(sorted({example.key for example in examples}))}
        self.group = torch.tensor([numbers[example.key] for example in examples])
        # Recipes of one reading make the same split, but not all need an AUC of it.
        for recipe in recipes:
            self.split = split_examples(examples, recipe)
        if plans is not None:
            self.split = Split(torch.arange(len(examples)), torch.empty(0, dtype=torch.int64), set())
        # What no head reads is neither looked at nor projected.
        read = sorted({entry for own in entries for entry in own})
        self.store = _Entries(store, read)
        bounds = [0, *torch.tensor(self.store.widths).cumsum(0).tolist()]
        columns = {entry: torch.arange(bounds[i], bounds[i + 1]) for i, entry in enumerate(read)}
        self.runs = [
            Run(head, recipe, own, torch.cat([columns[entry] for entry in own]).to(self.device), plan)
            for head, recipe, own, plan in zip(
                heads, recipes, entries, [None] * len(heads) if plans is None else plans, strict=True
            )
        ]
        self.begun = False
        self.raw = standardize.identity(bounds[-1], self.device)
        self.statistics: Statistics | None = None

    def run(self) -> Iterator[list[tuple[int, Epoch, Epoch]]]:
        """Trains; after each epoch yields, for every head that was validated: its index, the epoch, the best so far."""
        if not self.begun:
            yield from self._start()
        while active := [run for run in self.runs if not run.done]:
            number = 1 + active[0].epoch
            train_losses = self._train(active, number)
            for run in active:
                run.epoch = number
            yield self._validate(active, number, train_losses)
        for run in self.runs:
            if run.plan is not None:
                run.keep()

    def kept(self, run: Run) -> tuple[Tensor, Tensor]:
        """The kept weights, folded in float64."""
        assert run.best_weights is not None
        return self._statistics(run).fold(*run.best_weights, run.columns)

    def finish(self) -> None:
        """Leaves the kept weights in every head."""
        for run in self.runs:
            weight, bias = self.kept(run)
            run.head.load_state_dict({"weight": weight, "bias": bias})
            run.head.requires_grad_(False)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that `restore` needs: tensors, and the rest for JSON."""
        tensors: dict[str, Tensor] = {}
        if self.statistics is not None:
            tensors["mean"], tensors["inverse_deviation"] = self.statistics.mean, self.statistics.inverse_deviation
        facts = []
        for index, run in enumerate(self.runs):
            own: dict[str, Tensor] = {"weight": run.weight, "bias": run.bias}
            if run.best_weights is not None:
                own["best.weight"], own["best.bias"] = run.best_weights
            for number, moments in run.optimizer.state_dict()["state"].items():
                own |= {f"optimizer.{number}.{name}": value for name, value in moments.items()}
            tensors |= {f"{index}.{name}": value for name, value in own.items()}
            history = [asdict(epoch) for epoch in run.history]
            facts.append({"history": history, "start": run.start, "epoch": run.epoch})
        return tensors, {"heads": facts}

    def restore(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Goes back to where `state` was taken."""
        self.begun = True
        if "mean" in tensors:
            mean, inverse = tensors["mean"].to(self.device), tensors["inverse_deviation"].to(self.device)
            self.statistics = Statistics(mean, inverse)
        for index, (run, own) in enumerate(zip(self.runs, facts["heads"], strict=True)):
            run.history = [Epoch(**epoch) for epoch in own["history"]]
            run.start = None if own["start"] is None else Start(*own["start"])
            run.epoch = own["epoch"]
            with torch.no_grad():
                run.weight.copy_(tensors[f"{index}.weight"])
                run.bias.copy_(tensors[f"{index}.bias"])
            if run.history:  # a run with a plan keeps what it ends with
                best = tensors[f"{index}.best.weight"], tensors[f"{index}.best.bias"]
                run.best_weights = best[0].to(self.device), best[1].to(self.device)
            optimizer = run.optimizer.state_dict()
            optimizer["state"] = {
                number: {
                    name: tensors[f"{index}.optimizer.{number}.{name}"] for name in ("step", "exp_avg", "exp_avg_sq")
                }
                for number in (0, 1)
                if f"{index}.optimizer.{number}.step" in tensors
            }
            run.optimizer.load_state_dict(optimizer)

    def _start(self) -> Iterator[list[tuple[int, Epoch, Epoch]]]:
        """Looks at every response once, and takes the ridge starts."""
        self.begun = True
        try:
            yield from self._look()
        except standardize.NotFiniteError as error:
            place = int((self.responses == error.response).nonzero()[0])
            raise NothingToLearnError(f"an answer to problem {self.keys[place]!r} {error.what}") from error

    def _look(self) -> Iterator[list[tuple[int, Epoch, Epoch]]]:
        train = self.responses[self.split.train].unique()
        ridge = [run for run in self.runs if run.recipe.start == "ridge"]
        means = torch.empty(0)
        chosen = torch.zeros(len(train), dtype=torch.bool)
        if any(run.recipe.standardize for run in self.runs):
            generator = torch.Generator().manual_seed(self.runs[0].recipe.seed)
            if ridge:
                chosen[torch.randperm(len(train), generator=generator)[: standardize.RIDGE_RESPONSES]] = True
            self.statistics, means = standardize.survey(self.store, train, chosen, self.device)
        else:
            standardize.check_finite(self.store, train, self.device)
        standardize.check_finite(self.store, self.responses[self.split.validation].unique(), self.device)
        if not ridge:
            return
        assert self.statistics is not None
        means.sub_(self.statistics.mean).mul_(self.statistics.inverse_deviation)
        self._ridge(ridge, means, train[chosen])
        yield self._validate(ridge, 0, [None] * len(ridge))

    def _ridge(self, runs: Sequence[Run], means: Tensor, responses: Tensor) -> None:
        """Starts each head from the ridge regression whose held-out within-problem AUC is the highest, or the planned.

        Args:
            means: `[responses, features]`, standardised, of the training responses `responses`.
        """
        place = torch.searchsorted(responses, self.responses[self.split.train])
        place = place.clamp_max(len(responses) - 1)
        known = responses[place] == self.responses[self.split.train]
        place = place[known]
        counts = torch.zeros(len(responses)).index_add(0, place, torch.ones(len(place)))
        labels = torch.zeros(len(responses)).index_add(0, place, self.labels[self.split.train][known]) / counts
        held_out = self.split.validation
        found: dict[tuple[tuple[int, ...], Start | None], tuple[Tensor, Start]] = {}
        for run in runs:
            case = run.entries, run.start
            if case not in found:
                penalties = standardize.PENALTIES if run.start is None else (run.start.penalty,)
                own = means[:, run.columns]
                paths = standardize.ridge_paths(own, labels.to(self.device), counts.to(self.device), penalties)
                if run.start is not None:
                    found[case] = paths[0], run.start
                else:
                    assert self.statistics is not None
                    weight, bias = self.statistics.fold(paths, torch.zeros(len(paths)).to(paths), run.columns)
                    scores = self._scores(
                        held_out, [RawWeights(run.columns, weight.to(run.weight), bias.to(run.bias), False)]
                    )
                    auc = within_problem_auc(scores, self.labels[held_out], self.group[held_out])
                    best = int(auc.argmax())
                    scale, shift = standardize.logistic_scale(scores[:, best], self.labels[held_out])
                    found[case] = paths[best], Start(penalties[best], scale, shift)
            weight, start = found[case]
            run.start_from(weight.to(run.weight), start)

    def _statistics(self, run: Run) -> Statistics:
        if not run.recipe.standardize:
            return self.raw
        assert self.statistics is not None
        return self.statistics

    def _folded(self, run: Run) -> RawWeights:
        """What the finished head will have, if it ends here."""
        weight, bias = self._statistics(run).fold(*run.current, run.columns)
        dtype = run.head.weight.dtype
        # Through the head's own dtype: what is trained and validated is what is saved.
        weight, bias = weight.to(dtype).to(run.weight), bias.to(dtype).to(run.bias)
        return RawWeights(run.columns, weight, bias, run.head.config.gate)

    def _scores(self, examples: Tensor, heads: Sequence[RawWeights]) -> Tensor:
        """Scores `[examples, heads]` on the CPU, from a few reads of the distinct responses of the examples."""
        distinct, place = self.responses[examples].unique(return_inverse=True)
        with torch.no_grad():
            parts = [self._score(part, heads).cpu() for part in standardize.parts(distinct, self.store.lengths)]
        return torch.cat(parts)[place]

    def _score(self, responses: Tensor, heads: Sequence[RawWeights]) -> Tensor:
        """Scores `[responses, scores]`, differentiable, from one read of the responses."""
        entries, cu_seqlens = self.store.batch(responses, self.device)
        features = sum(self.store.widths)
        columns: list[Tensor | None] = [None] * len(heads)
        for gated in (True, False):
            kind = [index for index, head in enumerate(heads) if head.gate == gated]
            if not kind:
                continue
            weights = []
            for index in kind:
                own, weight = heads[index].columns, heads[index].weight
                # A head of some entries has no weight for the others.
                partial = len(own) < features
                weights.append(
                    weight.new_zeros(len(weight), features).index_copy(1, own, weight) if partial else weight
                )
            bias = torch.cat([heads[index].bias for index in kind])
            scores = schema.score_sequence(entries, torch.cat(weights), bias, cu_seqlens, gated)[0]
            sizes = [1 if gated else len(heads[index].weight) for index in kind]
            for index, part in zip(kind, scores.split(sizes, dim=1), strict=True):
                columns[index] = part
        return torch.cat([column for column in columns if column is not None], dim=1)

    def _losses(self, runs: Sequence[Run], scores: Tensor, examples: Tensor) -> list[Tensor]:
        labels, group = self.labels[examples].to(scores.device), self.group[examples].to(scores.device)
        return [get_loss(run.recipe.loss)(scores[:, i], labels, group)[0] for i, run in enumerate(runs)]

    def _train(self, runs: Sequence[Run], number: int) -> list[float | None]:
        """One epoch; returns each head's mean loss."""
        totals = torch.zeros(len(runs), dtype=torch.float64)
        candidates = 0
        for examples in epoch_batches(self.split.train, self.labels, self.group, runs[0].recipe, number):
            for run in runs:
                run.optimizer.zero_grad()
            distinct, place = self.responses[examples].unique(return_inverse=True)
            scores = self._score(distinct, [self._folded(run) for run in runs])[place.to(self.device)]
            losses = torch.stack(self._losses(runs, scores, examples))
            losses.sum().backward()
            for run in runs:
                run.optimizer.step()
            totals += len(examples) * losses.detach().cpu().double()
            candidates += len(examples)
        return (totals / candidates).tolist()

    def _validate(
        self, runs: Sequence[Run], number: int, train_losses: Sequence[float | None]
    ) -> list[tuple[int, Epoch, Epoch]]:
        """Scores the held-out side and records the epoch of every head; does nothing where nothing is held back."""
        for run, train_loss in zip(runs, train_losses, strict=True):
            self._check_loss(run, number, train_loss)
        if not len(self.split.validation):
            return []
        held_out = self.split.validation
        scores = self._scores(held_out, [self._folded(run) for run in runs])
        aucs = within_problem_auc(scores, self.labels[held_out], self.group[held_out]).tolist()
        losses = [loss.item() for loss in self._losses(runs, scores, held_out)]
        ended = []
        for run, train_loss, loss, auc in zip(runs, train_losses, losses, aucs, strict=True):
            self._check_loss(run, number, train_loss, loss)
            epoch = Epoch(number, train_loss, loss, None if math.isnan(auc) else auc)
            run.record(epoch)
            ended.append((self.runs.index(run), epoch, run.best))
        return ended

    def _check_loss(self, run: Run, number: int, train_loss: float | None, loss: float = 0.0) -> None:
        if not math.isfinite((train_loss or 0.0) + loss):
            raise NothingToLearnError(
                f"the loss of head {self.runs.index(run)} is {train_loss} in epoch {number}, {loss} on the "
                "held-out side: lower the learning rate"
            )
