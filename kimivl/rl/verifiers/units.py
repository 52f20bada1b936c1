"""Units of measure: what a written unit is a multiple of."""

from __future__ import annotations

import re
from collections import Counter
from functools import lru_cache
from math import pi

_METRIC = {"k": 1e3, "h": 1e2, "d": 1e-1, "c": 1e-2, "m": 1e-3, "u": 1e-6, "n": 1e-9, "M": 1e6, "G": 1e9, "": 1.0}
_PREFIXED = {
    "m": ("length", 1.0),
    "g": ("mass", 1e-3),
    "s": ("time", 1.0),
    "L": ("volume", 1e-3),
    "J": ("energy", 1.0),
    "W": ("power", 1.0),
    "N": ("force", 1.0),
    "Pa": ("pressure", 1.0),
    "V": ("voltage", 1.0),
    "A": ("current", 1.0),
    "Hz": ("frequency", 1.0),
    "eV": ("energy", 1.602176634e-19),
    "cal": ("energy", 4.184),
}
_SINGLE = {
    "in": ("length", 0.0254),
    "ft": ("length", 0.3048),
    "yd": ("length", 0.9144),
    "mi": ("length", 1609.344),
    "t": ("mass", 1e3),
    "lb": ("mass", 0.45359237),
    "oz": ("mass", 0.028349523125),
    "min": ("time", 60.0),
    "h": ("time", 3600.0),
    "day": ("time", 86_400.0),
    "week": ("time", 604_800.0),
    "deg": ("angle", pi / 180),
    "rad": ("angle", 1.0),
    "%": ("", 0.01),
    "$": ("dollar", 1.0),
    "cent": ("dollar", 0.01),
    "\u20ac": ("euro", 1.0),
    "\u00a3": ("pound sterling", 1.0),
    "\u00a5": ("yen", 1.0),
    "K": ("temperature", 1.0),
    "degC": ("celsius", 1.0),
    "degF": ("fahrenheit", 1.0),
    "\u03a9": ("resistance", 1.0),
    "ha": ("area", 1e4),
}
_NAMES = {
    "meter": "m", "metre": "m", "centimeter": "cm", "centimetre": "cm", "millimeter": "mm", "millimetre": "mm",
    "kilometer": "km", "kilometre": "km", "decimeter": "dm", "decimetre": "dm", "inch": "in", "inche": "in",
    "foot": "ft", "feet": "ft", "yard": "yd", "mile": "mi", "gram": "g", "kilogram": "kg", "kilo": "kg",
    "milligram": "mg", "ton": "t", "tonne": "t", "pound": "lb", "ounce": "oz", "second": "s", "sec": "s",
    "millisecond": "ms", "minute": "min", "hour": "h", "hr": "h", "d": "day", "liter": "L", "litre": "L", "l": "L",
    "ml": "mL", "milliliter": "mL", "millilitre": "mL", "joule": "J", "watt": "W", "newton": "N", "pascal": "Pa",
    "volt": "V", "ampere": "A", "amp": "A", "hertz": "Hz", "degree": "deg", "\u00b0": "deg", "radian": "rad",
    "percent": "%", "pct": "%", "percentage": "%", "dollar": "$", "usd": "$", "buck": "$", "euro": "\u20ac",
    "eur": "\u20ac", "\u00a2": "cent", "kelvin": "K", "celsius": "degC", "fahrenheit": "degF", "ohm": "\u03a9",
    "hectare": "ha", "kph": "km/h", "kmh": "km/h", "mph": "mi/h", "kWh": "kW*h", "lbs": "lb", "hrs": "h", "mins": "min",
}  # fmt: skip
_POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
_BASES = {"volume": ("length", 3), "area": ("length", 2), "frequency": ("time", -1)}
_FACTOR = re.compile(r"([^\d\s^*/]+?)\s*(?:\^\s*\{?\s*(-?\d)\s*\}?|(\d))?$")

Unit = tuple[float, tuple[tuple[str, int], ...]]
"""Multiple of the base unit, and powers by dimension."""


@lru_cache(maxsize=4096)
def parse_unit(text: str) -> Unit | None:
    """The unit that ``text`` names, such as ``cm``, ``km/h``, ``square meters`` or ``m s^{-1}``; None for a word that
    names none (``apples``)."""
    size, dimensions = 1.0, Counter[str]()
    # Longest names are tens of characters; what is longer is a sentence.
    if not text or len(text) > 60:
        return None
    text = text.replace(" per ", "/").replace("\u00b2", "^2").replace("\u00b3", "^3").replace("\u00b7", "*")
    for number, side in enumerate(text.split("/")):
        power = 1
        for word in side.replace("*", " ").replace("-", " -" if "^" not in side else "-").split():
            if word.lower() in _POWERS:
                power = _POWERS[word.lower()]
                continue
            factor = _FACTOR.match(word)
            found = _atom(factor.group(1)) if factor else None
            if factor is None or found is None:
                return None
            exponent = int(factor.group(2) or factor.group(3) or power) * (-1 if number else 1)
            size *= found[0] ** exponent
            for name, of_base in found[1]:
                dimensions[name] += of_base * exponent
            power = 1
    return size, tuple(sorted((name, count) for name, count in dimensions.items() if count))


@lru_cache(maxsize=1024)
def _atom(word: str) -> Unit | None:
    word = word.rstrip(".")
    for name in (word, word.lower(), word.lower().removesuffix("s")):
        if name in _NAMES:
            name = _NAMES[name]
            if "/" in name or "*" in name:
                return parse_unit(name)
        if name in _SINGLE:
            return _unit(*_SINGLE[name])
        for base, (dimension, size) in _PREFIXED.items():
            if name.endswith(base) and name.removesuffix(base) in _METRIC:
                return _unit(dimension, size * _METRIC[name.removesuffix(base)])
    return None


def _unit(dimension: str, size: float) -> Unit:
    base, power = _BASES.get(dimension, (dimension, 1))
    return size, ((base, power),) if base else ()
