"""Ordinary answers to datasets of reasoning-gym whose scorers execute text, and whether guards change their scores.

`python -m tests.evaluation.ordinary [answers]` prints the figures: the scorer itself, in this process, against the one
that rollouts use. Nothing here is an attack, so that the scorer may be run as it is.
"""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Iterator
from typing import Any

from swift_kernels.evaluation.answer_grammar import may_be_executed
from swift_kernels.evaluation.evaluators import evaluators

PROSE = (
    *("", "I do not know", "no", "24", "0", "-1", "x", "None", "True", "The answer is 24.", "yes, it is", "N/A", "?"),
    *("[]", "()", "{}", "[1, 2, 3]", "[[0, 1], [1, 0]]", "1 2 3", "0 1\n1 0", "a b c", "{'a': 1}", '{"a": [1]}', "3.5"),
    *("print('hello')", "sorted([3, 1, 2])", "lambda x: x", "x if x else 1", "list(range(4))", "'ABC'", "A"),
    *(
        "\\frac{1}{2}",
        "$24$",
        "\\boxed{24}",
        "24 apples",
        "6 * 4 = 24",
        "six times four",
        "1,000",
        "5 > 3",
        "50%",
        "4!",
    ),
)


def executing() -> dict[str, frozenset[str]]:
    """The datasets whose scorers execute text, as far as reading tells, and what with; without those of datasets."""
    from reasoning_gym.factory import DATASETS

    found = {name: evaluators(dataset) for name, (dataset, _) in sorted(DATASETS.items())}
    return {name: what for name, what in found.items() if what and name != "composite"}


def answers(dataset: str, count: int, seed: int = 0) -> Iterator[tuple[Any, str]]:
    """So many entries and answers to them: right, in other ways of writing, nearly right, another's, and prose."""
    import reasoning_gym

    rng = random.Random(seed)
    entries = list(reasoning_gym.create_dataset(dataset, size=max(2, count // 10), seed=seed))
    for made in range(count):
        entry = entries[made % len(entries)]
        reference, other = str(entry["answer"]), str(rng.choice(entries)["answer"])
        ways = rewrites(reference) if made % 10 < 6 else rewrites(other) if made % 10 == 6 else near(reference, rng)
        yield entry, reference if made % 10 == 0 else rng.choice(PROSE) if made % 10 == 9 else rng.choice(ways)


def rewrites(reference: str) -> list[str]:
    """Other ways to write an answer: harmless to a reader, not always to a scorer."""
    rows = [line.split() for line in reference.splitlines()]
    flat = [item for row in rows for item in row]
    return [
        *(reference, f" {reference} ", f"({reference})", f"{reference}.", f"{reference};", f"${reference}$"),
        *(f"= {reference}", f"{reference} = 24", f"{reference} = y", f"`{reference}`", f"\\boxed{{{reference}}}"),
        *(f"The answer is {reference}", f"'{reference}'", f'"{reference}"', f"**{reference}**", f"+{reference}"),
        *(reference.replace("**", "^"), reference.replace("*", "\N{MULTIPLICATION SIGN}"), reference.replace("/", "÷")),
        *(reference.replace("*", ""), reference.replace("*", " "), reference.replace("*", " * ")),
        *(reference.replace(" ", ""), reference.replace("-", "\N{MINUS SIGN}"), reference.replace("+ C", "+ K")),
        *(reference.replace(" + C", ""), reference.replace("+ C", "+ c0"), reference.replace("+ C", "+ constant")),
        *(reference.replace("+ C", "+ C_1"), f"C + {reference.removesuffix(' + C')}", reference.replace("log", "ln")),
        *(f"1*({reference})", f"({reference})/1", f"({reference}) + 0", f"sqrt(({reference})**2)", f"{reference}!"),
        *(reference.replace("sqrt(x)", "x**(1/2)"), reference.replace("/2", "*0.5"), reference.replace("exp(", "E**(")),
        *(re.sub(r"(\d+)/(\d+)", r"Rational(\1, \2)", reference), re.sub(r"\*\*(\d+)", r"^{\1}", reference)),
        *(str(rows).replace("'", ""), str(rows), str(flat), str(flat).replace("'", ""), ", ".join(flat)),
        *(str(list(reference)), str(tuple(reference)), "".join(flat), "\n".join(map(" ".join, rows)), "; ".join(flat)),
        *(reference.lower(), reference.upper(), reference.replace("0x", "0X"), reference.replace("'", '"')),
    ]


def near(reference: str, rng: random.Random) -> list[str]:
    """What one slip makes of an answer."""
    cut = rng.randrange(max(1, len(reference)))
    numbers = [*re.finditer(r"\d+", reference), *re.finditer(r"\Z", reference)]
    number = rng.choice(numbers[:-1] or numbers)
    return [
        reference[:cut] + reference[cut + 1 :],
        reference[: cut + 1] + reference[cut : cut + 1] + reference[cut + 1 :],
        reference[: number.start()] + str(int(number[0] or 0) + 1) + reference[number.end() :],
        *(f"{reference} + 1", f"-({reference})", f"2*({reference})", reference[::-1], f"{reference} {reference}"),
        *(reference.replace("+", "-", 1), reference.replace("*", "+", 1), reference.replace("(", "", 1)),
        *(str(list(reference))[:-1], str(reference.split())[1:], f"[{reference}]", f"({reference}"),
    ]


def scored(dataset: Any, answer: str, entry: Any) -> float:
    """The score as a scorer gives it; 0 where it fails."""
    try:
        return float(dataset.score_answer(answer, entry))
    except Exception:  # a scorer may raise anything
        return 0.0


def compared(name: str, count: int, seed: int = 0) -> tuple[int, int, list[tuple[str, float, float]]]:
    """How many answers a dataset's scorer was fed, how many are right, and those graded otherwise than before.

    An answer counts as graded otherwise if it is no longer right or wrong as it was, or if it was fed and has another
    score.
    """
    import reasoning_gym

    from swift_kernels.evaluation.tasks.gym_scorer import Scorer

    scorer, dataset = Scorer(time_limit=60.0), reasoning_gym.create_dataset(name, size=1, seed=0)
    fed, right, changed = 0, 0, []
    for entry, answer in answers(name, count, seed):
        before, after = scored(dataset, answer, entry), scorer.score(name, {}, answer, entry)
        accepted = may_be_executed(answer, evaluators(type(dataset)))
        fed, right = fed + accepted, right + (before >= 1)
        if (before >= 1) != (after >= 1) or (accepted and before != after):
            changed.append((answer, before, after))
    scorer.close()
    return fed, right, changed


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    for name, what in executing().items():
        fed, right, changed = compared(name, count)
        print(f"{name}: {count} answers, {fed} fed, {right} right, {len(changed)} changed; {', '.join(sorted(what))}")
        for answer, before, after in changed[:10]:
            print(f"    {answer!r}: {before} -> {after}")


if __name__ == "__main__":
    main()
