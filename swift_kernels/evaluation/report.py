"""One report of an evaluation, as a page that opens without a network and as markdown, from the JSON of `eval`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from swift_kernels import files
from swift_kernels.evaluation import page, plots
from swift_kernels.evaluation.compare import SELECTOR_NAMES
from swift_kernels.evaluation.evaluate import Evaluation
from swift_kernels.evaluation.metrics import with_nan
from swift_kernels.evaluation.plots import Picture
from swift_kernels.evaluation.study import Study, Transfer
from swift_kernels.evaluation.wording import p_value, percent, points, study_facts

HOW_TO_READ = (
    "Accuracies are percent of problems whose pick is right, at each N the mean over all subsets of N of a problem's "
    "answers (over 512 random ones where there are more, for votes and combinations); ties count in expectation. "
    "Intervals are 95%, bootstrapped over problems. Differences are paired by problem; p is that of a two-sided "
    "sign-flip test, adjusted for the number of comparisons in its table (Holm). P(correct), votes that SWIFT or a "
    "reward weighs and weighted means use temperatures and weights that were fitted to other problems of the file than "
    "those they are judged by."
)


class ReportError(ValueError):
    """A file that no report can be made of; the message names it and says what was expected."""


@dataclass(frozen=True)
class Section:
    """A heading with facts, a table (its first row the header) whose line `ours` is SWIFT's, and pictures."""

    title: str
    facts: Sequence[str]
    table: Sequence[Sequence[str]]
    ours: int | None
    pictures: Sequence[Picture]


def read(path: Path) -> Study:
    """The evaluation in a file of `swift-kernels eval --output`."""
    try:
        return Study.from_dict(_read_object(path))
    except ReportError:
        raise
    except ValueError as error:
        raise ReportError(f"{path} is {error}") from None


def read_ablation(path: Path) -> dict[str, Any]:
    """What `swift-kernels ablate --output` wrote."""
    found = with_nan(_read_object(path))
    if missing := sorted({"results", "baselines", "train_problems", "test_problems"}.difference(found)):
        raise ReportError(f"{path} has no {missing[0]!r}: expected a file of `swift-kernels ablate --output`")
    return found


def _read_object(path: Path) -> dict[str, Any]:
    try:
        found = files.parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ReportError(f"{path} is not JSON, is it truncated? {error}") from None
    if not isinstance(found, dict):
        raise ReportError(f"{path} holds a {type(found).__name__}: expected an object")
    return found


def write_html(study: Study, path: Path, ablation: Mapping[str, Any] | None = None) -> None:
    """Writes the page, complete or not at all."""
    with page.drawing() as pyplot:
        sections = _sections(study, ablation, pyplot)
    files.write_text(path, page.render("report.html", title=_title(study), how=HOW_TO_READ, sections=sections))


def write_markdown(study: Study, path: Path, ablation: Mapping[str, Any] | None = None) -> None:
    """Writes the report and, into a folder beside it named after it, its pictures."""
    folder = path.with_name(f"{path.stem}-pictures")
    lines = [f"# {_title(study)}", "", HOW_TO_READ, ""]
    with page.drawing() as pyplot:
        for section in _sections(study, ablation, pyplot):
            lines += [f"## {_plain(section.title)}", "", *(f"- {_plain(fact)}" for fact in section.facts), ""]
            if section.table:
                head, *rows = section.table
                lines += [_row(map(_plain, head)), _row(["---", *["---:"] * (len(head) - 1)])]
                lines += [
                    _row(f"**{_plain(cell)}**" if place == section.ours and cell else _plain(cell) for cell in row)
                    for place, row in enumerate(rows)
                ]
                lines.append("")
            for picture in section.pictures:
                files.write_text(folder / f"{picture.name}.svg", picture.svg)
                place = quote(f"{folder.name}/{picture.name}.svg")
                lines += [f"![{picture.caption}]({place})", "", picture.caption, ""]
    files.write_text(path, "\n".join(lines).rstrip() + "\n")


def _title(study: Study) -> str:
    return f"Best-of-N with SWIFT on {study.model}"


def _sections(study: Study, ablation: Mapping[str, Any] | None, pyplot: Any) -> list[Section]:
    sections = []
    for index, task in enumerate(study.tasks):
        name = f"{index + 1}-{re.sub(r'[^a-z0-9]+', '-', task.task.lower()).strip('-')[:60]}"
        table, ours = _table(task.evaluation)
        facts = [
            f"{task.evaluation.problems} problems, {task.evaluation.candidates:,} answers of {task.rollouts}, "
            f"head {task.head}",
            *study_facts(task),
        ]
        sections.append(Section(task.task, facts, table, ours, list(plots.task_pictures(task, name, pyplot))))
    if study.transfer is not None:
        picture = Picture.of(
            "transfer",
            "Accuracy of each head's picks on each task, 95% intervals; bold is the task's own head. Shades compare "
            "heads on one task.",
            plots.transfer(study.transfer, pyplot),
        )
        table = _transfer_table(study.transfer)
        sections.append(Section("Heads on the tasks of others", [], table, None, [picture]))
    if ablation is not None:
        try:
            figure = plots.training_problems(ablation, pyplot)
        except (KeyError, TypeError, ValueError) as error:
            raise ReportError(f"the ablation is damaged ({error!r}): expected a file of `ablate --output`") from None
        facts = [f"{ablation['train_problems']} training problems at most, {ablation['test_problems']} test problems"]
        if figure is None:
            facts.append("The ablation did not vary the number of training problems: `ablate --vary problems` does")
            pictures = []
        else:
            caption = "Accuracy and AUC against the number of training problems; bands are 95% intervals over both."
            pictures = [Picture.of("training-problems", caption, figure)]
        what = ablation.get("task") or ablation.get("title") or "no task is named"
        sections.append(Section(f"Training problems: {what}", facts, [], None, pictures))
    return sections


def _table(evaluation: Evaluation) -> tuple[list[list[str]], int]:
    """A selector a line, and which line is SWIFT's."""
    *smaller, largest = evaluation.accuracy
    last = evaluation.accuracy[largest]
    names = [key for key in SELECTOR_NAMES if key in last]
    rows = [["picked by", *(f"N={n}" for n in evaluation.accuracy), "SWIFT is ahead, paired", "p"]]
    for key in names:
        gap = evaluation.differences.get(f"swift - {key}")
        rows.append(
            [
                SELECTOR_NAMES[key],
                *(f"{100 * evaluation.accuracy[n][key].mean:.1f}" for n in smaller),
                percent(last[key]),
                *(("", "") if gap is None else (points(gap), p_value(evaluation.adjusted_p[f"swift - {key}"]))),
            ]
        )
    return rows, names.index("swift")


def _transfer_table(found: Transfer) -> list[list[str]]:
    rows = [["head", *(f"{task}, N={n}" for task, n in zip(found.tasks, found.n, strict=True))]]
    for head, accuracies, gaps, aucs in zip(found.heads, found.accuracy, found.difference, found.auc, strict=True):
        rows.append(
            [
                head,
                *(
                    f"{percent(own)}; AUC {auc.mean:.3f}; "
                    + ("own head" if gap is None else f"{points(gap)}, p {p_value(gap.p)}")
                    for own, gap, auc in zip(accuracies, gaps, aucs, strict=True)
                ),
            ]
        )
    return rows


def _plain(text: str) -> str:
    """Text that markdown shows as it is: names come from files and command lines."""
    return re.sub(r"([\\`*_<>\[\]#|])", r"\\\1", " ".join(text.split()))


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
