"""What tells a model from another, short enough to be kept with a head: some of its values, and its sizes."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from swift_kernels import features

EMBEDDING_VALUES = 64
"""Of the final norm, and of one embedding row."""
LAYER_VALUES, LAYER_PARAMETERS = 8, 24
"""Of one row of so many parameters of a layer: all of them, but where there are many experts."""
SAME_TOLERANCE = 0.01
"""Relative distance below which values count as the same weights: bfloat16 rounds within 0.004, 8-bit blocks within
0.005."""
RELATED_TOLERANCE = 0.3
"""Above this, the values belong to another model (unrelated vectors are 1.4 apart); in between, to a fine-tune or to
weights quantised to very few bits."""
ROUNDING = 0.005
"""Of a value, somewhat more than bfloat16 changes it by."""
KEPT = 0.25
"""Of the matrices: what stores most of them in 8 bits may keep some, such as routers of experts or a first layer."""
LAYER_TOLERANCE = 0.015
"""Root mean square of the relative distances of a layer's parameters. Of eight values of each in SmolLM2 they are 0.002
for bfloat16, up to 0.008 for 8-bit blocks and 0.014 for 8-bit rows, and 0.1 for blocks of four bits."""
SMALLEST = 1e-7
"""What float16 knows of: smaller values are rounded to its multiples."""
LARGEST = 3.5e38
_OPTIONAL = ("final_norm_values", "projection_values")
KINDS = ("matrices", "vectors", "adapters")
"""Of a layer's parameters; what an adapter (PEFT) adds is kept apart."""
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

LayerValues = dict[str, dict[str, list[float]]]


def fingerprint(model: Any) -> dict[str, Any]:
    """Architecture, sizes, 64 values each of final norm and one embedding row, and a few of every parameter of a layer.

    Of parameters that are stored otherwise than as plain numbers, as those of models quantised to 4 bits are, nothing
    is taken.
    """
    model = features.unwrapped(model)
    config = features.text_config(model)
    layout = features.model_layout(model)
    row, layers, norm = _vocabulary(model) // 3, layout.layers, _final_norm(model)
    return {
        "name": model_name(model),
        "architecture": type(model).__name__.removeprefix("FSDP"),  # as fully_shard renames it
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "vocab_size": config.vocab_size,
        "embedding_row": row,
        "embedding_values": _embedding_values(model, row),
        "final_norm_values": None if norm is None else _rounded(_values([norm.weight], EMBEDDING_VALUES)[0]),
        "projection_values": _projection_values(model, row),
        # Last, what the decoder has around its layers, such as the bias of its norm.
        "layers": [*map(_layer_values, layers), _layer_values(layout.decoder, {layers, *_of_vocabulary(model)})],
    }


def model_name(model: Any) -> str:
    """The last part of the path or the Hub id it was loaded from, else its architecture."""
    model = features.unwrapped(model)
    return Path(getattr(model.config, "_name_or_path", "") or type(model).__name__.removeprefix("FSDP")).name


def compare_model(recorded: dict[str, Any], model: Any) -> tuple[str, bool]:
    """How `model` differs from a recorded fingerprint ("" if it does not), and whether it may still be called the same.

    Copies in other dtypes do not differ; a fine-tune differs and is the same; another model is not.
    """
    check_fingerprint(recorded)
    model = features.unwrapped(model)
    actual = fingerprint(model)
    # Vocabularies may be padded differently; the row is one both have.
    row = min(recorded["embedding_row"], _vocabulary(model) - 1)
    actual["embedding_values"] = _embedding_values(model, row)
    actual["projection_values"] = _projection_values(model, row)
    return compare_fingerprints(recorded, actual)


def compare_fingerprints(recorded: dict[str, Any], actual: dict[str, Any]) -> tuple[str, bool]:
    """As `compare_model`, of a model that was recorded too."""
    for key in ("architecture", "hidden_size", "num_hidden_layers"):
        if recorded[key] != actual[key]:
            return f"{key} is {actual[key]}, expected {recorded[key]}", False
    distances = [_distance(recorded[key], actual[key]) for key in ("embedding_values", "final_norm_values")]
    if any(not distance <= RELATED_TOLERANCE for distance in distances):  # NaN is no likeness
        return f"its weights are {max(distances):.2f} away (relative), more than {RELATED_TOLERANCE}", False
    if max(distances) > SAME_TOLERANCE:
        return f"its weights are {max(distances):.3f} away (relative), as a fine-tune's would be", True
    # Earlier versions recorded no layers and no projection.
    projections = recorded.get("projection_values"), actual.get("projection_values")
    if None not in projections and not (distance := _distance(*projections)) <= SAME_TOLERANCE:
        return f"its output projection is {distance:.3f} away (relative), as a fine-tune's would be", True
    return _compare_layers(recorded.get("layers") or [], actual.get("layers") or []), True


def check_fingerprint(recorded: Any) -> None:
    """Raises ValueError when something read from a file is no fingerprint of a model."""
    kinds = {"name": str, "architecture": str, "hidden_size": int, "num_hidden_layers": int, "embedding_row": int}
    right = isinstance(recorded, dict) and all(type(recorded.get(key)) is kind for key, kind in kinds.items())
    right = right and recorded["embedding_row"] >= 0
    if right:
        layers = recorded.get("layers", [])
        right = (
            _is_values(recorded.get("embedding_values"))
            and all(recorded.get(key) is None or _is_values(recorded[key]) for key in _OPTIONAL)
            and isinstance(layers, list)
            and all(isinstance(layer, dict) and layer.keys() == set(KINDS) for layer in layers)
            and all(map(_is_values_by_name, (kind for layer in layers for kind in layer.values())))
        )
    if not right:
        raise ValueError(
            "the fingerprint of the base model is damaged: expected name, architecture, sizes and values as "
            "fingerprint.fingerprint gives them"
        )


def _is_values(values: Any) -> bool:
    """Whether these are numbers of float32, or NaN, which is no value of any weight."""
    kinds = {type(value) for value in values} if isinstance(values, list) else {type(values)}
    return kinds <= {int, float} and not any(abs(value) > LARGEST for value in values)


def _is_values_by_name(named: Any) -> bool:
    return isinstance(named, dict) and all(map(_is_values, named.values()))


def _compare_layers(recorded: list[LayerValues], actual: list[LayerValues]) -> str:
    """What speaks for a fine-tune, or "" where nothing does.

    What stores weights in fewer bits changes nearly every matrix, and no vector. So a fine-tune that changes no more
    than that is still known by the matrices that it leaves as they were, or by a vector that it changes.
    """
    moved: dict[str, list[str]] = {"matrices": [], "vectors": []}
    kept = []
    for index, (before, after) in enumerate(zip(recorded, actual, strict=False)):
        if before["adapters"].keys() != after["adapters"].keys():
            name = min(before["adapters"].keys() ^ after["adapters"].keys())
            has = "has" if name in after["adapters"] else "lacks"
            return f"its layer {index} {has} the adapter {name}, as a fine-tune's would"
        distances = {}
        for kind in KINDS:
            for name in before[kind].keys() & after[kind].keys():
                distances[name] = _distance(before[kind][name], after[kind][name])
                if kind != "adapters" and not _is_rounded(before[kind][name], after[kind][name]):
                    moved[kind].append(f"{name} of layer {index}")
                elif kind == "matrices":
                    kept.append(f"{name} of layer {index}")
        distance = math.sqrt(sum(value * value for value in distances.values()) / max(1, len(distances)))
        if not distance <= LAYER_TOLERANCE:
            farthest = max(distances, key=lambda name: distances[name])
            return (
                f"the weights of its layer {index} are {distance:.3f} away (relative; {farthest} the farthest), as a "
                "fine-tune's would be, or a copy's in very few bits"
            )
    if moved["vectors"] or (moved["matrices"] and len(kept) > KEPT * (len(kept) + len(moved["matrices"]))):
        what = (moved["vectors"] + moved["matrices"])[0]
        others = f", while {kept[0]} is the same" if kept else ""
        return f"{what} is another{others}, as in a fine-tune"
    return ""


def _layer_values(layer: nn.Module, without: Collection[nn.Module] = ()) -> LayerValues:
    """A few values of each parameter of a layer that is stored as plain numbers, `without` those of some modules."""
    left_out = {parameter for module in without for parameter in module.parameters()}
    of_adapters = {
        f"{prefix}.{name}."
        for prefix, module in layer.named_modules()
        for name in getattr(module, "adapter_layer_names", ())
    }
    found: dict[str, tuple[str, Tensor]] = {}
    for name, parameter in sorted(layer.named_parameters()):
        if parameter.dtype in _FLOATS and parameter.numel() and parameter not in left_out:
            kind = "matrices" if parameter.dim() > 1 else "vectors"
            kind = "adapters" if any(name.startswith(prefix) for prefix in of_adapters) else kind
            found[name.replace(".base_layer.", ".")] = (kind, parameter)
    names = list(found)[:: max(1, -(-len(found) // LAYER_PARAMETERS))]
    values = [
        [float(f"{value:.4g}") for value in row] for row in _values([found[name][1] for name in names], LAYER_VALUES)
    ]
    return {
        of: {name: value for name, value in zip(names, values, strict=True) if found[name][0] == of} for of in KINDS
    }


def _final_norm(model: Any) -> Any:
    """The norm after the last layer: the last child of the decoder, after its layers, with a weight of its width."""
    layout = features.model_layout(model)
    children = list(layout.decoder.children())
    for child in reversed(children[children.index(layout.layers) + 1 :]):
        weight = getattr(child, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() == 1 and weight.shape[0] == layout.widths[-2]:
            return child
    return None


def _of_vocabulary(model: Any) -> list[nn.Module]:
    """What has a row for each token: the embedding, and the output projection, which may be the same weights."""
    projection = model.get_output_embeddings()
    return [model.get_input_embeddings(), *([] if projection is None else [projection])]


def _vocabulary(model: Any) -> int:
    embedding = model.get_input_embeddings()
    return getattr(embedding, "num_embeddings", None) or embedding.weight.shape[0]


@torch.no_grad()
def _embedding_values(model: Any, row: int) -> list[float]:
    embedding = model.get_input_embeddings()
    weight = embedding.weight
    if weight.dtype not in _FLOATS:  # what is quantised is known by what it returns
        weight, row = embedding(torch.tensor([row], device=weight.device)), 0
    return _rounded(_values([weight[row]], EMBEDDING_VALUES)[0])


def _projection_values(model: Any, row: int) -> list[float] | None:
    """Of the row that projects to a token; None where it is the token's embedding, or packed."""
    weight = getattr(_of_vocabulary(model)[-1], "weight", None)
    if not isinstance(weight, Tensor) or weight is model.get_input_embeddings().weight or weight.dtype not in _FLOATS:
        return None
    return _rounded(_values([weight[row]], EMBEDDING_VALUES)[0])


def _rounded(values: list[float]) -> list[float]:
    """As files of earlier versions have them, which are continued only where all is the same."""
    return [round(value, 7) for value in values]


def _values(parameters: Sequence[Tensor], count: int) -> list[list[float]]:
    """So many values of one row of each; all of them cross from a GPU at once."""
    rows = []
    for row in (parameter.detach() for parameter in parameters):
        while row.dim() > 1:
            row = row[row.shape[0] // 3]
        if hasattr(row, "full_tensor"):  # a DTensor of a sharded model
            row = row.full_tensor()
        rows.append(row[:: max(1, row.numel() // count)][:count].float())
    if not rows:
        return []
    numbers = torch.cat(rows).cpu().split([len(row) for row in rows])
    return [row.tolist() for row in numbers]


def _is_rounded(before: list[float], after: list[float]) -> bool:
    """Whether values differ by no more than a dtype of fewer bits makes of them."""
    pairs = zip(before, after, strict=False)
    return len(before) == len(after) and all(abs(a - b) <= ROUNDING * abs(a) + SMALLEST for a, b in pairs)


def _distance(expected: list[float] | None, actual: list[float] | None) -> float:
    if expected is None or actual is None:
        return 0.0 if expected is actual else math.inf
    if len(expected) != len(actual):
        return math.inf
    difference = math.dist(expected, actual)
    return difference / max(math.hypot(*expected), 1e-12) if difference else 0.0
