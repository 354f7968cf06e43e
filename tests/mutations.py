"""Damage to files, the same for the same seed: bytes that change, and JSON that says something else."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from typing import Any

ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    1.5,
    2**64,
    10**400,
    float("nan"),
    float("inf"),
    "",
    "\0",
    "\ud800",
    "x",
    [],
    {},
    [[1]],
]
TOO_LONG = 10**5


def of_bytes(content: bytes, chance: random.Random) -> bytes:
    """A flip of a bit, a cut, a hole, a repetition, or something else at the end."""
    place = chance.randrange(len(content))
    until = min(len(content), place + chance.randrange(1, 64))
    made: list[Callable[[], bytes]] = [
        lambda: content[:place] + bytes([content[place] ^ 1 << chance.randrange(8)]) + content[place + 1 :],
        lambda: content[:place],
        lambda: content[:place] + content[until:],
        lambda: content[:until] + content[place:],
        lambda: content[:place] + b"\0" * (until - place) + content[until:],
        lambda: content + content[place:until],
    ]
    return chance.choice(made)()


def of_json(content: bytes, chance: random.Random) -> bytes:
    """One JSON text with a value anywhere in it replaced, removed, moved or said twice."""
    root = [json.loads(content)]
    owner: Any = root
    key: Any = 0
    while isinstance(owner[key], dict | list) and owner[key] and chance.random() < 0.8:
        owner = owner[key]
        key = chance.choice(list(owner)) if isinstance(owner, dict) else chance.randrange(len(owner))
    value = owner[key]
    kind = chance.randrange(6)
    if kind == 0 and owner is not root:
        del owner[key]
    elif kind == 1 and isinstance(owner, dict):
        owner[f"{key}x"] = owner.pop(key)
    elif kind == 1:
        owner.append(copy.deepcopy(value))
    elif kind == 2 and isinstance(owner, list):
        chance.shuffle(owner)
    elif kind == 3 and type(value) in (int, float):
        owner[key] = value + chance.choice([-1, 1, 2**33])
    elif kind == 4 and isinstance(value, str):
        owner[key] = value[1:] + "y"
    else:
        owner[key] = chance.choice(ODD)
    text = json.dumps(root[0]) if root else ""
    if chance.random() < 0.05:  # what no dump makes
        text = text.replace("1", chance.choice(["1" * 5000, "[" * TOO_LONG, "1e999", "01"]), 1)
    return text.encode()


def of_lines(content: bytes, chance: random.Random) -> bytes:
    """JSON lines of which one is damaged, lost, moved or there twice."""
    lines = content.splitlines(keepends=True)
    place = chance.randrange(len(lines))
    kind = chance.randrange(8)
    if kind == 0:
        del lines[place]
    elif kind == 1:
        lines.insert(chance.randrange(len(lines) + 1), lines[place])
    elif kind == 2:
        chance.shuffle(lines)
    elif kind == 3:
        lines[place] = of_bytes(lines[place], chance)
    else:
        lines[place] = of_json(lines[place], chance) + b"\n"
    return b"".join(lines)
