r"""Numbers as people and models write them: ``1,234.5``, ``\frac{3}{4}``, ``2 1/2``, ``6.02 \times 10^{23}``, ``50\%``,
``$12``, ``-5 cm``. Exact: a value is a fraction, not a float."""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from kimivl.rl.verifiers.units import parse_unit

MAX_DIGITS = 400
"""Longer numbers, and exponents of ten beyond it, are not read: they could fill the memory."""
MAX_LENGTH = 500

_WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
_SPELLED = {word: str(value) for value, word in enumerate(_WORDS)}
_VULGAR = {
    "\u00bd": "1/2", "\u2153": "1/3", "\u2154": "2/3", "\u00bc": "1/4", "\u00be": "3/4", "\u2155": "1/5",
    "\u215b": "1/8", "\u215c": "3/8", "\u215d": "5/8", "\u215e": "7/8",
}  # fmt: skip
_SUPERSCRIPT = str.maketrans("\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207b", "0123456789-")
_PLAIN = [
    (re.compile(r"[\u2212\u2013\u2010\u2011\ufe63\uff0d]"), "-"),
    (re.compile(r"[\u00a0\u2009\u202f\u2007]|\\[,;:! ]|\\q?quad(?![a-zA-Z])|~"), " "),
    (re.compile(r"\\(?:left|right|displaystyle|bigl?|bigr)(?![a-zA-Z])"), ""),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\[dtc]frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\\(?:text|textbf|mathrm|mathbf|mathit|operatorname|mbox|textrm|bf|rm)\s*\{([^{}]*)\}"), r" \1"),
    (re.compile(r"\^\s*\{?\s*\\?(?:circ|degree)(?![a-zA-Z])\s*\}?|\\degree(?![a-zA-Z])|\u00b0"), " deg "),
    (re.compile(r"\u2103"), " degC "),
    (re.compile(r"\bdeg\s+(?:C|Celsius)\b|\bdegrees\s+(?:C|Celsius)\b"), "degC"),
    (re.compile(r"\bdeg\s+(?:F|Fahrenheit)\b|\bdegrees\s+(?:F|Fahrenheit)\b"), "degF"),
    (re.compile(r"\\([%$#&])"), r"\1"),
    (re.compile(r"\\(?:times|cdot)(?![a-zA-Z])|\u00d7"), "*"),
    (re.compile(r"\\(?:approx|simeq|sim)(?![a-zA-Z])|\u2248"), "="),
]
_NAMED = re.compile(r"^\s*(?:[A-Za-z]\w{0,20}|\\[a-z]+|[A-Za-z]\([a-z]\))?\s*=\s*")
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d{1,3}(?: \d{3})+(?:\.\d+)?(?!\d)|\d+(?:\.\d*)?|\.\d+)"
_POWER = r"10\s*(?:\^|\*\*)\s*[{(]*\s*(?P<power>[-+]?\d+)\s*[})]*"
_FORMS = [
    re.compile(form + r"\s*(?P<unit>.*)$", re.DOTALL)
    for form in (
        rf"(?:(?P<whole>\d+)\s*)?\\frac\s*\{{\s*(?P<n>-?{_DIGITS})\s*\}}\s*\{{\s*(?P<d>{_DIGITS})\s*\}}",
        r"(?:(?P<whole>\d+)\s*)?\\frac\s*(?P<n>\d)\s*(?P<d>\d)",
        rf"(?:(?P<whole>\d+)(?:\s+|\s*\+\s*))?(?P<n>{_DIGITS})\s*/\s*(?P<d>{_DIGITS})(?!\s*[\d.(])",
        _POWER,
        rf"(?P<number>{_DIGITS})(?P<e>[eE][-+]?\d+)?(?:\s*[*x]\s*{_POWER})?",
    )
]
_HEAD = re.compile(r"(?P<sign>[-+]?)\s*(?P<currency>[$\u20ac\u00a3\u00a5]?)\s*(?P<sign2>[-+]?)\s*")
_UNIT = re.compile(
    r"[A-Za-z%$/\u0080-\uffff][A-Za-z%$/*.\s\u0080-\uffff-]*(?:\^\s*\{?\s*-?\d\s*\}?[\s/*]*[A-Za-z]*|[23]\b)*$"
)


class Quantity(NamedTuple):
    """A number with what is written behind it. ``decimal``: it has a decimal point or an exponent, so that it may be
    rounded."""

    value: Fraction
    unit: str
    decimal: bool


def plain(text: str) -> str:
    """Typeset text as plain characters, as far as numbers and units need it."""
    for pattern, replacement in _PLAIN:
        text = pattern.sub(replacement, text)
    return text.replace("$ ", "$").strip()


def parse_quantity(text: str) -> Quantity | None:
    """The number that ``text`` is, with its unit; None where it is anything else than one number."""
    return _parse(text) if 0 < len(text) <= MAX_LENGTH else None


@lru_cache(maxsize=65_536)
def _parse(text: str) -> Quantity | None:
    text = _NAMED.sub("", plain(text)).strip().rstrip(".")
    text = _SPELLED.get(text.lower(), text)
    for sign, fraction in _VULGAR.items():
        text = text.replace(sign, f" {fraction}").strip()
    text = re.sub(r"(?<=10)[\u2070\u00b9\u00b2\u00b3\u2074-\u2079\u207b]+", _written_out, text)
    head = _HEAD.match(text)
    start = head.end() if head else 0
    match = next((found for form in _FORMS if (found := form.match(text, start))), None)
    if head is None or match is None or len(match.group()) - len(match["unit"]) > MAX_DIGITS:
        return None
    parts = match.groupdict()
    value, unit = _value(parts), parts["unit"].strip()
    if value is None or (unit and not _UNIT.match(unit)):
        return None  # no number, or more than a number and its unit
    negative = (head["sign"] + head["sign2"]).count("-") % 2 == 1
    rounded = "." in (parts.get("number") or "") or bool(parts.get("e") or parts.get("power"))
    return Quantity(-value if negative else value, head["currency"] or unit, rounded)


def _written_out(match: re.Match[str]) -> str:
    return f"^{match.group().translate(_SUPERSCRIPT)}"


def _fraction(digits: str) -> Fraction:
    return Fraction(digits.replace(",", "").replace(" ", ""))


def _value(parts: dict[str, str | None]) -> Fraction | None:
    if above := parts.get("n"):
        divisor = _fraction(parts["d"] or "")
        return _fraction(above) / divisor + int(parts.get("whole") or 0) if divisor else None
    value = _fraction(parts.get("number") or "1")
    for exponent in (parts.get("e"), parts.get("power")):
        power = int((exponent or "0").lstrip("eE"))
        if abs(power) > MAX_DIGITS:
            return None
        value *= Fraction(10) ** power
    return value


_IN_TEXT = re.compile(
    rf"(?<![\w.,])(?P<number>[-\u2212]?{_DIGITS}(?:\s*/\s*\d+)?(?:[eE][-+]?\d+)?)(?!\w?\d)(?:\s*(?P<word>%|[A-Za-z\u00b0]+))?"
)


_LIST = re.compile(r"\d,(?!\d{3}(?!\d))\d")
"""A comma between digits that parts no thousands."""


def only_number(text: str) -> Quantity | None:
    """The number that a sentence names, where it names one and no other: "There are 12 apples."."""
    if _LIST.search(text):
        return None
    found = {match["number"]: match["word"] for match in _IN_TEXT.finditer(plain(text[: 20 * MAX_LENGTH]))}
    if len(found) != 1:
        return None
    number, word = found.popitem()
    return parse_quantity(f"{number} {word}" if word and parse_unit(word) else number)
