"""Mathematical equality: literally, as numbers, and last by computer algebra (math-verify, which is on sympy)."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

from kimivl.rl.verifiers.exact import normal
from kimivl.rl.verifiers.extract import Place, final_answer
from kimivl.rl.verifiers.numbers import Quantity, parse_quantity

PLACES = 6
"""Decimals that a rounded number must have right."""
FIGURES = 200
"""A rounded number may be off by its 200th part at most: ``0`` is not a small number, whatever its decimals."""
MAX_LENGTH = 1_000
MAX_DEPTH = 30

_HUGE = re.compile(
    r"\d{60}"  # a number of more digits than anyone means
    r"|(?:\^|\*\*)\s*[{(]*\s*[-+]?(?:\d{5}|\d+\s*[})]*\s*(?:\^|\*\*))"  # an exponent above 9999, or a tower
    r"|\d{4}\s*!|!\s*!|\)\s*!"  # a large factorial
)
_TO_DO = re.compile(r"(?:.*=)?[\d.,()]+(?:[-+*\u00f7][-+]*[\d.,()]+)+", re.DOTALL)
"""Numbers that are still to be added, subtracted or multiplied."""
_UNITLESS = {"", "%", "$", "deg"}
_SQRT = re.compile(r"(?<![\\a-zA-Z])sqrt\s*\(([^()]*)\)")
_WORDS = re.compile(r"(?<![\\a-zA-Z])(pi|sin|cos|tan|log|ln|exp|infty)(?![a-zA-Z])")
_SIGNS = str.maketrans(
    {"\u03c0": r"\pi ", "\u221e": r"\infty ", "\u222a": r"\cup ", "\u2264": r"\le ", "\u2265": r"\ge "}
)


@dataclass(frozen=True)
class Mathematics:
    r"""The final answer equals the expected one: ``\frac{1}{2}`` is ``0.5``, ``x(x+1)`` is ``x^2+x``, ``\{2, 1\}`` is
    ``\{1, 2\}``, ``(0, 1]`` is not ``[0, 1]``. Where a number is expected, a sum, difference or product of numbers
    (``3+4`` for ``7``) is no answer: it may be the question said again.

    Computer algebra may take any time and memory, so this verifier wants worker processes (``reward.workers``); what
    ``settle`` can say needs none. An answer that is beyond all measure (towers of powers, endless nesting) where the
    expected one is not, is wrong without being worked out.

    Args:
        place: where an answer may stand.
    """

    place: Place = "whole"

    def settle(self, text: str, expected: str) -> bool | None:
        """Literal and numerical equality; None where only computer algebra can tell."""
        answer = final_answer(text, self.place)
        if answer is None or len(answer) > MAX_LENGTH >= len(expected):
            return False
        given, wanted = _read(answer), _read(expected)
        if given.normal == wanted.normal:
            return True
        if given.quantity is not None and wanted.quantity is not None:
            return _same_number(given.quantity, wanted.quantity)
        if wanted.quantity is not None and _TO_DO.fullmatch(given.normal):
            return False
        return False if given.is_huge and not wanted.is_huge else None

    def prepare(self) -> None:
        """Import sympy and build the grammar's tables, before the first answer is timed."""
        self("\\boxed{x+1}", "1+x")

    def __call__(self, text: str, expected: str) -> bool:
        settled = self.settle(text, expected)
        if settled is not None:
            return settled
        answer = final_answer(text, self.place) or ""
        _, verify = _math_verify()
        return bool(verify(list(_parsed(expected)), list(_parsed(answer)), timeout_seconds=None))


@dataclass(frozen=True, slots=True)
class _Answer:
    normal: str
    quantity: Quantity | None
    is_huge: bool


@lru_cache(maxsize=65_536)
def _read(text: str) -> _Answer:
    """What is cheap to know of an answer; kept, because the k responses to a problem say much the same."""
    text = text.strip()
    quantity = parse_quantity(text)
    if quantity is not None and quantity.unit not in _UNITLESS:
        quantity = None  # `5 m` may be metres, or five times m
    return _Answer(re.sub(r"\s+", "", normal(text)), quantity, is_huge(text))


def is_huge(text: str) -> bool:
    """Whether to work an expression out may take more time or memory than any real answer needs."""
    if len(text) > MAX_LENGTH or _HUGE.search(text):
        return True
    depth = deepest = 0
    for character in text:
        depth += (character in "{([") - (character in "})]")
        deepest = max(deepest, depth)
    return deepest > MAX_DEPTH


def _same_number(given: Quantity, wanted: Quantity) -> bool:
    if given.unit and wanted.unit and given.unit != wanted.unit:
        percent = [side.value / 100 if side.unit == "%" else side.value for side in (given, wanted)]
        return "%" in (given.unit, wanted.unit) and percent[0] == percent[1]
    readings = [given.value]
    if given.unit != wanted.unit and "%" in (given.unit, wanted.unit):  # one of them is a percentage, one is bare
        readings.append(given.value / 100 if given.unit == "%" else given.value * 100)
    if any(reading == wanted.value for reading in readings):
        return True
    return (given.decimal or wanted.decimal) and any(
        round(reading, PLACES) == round(wanted.value, PLACES)
        and abs(reading - wanted.value) * FIGURES <= abs(wanted.value)
        for reading in readings
    )


@cache
def _math_verify() -> tuple[Any, Any]:
    """``parse`` and ``verify``. Their own timeouts are alarms, which do not interrupt C code."""
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its timeouts are off
    from math_verify import parse, verify

    return parse, verify


@lru_cache(maxsize=16_384)
def _parsed(text: str) -> tuple[Any, ...]:
    """The expressions that math-verify reads in an answer; kept, above all for the expected ones."""
    parse, _ = _math_verify()
    inner = as_latex(text)
    return tuple(parse(inner if "\\boxed" in inner else f"${inner}$", parsing_timeout=None))


def as_latex(text: str) -> str:
    """Plain notation as LaTeX, as far as it is unambiguous: ``sqrt(2)``, ``x**2``, ``pi``, Unicode signs."""
    text = text.strip().translate(_SIGNS).replace("$", "").replace("**", "^").replace("\u2212", "-")
    text = re.sub("\u221a\\s*\\(([^()]*)\\)|\u221a\\s*(\\w+)", lambda match: rf"\sqrt{{{match[1] or match[2]}}}", text)
    if "\\" not in text:
        text = re.sub(r"(?<=[\w)])\s*\*\s*(?=[\w(])", r" \\cdot ", text)
    return _WORDS.sub(r"\\\1 ", _SQRT.sub(r"\\sqrt{\1}", text))
