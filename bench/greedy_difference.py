"""How often greedy tokens change when scores are taken inside the model's norms, in bfloat16.

    python bench/greedy_difference.py [--answers 1000] [--json] [--device cpu]

SmolLM2 answers sums greedily: the stock model, and `attach(model, head, fuse="norm")`. For scale, the stock model
again in batches of another size: matrix multiplications change their last bits with the batch, too. Once a token
differs what follows is another answer, so tokens are compared up to the first that differs.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import common
import torch

from swift_kernels import SwiftHead, attach
from swift_kernels.evaluation.tasks import get_task
from swift_kernels.integrations.models import load_model

BATCH, OTHER_BATCH = 64, 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=1000)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--device", help="cpu or cuda; by default cuda where there is one")
    options = parser.parse_args()
    device = common.choose_device(options.device)
    model, tokenizer = load_model("smollm2", torch.bfloat16, device)
    head = SwiftHead.for_model(model)
    stock = answers(model, tokenizer, options.answers, BATCH)
    with attach(model, head, fuse="norm") as scorer:
        fused = answers(model, tokenizer, options.answers, BATCH)
        described = scorer.describe()
    other = answers(model, tokenizer, options.answers, OTHER_BATCH)
    result = {
        "environment": common.environment(device),
        "scorer": described,
        "answers": options.answers,
        "norm": compare(stock, fused),
        f"stock in batches of {OTHER_BATCH}": compare(stock, other),
    }
    path = common.write_result(device, "greedy_difference", result)
    if options.json:
        print(json.dumps(result))
        return
    print(described)
    for name in ("norm", f"stock in batches of {OTHER_BATCH}"):
        found = result[name]
        print(
            f"{name}: {found['answers_that_differ']} of {options.answers} greedy answers differ from the stock model's "
            f"in batches of {BATCH}; {found['tokens_that_differ']} of {found['tokens_compared']} tokens compared "
            f"({found['tokens_that_differ'] / found['tokens_compared']:.3%})"
        )
    print(path)


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


def compare(before: list[list[int]], after: list[list[int]]) -> dict[str, int]:
    differ = compared = 0
    for first, second in zip(before, after, strict=True):
        same = next((i for i, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1]), None)
        if same is None and len(first) == len(second):
            compared += len(first)
        else:
            differ += 1
            compared += min(len(first), len(second)) if same is None else same + 1
    return {"answers_that_differ": differ, "tokens_that_differ": differ, "tokens_compared": compared}


if __name__ == "__main__":
    main()
