"""What every benchmark's command line has in common, and how contenders take turns."""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TypeVar

import torch
from rich.console import Console

from bench import clocks, plots, results, tables
from bench.floors import Floors
from bench.results import Case, Labels, Result
from bench.summary import Sample

LEFT_OUT = 3
"""Exit status where cases were left for lack of time: --resume goes on with them."""

NOT_HERE = 4
"""Exit status where nothing can be measured on this machine, for a reason that is told."""

OUT_OF_MEMORY = ("out of memory", "ALLOC_FAILED")
"""What libraries say that raise no `torch.OutOfMemoryError`."""

PATIENCE = 3
"""Rounds for each sample that is asked for, before a busy machine is given up on."""


class HasName(Protocol):
    name: str


Named = TypeVar("Named", bound=HasName)
Made = TypeVar("Made")


def parser(description: str | None) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument(
        "--quick", action="store_true", help="tiny shapes and few samples, to try everything out: no figures to quote"
    )
    made.add_argument("--json", action="store_true", help="print the result as JSON instead of tables")
    made.add_argument("--device", type=device_type, help="cpu or cuda; cuda where there is one, unless told")
    made.add_argument("--threads", type=count, help="on a CPU; with 1, CPU time is measured, even on a busy machine")
    made.add_argument("--samples", type=count, help="of each contender")
    made.add_argument("--budget", type=float, default=float("inf"), help="seconds after which no new case is begun")
    made.add_argument("--resume", action="store_true", help="keep the cases that were measured on the same tree before")
    made.add_argument("--results", type=Path, default=results.RESULTS, help="folder of the results")
    return made


def device_type(text: str) -> str:
    if text not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither cpu nor cuda")
    if text == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("torch sees no CUDA device here")
    return text


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return int(text)


def counts(text: str) -> list[int]:
    """Of an option that takes several, comma-separated."""
    return [count(part) for part in text.split(",")]


def choices(*allowed: str) -> Callable[[str], list[str]]:
    """The type of an option that takes some of these, comma-separated; a name may have commas itself."""

    def parse(text: str) -> list[str]:
        chosen = text.split(",") if text not in allowed else [text]
        for name in chosen:
            if name not in allowed:
                raise argparse.ArgumentTypeError(f"{name!r} is none of: {', '.join(allowed)}")
        return chosen

    return parse


class Bench:
    """One run of a benchmark: measures case after case and saves each as it comes.

    with Bench("score_step", options) as bench:
        for labels in ...:
            if bench.wants(labels):
                bench.add(measure(labels))
    """

    def __init__(self, name: str, options: argparse.Namespace, threads: int | None = None, **settings: Any) -> None:
        self.quick: bool = options.quick
        cuda = options.device == "cuda" or (options.device is None and torch.cuda.is_available())
        self.device = torch.device("cuda" if cuda else "cpu")
        torch.set_num_threads(threads or options.threads or (1 if self.quick else torch.get_num_threads()))
        self.clock = clocks.clock_for(self.device)
        self._options = options
        self._folder = results.folder_of(self.device, options.results)
        self._begun = time.monotonic()
        self._left_out: list[Labels] = []
        self._begun_cases: list[Labels] = []
        self._impossible: list[str] = []
        self._failed: list[str] = []
        settings = {"clock": self.clock.__name__, "quick": self.quick, **settings}
        if options.threads and not threads:
            name += f"_{options.threads}_threads"
        self.result = Result(name, results.environment(self.device), settings)
        if self.quick and options.results == results.RESULTS:
            raise SystemExit(
                "--quick makes no figures to keep: expected --results FOLDER with it, outside bench/results"
            )
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SystemExit(f"{self._folder} cannot be made for the results: {error.strerror}") from None

    def __enter__(self) -> Bench:
        path = self._folder / f"{self.result.name}.json"
        if self._options.resume and path.exists():
            before = Result.load(path)
            if self.result.continues(before):
                self.result.cases = before.cases
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            return
        if not self.result.cases:
            told = [*self._failed, *self._impossible]
            print(f"{self.result.name}: nothing was measured", *told, sep="\n", file=sys.stderr)
            raise SystemExit(1 if self._failed else LEFT_OUT if self._left_out else NOT_HERE if self._impossible else 1)
        path = self.result.save(self._folder)
        drawn = plots.plot_if_possible(self.result, path.with_suffix(".png"))
        if self._options.json:
            print(json.dumps(dataclasses.asdict(self.result)))
        else:
            console = Console(width=max(150, Console().width))
            tables.print_result(self.result, console)
            for labels in self._left_out:
                console.print(f"not measured for lack of time: {Case(labels, '', {}).title()}")
            for line in (*self._impossible, *self._failed):
                console.print(line, markup=False)
            console.print(f"every sample: {path}\n{drawn}", soft_wrap=True)
        if self._failed or self._left_out:
            raise SystemExit(1 if self._failed else LEFT_OUT)

    def samples(self, usual: int) -> int:
        """How many of each contender: as told, or so many; few in a quick run."""
        return self._options.samples or (3 if self.quick else usual)

    def wants(self, labels: Labels) -> bool:
        """Whether this case is to be measured: not measured before, and within the time that was given."""
        if any(case.labels == labels for case in self.result.cases):
            return False
        if time.monotonic() - self._begun > self._options.budget:
            self._left_out.append(labels)
            return False
        print(f"{self.result.name}: {Case(labels, '', {}).title()}", file=sys.stderr, flush=True)
        self._begun_cases.append(labels)
        return True

    def leave_out(self, every: Sequence[Labels], why: str) -> None:
        """Tells that these cases cannot be measured here."""
        self._impossible += [f"not measured: {Case(labels, '', {}).title()}: {why}" for labels in every]

    @contextmanager
    def going_on(self, model: str) -> Iterator[None]:
        """Around the cases of a model: what does not fit the GPU is left out, what fails is told, and others go on.

        The exit status of a run in which one failed is 1.
        """
        self._begun_cases = []
        why = ""
        try:
            yield
        except (Exception, SystemExit) as error:
            why = str(error).partition("\n")[0] or type(error).__name__
            short = isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in OUT_OF_MEMORY)
            if not short:
                traceback.print_exc()
        if not why:
            return
        every = self._begun_cases or [{"model": model}]
        if short:  # only now does nothing refer to what the case had made
            gc.collect()
            torch.cuda.empty_cache()
            self.leave_out(every, f"it needs more than the {torch.cuda.mem_get_info()[1] / 1e9:.0f} GB of this GPU")
        else:
            self._failed += [f"failed: {Case(labels, '', {}).title()}: {why}" for labels in every]

    def add(self, case: Case) -> None:
        self._begun_cases = [labels for labels in self._begun_cases if labels != case.labels]
        self.result.cases.append(case)
        self.result.save(self._folder)


def take_turns(
    contenders: Mapping[str, Callable[[int], Sample]], wanted: int, floors: Floors | None = None
) -> dict[str, list[Sample]]:
    """Rounds in which each contender is measured once, until each has as many undisturbed samples as wanted.

    A contender gets the number of the round and returns its sample. Nobody always follows the same neighbour: who runs
    second finds another cache than who runs third.
    """
    names = list(contenders)
    samples: dict[str, list[Sample]] = {name: [] for name in names}
    for turn in range(PATIENCE * wanted):
        if floors is not None:
            floors.sample(always=turn < 6)
        first = turn % len(names)
        order = names[first:] + names[:first]
        for name in order if turn // len(names) % 2 else order[::-1]:
            samples[name].append(contenders[name](turn))
        counts = [sum(sample is not None for sample in found) for found in samples.values()]
        # Who has none by then will have none, and the others are not to wait for it.
        if min((count for count in counts if count or turn + 1 < wanted), default=0) >= wanted:
            break
    return samples


def without_faulty(
    contenders: Sequence[Named], attempt: Callable[[Named], Made], mine: str
) -> tuple[dict[str, Made], list[str]]:
    """What `attempt` makes of each contender by name, and a note on each for which it fails.

    A rival that fails is not to keep the others from being measured; what fails for `mine` does.
    """
    made: dict[str, Made] = {}
    notes = []
    for contender in contenders:
        try:
            made[contender.name] = attempt(contender)
        except (Exception, SystemExit) as error:
            if contender.name == mine or isinstance(error, torch.OutOfMemoryError):
                raise
            traceback.print_exc()
            notes.append(f"without {contender.name}: {str(error).partition(chr(10))[0] or type(error).__name__}")
    return made, notes
