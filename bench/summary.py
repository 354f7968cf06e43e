"""Medians with intervals, ratios of samples that were taken in turn, and outliers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Optional

FEWEST_SAMPLES = 6
"""Of fewer undisturbed samples no figure is made: between 5 samples the true median lies with less than 95%."""

OUTLIER = 5.0
"""An outlier lies so many standard deviations from the median, estimated from the median absolute deviation."""

Sample = Optional[float]  # noqa: UP045 - evaluated at run time, by Python 3.10 too
"""None where the sample was disturbed: taken while its threads had to wait for a core."""


@dataclass(frozen=True)
class Summary:
    """Median of some samples, and the interval that covers the true median with at least 95% confidence."""

    median: float
    low: float
    high: float
    count: int
    disturbed: int
    outliers: int

    @staticmethod
    def of(samples: Sequence[Sample]) -> Summary | None:
        """None of fewer than `FEWEST_SAMPLES` undisturbed samples."""
        ordered = sorted(sample for sample in samples if sample is not None)
        if len(ordered) < FEWEST_SAMPLES:
            return None
        low, high = interval_ranks(len(ordered))
        return Summary(
            statistics.median(ordered),
            ordered[low],
            ordered[high],
            len(ordered),
            len(samples) - len(ordered),
            len(find_outliers(ordered)),
        )


@dataclass(frozen=True)
class Ratio:
    """The median of ratios within rounds, and its interval."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(numerators: Sequence[Sample], denominators: Sequence[Sample]) -> Ratio | None:
        """Of two contenders' samples by round. A round in which one was disturbed says nothing."""
        ratios = [a / b for a, b in zip(numerators, denominators, strict=True) if a is not None and b]
        found = Summary.of(ratios)
        return None if found is None else Ratio(found.median, found.low, found.high)

    @property
    def differs(self) -> bool:
        return not self.low <= 1 <= self.high

    def text(self, percent: bool = False) -> str:
        """As "2.06x (2.01-2.11)" or "99.0% (98.5-99.8)"; where the interval includes 1, as "no difference"."""
        scale, unit = (100, "%") if percent else (1, "x")
        digits = 1 if percent or self.median >= 10 else 2
        interval = f"({self.low * scale:.{digits}f}-{self.high * scale:.{digits}f})"
        return f"{self.median * scale:.{digits}f}{unit} {interval}" if self.differs else f"no difference {interval}"


def interval_ranks(count: int) -> tuple[int, int]:
    """Ranks, from 0, of the order statistics that enclose the true median with a probability of 95% or more.

    Exact, from the binomial distribution: nothing is assumed of how the samples are distributed.
    """
    rank, outside = 0, 2 / 2**count
    while rank < (count - 1) // 2:
        outside += 2 * math.comb(count, rank + 1) / 2**count
        if outside > 0.05:
            break
        rank += 1
    return rank, count - 1 - rank


def find_outliers(samples: Sequence[float]) -> list[float]:
    median = statistics.median(samples)
    spread = 1.4826 * statistics.median(abs(sample - median) for sample in samples)
    return [sample for sample in samples if abs(sample - median) > OUTLIER * spread > 0]
