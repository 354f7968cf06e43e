"""The activation store: what a head reads of every scored token, kept on disk so that the LLM runs once.

A folder:

    store.json             what is stored, and of which model
    sketch.safetensors     the projections, if entries are sketched
    00000.safetensors      a shard: `values` [tokens, features] and `lengths` [responses]
    00000.json             its problems, which response is whose, and its checksum

A shard holds the answers to a few problems that were generated together. Its record is written after it, so a shard
that a killed run left behind has none, is not counted, and is made again. Shards are mapped into memory, not read.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swift_kernels import files
from swift_kernels.features import FEATURE_SOURCES, FROM_LOGITS, HIDDEN_STATES
from swift_kernels.head import SwiftHead
from swift_kernels.training.sketch import METHODS, Sketch

FORMAT = "swift_kernels.activations"
FORMAT_VERSION = 2
HEADER_NAME, SKETCH_NAME = "store.json", "sketch.safetensors"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class StoreError(ValueError):
    """An activation store that cannot be used; the message names the file, and what to do."""


@dataclass(frozen=True)
class Layout:
    """What a store keeps of every scored token.

    Attributes:
        features: the sources, as in `HeadConfig`, in the order of `FEATURE_SOURCES`.
        widths: of the entries as the model computes them: one a layer, then one for each other source.
        layers: indices of the hidden states in Hugging Face's `hidden_states`; None where none are kept.
        num_hidden_layers: of the model, where layers are given.
        span: which tokens count.
        dtype: that values are stored in. float16 would overflow on the massive activations that many models have.
        sketch: how entries are sketched ({"method": "pca", "dimensions": 64}), or None.
    """

    features: tuple[str, ...]
    widths: tuple[int, ...]
    layers: tuple[int, ...] | None = None
    num_hidden_layers: int | None = None
    span: str = "fed"
    dtype: str = "bfloat16"
    sketch: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple(self.widths))
        object.__setattr__(self, "layers", None if self.layers is None else tuple(self.layers))
        object.__setattr__(self, "features", tuple(self.features))
        if not self.features or self.features != tuple(name for name in FEATURE_SOURCES if name in self.features):
            raise StoreError(f"features is {self.features!r}: expected some of {', '.join(FEATURE_SOURCES)}, in order")
        if len(self.entries) != len(self.widths):
            raise StoreError(f"{len(self.widths)} widths for the entries {list(self.entries)}: expected one each")
        if self.dtype not in DTYPES:
            raise StoreError(f"the store's dtype is {self.dtype!r}: expected one of {', '.join(DTYPES)}")

    @property
    def entries(self) -> tuple[int | str, ...]:
        """What the entries are: layers, and the names of other sources."""
        return *(self.layers or ()), *(name for name in self.features if name != HIDDEN_STATES)

    @property
    def stored_widths(self) -> tuple[int, ...]:
        """Of the entries as they are stored: a sketch leaves alone what is no wider than itself."""
        if self.sketch is None:
            return self.widths
        return tuple(min(width, self.sketch["dimensions"]) for width in self.widths)

    def nbytes(self, tokens: int) -> int:
        return tokens * sum(self.stored_widths) * DTYPES[self.dtype].itemsize


def make_layout(
    model: Any, layers: str | Sequence[int | str], dtype: str = "bfloat16", sketch: str | None = None
) -> Layout:
    """The layout of a store for a model.

    Args:
        layers: as in `SwiftHead.for_model`, or a list of layers, or "all", and of other sources: ["all", "logits"].
        sketch: "random:64" or "pca:64", the number of dimensions an entry; None keeps entries whole.
    """
    wanted = [layers] if isinstance(layers, str) else list(layers)
    chosen = [layer for layer in wanted if layer not in FROM_LOGITS]
    selections: list[Any] = [chosen[0] if chosen in (["all"], [HIDDEN_STATES]) else chosen] if chosen else []
    selections += [source for source in FROM_LOGITS if source in wanted]
    configs = [SwiftHead.for_model(model, selection).config for selection in selections]
    if not configs:
        raise StoreError("there is nothing to store: expected layers, logits or top_logprobs")
    widths = tuple(width for config in configs for width in config.widths)
    return Layout(
        tuple(config.features for config in configs),
        widths,
        configs[0].layers,
        configs[0].num_hidden_layers if chosen else None,
        configs[0].span,
        dtype,
        None if sketch is None else parse_sketch(sketch, max(widths)),
    )


def parse_sketch(text: str, width: int) -> dict[str, Any]:
    """ "pca:64" as a layout holds it."""
    method, _, dimensions = text.partition(":")
    if method not in METHODS or not dimensions.isdecimal() or not 1 <= int(dimensions) <= width:
        raise StoreError(
            f"the sketch is {text!r}: expected {' or '.join(f'{each}:K' for each in METHODS)}, K from 1 to {width}"
        )
    return {"method": method, "dimensions": int(dimensions)}


@dataclass(frozen=True)
class ShardProblem:
    """One problem of a shard: which of its distinct responses each of its candidates is.

    A problem's responses follow those of the problems before it. `digest` is that of the candidates' token ids.
    """

    id: str
    responses: list[int]
    digest: str


@dataclass(frozen=True)
class Shard:
    """The record of a shard."""

    name: str
    problems: list[ShardProblem]
    lengths: list[int]
    nbytes: int
    sha256: str

    @property
    def ids(self) -> list[str]:
        return [problem.id for problem in self.problems]


class StoreWriter:
    """Writes shards, each complete or not at all, into a new store or one that was begun with the same settings.

    Several processes may write different shards of one store.
    """

    def __init__(self, path: str | Path, layout: Layout, model: dict[str, Any], sketch: Sketch | None = None) -> None:
        self.path = Path(path)
        self.layout = layout
        self.sketch = sketch
        header = _header(layout, model)
        if self.path.exists() and not self.path.is_dir():
            raise StoreError(f"{path} is no folder: expected one for the activations, or a name for one")
        if (self.path / HEADER_NAME).exists():
            there = _read_json(self.path / HEADER_NAME)
            for key in sorted(there.keys() | header.keys()):
                if there.get(key) != header.get(key):
                    raise StoreError(
                        f"{path} was made with other settings: {key} is {_short(there.get(key))} there and "
                        f"{_short(header.get(key))} here; use the same settings to continue it, or another folder"
                    )
        else:
            self.path.mkdir(parents=True, exist_ok=True)
            if sketch is not None:
                sketch.save(self.path / SKETCH_NAME)
            files.write_text(self.path / HEADER_NAME, json.dumps(header, indent=1) + "\n")

    def write(self, name: str, problems: Sequence[ShardProblem], responses: Sequence[Tensor]) -> None:
        """Writes a shard; `responses` are its distinct responses' values, `[tokens, stored features]` each."""
        from safetensors.torch import save_file

        dtype = DTYPES[self.layout.dtype]
        empty = torch.empty(0, sum(self.layout.stored_widths), dtype=dtype)
        values = torch.cat([empty, *(response.to(dtype) for response in responses)])
        lengths = [response.shape[0] for response in responses]
        path = self.path / f"{name}.safetensors"
        with files.replacing(path) as temporary:
            save_file({"values": values, "lengths": torch.tensor(lengths, dtype=torch.int64)}, temporary)
            record = {
                "problems": [vars(problem) for problem in problems],
                "lengths": lengths,
                "nbytes": temporary.stat().st_size,
                "sha256": _sha256(temporary),
            }
        files.write_text(self.path / f"{name}.json", json.dumps(record) + "\n")


class Store:
    """A store that is read: the stored responses of all shards, one after the other.

    Attributes:
        layout, model: what is stored, and the fingerprint of the model that computed it.
        widths: of the entries as stored.
        lengths: scored tokens of each response.
        shards: their records, in order.
    """

    def __init__(self, path: str | Path, *, verify: bool = True) -> None:
        """Opens a store; with `verify`, every shard is held against its checksum."""
        self.path = Path(path)
        header = read_header(self.path)
        self.model: dict[str, Any] = header["model"]
        self.layout = Layout(**header["layout"])
        self.sketch = None if self.layout.sketch is None else Sketch.load(self.path / SKETCH_NAME)
        self.widths = self.layout.stored_widths
        self.shards = shards_of(self.path)
        if verify:
            for shard in self.shards:
                if found := damage(self.path, shard):
                    raise StoreError(f"{found}: run the command that made the store again, which makes this shard anew")
        self.lengths = tuple(length for shard in self.shards for length in shard.lengths)
        self._problems: dict[str, ShardProblem] = {}
        self._first: dict[str, int] = {}
        self._rows: list[tuple[int, int]] = []
        self._values: list[Tensor] = []
        for index, shard in enumerate(self.shards):
            first = len(self._rows)
            for problem in shard.problems:
                if problem.id in self._problems:
                    raise StoreError(f"{path}: problem {problem.id!r} is in two shards, one of them {shard.name}")
                self._problems[problem.id] = problem
                self._first[problem.id] = first
                first += max(problem.responses, default=-1) + 1
            self._rows += [(index, start) for start in itertools.accumulate(shard.lengths[:-1], initial=0)]
            self._values.append(_map(self.path / f"{shard.name}.safetensors"))

    @property
    def nbytes(self) -> int:
        return sum(shard.nbytes for shard in self.shards)

    def responses(self, problem_id: str, token_ids: Sequence[Sequence[int]]) -> list[int]:
        """For each candidate of a problem the index of its response, given the candidates' token ids."""
        problem = self._problems.get(problem_id)
        if problem is None:
            raise StoreError(
                f"{self.path} has no problem {problem_id!r}: expected the store that was written with these rollouts; "
                "run `swift-kernels rollout` again to complete it"
            )
        if problem.digest != digest(token_ids):
            raise StoreError(f"{self.path}: the answers to problem {problem_id!r} are not those of the rollouts")
        first = self._first[problem_id]
        return [first + response for response in problem.responses]

    def batch(self, indices: Tensor, device: torch.device | str = "cpu") -> tuple[list[Tensor], Tensor]:
        """The packed values, one `[tokens, width]` an entry, and `cu_seqlens` of the given responses."""
        return self._read(indices, slice(0, len(self.widths)), device)

    def part(self, entries: Sequence[int]) -> StorePart:
        """Some of the entries: of the others as little is read as can be."""
        return StorePart(self, tuple(entries))

    def _read(self, indices: Tensor, entries: slice, device: torch.device | str) -> tuple[list[Tensor], Tensor]:
        first = sum(self.widths[: entries.start])
        widths = self.widths[entries]
        parts, lengths = [], []
        for index in indices.tolist():
            shard, start = self._rows[index]
            parts.append(self._values[shard][start : start + self.lengths[index], first : first + sum(widths)])
            lengths.append(self.lengths[index])
        packed = torch.cat(parts).to(device)
        return list(packed.split(widths, dim=1)), torch.tensor([0, *lengths]).cumsum(0)


class StorePart:
    """Some entries of a store, as `Store.batch` gives them all."""

    def __init__(self, store: Store, entries: tuple[int, ...]) -> None:
        self.widths = tuple(store.widths[entry] for entry in entries)
        self.lengths = store.lengths
        self._store, self._entries = store, entries
        # Rows of a shard are mapped: what lies between the first and the last entry is read, the rest is not.
        self._span = slice(min(entries), max(entries) + 1)

    def batch(self, indices: Tensor, device: torch.device | str = "cpu") -> tuple[list[Tensor], Tensor]:
        values, cu_seqlens = self._store._read(indices, self._span, device)
        return [values[entry - self._span.start] for entry in self._entries], cu_seqlens


def read_header(path: Path) -> dict[str, Any]:
    if not (path / HEADER_NAME).is_file():
        raise StoreError(f"{path} holds no {HEADER_NAME}: expected a folder written by `swift-kernels rollout --store`")
    header = _read_json(path / HEADER_NAME)
    if header.get("format") != FORMAT or header.get("version") != FORMAT_VERSION:
        raise StoreError(
            f"{path / HEADER_NAME}: format {header.get('format')!r}, version {header.get('version')}: "
            f"expected {FORMAT!r}, version {FORMAT_VERSION}"
        )
    return header


def shards_of(path: Path) -> list[Shard]:
    """The records of a store's shards, in order."""
    return [read_shard(record) for record in sorted(path.glob("[0-9]*.json"))]


def read_shard(record: Path) -> Shard:
    content = _read_json(record)
    try:
        problems = [ShardProblem(**problem) for problem in content.pop("problems")]
        return Shard(record.stem, problems, **content)
    except (KeyError, TypeError) as error:
        raise StoreError(f"{record} is no record of a shard ({error}): remove it, and the shard is made anew") from None


def damage(path: Path, shard: Shard) -> str | None:
    """What is wrong with a shard's file, held against its record; None where nothing is."""
    file = path / f"{shard.name}.safetensors"
    if not file.is_file():
        return f"{file} is missing"
    if file.stat().st_size != shard.nbytes:
        return f"{file} has {file.stat().st_size:,} bytes, {shard.nbytes:,} were written: it is truncated"
    if _sha256(file) != shard.sha256:
        return f"{file} is corrupted: its checksum is not the one it was written with"
    return None


def digest(token_ids: Sequence[Sequence[int]]) -> str:
    """Of the token ids of a problem's candidates."""
    return hashlib.sha256(json.dumps([list(ids) for ids in token_ids]).encode()).hexdigest()[:16]


def sketch_of(path: Path, layout: Layout) -> Sketch:
    """The projections of another store, so that one head reads both."""
    there, here = vars(Layout(**read_header(path)["layout"])), vars(layout)
    for key in here:
        if there[key] != here[key]:
            raise StoreError(f"{path} was made with other settings: {key} is {there[key]} there and {here[key]} here")
    return Sketch.load(path / SKETCH_NAME)


def begun_sketch(path: Path, other: Path | None, layout: Layout) -> Sketch:
    """The projections of a store that was begun; raises where those of another store are asked for and differ."""
    own = Sketch.load(path / SKETCH_NAME)
    if other is not None and not own.equals(sketch_of(other, layout)):
        raise StoreError(f"{path} was begun with other projections than those of {other}: use another folder")
    return own


def drop_damaged(path: Path) -> list[str]:
    """Removes the records of damaged shards, which are then made anew, and says what is wrong with each.

    What killed runs wrote by half is removed too, also by safetensors' `save_file`, which adds six letters to `.tmp`.
    """
    files.remove_abandoned(path, ".[0-9]*.????????.tmp", ".tmp??????")
    found = []
    for shard in shards_of(path):
        if problem := damage(path, shard):
            found.append(f"{problem}; it is made anew")
            (path / f"{shard.name}.json").unlink()
    return found


def check_space(path: Path, nbytes: int, what: str) -> None:
    """Raises when the disk has no room for a store of so many bytes."""
    folder = path
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if nbytes > free:
        raise StoreError(
            f"{what} take up to {nbytes / 1e9:.1f} GB, {folder} has {free / 1e9:.1f} GB free: fewer layers "
            "(--store-layers), a sketch (--sketch), shorter answers (--max-new-tokens) or fewer problems need less"
        )


def _header(layout: Layout, model: dict[str, Any]) -> dict[str, Any]:
    header = {"format": FORMAT, "version": FORMAT_VERSION, "model": model, "layout": vars(layout)}
    return json.loads(json.dumps(header))  # as it is read back, where a tuple is a list


def _map(path: Path) -> Tensor:
    """The values of a shard, mapped into memory: pages are read when they are used, and can be dropped."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return file.get_tensor("values")


def _sha256(path: Path) -> str:
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            found.update(chunk)
    return found.hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise StoreError(f"{path} is not JSON ({error})") from None
    if not isinstance(content, dict):
        raise StoreError(f"{path} holds a {type(content).__name__}: expected an object")
    return content


def _short(value: Any) -> str:
    if isinstance(value, dict) and "name" in value:
        return str(value["name"])
    text = json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."
