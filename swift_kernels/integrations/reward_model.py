"""Reward models that are sequence classifiers of transformers, run over the answers of rollouts.

What such a model reads is, in this order: a chat of the prompt and the answer, where its tokenizer has a chat template;
the two as a pair, where the tokenizer has a separator, as those of encoders do; otherwise the answer right after the
prompt, as one text.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from swift_kernels import features
from swift_kernels.evaluation.rewards import ProblemRewards, RewardWriter
from swift_kernels.hub import first_line
from swift_kernels.integrations.compatibility import check_token_ids
from swift_kernels.integrations.flops import flop_counter
from swift_kernels.integrations.models import hub_id
from swift_kernels.progress import Update
from swift_kernels.training.rollouts import Rollout

CHAT, PAIR, TEXT = "chat template", "pair", "text"

PROBES, LONG_PROBE = (8, 16, 24), 512
"""Lengths at which a forward's FLOPs are counted: three make a parabola, a longer one says whether it is one."""

_TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken", "tokenization_*.py")
_NO_TOKENIZER = "has no vocabulary, every word would be unknown to it: expected the files of its tokenizer beside it"


class RewardModelError(ValueError):
    """A reward model that cannot be used; the message says what would do."""


Parabola = tuple[Fraction, Fraction, Fraction]
"""Coefficients, the constant first."""


@dataclass(frozen=True)
class _Flops:
    """Of a forward, both by its length: what all rows share, such as the angles of rotary embeddings, and of a row."""

    shared: Parabola
    a_row: Parabola

    def __call__(self, rows: int, length: int) -> int:
        shared, a_row = (
            constant + linear * length + square * length**2 for constant, linear, square in (self.shared, self.a_row)
        )
        return int(shared + rows * a_row)


class RewardModel:
    """A sequence classifier, one of whose labels is the reward.

    Attributes:
        name: Hub id, or the name of the folder.
        label: index of the label that is the reward.
        output: "logit", or "log-probability" where the labels exclude each other: then a label's own logit says
            nothing without the others.
        reads: `CHAT`, `PAIR` or `TEXT`.
        context: tokens that it takes at most, or None where neither it nor its tokenizer says.
        parameters: their number.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str, label: int | None = None) -> None:
        self.name = name
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        # Without gradients, for which the counter of FLOPs would put hooks on parameters that a module is given.
        self._model, self._tokenizer = model.eval().requires_grad_(False), tokenizer
        self.label = _check_label(model.config, name, label)
        exclusive = model.config.problem_type in (None, "single_label_classification")
        self.output = "log-probability" if model.config.num_labels > 1 and exclusive else "logit"
        if getattr(tokenizer, "chat_template", None):
            self.reads = CHAT
        else:
            self.reads = PAIR if tokenizer.sep_token_id is not None else TEXT
        self.context = _context(model, tokenizer)
        # What the model itself takes for padding, by which some find their last token and their positions.
        pad = features.text_config(model).pad_token_id
        self._pad = pad if pad is not None and pad >= 0 else None
        self._takes = inspect.signature(model.forward).parameters
        self._flops: _Flops | None = None
        self._probed = False

    @property
    def device(self) -> str:
        """Of the model, by which timings are told apart: a GPU's name."""
        device = self._model.device
        return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type

    def settings(self) -> dict[str, Any]:
        """All of the model that decides about rewards and what they cost, for the header of a file."""
        return {
            "reward_model": {
                "name": self.name,
                "architecture": type(self._model).__name__,
                "parameters": self.parameters,
            },
            "label": self.label,
            "output": self.output,
            "reads": self.reads,
            "dtype": str(self._model.dtype).removeprefix("torch."),
            "weights": _digest(self._model),
            "device": self.device,
        }

    @torch.inference_mode()
    def score(self, prompt: str, answers: Sequence[str], batch_size: int = 16) -> ProblemRewards:
        """Rewards of the answers to one prompt, `batch_size` of them in a forward; equal ones are read once.

        An answer that does not fit the context with its prompt has NaN: cut off, it would be another answer. So has
        one that cannot be encoded: it is the answer's fault, and those after it are read all the same.
        """
        if not self._probed:
            made = (self._try_to_encode(prompt, answer) for answer in answers)
            if (row := next((row for row in made if not isinstance(row, str)), None)) is not None:
                self._probe(row)
        started = time.perf_counter()
        encoded = {answer: self._try_to_encode(prompt, answer) for answer in dict.fromkeys(answers)}
        inputs = {answer: row for answer, row in encoded.items() if not isinstance(row, str)}
        rewards = dict.fromkeys(encoded, math.nan)
        fitting = [a for a in inputs if self.context is None or len(inputs[a]["input_ids"]) <= self.context]
        fitting.sort(key=lambda answer: len(inputs[answer]["input_ids"]))
        tokens = flops = 0
        for start in range(0, len(fitting), batch_size):
            batch = fitting[start : start + batch_size]
            found, own = self._forward([inputs[answer] for answer in batch])
            rewards.update(zip(batch, found, strict=True))
            flops += own
            tokens += sum(len(inputs[answer]["input_ids"]) for answer in batch)
        return ProblemRewards(
            rewards=[rewards[answer] for answer in answers],
            answers=len(fitting),
            too_long=sum(answer in inputs and answer not in fitting for answer in answers),
            tokens=tokens,
            seconds=time.perf_counter() - started,
            flops=flops,
            unreadable=sum(answer not in inputs for answer in answers),
            why=next((row for row in encoded.values() if isinstance(row, str)), None),
        )

    def _try_to_encode(self, prompt: str, answer: str) -> dict[str, list[int]] | str:
        """What the model reads, or why there is nothing that it could."""
        try:
            return self._encode(prompt, answer)
        except MemoryError:
            raise
        except Exception as error:  # each tokenizer and chat template has its own
            return first_line(error)

    def _encode(self, prompt: str, answer: str) -> dict[str, list[int]]:
        if self.reads == CHAT:
            chat = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
            encoded = self._tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True)
        elif self.reads == PAIR:
            encoded = self._tokenizer(prompt, answer)
        else:
            encoded = self._tokenizer(prompt + answer)
        ids = list(encoded["input_ids"])
        if not ids:
            raise RewardModelError("prompt and answer have no tokens: expected at least one")
        check_token_ids(self._model, ids, "an answer with its prompt")
        given = {"input_ids": ids}
        if "token_type_ids" in encoded and "token_type_ids" in self._takes:
            given["token_type_ids"] = list(encoded["token_type_ids"])
        return given

    def _forward(self, rows: Sequence[dict[str, list[int]]]) -> tuple[list[float], int]:
        """The rewards of a batch, and the FLOPs."""
        inputs = self._collate(rows)
        if self._flops is None:
            with flop_counter() as counter:
                logits = self._model(**inputs).logits
            flops = counter.get_total_flops()
        else:
            logits = self._model(**inputs).logits
            flops = self._flops(*inputs["input_ids"].shape)
        return self._rewards(logits).tolist(), flops

    def _collate(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, Any]:
        longest = max(len(row["input_ids"]) for row in rows)
        left = self._tokenizer.padding_side == "left"
        pad = self._pad
        if pad is None:
            # Decoders take the last token that is no padding, so nothing that ends an answer may be padding.
            last = {row["input_ids"][-1] for row in rows}
            own = self._tokenizer.pad_token_id
            pad = next(token for token in (own, *range(len(last) + 1)) if token is not None and token not in last)
            features.text_config(self._model).pad_token_id = pad
        fill = {"input_ids": pad, "token_type_ids": getattr(self._tokenizer, "pad_token_type_id", 0)}

        def padded(values: list[int], value: int) -> list[int]:
            padding = [value] * (longest - len(values))
            return padding + values if left else values + padding

        columns = {key: [padded(row[key], fill[key]) for row in rows] for key in rows[0]}
        columns["attention_mask"] = [padded([1] * len(row["input_ids"]), 0) for row in rows]
        inputs: dict[str, Any] = {
            key: torch.tensor(values, device=self._model.device) for key, values in columns.items()
        }
        if left and "position_ids" in self._takes:
            inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        if "use_cache" in self._takes:
            inputs["use_cache"] = False
        return inputs

    def _rewards(self, logits: Tensor) -> Tensor:
        logits = logits.float()
        return (logits.log_softmax(1) if self.output == "log-probability" else logits)[:, self.label]

    def _probe(self, row: dict[str, list[int]]) -> None:
        """Finds the FLOPs of a forward by its rows and length, which is also what warms the device up.

        With dense attention they are a parabola in the length for what all rows share, and one for each row, so that a
        few short forwards under the counter say what all others take, without its overhead in what is timed. Where a
        longer one says otherwise, as of attention in windows, each forward is counted as it runs.
        """
        self._probed = True
        longest = min(LONG_PROBE, self.context or LONG_PROBE)
        if longest <= PROBES[-1]:
            return

        def count(rows: int, length: int) -> int:
            with flop_counter() as counter:
                # Its last tokens, which some models look for, and others before them.
                self._model(**self._collate([{key: (ids * length)[-length:] for key, ids in row.items()}] * rows))
            return counter.get_total_flops()

        one, two = ([count(rows, length) for length in PROBES] for rows in (1, 2))
        found = _Flops(
            _fit_parabola(PROBES, [2 * alone - pair for alone, pair in zip(one, two, strict=True)]),
            _fit_parabola(PROBES, [pair - alone for alone, pair in zip(one, two, strict=True)]),
        )
        if found(2, longest) == count(2, longest):
            self._flops = found


def load_reward_model(
    name: str,
    *,
    label: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> RewardModel:
    """Loads a sequence classifier of transformers and its tokenizer.

    Args:
        name: a folder or a Hub id.
        label: index of the label that is the reward; needed where there are several.
        dtype: by default float32 on the CPU and bfloat16 on a GPU.
        device: by default the GPU where there is one.

    Raises:
        RewardModelError: when it cannot be loaded, or was not trained as a sequence classifier.
    """
    try:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer
    except ImportError as error:
        raise ImportError("reward models need transformers: pip install 'swift_kernels[transformers]'") from error

    if not Path(name).is_dir() and hub_id(name) is None:
        raise RewardModelError(f"reward model {name!r} does not exist: expected a folder or a Hub id")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    folder = Path(name)
    if folder.is_dir() and (folder / "config.json").is_file() and not _has_tokenizer_file(folder):
        raise RewardModelError(f"reward model {name!r} {_NO_TOKENIZER}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model, info = AutoModelForSequenceClassification.from_pretrained(name, dtype=dtype, output_loading_info=True)
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # a damaged file has one of its own in each format
        raise RewardModelError(f"reward model {name!r} cannot be loaded: {first_line(error)}") from error
    # Without its files transformers makes a tokenizer of the special tokens, to which every word is unknown; those of
    # SentencePiece have the sign for a space too.
    if not tokenizer.get_vocab().keys() - {*tokenizer.all_special_tokens, "\u2581"}:
        raise RewardModelError(f"reward model {name!r} {_NO_TOKENIZER}")
    if info["missing_keys"]:
        raise RewardModelError(
            f"reward model {name!r} is no sequence classifier, it lacks {sorted(info['missing_keys'])[0]}: expected "
            "one that was trained to give rewards"
        )
    return RewardModel(model.to(device), tokenizer, folder.resolve().name if folder.is_dir() else name, label)


def reward_rollouts(
    model: RewardModel, rollouts: Sequence[Rollout], writer: RewardWriter, batch_size: int, update: Update
) -> None:
    """Writes the rewards of those rollouts that the writer does not have yet, problem by problem.

    Raises:
        RuntimeError, RewardModelError: when the model fails at a problem; the problems before it are kept.
    """
    update(len(writer.done))
    for rollout in rollouts:
        if rollout.id in writer.done:
            continue
        try:
            found = model.score(rollout.prompt, [candidate.text for candidate in rollout.candidates], batch_size)
        except (Exception, KeyboardInterrupt) as error:
            held = f"{len(writer.done)} problems are in {writer.path}, the same command continues"
            if isinstance(error, KeyboardInterrupt):
                raise KeyboardInterrupt(held) from None
            if isinstance(error, torch.OutOfMemoryError):
                held += f", with a --batch-size below {batch_size} in less memory"
            # Wrong input or a failure, as the exit code tells them apart.
            kind = RewardModelError if isinstance(error, ValueError) else RuntimeError
            raise kind(f"problem {rollout.id!r}: the reward model failed: {first_line(error)}; {held}") from error
        writer.write(rollout, found)
        update(len(writer.done))


def _has_tokenizer_file(folder: Path) -> bool:
    return any(True for pattern in _TOKENIZER_FILES for _ in folder.glob(pattern))


def _check_label(config: Any, name: str, label: int | None) -> int:
    count = config.num_labels
    if label is None:
        if count == 1:
            return 0
        names = ", ".join(f"{index} {config.id2label.get(index, '')}".strip() for index in range(count))
        raise RewardModelError(f"reward model {name!r} has {count} labels ({names}): say which one is the reward")
    if not 0 <= label < count:
        raise RewardModelError(f"label is {label}: expected 0..{count - 1}, reward model {name!r} has {count} of them")
    return label


def _context(model: Any, tokenizer: Any) -> int | None:
    limit = getattr(features.text_config(model), "max_position_embeddings", None)
    if limit is None:
        limit = tokenizer.model_max_length
        return limit if limit < 10**9 else None  # a tokenizer that does not know says 1e30
    for name, module in model.named_modules():
        # RoBERTa and its like begin to count behind the padding's index.
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return module.num_embeddings - module.padding_idx - 1
    return limit


def _fit_parabola(lengths: Sequence[int], counts: Sequence[int]) -> Parabola:
    """That of three points at even distances, exactly."""
    (x0, x1, _), (y0, y1, y2) = lengths, counts
    step = x1 - x0
    square = Fraction(y2 - 2 * y1 + y0, 2 * step**2)
    linear = Fraction(y1 - y0, step) - square * (x0 + x1)
    return y0 - linear * x0 - square * x0**2, linear, square


def _digest(model: nn.Module) -> str:
    """Of a few values of each parameter: a model that was trained further has another."""
    values = []
    for parameter in model.parameters():
        flat = parameter.detach().flatten()
        values.append(flat[:: max(1, flat.numel() // 8)][:8].float().tolist())
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]
