"""How long work tells how far it is, without knowing who shows it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol


class Update(Protocol):
    """Tells how much of the total is done, and something worth knowing about it."""

    def __call__(self, done: int, detail: str = "") -> None: ...


Progress = Callable[[str, int], AbstractContextManager[Update]]
"""`with progress(description, total) as update: update(done)`."""
