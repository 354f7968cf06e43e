"""Units of measurement under one name each, to tell 5 cm from 5 m; they are not converted into each other."""

from __future__ import annotations

import re

_ALIASES = {
    "millimeter": "mm millimetre",
    "centimeter": "cm centimetre",
    "decimeter": "dm decimetre",
    "meter": "m metre",
    "kilometer": "km kilometre",
    "inch": "in inches",
    "foot": "ft feet",
    "yard": "yd",
    "mile": "mi",
    "milligram": "mg",
    "gram": "g gm gramme",
    "kilogram": "kg kilo",
    "ton": "tonne",
    "ounce": "oz",
    "pound": "lb",
    "milliliter": "ml millilitre",
    "liter": "l litre",
    "gallon": "gal",
    "second": "s sec",
    "minute": "min",
    "hour": "h hr",
    "day": "",
    "week": "wk",
    "month": "",
    "year": "yr",
    "degree": "deg",
    "radian": "rad",
    "dollar": "usd",
    "cent": "",
    "euro": "eur",
    "acre": "",
    "hectare": "ha",
    "mile/hour": "mph",
    "kilometer/hour": "kmph kph",
}
_UNITS = {
    form: unit for unit, others in _ALIASES.items() for name in (unit, *others.split()) for form in (name, name + "s")
}
_POWERS = {"square": "2", "sq": "2", "squared": "2", "cubic": "3", "cu": "3", "cubed": "3"}


def canonical_unit(phrase: str, power: str | None = None) -> str | None:
    """The name of the unit that a phrase such as "square cm" or "miles per hour" means, None for other words."""
    words = re.sub(r"\bper\b|/", " / ", phrase.casefold()).replace(".", " ").split()
    if "/" in words:
        at = words.index("/")
        above, below = canonical_unit(" ".join(words[:at])), canonical_unit(" ".join(words[at + 1 :]))
        return f"{above}/{below}" if above and below else None
    for word in words:
        power = _POWERS.get(word, power)
    words = [word for word in words if word not in _POWERS]
    if len(words) != 1:
        return None
    word, _, written = words[0].partition("^")
    unit = _UNITS.get(word)
    power = written.strip("{}") or power
    return f"{unit}^{power}" if unit and power not in (None, "1") else unit
