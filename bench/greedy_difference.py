"""Counts how often greedy tokens change when scores are taken inside the model's norms, in bfloat16.

    python -m bench.greedy_difference [--answers 1000]

SmolLM2 answers sums greedily: the stock model, and `attach(model, head, fuse="norm")`. For scale, the stock model
again in batches of another size: matrix multiplications change their last bits with the batch, too. Once a token
differs what follows is another answer, so tokens are compared up to the first that differs.
"""

from __future__ import annotations

from typing import Any

import torch

from bench import harness
from bench.harness import Bench
from bench.results import Case, Labels
from swift_kernels import SwiftHead, attach
from swift_kernels.evaluation.tasks import get_task
from swift_kernels.integrations.models import ModelError, load_model

BATCH, OTHER_BATCH = 64, 40


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--answers", type=harness.count, help="1000 unless told")
    options = parser.parse_args()
    with Bench("greedy_difference", options) as bench:
        count = options.answers or (8 if bench.quick else 1000)
        labels: Labels = {"model": "SmolLM2-135M", "answers": count}
        if bench.wants(labels):
            measure(bench, labels, count)


def measure(bench: Bench, labels: Labels, count: int) -> None:
    try:
        model, tokenizer = load_model("smollm2", torch.bfloat16, bench.device)
    except ModelError as error:  # its weights come in a package
        bench.leave_out([labels], str(error))
        return
    stock = answers(model, tokenizer, count, BATCH)
    with attach(model, SwiftHead.for_model(model), fuse="norm"):
        fused = answers(model, tokenizer, count, BATCH)
    contenders = {
        'fuse="norm"': fused,
        f"stock, batches of {OTHER_BATCH}": answers(model, tokenizer, count, OTHER_BATCH),
    }
    found = {f"stock, batches of {BATCH}": (0, sum(map(len, stock)))}
    found |= {name: compare(stock, each) for name, each in contenders.items()}
    differ: dict[str, list[float | None]] = {name: [answers_differ] for name, (answers_differ, _) in found.items()}
    compared = {name: float(tokens) for name, (_, tokens) in found.items()}
    reference = f"stock, batches of {BATCH}"
    bench.add(Case(labels, reference, differ, "answers that differ", metrics={"tokens compared": compared}))


@torch.no_grad()
def answers(model: Any, tokenizer: Any, count: int, batch: int) -> list[list[int]]:
    task = get_task("sums")
    prompts = [task.prompt(problem.question) for problem in task.problems("all", count)]
    found: list[list[int]] = []
    for start in range(0, count, batch):
        inputs = tokenizer(prompts[start : start + batch], return_tensors="pt", padding=True).to(model.device)
        output = model.generate(**inputs, do_sample=False, max_new_tokens=task.max_new_tokens)
        for row in output[:, inputs["input_ids"].shape[1] :].tolist():
            end = row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else len(row)
            found.append(row[:end])
    if len(found) != count:
        raise SystemExit(f"the task has {len(found)} problems: ask for no more")
    return found


def compare(before: list[list[int]], after: list[list[int]]) -> tuple[int, int]:
    """How many answers differ, and how many tokens were compared until they did."""
    differ = compared = 0
    for first, second in zip(before, after, strict=True):
        same = next((i for i, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1]), None)
        if same is None and len(first) == len(second):
            compared += len(first)
        else:
            differ += 1
            compared += min(len(first), len(second)) if same is None else same + 1
    return differ, compared


if __name__ == "__main__":
    main()
