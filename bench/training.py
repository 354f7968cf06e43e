"""What training wins: a page made from what `swift-kernels ablate --output` wrote.

python -m bench.training          writes bench/results/training/README.md
python -m bench.training --check  says whether it is up to date
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from swift_kernels import files
from swift_kernels.cli.render import p_value
from swift_kernels.cli.stores import TITLES
from swift_kernels.evaluation.compare import SELECTOR_NAMES

FOLDER = Path(__file__).parent / "results" / "training"
PAGE = FOLDER / "README.md"


def page() -> str:
    """The page, from the JSON files beside it."""
    lines = [
        "# What training wins",
        "",
        "Every table is made from the JSON file that it names, by `python -m bench.training`. Heads are fitted to one "
        "activation store and evaluated on problems that they never saw, several seeds each: percent of picks that are "
        "right, with 95% intervals from resampling problems and seeds, and p of a two-sided sign-flip test over "
        "problems, not corrected for making several comparisons. What a head is ahead of the base by is paired by "
        "problem and seed.",
    ]
    for path in sorted(FOLDER.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        lines += ["", f"## {content['title']}", "", f"[`{path.name}`]({path.name}), made by:", "", "```sh"]
        lines += [*content["commands"], "```", ""]
        lines += _cost(content["runs"]) if "runs" in content else _ablation(content)
    return "\n".join([*lines, ""])


def _ablation(content: dict[str, Any]) -> list[str]:
    base = content["results"][0]
    n = max(base["accuracy"], key=int)
    recipe = base["variant"]["recipe"]
    lines = [
        f"Base: {recipe['loss']}, start {recipe['start']}, {content['train_problems']} problems; "
        f"{content['test_problems']} test problems, {content['seeds']} seeds.",
        "",
        f"| picked by | N = {n} | the base is ahead by | p |",
        "|---|---:|---:|---:|",
    ]
    for key, name in SELECTOR_NAMES.items():
        row = base["accuracy"] if key == "swift" else content["baselines"].get(key)
        if row is not None:
            lead = content["leads"].get(key)
            lines.append(f"| {name} | {_percent(row[n])} | " + ("| |" if lead is None else _gain(lead)))
    for axis, title in TITLES.items():
        own = [result for result in content["results"] if result["variant"]["axis"] == axis]
        if own:
            lines += ["", f"| {title} | N = {n} | ahead of the base by | p | within-problem AUC | ahead by (p) |"]
            lines.append("|---|---:|---:|---:|---:|---:|")
            for result in (base, *own):
                gain = "| | " if result["difference"] is None else _gain(result["difference"]) + " "
                auc = "{mean:.3f} ({low:.3f}-{high:.3f})".format(**result["auc"])
                lead = result["auc_difference"]
                ahead = "" if lead is None else f"{lead['mean']:+.3f} ({p_value(lead['p'])})"
                name = result["variant"]["name"]
                lines.append(f"| {name} | {_percent(result['accuracy'][n])} | {gain}{auc} | {ahead} |")
    return lines


def _cost(runs: dict[str, dict[str, Any]]) -> list[str]:
    lines = ["| way | tokens fed to the LLM for the fit | epochs | wall time |", "|---|---:|---:|---:|"]
    return lines + [
        f"| {name} | {run['llm_tokens']:,} | {run['epochs']} | {run['seconds']:.0f} s |" for name, run in runs.items()
    ]


def _percent(estimate: dict[str, float]) -> str:
    return "{:.1f} ({:.1f}-{:.1f})".format(*(100 * estimate[key] for key in ("mean", "low", "high")))


def _gain(difference: dict[str, float]) -> str:
    points = "{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * difference[key] for key in ("mean", "low", "high")))
    return f"{points} | {p_value(difference['p'])} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit with 1 where the page is not current"
    )
    if not parser.parse_args().check:
        files.write_text(PAGE, page())
        return 0
    current = PAGE.is_file() and PAGE.read_text(encoding="utf-8") == page()
    print(f"{PAGE.name} is {'current' if current else 'not current: run python -m bench.training'}", file=sys.stderr)
    return 0 if current else 1


if __name__ == "__main__":
    sys.exit(main())
