"""Scores a language model's answers while they are decoded: fused SWIFT reward heads (arXiv 2505.12225)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from swift_kernels.features import UnsupportedModelError
from swift_kernels.head import HeadConfig, SwiftHead, score_heads
from swift_kernels.state import ScoreState

if TYPE_CHECKING:
    from swift_kernels.integrations.teacher_forcing import score_texts
    from swift_kernels.integrations.transformers import Scorer, attach
    from swift_kernels.selection.best_of_n import BestOfN, Candidate, best_of_n

__version__ = "0.1.0"

__all__ = [
    "BestOfN",
    "Candidate",
    "HeadConfig",
    "ScoreState",
    "Scorer",
    "SwiftHead",
    "UnsupportedModelError",
    "attach",
    "best_of_n",
    "score_heads",
    "score_texts",
]

# These import transformers, so they are looked up when first used.
_LAZY = {
    "Scorer": "swift_kernels.integrations.transformers",
    "attach": "swift_kernels.integrations.transformers",
    "score_texts": "swift_kernels.integrations.teacher_forcing",
    "BestOfN": "swift_kernels.selection.best_of_n",
    "Candidate": "swift_kernels.selection.best_of_n",
    "best_of_n": "swift_kernels.selection.best_of_n",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)
