"""The activation store: what a head reads of every scored token, kept on disk so that the LLM runs once.

A folder:

    store.json             what is stored, of which model and how the answers were made, and the sketch's checksum
    sketch.safetensors     the projections, if entries are sketched
    00000.safetensors      a shard: `values` [tokens, features] and `lengths` [responses]
    00000.json             its problems, which response is whose, and the checksum of the shard

Both JSON files end with a checksum of themselves. Version 2 had neither that nor the sketch's, and said nothing of the
answers: such stores are read, and continued, and only checked for what cannot be.

A shard holds the answers to a few problems that were generated together. Its record is written after it, so a shard
that a killed run left behind has none, is not counted, and is made again. Shards are mapped into memory, not read.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swift_kernels import files
from swift_kernels.training.layout import DTYPES, Layout, StoreError, make_layout, parse_sketch
from swift_kernels.training.sketch import Sketch

FORMAT = "swift_kernels.activations"
FORMAT_VERSION = 3
READABLE_VERSIONS = (2, 3)
HEADER_NAME, SKETCH_NAME = "store.json", "sketch.safetensors"

__all__ = ["DTYPES", "Layout", "ShardProblem", "Store", "StoreError", "StoreWriter", "make_layout", "parse_sketch"]


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

    def __init__(
        self,
        path: str | Path,
        layout: Layout,
        model: dict[str, Any],
        sketch: Sketch | None = None,
        rollouts: dict[str, Any] | None = None,
    ) -> None:
        """`rollouts` are the settings of the answers: those of others are then refused."""
        self.path = Path(path)
        self.layout = layout
        self.sketch = sketch
        if self.path.exists() and not self.path.is_dir():
            raise StoreError(f"{path} is no folder: expected one for the activations, or a name for one")
        header: dict[str, Any] = {"model": model, "layout": vars(layout), "rollouts": rollouts}
        if (self.path / HEADER_NAME).exists():
            there = read_header(self.path)
            known = {key: value for key, value in header.items() if None not in (value, there.get(key))}
            if difference := files.other_settings(self.path, {key: there[key] for key in known}, known, "folder"):
                raise StoreError(difference)
            return
        check_vacant(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        checksum = None
        if sketch is not None:
            sketch.save(self.path / SKETCH_NAME)
            checksum = _sha256(self.path / SKETCH_NAME)
        content = sealed({"format": FORMAT, "version": FORMAT_VERSION, **header, "sketch": checksum})
        files.write_text(self.path / HEADER_NAME, json.dumps(content, indent=1) + "\n")

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
        files.write_text(self.path / f"{name}.json", json.dumps(sealed(record)) + "\n")


class Store:
    """A store that is read: the stored responses of all shards, one after the other.

    Attributes:
        layout, model: what is stored, and the fingerprint of the model that computed it.
        rollouts: the settings of the answers; None where they are not known.
        widths: of the entries as stored.
        lengths: scored tokens of each response.
        shards: their records, in order.
    """

    def __init__(self, path: str | Path, *, verify: bool = True) -> None:
        """Opens a store; with `verify`, every shard is held against its checksum."""
        self.path = Path(path)
        header = read_header(self.path)
        self.model: dict[str, Any] = header["model"]
        self.rollouts: dict[str, Any] | None = header.get("rollouts")
        self.layout = Layout(**header["layout"])
        self.sketch = None if self.layout.sketch is None else read_sketch(self.path)
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
            self._values.append(_map(self.path / f"{shard.name}.safetensors", shard, self.layout))

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
    file = path / HEADER_NAME
    if not file.is_file():
        raise StoreError(f"{path} holds no {HEADER_NAME}: expected a folder written by `swift-kernels rollout --store`")
    header = _read_json(file)
    if header.get("format") != FORMAT or header.get("version") not in READABLE_VERSIONS:
        raise StoreError(
            f"{file}: format {header.get('format')!r}, version {header.get('version')}: "
            f"expected {FORMAT!r}, version {FORMAT_VERSION}"
        )
    _check_seal(file, header, header["version"])
    model = header.get("model")
    try:
        if not isinstance(model, dict) or not isinstance(model.get("name"), str):
            raise TypeError("model is no fingerprint with a name")
        layout = Layout.read(header["layout"])
        if layout.sketch is not None and header["version"] > 2 and not isinstance(header.get("sketch"), str):
            raise TypeError("no checksum of the sketch")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise StoreError(
            f"{file} is damaged ({type(error).__name__}: {error}): make the store anew, in another folder"
        ) from None
    return header


def shards_of(path: Path) -> list[Shard]:
    """The records of a store's shards, in order."""
    records = sorted(path.glob("[0-9]*.json"))
    version = read_header(path)["version"] if records else FORMAT_VERSION
    return [read_shard(record, version) for record in records]


def problems_of(path: Path) -> dict[str, ShardProblem]:
    """The problems of a store's shards, by their ids."""
    return {problem.id: problem for shard in shards_of(path) for problem in shard.problems}


def read_shard(record: Path, version: int = FORMAT_VERSION) -> Shard:
    content = _read_json(record)
    _check_seal(record, content, version)
    content.pop("digest", None)
    try:
        shard = Shard(record.stem, [ShardProblem(**problem) for problem in content.pop("problems")], **content)
        count = 0
        for problem in shard.problems:
            distinct = list(dict.fromkeys(problem.responses))
            if distinct != list(range(len(distinct))) or not all(type(place) is int for place in problem.responses):
                raise TypeError(f"problem {problem.id!r} has the responses {problem.responses}")
            count += len(distinct)
        if not isinstance(shard.lengths, list) or len(shard.lengths) != count:
            raise TypeError(f"{count} responses need as many lengths")
        if any(type(length) is not int or length < 0 for length in shard.lengths):
            raise TypeError("lengths are not whole numbers of at least 0")
        texts = [shard.sha256, *(text for problem in shard.problems for text in (problem.id, problem.digest))]
        if type(shard.nbytes) is not int or not all(isinstance(text, str) for text in texts):
            raise TypeError("nbytes is no number, or a checksum or the id of a problem is no text")
    except (KeyError, TypeError) as error:
        raise StoreError(f"{record} is no record of a shard ({error}): remove it, and the shard is made anew") from None
    return shard


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """The content with a checksum of itself."""
    return {**content, "digest": hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()}


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
    return read_sketch(path)


def read_sketch(path: Path) -> Sketch:
    """The projections of a store, held against its header."""
    from safetensors import SafetensorError

    header, file = read_header(path), path / SKETCH_NAME
    layout = Layout(**header["layout"])
    if not file.is_file():
        raise StoreError(f"{file} is missing: make the store anew, in another folder")
    try:
        sketch = Sketch.load(file)
    except (SafetensorError, KeyError) as error:
        raise StoreError(f"{file} is no sketch ({error}): make the store anew, in another folder") from None
    shapes = [tuple(tensor.shape) for tensor in (*sketch.projections, *sketch.means)]
    expected = [*zip(layout.widths, layout.stored_widths, strict=True), *((width,) for width in layout.widths)]
    if shapes != expected or header.get("sketch") not in (None, _sha256(file)):
        raise StoreError(
            f"{file} is corrupted: it is not the one that {HEADER_NAME} speaks of; make the store anew, in another "
            "folder"
        )
    return sketch


def begun_sketch(path: Path, other: Path | None, layout: Layout) -> Sketch:
    """The projections of a store that was begun; raises where those of another store are asked for and differ."""
    own = read_sketch(path)
    if other is not None and not own.equals(sketch_of(other, layout)):
        raise StoreError(f"{path} was begun with other projections than those of {other}: use another folder")
    return own


def drop_damaged(path: Path) -> list[str]:
    """Removes the records of damaged shards, which are then made anew, and says what is wrong with each.

    What killed runs wrote by half is removed too, also by safetensors' `save_file`, which adds six letters to `.tmp`.
    """
    if not (path / HEADER_NAME).exists():
        return []
    files.remove_abandoned(path, ".[0-9]*.????????.tmp", ".tmp??????")
    found = []
    for shard in shards_of(path):
        if problem := damage(path, shard):
            found.append(f"{problem}; it is made anew")
            (path / f"{shard.name}.json").unlink()
    return found


def check_vacant(path: Path) -> None:
    """Raises where a folder without a header has files that a new store would write over."""
    taken = [file.name for file in path.glob("[0-9]*.json") if re.fullmatch(r"\d{5,}\.json", file.name)]
    # Also those of a model, which would be read with the store's.
    taken += [file.name for file in path.glob("*.safetensors") if file.name != SKETCH_NAME]
    # A run that was killed before the header may have left its sketch.
    if taken or ((path / SKETCH_NAME).exists() and not _is_sketch(path / SKETCH_NAME)):
        raise StoreError(
            f"{path} holds {min(taken, default=SKETCH_NAME)} but no {HEADER_NAME}: expected a store, or a folder that "
            "holds nothing of these names; nothing was changed, give another one"
        )


def _is_sketch(file: Path) -> bool:
    from safetensors import SafetensorError

    try:
        return bool(Sketch.load(file).projections)
    except (SafetensorError, KeyError, OSError):
        return False


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


def _check_seal(file: Path, content: dict[str, Any], version: int) -> None:
    bare = {key: value for key, value in content.items() if key != "digest"}
    if ("digest" in content or version > 2) and content.get("digest") != sealed(bare)["digest"]:
        what = "header of a store" if file.name == HEADER_NAME else "record of a shard"
        remedy = "make the store anew" if file.name == HEADER_NAME else "remove it, and the shard is made anew"
        raise StoreError(
            f"{file} is no {what}, or corrupted: its checksum is not the one it was written with; {remedy}"
        )


def _map(path: Path, shard: Shard, layout: Layout) -> Tensor:
    """The values of a shard, mapped into memory: pages are read when they are used, and can be dropped."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            values, lengths = file.get_tensor("values"), file.get_tensor("lengths")
    except SafetensorError as error:
        raise StoreError(f"{path} is no shard of a store ({error})") from None
    shape, dtype = [sum(shard.lengths), sum(layout.stored_widths)], DTYPES[layout.dtype]
    if list(values.shape) != shape or values.dtype != dtype or lengths.tolist() != shard.lengths:
        raise StoreError(
            f"{path} holds {values.dtype} values of shape {list(values.shape)}: expected {dtype} of shape {shape}, and "
            f"the lengths of {shard.name}.json; remove that, and the shard is made anew"
        )
    return values


def _sha256(path: Path) -> str:
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            found.update(chunk)
    return found.hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = files.parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise StoreError(f"{path} is not JSON that can be read: {error}") from None
    if not isinstance(content, dict):
        raise StoreError(f"{path} holds a {type(content).__name__}: expected an object")
    return content
