"""An unfinished fit on disk: one safetensors file with JSON in its header, replaced whole after every epoch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from swift_kernels import files

FORMAT = "swift_kernels.fit"


class ResumeError(ValueError):
    """A checkpoint that belongs to another fit, or is none."""


def save(path: Path, tensors: dict[str, Tensor], facts: dict[str, Any], identity: dict[str, Any]) -> None:
    """Writes the state of a fit; `identity` says which fit it is, flat and readable."""
    header = {"format": FORMAT, "identity": json.dumps(identity), "facts": json.dumps(facts)}
    files.write_tensors(path, tensors, header)


def remove(path: Path) -> None:
    """Removes the state of a fit that has ended, and what killed runs wrote of it by half."""
    path.unlink(missing_ok=True)
    files.remove_leftovers(path)


def load(path: Path, identity: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The state that `save` wrote, None where there is no file.

    Raises:
        ResumeError: the file is no checkpoint, or one of another fit; the message names what differs.
    """
    if not path.exists():
        return None
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no mapping
    except SafetensorError as error:
        raise ResumeError(f"{path} is no checkpoint of a fit: {error}") from None
    try:
        saved, facts = files.parse_json(header["identity"]), files.parse_json(header["facts"])
    except (KeyError, ValueError):
        saved = facts = None
    if header.get("format") != FORMAT or not isinstance(saved, dict) or not isinstance(facts, dict):
        raise ResumeError(f"{path} is no checkpoint of a fit: it was left as it is, remove it or give another --output")
    own = json.loads(json.dumps(identity))
    different = [name for name in {**own, **saved} if saved.get(name) != own.get(name)]
    if different:
        name = different[0]
        raise ResumeError(
            f"{path} is the checkpoint of another fit: {name} is {saved.get(name)} there and {own.get(name)} here; "
            "finish that one, or remove the file"
        )
    return tensors, facts
