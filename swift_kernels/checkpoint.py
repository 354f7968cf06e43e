"""Heads on disk and on the Hub: `config.json` + `model.safetensors`, and the authors' `.pt` files.

A checkpoint carries a fingerprint of the model it was trained on, so that it is not attached to another one.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swift_kernels import features, files, hub
from swift_kernels.head import DTYPES, HeadConfig, SwiftHead, check_finite

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
FORMAT_VERSION = 1
LAYERS_CONVENTION = (
    "Hugging Face hidden_states: 0 is the input of the first decoder layer, num_hidden_layers the model's final output"
)

PACKAGED_HEADS = Path(__file__).parent / "heads"
"""Heads that ship with the package, a folder each."""

FINGERPRINT_VALUES = 64
SAME_TOLERANCE = 0.01
"""Relative distance below which values count as the same weights: bfloat16 rounds within 0.004, 8-bit blocks within
0.005."""
RELATED_TOLERANCE = 0.3
"""Above this, the values belong to another model (unrelated vectors are 1.4 apart); in between, to a fine-tune or to
weights quantised to very few bits."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file, what is wrong, and what to do."""


class ModelMismatchError(CheckpointError):
    """The head was trained on another model."""


def save(head: SwiftHead, path: str | Path) -> None:
    """Writes `head` into the folder `path`: the weights first, the config last, each replaced atomically."""
    check_finite(head, "not saved")
    if head.weight.dtype != DTYPES[head.config.dtype]:
        raise ValueError(
            f"the weights are {head.weight.dtype}, the config says {head.config.dtype}: convert with "
            "head.with_config(dtype=...)"
        )
    _safetensors()  # or it says what to install
    folder = Path(path)
    files.write_tensors(folder / WEIGHTS_NAME, head.state_dict())
    config = {"format_version": FORMAT_VERSION, "layers_convention": LAYERS_CONVENTION, **head.config.to_dict()}
    files.write_text(folder / CONFIG_NAME, json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def load(path: str | Path, *, model: Any | None = None, allow_mismatch: bool = False, **options: Any) -> SwiftHead:
    """Loads a head from a folder, by the name of one that ships with the package, or from the Hub.

    With `model`, its fingerprint is compared with the one of the head, and the head is moved to its device. `options`
    are what the Hub's download takes: revision, token, cache_dir and so on.

    Raises:
        CheckpointError: a file is missing, truncated, has missing or extra keys, or holds non-finite weights.
        ModelMismatchError: `model` is not the one the head was trained on, and `allow_mismatch` is False.
    """
    if not str(path):
        raise CheckpointError("the path of the head is empty: expected a folder, a packaged head or a Hub id")
    if Path(path).suffix in (".pt", ".pth", ".bin"):
        raise CheckpointError(f"{path} is a pickle: load heads of the authors' code with SwiftHead.from_upstream")
    folder = next((place for place in (Path(path), PACKAGED_HEADS / path) if place.is_dir()), None)
    if folder is None:
        folder = _download(str(path), **options)
    config = _read_config(folder / CONFIG_NAME)
    _check_size(folder / WEIGHTS_NAME, config)
    head = SwiftHead(config)
    head.load_state_dict(_read_weights(folder / WEIGHTS_NAME, head))
    check_finite(head, str(folder / WEIGHTS_NAME))
    head.requires_grad_(False)
    if model is not None:
        check_model(head, model, allow_mismatch=allow_mismatch)
        head.to(model.get_input_embeddings().weight.device)
    return head


def push(head: SwiftHead, repo_id: str, **options: Any) -> str:
    """Uploads `head` to the Hub (`options`: token, private, revision, ...) and returns the address of the commit."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        save(head, folder)
        return hub.upload(folder, repo_id, [CONFIG_NAME, WEIGHTS_NAME], **options)


def load_upstream(
    path: str | Path,
    *,
    model: Any,
    layers: str | Sequence[int] = "all",
    apply_norm: bool | None = None,
) -> SwiftHead:
    """Loads a `.pt` file of the authors' code (`fused_layer.*`, or `reward_layer.*` without a gate).

    Args:
        path: the file.
        model: the model it was trained on; upstream files do not record it.
        layers: as in `SwiftHead.for_model`: the `--layers` it was trained with, or "logits" for `--logits_mode`.
        apply_norm: whether it was trained with `--apply_norm`; by default, read off the file's name.

    Upstream finds the scored span by stripping chat template strings, which outside Llama-3 starts a token late and
    adds an end-of-turn to truncated answers; scores here follow `span="fed"` and can differ by those tokens.
    """
    if apply_norm or (apply_norm is None and "_norm_" in Path(path).name):
        raise CheckpointError(
            f"{path} was trained with --apply_norm, which normalises every layer once more: such features are not "
            "computed here (pass apply_norm=False if the file's name misleads)"
        )
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist: expected a .pt file of the authors' code") from None
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path} holds more than tensors and was not loaded: {hub.first_line(error)}") from None
    except Exception as error:  # unpickling damaged bytes can raise anything
        raise CheckpointError(f"{path} cannot be read, is it truncated? {hub.first_line(error)}") from None
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise CheckpointError(f"{path} holds a {type(tensors).__name__}: expected a state dict of tensors")
    gate = "fused_layer.weight" in tensors
    name = "fused_layer" if gate else "reward_layer"
    expected = {f"{name}.weight", f"{name}.bias"}
    if set(tensors) != expected:
        raise CheckpointError(
            f"{path} has keys {sorted(map(str, tensors))}: expected fused_layer.weight and fused_layer.bias, or "
            "reward_layer.weight and reward_layer.bias"
        )
    head = SwiftHead.for_model(model, layers, gate=gate)
    for parameter, key in ((head.weight, f"{name}.weight"), (head.bias, f"{name}.bias")):
        if not tensors[key].is_floating_point() or tensors[key].layout != torch.strided:
            raise CheckpointError(
                f"{path}: {key} is {tensors[key].dtype}, {tensors[key].layout}: expected dense floats"
            )
        if tensors[key].shape != parameter.shape:
            raise CheckpointError(
                f"{path}: {key} has shape {list(tensors[key].shape)}: expected {list(parameter.shape)} for layers "
                f"{layers!r} of {type(model).__name__}"
            )
        parameter.data.copy_(tensors[key])
    check_finite(head, str(path))
    return head.requires_grad_(False)


def save_upstream(head: SwiftHead, path: str | Path) -> None:
    """Writes `head` as a state dict of the authors' `LinearRewardModel`."""
    name = "fused_layer" if head.config.gate else "reward_layer"
    state = {f"{name}.{key}": value.detach().float().cpu() for key, value in head.state_dict().items()}
    with files.replacing(path) as temporary:
        torch.save(state, temporary)


def fingerprint(model: Any) -> dict[str, Any]:
    """What tells a model from another: architecture, sizes, and 64 values each of final norm and one embedding row."""
    config = features.text_config(model)
    embedding = model.get_input_embeddings().weight
    row = embedding.shape[0] // 3
    norm = _final_norm(model)
    return {
        "name": Path(getattr(model.config, "_name_or_path", "") or type(model).__name__).name,
        "architecture": type(model).__name__,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "vocab_size": config.vocab_size,
        "embedding_row": row,
        "embedding_values": _sample(embedding[row]),
        "final_norm_values": None if norm is None else _sample(norm.weight),
    }


def check_model(head: SwiftHead, model: Any, *, allow_mismatch: bool = False) -> None:
    """Raises `ModelMismatchError` when `head` was trained on another model, warns when on a relative of this one."""
    if head.config.base_model is None:
        return
    difference, same_model = compare_model(head.config.base_model, model)
    if not difference:
        return
    name = fingerprint(model)["name"]
    message = f"the head was trained on {head.config.base_model['name']}, the model is {name}: {difference}"
    if not same_model and not allow_mismatch:
        raise ModelMismatchError(f"{message}. allow_mismatch=True overrides")
    warnings.warn(f"{message}; scores may be off", UserWarning, stacklevel=3)


def compare_model(recorded: dict[str, Any], model: Any) -> tuple[str, bool]:
    """How `model` differs from a recorded fingerprint ("" if it does not), and whether it may still be called the same.

    Copies in other dtypes do not differ; a fine-tune differs and is the same; another model is not.
    """
    check_fingerprint(recorded)
    actual = fingerprint(model)
    embedding = model.get_input_embeddings().weight
    # Vocabularies may be padded differently; the row is one both have.
    actual["embedding_values"] = _sample(embedding[min(recorded["embedding_row"], embedding.shape[0] - 1)])
    return compare_fingerprints(recorded, actual)


def compare_fingerprints(recorded: dict[str, Any], actual: dict[str, Any]) -> tuple[str, bool]:
    """As `compare_model`, of a model that was recorded too."""
    for key in ("architecture", "hidden_size", "num_hidden_layers"):
        if recorded[key] != actual[key]:
            return f"{key} is {actual[key]}, expected {recorded[key]}", False
    distance = max(_distance(recorded[key], actual[key]) for key in ("embedding_values", "final_norm_values"))
    if not distance <= RELATED_TOLERANCE:  # NaN is no likeness
        return f"its weights are {distance:.2f} away (relative), more than {RELATED_TOLERANCE}", False
    if distance > SAME_TOLERANCE:
        return f"its weights are {distance:.3f} away (relative), as a fine-tune's would be", True
    return "", True


def check_fingerprint(recorded: Any) -> None:
    """Raises when something read from a file is no fingerprint of a model."""
    kinds = {"name": str, "architecture": str, "hidden_size": int, "num_hidden_layers": int, "embedding_row": int}
    wrong = not isinstance(recorded, dict) or any(
        not isinstance(recorded.get(key), kind) for key, kind in kinds.items()
    )
    for key in ("embedding_values", "final_norm_values"):
        values = None if wrong else recorded.get(key)
        if isinstance(values, list):
            wrong = any(not isinstance(value, int | float) for value in values)
        elif values is not None or key == "embedding_values":
            wrong = True
    if wrong:
        raise CheckpointError(
            "the fingerprint of the base model is damaged: expected name, architecture, sizes and values as "
            "checkpoint.fingerprint gives them"
        )


def _final_norm(model: Any) -> Any:
    """The norm after the last layer: the last child of the decoder, after its layers, with a weight of its width."""
    layout = features.model_layout(model)
    children = list(layout.decoder.children())
    for child in reversed(children[children.index(layout.layers) + 1 :]):
        weight = getattr(child, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() == 1 and weight.shape[0] == layout.widths[-2]:
            return child
    return None


def _sample(values: Tensor) -> list[float]:
    values = values.detach()
    if hasattr(values, "full_tensor"):  # a DTensor of a sharded model
        values = values.full_tensor()
    step = max(1, values.numel() // FINGERPRINT_VALUES)
    return [round(value, 7) for value in values[::step][:FINGERPRINT_VALUES].float().cpu().tolist()]


def _distance(expected: list[float] | None, actual: list[float] | None) -> float:
    if expected is None or actual is None:
        return 0.0 if expected is actual else float("inf")
    if len(expected) != len(actual):
        return float("inf")
    first, second = torch.tensor(expected), torch.tensor(actual)
    return ((first - second).norm() / first.norm().clamp_min(1e-12)).item()


def _read_config(path: Path) -> HeadConfig:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist: expected a head's config") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON, is it truncated? {hub.first_line(error)}") from None
    if not isinstance(raw, dict) or raw.pop("format_version", None) != FORMAT_VERSION:
        raise CheckpointError(f"{path} is no head's config of format version {FORMAT_VERSION}")
    convention = raw.pop("layers_convention", LAYERS_CONVENTION)
    if convention != LAYERS_CONVENTION:
        raise CheckpointError(f"{path} numbers layers otherwise: {convention!r}, expected {LAYERS_CONVENTION!r}")
    known = {field.name for field in dataclasses.fields(HeadConfig)}
    if set(raw) != known:
        missing, extra = sorted(known - set(raw)), sorted(set(raw) - known)
        raise CheckpointError(f"{path} lacks keys {missing} and has unknown keys {extra}")
    try:
        config = HeadConfig(**raw)
        if config.base_model is not None:
            check_fingerprint(config.base_model)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from None
    return config


def _check_size(path: Path, config: HeadConfig) -> None:
    """Raises when the weights file is smaller than the config says, before memory is taken for it."""
    needed = config.num_outputs * (config.num_features + 1) * DTYPES[config.dtype].itemsize
    if path.is_file() and path.stat().st_size < needed:
        raise CheckpointError(
            f"{path} has {path.stat().st_size} bytes, the config calls for {needed} of weights, is it truncated?"
        )


def _read_weights(path: Path, head: SwiftHead) -> dict[str, Tensor]:
    safetensors = _safetensors()
    try:
        tensors = safetensors.load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist: expected the head's weights") from None
    except Exception as error:  # safetensors raises its own Rust-side type, and OSError
        raise CheckpointError(f"{path} cannot be read, is it truncated? {hub.first_line(error)}") from None
    expected = head.state_dict()
    if set(tensors) != set(expected):
        missing, extra = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
        raise CheckpointError(f"{path} lacks keys {missing} and has extra keys {extra}")
    for key, value in expected.items():
        if tensors[key].shape != value.shape or tensors[key].dtype != value.dtype:
            raise CheckpointError(
                f"{path}: {key} is {tensors[key].dtype} of shape {list(tensors[key].shape)}: expected {value.dtype} "
                f"of shape {list(value.shape)} as the config says"
            )
    return tensors


def _download(repo_id: str, **options: Any) -> Path:
    library = hub.client()
    try:
        return Path(library.snapshot_download(repo_id, allow_patterns=[CONFIG_NAME, WEIGHTS_NAME], **options))
    except Exception as error:
        raise CheckpointError(
            f"{repo_id} is neither a folder with {CONFIG_NAME} and {WEIGHTS_NAME} nor a repository of the Hub that can "
            f"be downloaded: {hub.first_line(error)}"
        ) from error


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("checkpoints need safetensors: pip install 'swift_kernels[hub]'") from error
    return safetensors.torch
