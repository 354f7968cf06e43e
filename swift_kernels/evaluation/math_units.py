"""Units of measurement under one name each, to tell 5 cm from 5 m; they are not converted into each other."""

from __future__ import annotations

import re
from fractions import Fraction

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


_MULTIPLIERS = {
    "half": Fraction(1, 2),
    "halves": Fraction(1, 2),
    "dozen": Fraction(12),
    **{
        form: factor
        for place, word in enumerate(("ten", "hundred", "thousand", "million", "billion", "trillion"))
        for scale in (Fraction(10 ** (1, 2, 3, 6, 9, 12)[place]),)
        for form, factor in (
            (word, scale),
            (word + "s", scale),
            (word + "th", 1 / scale),
            (word + "ths", 1 / scale),
        )
    },
    # A second is a unit of time, and a quarter a coin.
    **{
        word + plural: Fraction(1, below)
        for below, word in enumerate(("third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth"), start=3)
        for plural in ("", "s")
    },
}


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# "5 squared" is no 5, but "5 units squared" are 5, and "20 dollars less" are 20.
_OPERATIONS = _words(
    "squared cubed factorial times more less fewer greater larger smaller over under by to point power mod modulo "
    "doubled tripled quadrupled halved multiplied divided increased decreased raised sin cos tan log ln exp sqrt"
)
_COMPARISONS = _words("than plus minus or least most below above")
_CLAUSE = _words(
    "of per a an the each every in on for to at from and that which who is are was were will can total with"
)
_IRREGULAR = {"people": "person", "children": "child", "men": "man", "women": "woman", "mice": "mouse"}


def multiplied(phrase: str) -> tuple[Fraction, str] | None:
    """How much the words after a number multiply it, and what is left of them; None where they calculate or compare.

    "thousand dollars" are 1000 "dollars"; what "squared" or "more than x" leave of a number is not read.
    """
    words = phrase.replace(".", " ").replace("/", " / ").split()
    factor, begin = Fraction(1), 0
    while begin < len(words) and (one := _MULTIPLIERS.get(words[begin].casefold())):
        factor, begin = factor * one, begin + 1
    lower = [word.casefold() for word in words[begin:]]
    # "5 times" is how often, "5 times x" a product.
    # Of "or more", parsing made ", more".
    calculates = lower and (lower[0] in _OPERATIONS or lower[0].startswith(",")) and lower != ["times"]
    if calculates or any(word in _COMPARISONS or word in _MULTIPLIERS for word in lower):
        return None
    return factor, " ".join(words[begin:]) if begin else phrase


def things(phrase: str) -> frozenset[str]:
    """What is counted or measured, in the singular: of "red apples per day" "red" and "apple"; units say nothing."""
    words = re.findall(r"[^\W\d_]+|/", phrase.casefold())
    end = next((place for place, word in enumerate(words) if word == "/" or (word in _CLAUSE and place)), len(words))
    named = (_UNITS.get(word) or _singular(word) for word in words[:end] if word not in _POWERS)
    return frozenset(word for word in named if word not in _CLAUSE and word not in ("", "unit"))


def _singular(word: str) -> str:
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    # A stem will do: house and houses, bus and buses.
    return re.sub(r"s*(?:es|e|s)?$", "", word)
