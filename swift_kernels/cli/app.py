"""The subcommands of `swift-kernels`. Heavy imports wait until a subcommand runs, so that `--help` is quick."""

from __future__ import annotations

import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="swift-kernels",
    help="Score a language model's answers while they are decoded, and pick the best.",
    add_completion=False,
    rich_markup_mode=None,
)

Model = Annotated[str, typer.Option(help="smollm2, gemma3-270m, a folder, a .gguf file or a Hub id.")]
Head = Annotated[str, typer.Option(help="A head's folder, Hub id, or the name of one that comes with the package.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ...; the GPU where there is one.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; by default float32 on the CPU.")]
Json = Annotated[bool, typer.Option("--json", help="Print facts for machines instead of tables.")]
AllowMismatch = Annotated[bool, typer.Option(help="Use the head although it was trained on another model.")]
TaskName = Annotated[
    str,
    typer.Option(
        help="sums, reasoning-gym:<dataset>[,shots=4,...], jsonl:<path>, or of the Hub math, gsm8k, aqua, imbue-code, "
        "hellaswag, coinflip; these also with :<path> of a JSONL file in the Hub's format."
    ),
]
TopP = Annotated[float, typer.Option(help="Nucleus sampling; 1 switches it off.")]
TopK = Annotated[int, typer.Option(help="Sample from the k likeliest tokens; 0 switches it off.")]


@app.command()
def rollout(
    model: Model,
    task: TaskName,
    output: Annotated[Path, typer.Option(help="JSONL file; an unfinished one is continued.")],
    split: Annotated[str, typer.Option(help="train, test or all; train and test never share a problem.")] = "train",
    problems: Annotated[int | None, typer.Option(help="How many problems; by default all of the split.")] = None,
    n: Annotated[int, typer.Option(help="Answers to each problem.")] = 8,
    temperature: float = 1.0,
    top_p: TopP = 0.9,
    top_k: TopK = 0,
    max_new_tokens: Annotated[int | None, typer.Option(help="By default what the task needs.")] = None,
    seed: Annotated[int, typer.Option(help="Of the choice of problems and of sampling.")] = 0,
    chat: Annotated[bool | None, typer.Option(help="Use the chat template; by default as the task says.")] = None,
    batch_size: Annotated[int, typer.Option(help="Answers decoded at once.")] = 64,
    store: Annotated[Path | None, typer.Option(help="Folder that keeps the activations, for `train --store`.")] = None,
    store_layers: Annotated[str, typer.Option(help="What it keeps: all or indices, logits, top_logprobs.")] = "all",
    store_dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    sketch: Annotated[str | None, typer.Option(help="Project each entry: random:64, or pca:64.")] = None,
    sketch_of: Annotated[Path | None, typer.Option(help="Store whose projections to use, as for test data.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Let a model answer a task's problems N times each, grade the answers, and store them.

    With --store the activations of their tokens are kept in the same pass. Under `accelerate launch` the processes
    share the problems. An interrupted run goes on where it was.
    """
    from swift_kernels import files, processes
    from swift_kernels.cli import render
    from swift_kernels.evaluation.tasks import check_generates, get_task
    from swift_kernels.training.collection import Job, collect_rollouts, keeping, largest_store
    from swift_kernels.training.generation import Sampling, settings
    from swift_kernels.training.rollouts import read
    from swift_kernels.training.store import make_layout

    chosen = check_generates(get_task(task))
    limit = chosen.max_new_tokens if max_new_tokens is None else max_new_tokens
    sampling = Sampling(n, temperature, top_p, top_k, limit, seed)
    _at_least("--batch-size", batch_size, 1)
    if store is None and (sketch or store_layers != "all"):
        raise ValueError("--sketch and --store-layers say what a store keeps: give its folder with --store")
    if sketch_of is not None and not sketch:
        raise ValueError("--sketch-of says whose projections to use: say what they are with --sketch")
    wanted = chosen.problems(split, problems, seed)
    chat = chosen.chat if chat is None else chat
    group = processes.join(device)
    if group.is_first:
        # What another job has is said before a model is loaded.
        with keeping(output), nullcontext() if store is None else files.alone(store, folder=True):
            pass
    lm, tokenizer = _load_model(model, device, dtype)
    header = settings(lm, chosen, sampling, split=split, chat=chat)
    layout = None if store is None else make_layout(lm, _parse_sources(store_layers), store_dtype, sketch)
    job = Job(lm, tokenizer, chosen, wanted, sampling, chat, header, output, batch_size, store, layout, sketch_of)
    if layout is not None and group.is_first:
        tokens, nbytes = largest_store(job)
        per_token = f"{len(layout.widths)} entries of {max(layout.stored_widths):,} {layout.dtype}"
        render.note(f"{store}: at most {tokens:,} tokens of {per_token}, {nbytes / 1e9:.2f} GB")
    with render.progress("rollout", len(wanted), quiet=not group.is_first) as update:
        continued = collect_rollouts(job, group, update, render.note)
    if not group.is_first:
        return
    rollouts = read(output).rollouts
    candidates = [candidate for item in rollouts for candidate in item.candidates]
    right = sum(candidate.correct for candidate in candidates)
    finished = sum(candidate.finished for candidate in candidates)
    facts = {
        "output": str(output),
        "problems": len(rollouts),
        "continued": continued,
        "candidates": len(candidates),
        "correct": right,
        "finished": finished,
    }
    render.emit(
        facts,
        as_json,
        f"{output}: {len(rollouts)} problems, {len(candidates)} answers, {right / len(candidates):.1%} right, "
        f"{finished / len(candidates):.1%} finished",
    )


@app.command()
def train(
    rollouts: Annotated[Path, typer.Argument(help="Rollouts of `swift-kernels rollout` or of the authors' code.")],
    output: Annotated[Path, typer.Option(help="Folder for the head and its card.")],
    model: Annotated[str | None, typer.Option(help="As for rollout; not needed with --store.")] = None,
    store: Annotated[Path | None, typer.Option(help="Activations that `rollout --store` kept: no LLM runs.")] = None,
    test_store: Annotated[Path | None, typer.Option(help="Those of the --test rollouts.")] = None,
    on_the_fly: Annotated[
        bool, typer.Option("--on-the-fly", help="Run the model again in every epoch: for what fits on no disk.")
    ] = False,
    layers: Annotated[str, typer.Option(help="all, indices such as 16,24 or -4,-1, logits, or top_logprobs.")] = "all",
    top_logprobs: Annotated[
        int | None, typer.Option(help="How many log-probabilities --layers top_logprobs reads; 20 if not given.")
    ] = None,
    gate: Annotated[bool, typer.Option(help="Weigh tokens by a gate, or take their plain mean.")] = True,
    test: Annotated[Path | None, typer.Option(help="Rollouts on other problems, to evaluate the head on.")] = None,
    recipe: Annotated[str, typer.Option(help="swift, or upstream for the paper's; the options below override it.")] = (
        "swift"
    ),
    loss: Annotated[str | None, typer.Option(help="bce, hinge, dpo, infonca or nca.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    weight_decay: float | None = None,
    batch_size: Annotated[int | None, typer.Option(help="Answers a step.")] = None,
    epochs: int | None = None,
    patience: Annotated[
        int | None, typer.Option(help="Epochs without a better held-out figure until it stops.")
    ] = None,
    validation: Annotated[float | None, typer.Option(help="Share that is held back for early stopping.")] = None,
    seed: int | None = None,
    standardize: Annotated[bool | None, typer.Option(help="Train on features of mean 0 and deviation 1.")] = None,
    start: Annotated[str | None, typer.Option(help="ridge or random.")] = None,
    split: Annotated[str | None, typer.Option(help="Hold back by problem or by candidate.")] = None,
    stop: Annotated[str | None, typer.Option(help="What is watched on the held-out side: auc or loss.")] = None,
    keep: Annotated[str | None, typer.Option(help="Weights of the best or of the last epoch.")] = None,
    refit: Annotated[bool | None, typer.Option(help="Then train again on all problems, for as many epochs.")] = None,
    gate_pace: Annotated[float | None, typer.Option(help="Learning rate of the gate, relative to the rest.")] = None,
    push: Annotated[str | None, typer.Option(help="Hub repository to upload the head and its card to.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Train a head on rollouts: the model runs once over them, not at all with --store, every epoch --on-the-fly.

    A fit that was interrupted goes on after its last whole epoch when the same command is given again. Under
    `accelerate launch` the first process trains, as it would alone.
    """
    from swift_kernels import files, hub, processes
    from swift_kernels.cli import render
    from swift_kernels.training import resume
    from swift_kernels.training.recipe import get_recipe
    from swift_kernels.training.rollouts import read
    from swift_kernels.training.store import Store
    from swift_kernels.training.train import CHECKPOINT_NAME, train_head, train_stored_head

    # The launcher waits for the first process; the others would run into the time limit of a barrier.
    if not processes.join(device).is_first:
        return
    _check_head_folder(output)
    chosen = get_recipe(
        recipe,
        loss=loss,
        learning_rate=lr,
        weight_decay=weight_decay,
        batch_size=batch_size,
        epochs=epochs,
        patience=patience,
        validation=validation,
        seed=seed,
        standardize=standardize,
        start=start,
        split=split,
        stop=stop,
        keep=keep,
        refit=refit,
        gate_pace=gate_pace,
    )
    train_file = read(rollouts)
    test_file = None if test is None else read(test)
    selection = _parse_layers(layers)
    if push is not None:
        # Now, not when the work of hours could not be uploaded.
        hub.check_access(push)
    options: dict[str, Any] = {
        "layers": selection,
        "gate": gate,
        "recipe": chosen,
        "test": test_file,
        "model_name": model,
        "checkpoint": output / CHECKPOINT_NAME,
        "progress": render.progress,
        "note": render.note,
    }
    with files.alone(output, folder=True):
        if store is not None:
            if on_the_fly:
                raise ValueError("--on-the-fly runs the model in every epoch, --store spares it: give one of them")
            if top_logprobs is not None or device is not None or dtype is not None:
                raise ValueError(
                    "--top-logprobs, --device and --dtype are for a model that runs: --store has what it had"
                )
            if (test is None) != (test_store is None):
                raise ValueError("--test and --test-store belong together: give both, or evaluate later with `eval`")
            other = None if test_store is None else Store(test_store)
            result = train_stored_head(Store(store), train_file, test_store=other, **options)
        elif test_store is not None:
            raise ValueError("--test-store is read with --store: give both, or --test alone")
        elif model is None:
            raise ValueError("--model is missing: expected the model that wrote the answers, or --store")
        else:
            lm, tokenizer = _load_model(model, device, dtype)
            result = train_head(lm, tokenizer, train_file, top_logprobs=top_logprobs, on_the_fly=on_the_fly, **options)
        result.save(output, push)
        # Not before: until then it is all that there is of the fit.
        resume.remove(output / CHECKPOINT_NAME)
    pushed, refusal = None, None
    if push is not None:
        try:
            pushed = result.push(output, push)
        except hub.HubError as error:
            refusal = error
    parts: list[Any] = [
        f"{output}: {result.head.config.num_outputs * (result.head.config.num_features + 1):,} parameters, epoch "
        f"{result.fit.kept.number} of {result.fit.history[-1].number}, {result.fit.kept.held_out}",
        f"tokens fed to the LLM for the features of the fit: {result.llm_tokens:,}",
    ]
    title = "test problems"
    if result.test is None:
        title = "validation problems" + (", before the refit" if chosen.refit else "")
        title += ", whose other answers it was trained on" if chosen.split == "candidate" else ""
    shown = result.test or result.validation
    parts += [
        render.evaluation_table(shown, f"Best-of-N accuracy on {shown.problems} {title}"),
        render.evaluation_lines(shown),
    ]
    if pushed is not None:
        parts.append(f"pushed: {pushed}")
    render.emit({"output": str(output), "pushed": pushed, **result.facts()}, as_json, *parts)
    if refusal is not None:
        raise refusal


@app.command(name="best-of")
def best_of(
    model: Model,
    head: Head,
    prompt: Annotated[str, typer.Option(help="The prompt, or - to read it from stdin.")],
    n: Annotated[int, typer.Option(help="Answers to choose from.")] = 16,
    task: Annotated[str | None, typer.Option(help="Put the prompt, as a problem, into this task's template.")] = None,
    chat: Annotated[bool, typer.Option(help="Use the chat template.")] = False,
    max_new_tokens: int | None = None,
    temperature: float = 1.0,
    top_p: TopP = 0.9,
    top_k: TopK = 0,
    seed: int | None = None,
    batch_size: Annotated[int | None, typer.Option(help="Answers decoded at once; by default all.")] = None,
    allow_mismatch: AllowMismatch = False,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Sample N answers to a prompt, score them while they are decoded, and print the best."""
    import torch
    from rich.table import Table
    from rich.text import Text

    from swift_kernels.cli import render
    from swift_kernels.evaluation.tasks import get_task
    from swift_kernels.selection.best_of_n import best_of_n
    from swift_kernels.training.generation import Sampling, cut_at_stop

    text = sys.stdin.read() if prompt == "-" else prompt
    if not text.strip():
        raise ValueError("the prompt is empty: give one with --prompt, or - to read stdin")
    template = None if task is None else get_task(task)
    stop: tuple[str, ...] = ()
    if template is not None:
        text, stop, chat = template.prompt(text.strip()), template.stop, chat or template.chat
    limit = (256 if template is None else template.max_new_tokens) if max_new_tokens is None else max_new_tokens
    Sampling(n, temperature, top_p, top_k, limit)
    lm, tokenizer = _load_model(model, device, dtype)
    reward_head = _load_head(head, lm, allow_mismatch)
    if seed is not None:
        torch.manual_seed(seed)
    with_template = chat and getattr(tokenizer, "chat_template", None)
    best = best_of_n(
        lm,
        tokenizer,
        [{"role": "user", "content": text}] if with_template else text,
        reward_head,
        n,
        max_new_tokens=limit,
        batch_size=batch_size,
        allow_mismatch=allow_mismatch,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        **({"stop_strings": list(stop)} if stop else {}),
    )
    chances = ["P(correct)"] if reward_head.config.is_calibrated else []
    table = Table("score", *chances, "tokens", "finished", "answer")
    for candidate in sorted(best.candidates, key=lambda c: -c.score if c.score == c.score else float("inf")):
        shown = " ".join(cut_at_stop(candidate.text, stop).split())
        finished = "yes" if candidate.finished else "no"
        chance = render.score_facts(reward_head, candidate.score).get("p_correct")
        cells = [f"{candidate.score:.4f}", *(["" if chance is None else f"{chance:.3f}"] if chances else [])]
        table.add_row(*cells, str(candidate.token_count), finished, Text(shown))
    facts = {
        "text": cut_at_stop(best.text, stop),
        **render.score_facts(reward_head, best.score),
        "candidates": [
            {
                "text": cut_at_stop(candidate.text, stop),
                **render.score_facts(reward_head, candidate.score),
                "token_count": candidate.token_count,
                "finished": candidate.finished,
                "token_ids": candidate.token_ids,
            }
            for candidate in best.candidates
        ],
    }
    render.emit(facts, as_json, Text(str(facts["text"]).strip()), table)


@app.command()
def score(
    file: Annotated[Path, typer.Argument(help="JSONL: a prompt with a response, or with responses, a line.")],
    model: Model,
    head: Head,
    output: Annotated[Path | None, typer.Option(help="File for the scored lines; by default stdout.")] = None,
    batch_size: Annotated[int, typer.Option(help="Answers a forward.")] = 16,
    allow_mismatch: AllowMismatch = False,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Score answers that exist already: the same lines come back with `score` (`scores` for `responses`).

    Prompts and responses are text or lists of token ids. `finished: false` marks a response that was cut off.
    """
    from swift_kernels import files
    from swift_kernels.cli import render
    from swift_kernels.cli.scoring import read_answers, score_lines

    _at_least("--batch-size", batch_size, 1)
    if output is not None:
        files.check_replaceable(output, file)
    rows = read_answers(file)
    lm, tokenizer = _load_model(model, device, dtype)
    reward_head = _load_head(head, lm, allow_mismatch)
    started = time.perf_counter()
    with render.progress("scoring", len(rows)) as update:
        lines = score_lines(lm, tokenizer, reward_head, rows, batch_size, allow_mismatch, update)
        if output is None:
            for line in lines:
                print(line, flush=True)
            return
        with files.replacing(output) as temporary, open(temporary, "w", encoding="utf-8") as written:
            for line in lines:
                written.write(line + "\n")
    seconds = time.perf_counter() - started
    facts = {"output": str(output), "lines": len(rows), "seconds": round(seconds, 3)}
    render.emit(facts, as_json, f"{output}: {len(rows)} lines scored in {seconds:.1f} s")


@app.command()
def demo(
    model: Model = "smollm2",
    head: Head = "smollm2-135m-sums",
    problems: Annotated[int, typer.Option(help="Sums to answer, none of which the head was trained on.")] = 40,
    n: Annotated[int, typer.Option(help="Answers to each.")] = 16,
    seed: int = 0,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """A small model answers sums it has not seen, scored while decoding: what the head sees, wins and costs."""
    from swift_kernels.cli import demo as show
    from swift_kernels.cli import render

    _at_least("--problems", problems, 1)
    _at_least("--n", n, 1)
    lm, tokenizer = _load_model(model, device, dtype)
    reward_head = _load_head(head, lm, False)
    result = show.run(lm, tokenizer, reward_head, problems, n, seed)
    render.emit(result.facts(), as_json, *show.parts(result))


def _load_model(name: str, device: str | None, dtype: str | None) -> tuple[Any, Any]:
    from swift_kernels.integrations.models import load_model

    chosen = _check_placement(device, dtype)
    return load_model(name, chosen, device)


def _check_placement(device: str | None, dtype: str | None) -> Any:
    """The dtype, before any model is loaded with it; then transformers says nothing but errors."""
    import torch

    from swift_kernels.head import DTYPES

    dtypes = {**DTYPES, "float16": torch.float16}
    if dtype is not None and dtype not in dtypes:
        raise ValueError(f"--dtype is {dtype!r}: expected one of {', '.join(dtypes)}")
    if device is not None:
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"--device {device!r} cannot be used: {str(error).splitlines()[0]}") from None
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return None if dtype is None else dtypes[dtype]


def _load_head(name: str, model: Any, allow_mismatch: bool) -> Any:
    from swift_kernels import checkpoint

    return checkpoint.load(name, model=model, allow_mismatch=allow_mismatch)


def _check_head_folder(output: Path) -> None:
    """Raises where a head would be written over what is none: another model's weights, or a project's README."""
    from swift_kernels import checkpoint
    from swift_kernels.training.train import CARD_NAME, CHECKPOINT_NAME

    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output} is a file: expected a folder, or a name for one")
    checkpoint.check_own(output)
    heads = (checkpoint.CONFIG_NAME, checkpoint.WEIGHTS_NAME, CHECKPOINT_NAME)
    if (output / CARD_NAME).exists() and not any((output / name).exists() for name in heads):
        raise ValueError(f"{output / CARD_NAME} is no head's and would be lost: expected another folder for the head")


_SOURCES = "all, logits, top_logprobs or "


def _parse_layers(text: str) -> str | list[int]:
    return text if text in ("all", "logits", "top_logprobs") else _parse_integers("--layers", text, _SOURCES)


def _parse_sources(text: str) -> list[str | int]:
    """Layers and other sources, such as "all,logits" or "16,24,top_logprobs"."""
    parts = text.split(",")
    layers = [part for part in parts if part not in ("logits", "top_logprobs")]
    sources = [part for part in parts if part not in layers]
    if layers in ([], ["all"]):
        return [*layers, *sources]
    try:
        return [*map(int, layers), *sources]
    except ValueError:
        raise ValueError(f"--store-layers is {text!r}: expected {_SOURCES}integers separated by commas") from None


def _parse_integers(option: str, text: str, others: str = "") -> list[int]:
    """`others` names what may stand there instead, for the message."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} is {text!r}: expected {others}integers separated by commas") from None


def _at_least(option: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{option} is {value}: expected at least {least}")
