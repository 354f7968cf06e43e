"""Other ways to write an answer, and answers that nearly are it.

Each line of the tables is a reference and answers to it, separated by ` | `. `python -m tests.evaluation.rewrites`
prints how many of the tables' answers, and of those made by rule from the benchmarks' references, are graded rightly.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, NamedTuple

from swift_kernels.evaluation.graders import MathGrader
from tests.shared_data import shared_rows

EQUIVALENT = r"""
\frac{1}{2} | 0.5 | \dfrac12 | 1/2 | .5 | \tfrac{2}{4} | ½ | 50\% | \frac 1 2
-\frac{35}{9} | \frac{-35}{9} | -35/9 | -3\frac{8}{9} | -\dfrac{35}{9}
1\frac{4}{5} | 1.8 | 1 4/5 | \frac{9}{5} | 1 \frac45
137 \frac{1}{2} | 137.5 | 137\frac12 | \frac{275}{2}
\frac{1}{3} | 0.333333 | 0.\overline{3} | 2/6
\frac{9}{100} | 0.09 | 9\% | .09
.0000672 | 6.72 \times 10^{-5} | 0.0000672 | 6.72e-5
326.5 | \frac{653}{2} | 326\frac{1}{2}
18 | \$18 | 18.00 | 18 apples | 18\text{ apples per day} | $18$ | x = 18 | 18. | 17+1=18 | +18 | **18** | (18)
18 | x\approx18
8 | 2^3 | 2**3 | \sqrt{64} | \boxed{8} | \{8\}
5 | \text{5 cm} | 5\ \mathrm{m} | 5 m | \text{Area} = 5 | AB=5
120 | 5! | 1.2\times10^2 | \binom{10}{3}
50 | 50\% | 50 percent | 50\text{ percent}
50\% | 0.5 | 50 | \frac12
10,\!080 | 10080 | 10,080 | 10{,}080 | 10\,080 | 10 080
11,\! 111,\! 111,\! 100 | 11,111,111,100 | 11111111100
58,500 | 58500 | \$58,500 | 58500.0
\$32,\!348 | 32348 | \$32,348 | 32,348 \text{ dollars}
\$18.90 | 18.9 | \$18.90 | $18.90 | 18.90\text{ dollars}
5.4 \text{ cents} | 5.4 | 5.4\text{ cents} | 5.40 cents
864 \mbox{ inches}^2 | 864 | 864 \text{ square inches} | 864\text{ in}^2 | 864\text{ sq in}
15\mbox{ cm}^2 | 15 \text{ cm}^{2} | 15 cm^2 | 15\,\mathrm{cm}^2 | 15 cm²
60\text{ mph} | 60\text{ miles per hour} | 60 mph | 60\text{ miles/hour}
\frac{270}7\text{ degrees} | \frac{270}{7}^\circ | \frac{270}{7}
90^\circ | 90 | 90^{\circ} | 90\text{ degrees} | 90 degrees | 90° | \angle ABC = 90^\circ
1,-2 | -2, 1 | \{1,-2\} | x = 1 \text{ or } x = -2 | 1 \text{ and } -2 | x=-2,1 | 1; -2 | \left\{-2, 1\right\}
3, 5, 7 | 7,5,3 | 3, 5, \text{ and } 7 | 3, 5 and 7 | (3,5,7)
1 \pm \sqrt{19} | 1+\sqrt{19}, 1-\sqrt{19} | 1-\sqrt{19}, 1+\sqrt{19} | x = 1 \pm \sqrt{19} | 1 ± √19
\{1\pm\sqrt{5},-2\} | -2, 1+\sqrt5, 1-\sqrt5 | \{-2, 1\pm\sqrt{5}\}
(6,31,-1) | (6, 31, -1) | \left(6,31,-1\right) | \langle 6,31,-1\rangle | 6, 31, -1
\left( 3, \frac{\pi}{2} \right) | (3,\pi/2) | (3,\frac{1}{2}\pi) | (r,\theta)=(3,\pi/2)
(3,4] | \left(3, 4\right] | 3 < x \le 4 | x \in (3,4] | 3<x\leq 4
\left(\frac{3}{5},\frac{8}{3}\right] | (0.6, \frac{8}{3}] | (3/5,8/3]
x \in [-2,7] | [-2,7] | -2 \le x \le 7 | -2\leq x\leq 7 | \lbrack -2, 7 \rbrack
(2,\infty) | x > 2 | (2, +\infty) | (2, infinity) | 2<x
(-\infty, 2) \cup (3, \infty) | (3,\infty) \cup (-\infty,2) | x < 2 \text{ or } x > 3
(0,9) \cup (9,36) | \left(0, 9\right)\cup\left(9,36\right) | x \in (0,9)\cup(9,36)
\begin{pmatrix} -2 \\ 5 \end{pmatrix} | \begin{bmatrix}-2\\5\end{bmatrix} | (-2, 5) | \begin{array}{c}-2\\5\end{array}
\begin{pmatrix}-1/3\\2/3\end{pmatrix} | (-\frac13,\frac23) | \frac13\begin{pmatrix}-1\\2\end{pmatrix}
\begin{pmatrix}1&2\\0&1\end{pmatrix} | \begin{bmatrix}1&2\\0&1\end{bmatrix} | -\begin{pmatrix}-1&-2\\0&-1\end{pmatrix}
x=5 | 5 | x = 5 | 5.0
y = 2x + 3 | 2x+3 | y=3+2x | y - 2x = 3
5x - 7y + 11z + 4 = 0 | -5x+7y-11z-4=0 | 5x - 7y + 11z = -4
3\sqrt{13} | \sqrt{117} | 3\sqrt13 | 3*sqrt(13) | 3 \sqrt {13} | 3√13
\frac{\sqrt{3}}{3} | \frac{1}{\sqrt{3}} | \sqrt{3}/3 | \sqrt{\frac13} | \dfrac{\sqrt3}{3}
2\sqrt{5} | 2 \cdot 5^{1/2} | \sqrt{20} | 2\times\sqrt5
\text{(C)} | C | \text{C} | (C) | \textbf{(C)} | \text{(C) } 17 | C.
\text{Evelyn} | Evelyn | \textbf{Evelyn} | \mathrm{Evelyn}
\text{east} | East | east | \text{ East. }
\text{ellipse} | \text{an ellipse} | Ellipse | \mbox{ellipse}
52_8 | 52_{8} | 52 | (52)_8 | 52_{ 8 }
6 - 5i | -5i+6 | 6-5i | (6-5i)
\cot x | \frac{1}{\tan x} | \frac{\cos x}{\sin x} | \cot(x)
x^3+3x-6 | -6+3x+x^3 | x^3 + 3x - 6 | x^{3}+3(x-2)
(a+5)(b+2) | ab+2a+5b+10 | (b+2)(a+5) | (a+5) \cdot (b+2)
p - q | -q+p | p-q
288 \pi | 288\pi | 288pi | 288π | \pi \cdot 288
\frac{20000}{\pi} | 20000/\pi | \frac{1}{\pi}\cdot 20000
\frac{11+9a}{20} | \frac{9a}{20}+\frac{11}{20} | (11+9a)/20
\emptyset | \varnothing | \{\}
5000000 | 5\text{ million} | 5 million | \$5 million | 5 million dollars | 5{,}000\text{ thousand}
\$2,500,000 | \$2.5\text{ million} | 2.5 million dollars | 2.5\times10^6
18 | *18* | `18` | ***18***
3x | 3 x | *3x*
1 4/5 | \frac{18}{10} | 1+\frac45 | 3 - 1 1/5
5 houses | 5 house
5 buses | 5\text{ bus}
5 boxes | 5\text{ box}
1000x | 1 000 x | 1000 x
60 | 5\text{ dozen} | 5 dozen eggs
\frac{5}{2} | 5 halves | 25 tenths | 250\text{ hundredths}
5 | 5 times | 5 units squared | 5 dollars less | 5 apples more
18 \text{ apples} | 18 apples | 18 red apples | 18 apples per day | 18 | 18 units
5 \text{ people} | 5 persons | 5
"""

NEAR_MISSES = r"""
\frac{1}{2} | 2 | -\frac{1}{2} | 0.51 | \frac{1}{2}x | 5\% | 0.5\% | \frac{1}{20} | 1, 2
\frac{1}{3} | 0.33 | 3 | 0.3 | \frac{1}{3}\pi
5 | -5 | 6 | 4 | 50 | 0.05 | 500 | 5:6 | 5x | 5_3, 2 | \text{none} | \text{five apples} | \frac{5}{ | | 5, 6 | 5.0001
50\% | \$50 | 5\% | 50^\circ | 5
50 | 0.5 | 5 | 500\% | \frac{1}{50}
12 | 1, 2 | (1,2) | 21 | 12\sqrt{2} | 12i
1,234 | 1.234 | 1234.5 | 1,2,3,4 | 12.34
1234 | (1,234) | \{1,234\} | 1243
3 | 3c | c | 3t | 3^3 | 3 \neq 4
3c | 3 | 3d | 3+c | c^3
.0000672 | .0000673 | .000672 | 0.00007 | 6.72 \times 10^{5}
10^{-6} | 0.0000012 | 0.00001
\pi | 3.14 | 3.1416 | 2\pi | \frac{22}{7}
1\frac{4}{5} | \frac{4}{5} | 14/5 | 1.45 | 1 \cdot \frac{4}{5}
58,500 | 58.5 | 5850 | 58,501 | (58,500)
5.4 \text{ cents} | 5.4 \text{ dollars} | \$5.4 | 54 \text{ cents}
15\mbox{ cm}^2 | 15\text{ cm} | 15\text{ m}^2 | 15\text{ cm}^3 | 15\text{ mm}^2
864 \mbox{ inches}^2 | 864 \text{ square feet} | 864\text{ inches} | 6\text{ square feet}
60\text{ mph} | 60\text{ km/h} | 60\text{ miles} | 60\text{ feet per second}
90^\circ | 91^\circ | \frac{\pi}{2} | 90\text{ radians}
1,-2 | 1 | 1,2 | 1,-2,3 | -1,2 | \{1\} | x=1, y=2
3, 5, 7 | 3, 5 | 3, 5, 8 | 3, 5, 7, 9 | (7,5,3)
1 \pm \sqrt{19} | 1+\sqrt{19} | 1 \pm \sqrt{17} | -1 \pm \sqrt{19} | 19 \pm 1
\{1\pm\sqrt{5},-2\} | 1\pm\sqrt5 | 1\pm\sqrt5, 2 | \{1+\sqrt5, -2\}
(6,31,-1) | (31,6,-1) | (6,31) | (6,31,1) | \{6,31,-1\} | [6,31,-1] | -1, 31, 6
(-2,1) | (1,-2) | (-2,1,0) | (2,1) | [-2,1] | \{-2,1\}
(3,4] | [3,4] | (3,4) | [3,4) | 3<x<4 | \{3,4\} | (4,3] | 3, 4
x \in [-2,7] | (-2,7) | -2 < x < 7 | [-7,2] | x \notin [-2,7]
(2,\infty) | [2,\infty) | (-\infty,2) | x \ge 2 | x < 2 | 2 | (2,3)
(-\infty, 2) \cup (3, \infty) | (-\infty, 2) | (-\infty, 2] \cup (3, \infty) | (-\infty, 3) \cup (2, \infty) | x<2
\begin{pmatrix} -2 \\ 5 \end{pmatrix} | \begin{pmatrix}5\\-2\end{pmatrix} | \begin{pmatrix}-2&5\end{pmatrix} | (5, -2)
\begin{pmatrix}1&2\\3&4\end{pmatrix} | \begin{pmatrix}1&3\\2&4\end{pmatrix} | \begin{pmatrix}1\\2\\3\\4\end{pmatrix}
x=5 | y=5 | x=-5 | x>5 | x = 5, 6
y = 2x + 3 | y = 2x - 3 | x = 2y+3 | 3 | y = 3x + 2 | y > 2x+3 | f(x) = 2x+3
5x - 7y + 11z + 4 = 0 | 5x + 7y + 11z + 4 = 0 | 5x - 7y + 11z = 4
3\sqrt{13} | 13\sqrt{3} | \sqrt{39} | 3\sqrt[3]{13} | 39
\sqrt{2} | 1.41 | 2 | \sqrt{3} | \frac{1}{\sqrt{2}}
\text{(C)} | D | (B) | \text{(E)} | \text{(D) } 17 | \text{(C) or (D)}
\text{Evelyn} | Navin | \text{Eve} | \text{Evelyn and Navin}
\text{east} | seat | west | \text{eats} | \text{southeast}
\text{even} | odd | \text{neither} | \text{never}
52_8 | 52_7 | 53_8 | 25_8 | 42
6 - 5i | 6+5i | 5-6i | -6+5i | 6-5
\cot x | \tan x | \cot y | \cos x | \frac{\sin x}{\cos x}
x^3+3x-6 | x^3+3x+6 | x^3+3x-5 | x^2+3x-6 | y^3+3y-6
(a+5)(b+2) | (a+2)(b+5) | (a-5)(b+2) | ab+10 | (a+5, b+2)
p - q | q-p | p+q | pq | p
288 \pi | 288 | 144\pi | 288\pi^2 | \frac{288}{\pi}
\frac{11+9a}{20} | \frac{11+9b}{20} | \frac{9+11a}{20} | \frac{11+9a}{10}
\emptyset | 0 | \{0\} | \{1\}
5 | 5 thousand | 5\text{ million} | 5 hundred | 5 halves | 5 tenths | 5 squared | 5\text{ cubed} | 5 factorial | 5 plus
5 | 5 minus x | 5 more than x | 5 less than | 5\text{ or more} | 5 or more | 5 at least | 5\text{ dozen} | 5 times x
5 | 5 doubled | 5 thousand five hundred | 5 x y z | 5 sin x | 5 apples more than x
25 | 5 squared | 5\text{ squared}
18 \text{ apples} | 18 oranges | 18 cm | 17 apples | \$18 | 18\%
5 cm | 5 apples | 5 m
5 | 5 cm, 5 m | 5 apples, 5 oranges
6 | 6_7, 6_8
1234 | 12 34 | 1 234 5 | 1 2 3 4
9 | 1 8 | 18/2 1
18 | 1 8
"""


def pairs(table: str) -> list[tuple[str, str]]:
    """(reference, answer) of each answer in a table."""
    lines = (line.split(" | ") for line in table.strip().splitlines())
    return [(reference, answer.strip()) for reference, *answers in lines for answer in answers]


_INTEGER = re.compile(r"-?\d+")
_FRACTION = re.compile(r"(-?)\\d?frac\{(\d+)\}\{(\d+)\}")
_ROOT = re.compile(r"(\d*)\s*\\sqrt\{(\d+)\}")
_BRACKETS = re.compile(r"(?:x \\in )?(?:\\left)?([(\[])(.*?)(?:\\right)?([)\]])")
_TERM = re.compile(r"[+-]?[^+-]+")
_POLYNOMIAL = re.compile(r"[0-9a-zA-Z^ +-]*[a-zA-Z][0-9a-zA-Z^ +-]*[+-][0-9a-zA-Z^ +-]*")
_MATRIX = re.compile(r"\\begin\{pmatrix\}(.*)\\end\{pmatrix\}")


def rewrites(answer: str) -> Iterator[str]:
    """Answers that mean the same."""
    yield f"{{{answer}}}" if _INTEGER.fullmatch(answer) else f" {answer} "
    if _INTEGER.fullmatch(answer):
        number = int(answer)
        yield from (
            f"{number}.0",
            f"{number}.",
            f"\\frac{{{3 * number}}}{{3}}",
            f"x = {number}",
            f"{number}\\text{{ units}}",
        )
        yield from (f"\\${number}", f"{number - 7} + 7", f"$ {number} $", f"{number:,}".replace(",", "{,}"))
        yield from (f"{number:,}", f"{number:,}".replace(",", ",\\!"))
    if fraction := _FRACTION.fullmatch(answer):
        sign, above, below = fraction[1], int(fraction[2]), int(fraction[3])
        yield from (
            f"{sign}{above}/{below}",
            f"{sign}\\dfrac{{{above}}}{{{below}}}",
            f"\\frac{{{sign}{above}}}{{{below}}}",
        )
        yield from (
            f"{sign}\\tfrac{{{2 * above}}}{{{2 * below}}}",
            f"{sign}{above / below:.12f}",
            f"{sign}{above} \\div {below}",
        )
        if above > below:
            yield f"{sign}{above // below}\\frac{{{above % below}}}{{{below}}}"
    if root := _ROOT.fullmatch(answer):
        outer, inner = int(root[1] or 1), int(root[2])
        yield from (f"\\sqrt{{{outer**2 * inner}}}", f"{outer}\\cdot\\sqrt{{{inner}}}", f"{outer} \\sqrt {{{inner}}}")
        yield f"{outer} \\cdot {inner}^{{\\frac{{1}}{{2}}}}"
    if (inside := _BRACKETS.fullmatch(answer)) and "," in inside[2]:
        opening, content, closing = inside.groups()
        yield f"\\left{opening}{content}\\right{closing}".replace(",", ", ")
        yield f"{opening}{content}{closing}".replace(" ", "").replace("\\frac", "\\dfrac")
        if "]" in closing or "[" in opening:
            low, high = content.split(",")
            signs = {"(": "<", "[": "\\leq", ")": "<", "]": "\\le"}
            yield f"{low} {signs[opening]} x {signs[closing]} {high}"
    if _list(answer):
        parts = answer.split(",")
        yield from (", ".join(reversed(parts)), f"\\{{{answer}\\}}", " \\text{ and } ".join(parts))
        yield " \\text{ or } ".join(f"x = {part}" for part in parts)
    if _MATRIX.fullmatch(answer):
        yield answer.replace("pmatrix}", "bmatrix}").replace(" ", "")
        yield answer.replace("pmatrix}", "bmatrix}").replace("/", " / ")
    if answer.endswith("^\\circ"):
        number = answer.removesuffix("^\\circ")
        yield from (number, f"{number}^{{\\circ}}", f"{number}\\text{{ degrees}}", f"{number}°")
    if word := re.fullmatch(r"\\text\{\(?(\w+)\)?\}", answer):
        yield from (
            word[1],
            f"\\textbf{{{word[1]}}}",
            f"\\mathrm{{{word[1]}}}",
            word[1].capitalize(),
            f"\\text{{ {word[1]} }}",
        )
    if base := re.fullmatch(r"(\d+)_\{?(\d)\}?", answer):
        yield from (f"{base[1]}_{{{base[2]}}}", f"{base[1]}_{base[2]}", base[1])
    if _POLYNOMIAL.fullmatch(answer):
        yield " + ".join(f"({term.strip()})" for term in reversed(_TERM.findall(answer.replace(" ", ""))))
        yield f"\\left({answer}\\right)"


def near_misses(answer: str) -> Iterator[str]:
    """Answers that mean something else."""
    last = next(reversed(list(re.finditer(r"\d+", answer))), None)
    if last:
        yield f"{answer[: last.start()]}{int(last[0]) + 1}{answer[last.end() :]}"
    if _INTEGER.fullmatch(answer):
        number = int(answer)
        yield from (f"{number - 1}", f"{number}.5", f"{number}, {number + 1}")
        if number:
            yield from (
                f"{number}x",
                f"{number}\\sqrt{{2}}",
                f"{-number}",
                f"{10 * number}",
                f"{100 * number}",
                f"{Fraction(number, 100)}",
                f"\\frac{{1}}{{{number + 1}}}",
            )
    if fraction := _FRACTION.fullmatch(answer):
        sign, above, below = fraction.groups()
        yield from (f"{sign}\\frac{{{below}}}{{{above}}}", f"{'' if sign else '-'}\\frac{{{above}}}{{{below}}}")
        yield from (
            f"{sign}{above}",
            f"{sign}\\frac{{{above}}}{{{below}0}}",
            f"{sign}{int(above) / int(below) + 0.001:.6f}",
        )
    if root := _ROOT.fullmatch(answer):
        yield from (
            f"-{answer}",
            f"{root[2]}\\sqrt{{{int(root[1] or 1) + 1}}}",
            root[2],
            f"{root[1]}\\sqrt[3]{{{root[2]}}}",
        )
    if (inside := _BRACKETS.fullmatch(answer)) and "," in inside[2]:
        opening, content, closing = inside.groups()
        parts = content.split(",")
        yield from (f"({','.join(parts[1:] + parts[:1])})", f"{opening}{content},7{closing}", parts[0])
        yield from (f"{o}{content}{c}" for o in "([" for c in ")]" if (o, c) != (opening, closing))
    if _list(answer):
        parts = answer.split(",")
        yield from (parts[0], ",".join(parts[1:]), f"{answer}, 77", ",".join([f"{parts[0]}+1", *parts[1:]]))
    if matrix := _MATRIX.fullmatch(answer):
        rows = matrix[1].split("\\\\")
        yield from (
            answer.replace(matrix[1], "\\\\".join(rows[1:])),
            answer.replace(matrix[1], "\\\\".join(reversed(rows))),
        )
    if answer.endswith("^\\circ"):
        yield f"-{answer}"
    if word := re.fullmatch(r"\\text\{(\(?)(\w+)\)?\}", answer):
        yield from (
            [f"({chr(ord(word[2]) + 1)})"] if word[1] else [word[2][::-1], f"{word[2]}s", "\\text{none}", word[2][1:]]
        )
    if base := re.fullmatch(r"(\d+)_\{?(\d)\}?", answer):
        yield from (f"{base[1]}_{int(base[2]) - 1}", f"{base[1]}0_{base[2]}", str(int(base[1], int(base[2]))))
    if _POLYNOMIAL.fullmatch(answer):
        yield from (f"-({answer})", f"{answer} + 1", re.sub("[a-z]", "w", answer, count=1), f"2({answer})")
    if "\\pi" in answer and "," not in answer:
        yield from (answer.replace("\\pi", "\\pi^2"), answer.replace("\\pi", "e"), f"-{answer}")


def _list(answer: str) -> bool:
    return re.fullmatch(r"-?\d+(?:, ?-?\d+)+", answer) is not None and not re.fullmatch(r"\d+(?:,\d{3})+", answer)


def from_references(references: list[str]) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Equivalent rewrites and near misses of references, each reference once, as (reference, answer)."""
    distinct = list(dict.fromkeys(references))
    same = [(reference, answer) for reference in distinct for answer in dict.fromkeys(rewrites(reference))]
    other = [(reference, answer) for reference in distinct for answer in dict.fromkeys(near_misses(reference))]
    return same, other


def misgraded(grader: MathGrader, cases: list[tuple[str, str]], equal: bool) -> list[tuple[str, str]]:
    """Those whose answer, boxed as models do it, is not graded as it should be."""
    texts = ((reference, answer, f"So the answer is $\\boxed{{{answer}}}$.") for reference, answer in cases)
    return [(reference, answer) for reference, answer, text in texts if grader.equal(text, reference) is not equal]


def report(grader: MathGrader, kind: str, cases: list[tuple[str, str]], equal: bool) -> list[tuple[str, str]]:
    """Prints the rate, and returns what is misgraded."""
    wrong = misgraded(grader, cases, equal)
    right = len(cases) - len(wrong)
    print(f"{kind}: {right} of {len(cases)} {'accepted' if equal else 'refused'} ({right / len(cases):.1%})")
    return wrong


class Labelled(NamedTuple):
    """A solution that a human judged, and what the grader says."""

    place: str
    solution: str
    reference: str
    label: bool
    verdict: bool


def graded_solutions(grader: MathGrader, rows: list[dict[str, Any]]) -> Iterator[Labelled]:
    """The four labelled solutions of each row of gsm8k_model_solutions.jsonl."""
    for line, row in enumerate(rows, start=1):
        reference = row["ground_truth"].rpartition("A:")[2].strip()
        for model, made in row.items():
            if isinstance(made, dict):
                solution = made["solution"]
                verdict = grader.equal(solution, reference)
                yield Labelled(f"line {line}, {model}", solution, reference, made["is_correct"], verdict)


def references(name: str) -> list[str]:
    return [row["answer"].rpartition("####")[2].strip() for row in shared_rows(name)]


def main() -> None:
    grader = MathGrader(time_limit=20.0)
    for kind, same, other in (
        ("tables", pairs(EQUIVALENT), pairs(NEAR_MISSES)),
        ("MATH-500", *from_references(references("math500.jsonl"))),
        ("GSM8K", *from_references(references("gsm8k_test.jsonl"))),
    ):
        wrong = report(grader, f"{kind}, rewrites", same, True) + report(grader, f"{kind}, near misses", other, False)
        for case in wrong:
            print("  misgraded:", *case, sep="  ")
    begin = time.perf_counter()
    graded = list(graded_solutions(grader, shared_rows("gsm8k_model_solutions.jsonl")))
    seconds = time.perf_counter() - begin
    differ = [one for one in graded if one.label is not one.verdict]
    agreement = 1 - len(differ) / len(graded)
    print(f"labelled solutions: {agreement:.2%} of {len(graded)} as the labels say, {seconds:.1f} s")
    for one in differ:
        print(f"  {one.place}: {one.solution[-60:]!r} for {one.reference!r}, label {one.label}, grader {one.verdict}")
    grader.close()


if __name__ == "__main__":
    main()
