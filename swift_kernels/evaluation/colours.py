"""Backgrounds of tokens: dark text is readable on each, and they are told apart with any kind of colour vision."""

from __future__ import annotations

from collections.abc import Sequence

INK = "#1c2430"
"""The text on them."""

DIVERGING = ("#e0831f", "#f3c48f", "#f7f7f5", "#a9cdea", "#4f9bd9")
"""From low over neutral to high: orange and blue differ for those who do not see red and green apart."""

SEQUENTIAL = ("#f7f7f5", "#cfe6df", "#9bcfc0", "#5fb3a1")
"""From none to all."""


def mix(stops: Sequence[str], share: float) -> str:
    """The colour at `share` in 0..1 of a scale of evenly spaced stops; beyond, that of its end."""
    place = min(max(share, 0.0), 1.0) * (len(stops) - 1)
    index = min(int(place), len(stops) - 2)
    low, high = _channels(stops[index]), _channels(stops[index + 1])
    mixed = (round(a + (b - a) * (place - index)) for a, b in zip(low, high, strict=True))
    return "#" + "".join(f"{channel:02x}" for channel in mixed)


def contrast(one: str, other: str) -> float:
    """The contrast ratio of WCAG 2, 1 to 21; text is readable from 4.5 on."""
    light, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def _luminance(colour: str) -> float:
    linear = [
        channel / 12.92 if channel <= 0.04045 else ((channel + 0.055) / 1.055) ** 2.4
        for channel in (value / 255 for value in _channels(colour))
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _channels(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)
