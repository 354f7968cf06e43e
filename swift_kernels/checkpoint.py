"""Heads on disk and on the Hub: `config.json` + `model.safetensors`, and the authors' `.pt` files.

A checkpoint carries a fingerprint of the model it was trained on, so that it is not attached to another one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pickle
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swift_kernels import features, files, hub
from swift_kernels.fingerprint import check_fingerprint, compare_model, model_name
from swift_kernels.head import DTYPES, HeadConfig, SwiftHead, check_finite

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
FORMAT_VERSION = 1
LAYERS_CONVENTION = (
    "Hugging Face hidden_states: 0 is the input of the first decoder layer, num_hidden_layers the model's final output"
)

PACKAGED_HEADS = Path(__file__).parent / "heads"
"""Heads that ship with the package, a folder each."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file, what is wrong, and what to do."""


class ModelMismatchError(CheckpointError):
    """The head was trained on another model."""


def save(head: SwiftHead, path: str | Path) -> None:
    """Writes `head` into the folder `path`: the weights first, the config last, each replaced atomically.

    Raises:
        CheckpointError: the folder holds another `config.json` or `model.safetensors`, such as a language model's.
        ValueError: a weight is not finite, or of another dtype than the config says.
    """
    check_finite(head, "not saved")
    if head.weight.dtype != DTYPES[head.config.dtype]:
        raise ValueError(
            f"the weights are {head.weight.dtype}, the config says {head.config.dtype}: convert with "
            "head.with_config(dtype=...)"
        )
    _safetensors()  # or it says what to install
    folder = Path(path)
    check_own(folder)
    files.write_tensors(folder / WEIGHTS_NAME, head.state_dict())
    config = {
        "format_version": FORMAT_VERSION,
        "layers_convention": LAYERS_CONVENTION,
        # Between the two files a process may be killed: the config says which weights are its own.
        "weights_sha256": _sha256(folder / WEIGHTS_NAME),
        **head.config.to_dict(),
    }
    text = json.dumps(config, indent=2, ensure_ascii=False)
    # Lists of numbers, of which a fingerprint has hundreds, take a line each.
    text = re.sub(r"\[\n\s+([-+.,\deE\s]+?)\n\s*\]", lambda found: f"[{' '.join(found[1].split())}]", text)
    files.write_text(folder / CONFIG_NAME, text + "\n")


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
    config, sha256 = _read_config(folder / CONFIG_NAME)
    _check_size(folder / WEIGHTS_NAME, config)
    head = SwiftHead(config)
    head.load_state_dict(_read_weights(folder / WEIGHTS_NAME, head))
    check_finite(head, str(folder / WEIGHTS_NAME))
    if sha256 is not None and _sha256(folder / WEIGHTS_NAME) != sha256:
        raise CheckpointError(
            f"{folder / WEIGHTS_NAME} holds other weights than {CONFIG_NAME} was written with: was saving interrupted, "
            "or one of the two replaced? Save the head again, or take both files from one place"
        )
    head.requires_grad_(False)
    if model is not None:
        check_model(head, model, allow_mismatch=allow_mismatch)
        head.to(features.unwrapped(model).get_input_embeddings().weight.device)
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


def check_model(head: SwiftHead, model: Any, *, allow_mismatch: bool = False) -> None:
    """Raises `ModelMismatchError` when `head` was trained on another model, warns when on a relative of this one."""
    if head.config.base_model is None:
        return
    difference, same_model = compare_model(head.config.base_model, model)
    if not difference:
        return
    message = (
        f"the head was trained on {head.config.base_model['name']}, the model is {model_name(model)}: {difference}"
    )
    if not same_model and not allow_mismatch:
        raise ModelMismatchError(f"{message}. allow_mismatch=True overrides")
    warnings.warn(f"{message}; scores may be off", UserWarning, stacklevel=3)


def check_own(folder: Path) -> None:
    """Raises where saving a head into a folder would replace files of something else."""
    config, weights = folder / CONFIG_NAME, folder / WEIGHTS_NAME
    if config.is_file():
        try:
            own = "format_version" in files.parse_json(config.read_text(encoding="utf-8"))
        except (ValueError, TypeError, OSError):
            own = False
        if not own:
            raise CheckpointError(f"{config} is no head's and would be lost: expected another folder for the head")
    elif others := sorted(path for path in folder.glob("model*.safetensors*") if path.name != WEIGHTS_NAME):
        raise CheckpointError(
            f"{folder} holds {others[0].name}, which is no head's: expected another folder for the head"
        )
    elif weights.is_file() and not _holds_a_head(weights):
        raise CheckpointError(f"{weights} is no head's and would be lost: expected another folder for the head")


def _holds_a_head(weights: Path) -> bool:
    import safetensors

    try:
        with safetensors.safe_open(weights, framework="pt") as file:
            return set(file.keys()) == {"weight", "bias"}
    except Exception:  # safetensors raises its own Rust-side type, and OSError
        return False


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _read_config(path: Path) -> tuple[HeadConfig, str | None]:
    """The config, and the checksum of its weights, which earlier versions did not write."""
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
    sha256 = raw.pop("weights_sha256", None)
    if not isinstance(sha256, str | None):
        raise CheckpointError(f"{path}: weights_sha256 is {sha256!r}: expected the checksum of the weights")
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
    return config, sha256


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
