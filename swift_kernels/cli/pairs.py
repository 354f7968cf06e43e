"""`swift-kernels pairs`: stored answers that people compared, as rollouts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from swift_kernels.cli.app import Json, app


@app.command()
def pairs(
    task: Annotated[
        str, typer.Option(help="pku-saferlhf:helpful or pku-saferlhf:safe; with :<path>, of a JSONL file.")
    ],
    output: Annotated[Path, typer.Option(help="Rollout file; one that is there is replaced.")],
    split: Annotated[str, typer.Option(help="train, test or all; train and test never share a prompt.")] = "train",
    problems: Annotated[int | None, typer.Option(help="How many pairs; by default all of the split.")] = None,
    seed: Annotated[int, typer.Option(help="Of the choice of pairs.")] = 0,
    as_json: Json = False,
) -> None:
    """Write pairs of stored answers as rollouts, of which the preferred one is right: no model runs.

    `train --model ... --loss dpo` fits a head to the preferences, and `eval` at N=2 is how often it shares them.
    """
    from swift_kernels import files
    from swift_kernels.cli import render
    from swift_kernels.evaluation.tasks import get_pairs
    from swift_kernels.training.rollouts import Response, Rollout, RolloutWriter

    chosen = get_pairs(task)
    # What stands after the name and the aspect is a file.
    files.check_replaceable(output, *task.split(":", 2)[2:])
    wanted = chosen.problems(split, problems, seed)
    header = {"task": chosen.name, "split": split, "chat": chosen.chat, "seed": seed}
    with files.replacing(output) as temporary, RolloutWriter(temporary, header) as writer:
        for problem in wanted:
            candidates = [
                Response(None, text, finished=True, correct=preferred, answer=chosen.extract(text, problem))
                for text, preferred in chosen.answers(problem)
            ]
            prompt = chosen.prompt(problem.question)
            writer.write(Rollout(problem.id, problem.key, prompt, problem.answer, None, candidates))
    facts = {"output": str(output), "problems": len(wanted), "candidates": 2 * len(wanted)}
    render.emit(facts, as_json, f"{output}: {len(wanted)} pairs of {chosen.name}")
