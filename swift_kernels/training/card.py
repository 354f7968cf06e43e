"""The model card beside a head: data, recipe, figures on problems it never saw, limits."""

from __future__ import annotations

import json
import shlex
from typing import Any

from swift_kernels.evaluation.compare import SELECTOR_NAMES
from swift_kernels.evaluation.evaluate import Evaluation
from swift_kernels.evaluation.metrics import Difference
from swift_kernels.evaluation.wording import percent
from swift_kernels.features import HIDDEN_STATES
from swift_kernels.head import HeadConfig
from swift_kernels.training.fit import Fit, Recipe

_LOSSES = {
    "bce": "binary cross-entropy",
    "hinge": "hinge loss",
    "dpo": "DPO over pairs of a right and a wrong answer",
    "infonca": "InfoNCA",
    "nca": "NCA",
}


def model_card(
    config: HeadConfig,
    fit: Fit,
    recipe: Recipe,
    data: dict[str, Any],
    validation: Evaluation,
    test: Evaluation | None,
    repo_id: str | None = None,
) -> str:
    """The card, in the Hub's markdown with its YAML header; `repo_id` is where it will be on the Hub."""
    base = config.base_model or {}
    parameters = config.num_outputs * (config.num_features + 1)
    source = _source(config)
    lines = [
        "---",
        "library_name: swift_kernels",
        "tags: [swift, reward-model, best-of-n]",
        *([] if data["base_model"] is None else [f"base_model: {json.dumps(data['base_model'])}"]),
        "---",
        "",
        f"# SWIFT reward head for {base.get('name', 'a language model')}",
        "",
        f"Scores the answers of `{base.get('name')}` ({base.get('architecture')}) from {source} while they are "
        f"decoded: {parameters:,} parameters, {'gated' if config.gate else 'no gate'}, {config.dtype}. "
        "Method: [arXiv 2505.12225](https://arxiv.org/abs/2505.12225).",
        "",
        "```python",
        "from swift_kernels import SwiftHead, attach",
        "",
        f'head = SwiftHead.from_pretrained("{repo_id or "path/to/this/folder"}", model=model)',
        "with attach(model, head) as scorer:",
        "    output = model.generate(**inputs, do_sample=True, num_return_sequences=16)",
        "scores = scorer.scores()",
        "```",
        "",
        "## Data",
        "",
        f"{data['candidates']:,} answers to {data['problems']:,} problems"
        + (f" of the task `{config.task}`" if config.task else "")
        + f" ({data['rollouts']}), {data['correct'] / data['candidates']:.1%} of them right; "
        + _held_back(recipe, data),
        *_sampling(data["header"]),
        *_stored(data["layout"]),
        "",
        "## Recipe",
        "",
        _recipe(recipe, fit),
        "",
        "## Results",
        "",
    ]
    if test is None:
        lines += [
            "On the validation problems, which early stopping looked at"
            + (" and other answers to which were trained on" if recipe.split == "candidate" else "")
            + (", by the head before it was trained again on all problems" if recipe.refit else "")
            + ": not an independent test.",
            "",
            *_results(validation),
        ]
    else:
        lines += [f"On {test.problems} problems it never saw ({data['test_rollouts']}):", "", *_results(test)]
    commands = _commands(config, recipe, data)
    if commands:
        lines += ["", "## Made with", "", "```sh", *commands, "```"]
    lines += [
        "",
        "## Limits",
        "",
        f"The head knows this model and {'this task' if config.task else 'its training data'}; elsewhere its scores "
        "mean nothing until measured. Scores order the answers to one problem. They are not calibrated, and answers to "
        "different problems should not be compared by them. How much is won depends on how many candidates are drawn: "
        "look at accuracy against N.",
        "",
    ]
    return "\n".join(lines)


def _held_back(recipe: Recipe, data: dict[str, Any]) -> str:
    if recipe.split == "candidate":
        return f"{recipe.validation:.0%} of the answers, whatever their problem, were held back for early stopping."
    return f"{data['validation_problems']:,} of the problems were held back for early stopping."


def _recipe(recipe: Recipe, fit: Fit) -> str:
    features = (
        "Features standardised over the training tokens, folded into the weights afterwards"
        if recipe.standardize
        else "Features as they are"
    )
    start = (
        "start from a ridge regression of the grades on the answers' mean features (penalty "
        f"{fit.penalty:g} of their mean squared length, chosen by the AUC within the held-out problems)"
        if recipe.start == "ridge"
        else "random start"
    )
    watched = "AUC within the held-out problems" if recipe.stop == "auc" else "held-out loss"
    ended = (
        f"it stopped after epoch {fit.history[-1].number}, {recipe.patience} epochs without a better {watched}"
        if fit.stopped_early
        else f"it ran all {fit.history[-1].number} epochs"
    )
    pace = "" if recipe.gate_pace == 1 else f" (the gate's is {recipe.gate_pace:g} of it)"
    kept = f"The weights are those of epoch {fit.kept.number}"
    if fit.kept.number == 0:
        kept += ", the start itself"
    if recipe.keep == "best":
        kept += f", which has the best {watched}"
    elif fit.kept != fit.best:
        kept += f", the last; epoch {fit.best.number} had the best {watched}"
    return (
        f"{features}; {start}; {_LOSSES[recipe.loss]} on the pooled scores; AdamW, learning rate "
        f"{recipe.learning_rate:g}{pace}, weight decay {recipe.weight_decay:g}, "
        f"{recipe.batch_size} answers a step, at most {recipe.epochs} epochs, seed {recipe.seed}; {ended}. {kept} "
        f"({fit.kept.held_out})."
        + (" Then it was trained again from the start on all problems, for as many epochs." if recipe.refit else "")
    )


def _results(evaluation: Evaluation) -> list[str]:
    ns = list(evaluation.accuracy)
    heads = ["picked by", *(f"N = {n}" for n in ns), "SWIFT is ahead by", "p"]
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
    for key, name in SELECTOR_NAMES.items():
        if key in evaluation.accuracy[evaluation.n]:
            ahead = evaluation.differences.get(f"swift - {key}")
            cells = [
                f"**{name}**" if key == "swift" else name,
                *(percent(evaluation.accuracy[n][key]) for n in ns),
                *(("", "") if ahead is None else _points(ahead)),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return [
        *lines,
        "",
        "Percent of picks that are right; in brackets 95% intervals, bootstrapped over problems; ties count in "
        f"expectation. How many points SWIFT is ahead is at N = {evaluation.n} and paired by problem; p is that of a "
        "two-sided sign-flip test over problems, not corrected for making several comparisons. "
        + "".join(f"{note}. " for note in evaluation.notes)
        + (
            f"Within-problem AUC {evaluation.auc.mean:.3f} ({evaluation.auc.low:.3f}-{evaluation.auc.high:.3f}) over "
            f"the {evaluation.mixed_problems} problems with right and wrong answers."
            if evaluation.mixed_problems
            else "No problem has right and wrong answers."
        ),
    ]


def _commands(config: HeadConfig, recipe: Recipe, data: dict[str, Any]) -> list[str]:
    """What to type to make the head again, where the rollouts record how they were made."""
    headers = [data["header"], data["test_header"] or {}]
    if not all("sampling" in header for header in headers[: 1 if data["test_rollouts"] is None else 2]):
        return []
    lines: list[str] = []
    stores = data.get("stores", (None, None))
    for header, name, problems, store in zip(
        headers,
        (data["rollouts"], data["test_rollouts"]),
        (data["problems"], data["test_problems"]),
        stores,
        strict=True,
    ):
        if name is not None:
            keep = "" if store is None else f" --store {store}{_store_options(data['layout'])}"
            if keep and lines and data["layout"]["sketch"]:
                keep += f" --sketch-of {stores[0]}"
            sampling = " ".join(f"--{key.replace('_', '-')} {value}" for key, value in header["sampling"].items())
            lines += [
                f"swift-kernels rollout --model {data['model']} --task {shlex.quote(header['task'])} \\",
                f"    --split {header['split']} \\",
                f"    --problems {problems} {sampling} {'--chat' if header['chat'] else '--no-chat'} \\",
                f"    --output {name}{keep}",
            ]
    layers = _selection(config)
    test = "" if data["test_rollouts"] is None else f" --test {data['test_rollouts']}"
    where = f"--model {data['model']}" + (" --on-the-fly" if data["on_the_fly"] else "")
    if stores[0] is not None:
        where += f" --store {stores[0]}" + ("" if stores[1] is None else f" --test-store {stores[1]}")
    return [
        *lines,
        f"swift-kernels train {data['rollouts']}{test} {where} --output head \\",
        f"    --layers {layers} {'--gate' if config.gate else '--no-gate'} --loss {recipe.loss} "
        f"--lr {recipe.learning_rate!r} --weight-decay {recipe.weight_decay!r} \\",
        f"    --batch-size {recipe.batch_size} --epochs {recipe.epochs} --patience {recipe.patience} "
        f"--validation {recipe.validation!r} --seed {recipe.seed} \\",
        f"    {'--standardize' if recipe.standardize else '--no-standardize'} --start {recipe.start} "
        f"--split {recipe.split} --stop {recipe.stop} --keep {recipe.keep} "
        f"{'--refit' if recipe.refit else '--no-refit'} --gate-pace {recipe.gate_pace!r}",
    ]


def _selection(config: HeadConfig) -> str:
    if config.top_logprobs is not None:
        return f"top_logprobs --top-logprobs {config.top_logprobs}"
    if config.layers is None:
        return "logits"
    layers = config.layers
    return "all" if len(layers) == (config.num_hidden_layers or 0) + 1 else ",".join(map(str, layers))


def _sampling(header: dict[str, Any]) -> list[str]:
    if "sampling" not in header:
        return []
    sampling = {"split": header["split"], "dtype": header["dtype"], **header["sampling"]}
    return ["", f"Sampled with `{json.dumps(sampling)}`."]


def _stored(layout: dict[str, Any] | None) -> list[str]:
    """How the features were kept that it was fitted to."""
    if layout is None:
        return []
    sketch = layout["sketch"]
    kept = (
        "whole" if sketch is None else f"as a sketch of {sketch['dimensions']} dimensions an entry ({sketch['method']})"
    )
    return ["", f"Fitted to activations that were kept while the answers were generated, {kept}, in {layout['dtype']}."]


def _store_options(layout: dict[str, Any]) -> str:
    layers = layout["layers"] or ()
    whole = bool(layers) and len(layers) == layout["num_hidden_layers"] + 1
    others = [source for source in layout["features"] if source != HIDDEN_STATES]
    chosen = ",".join(map(str, [*(["all"] if whole else layers), *others]))
    sketch = layout["sketch"]
    parts = f" --store-layers {chosen} --store-dtype {layout['dtype']}"
    return parts + (f" --sketch {sketch['method']}:{sketch['dimensions']}" if sketch else "")


def _source(config: HeadConfig) -> str:
    if config.top_logprobs is not None:
        return (
            f"its {config.top_logprobs} largest log-probabilities (with their entropy, the gap between the first two "
            "and the log-probability of the token sampled)"
        )
    return "the raw logits" if config.layers is None else f"hidden states {_layers(config.layers)}"


def _layers(layers: tuple[int, ...]) -> str:
    whole = layers == tuple(range(layers[0], layers[-1] + 1))
    return f"{layers[0]}..{layers[-1]}" if whole and len(layers) > 2 else ", ".join(map(str, layers))


def _points(difference: Difference) -> tuple[str, str]:
    p = "< 0.001" if difference.p < 0.001 else f"{difference.p:.3f}"
    return f"{100 * difference.mean:.1f} ({100 * difference.low:.1f} to {100 * difference.high:.1f})", p
