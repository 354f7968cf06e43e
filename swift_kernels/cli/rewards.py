"""What other reward models say of rollouts: `swift-kernels reward`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from swift_kernels.cli.app import Device, Dtype, Json, app


@app.command()
def reward(
    rollouts: Annotated[Path, typer.Argument(help="Rollouts of `swift-kernels rollout` or of the authors' code.")],
    reward_model: Annotated[str, typer.Option(help="A folder or Hub id of a sequence classifier of transformers.")],
    output: Annotated[Path, typer.Option(help="JSONL file; an unfinished one is continued.")],
    label: Annotated[int | None, typer.Option(help="Index of the label that is the reward, of several.")] = None,
    batch_size: Annotated[int, typer.Option(help="Answers a forward.")] = 16,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Let a reward model judge the answers in rollouts, to compare with and to combine: its rewards and their cost.

    An interrupted run goes on where it was.
    """
    from swift_kernels import files
    from swift_kernels.cli import render
    from swift_kernels.cli.app import _at_least, _check_placement
    from swift_kernels.evaluation.rewards import RewardWriter, read_rewards
    from swift_kernels.integrations.reward_model import load_reward_model, reward_rollouts
    from swift_kernels.training.rollouts import read

    _at_least("--batch-size", batch_size, 1)
    files.check_replaceable(output, rollouts)
    file = read(rollouts)
    chosen = _check_placement(device, dtype)
    with files.alone(output):
        model = load_reward_model(reward_model, label=label, dtype=chosen, device=device)
        made = {key: value for key, value in file.header.items() if key not in ("format", "version")}
        with RewardWriter(output, {**model.settings(), "rollouts": made}, file.rollouts) as writer:
            if writer.done:
                render.note(f"{output}: continuing after {len(writer.done)} problems")
            with render.progress("reward", len(file.rollouts)) as update:
                reward_rollouts(model, file.rollouts, writer, batch_size, update)
    result = read_rewards(output, file.rollouts)
    for line in result.notes:
        render.note(line)
    cost = result.cost
    assert cost is not None
    candidates = sum(map(len, result.values))
    facts = {
        "output": str(output),
        "problems": len(result.values),
        "candidates": candidates,
        "without_reward": sum(value != value for row in result.values for value in row),
        "answers": cost.answers,
        "parameters": cost.parameters,
        "device": cost.device,
        "tokens": cost.tokens,
        "seconds": cost.seconds,
        "flops": cost.flops,
        "seconds_per_answer": cost.seconds / cost.answers if cost.answers else None,
        "flops_per_answer": cost.flops / cost.answers if cost.answers else None,
    }
    render.emit(
        facts,
        as_json,
        f"{output}: {len(result.values)} problems, {candidates} answers, {cost.answers} of them read ({cost.tokens:,} "
        "tokens), equal ones once",
        f"{result.name}: {cost.parameters:,} parameters"
        + (
            f"; an answer takes {cost.seconds / cost.answers:.3g} s on {cost.device} and "
            f"{cost.flops / cost.answers:.3g} FLOPs"
            if cost.answers
            else "; no answer was read"
        ),
    )
