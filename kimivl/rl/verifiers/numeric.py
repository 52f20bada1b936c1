"""A number with a tolerance and a unit."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from kimivl.rl.verifiers.extract import Place, final_answer, first_sentence
from kimivl.rl.verifiers.numbers import Quantity, only_number, parse_quantity
from kimivl.rl.verifiers.units import Unit, parse_unit

Units = Literal["ignore", "match", "require"]


@dataclass(frozen=True)
class Numeric:
    """The final answer is the expected number.

    Args:
        relative, absolute: differences that are allowed, in units of the expected answer; the larger one counts.
        exact_integers: an expected whole number (no decimal point, no exponent) must be met exactly.
        units: ``match``: units that both name must agree after conversion (``2 m`` is ``200 cm``), one alone may be
            left out, and a percentage may be written as one, as a number of percent, or as a fraction. ``require``: the
            expected unit must be there. ``ignore``: only the numbers count. Words that are no units (``12 apples``)
            never count.
        place: where an answer may stand; as a whole text, a sentence with one number in it is read too.
    """

    relative: float = 1e-4
    absolute: float = 1e-9
    exact_integers: bool = True
    units: Units = "match"
    place: Place = "whole"

    def __post_init__(self) -> None:
        if self.relative < 0 or self.absolute < 0:
            raise ValueError(f"reward.verifier needs relative >= 0 and absolute >= 0, not {self}")

    def __call__(self, text: str, expected: str) -> bool:
        """Raises ValueError where the expected answer is no number."""
        wanted = parse_quantity(expected.strip())
        if wanted is None:
            raise ValueError(f"the expected answer {expected!r:.120} is not a number: choose another reward.verifier")
        answer = final_answer(text, self.place)
        given = None if answer is None else read_quantity(answer)
        return given is not None and self.equal(given, wanted)

    def equal(self, given: Quantity, wanted: Quantity) -> bool:
        if not _is_worded(given.unit):
            return False
        if self.units == "ignore":
            return self._close(given.value, wanted)
        own, other = parse_unit(given.unit), parse_unit(wanted.unit)
        if own is None or other is None:
            if self.units == "require" and other is not None:
                return False
            return self._any_close(given, wanted, own, other)
        if own[1] != other[1]:
            return False
        return self._close(given.value * Fraction(own[0]) / Fraction(other[0]), wanted)

    def _any_close(self, given: Quantity, wanted: Quantity, own: Unit | None, other: Unit | None) -> bool:
        """One of the two has no unit: where the other is a percentage, it may be meant as one or as a fraction."""
        readings = [given.value]
        if own is not None and not own[1]:
            readings.append(given.value * Fraction(own[0]).limit_denominator())
        if other is not None and not other[1]:
            readings.append(given.value / Fraction(other[0]).limit_denominator())
        return any(self._close(reading, wanted) for reading in readings)

    def _close(self, given: Fraction, wanted: Quantity) -> bool:
        if given == wanted.value:
            return True
        if self.exact_integers and not wanted.decimal and wanted.value.denominator == 1:
            # Conversion of units rounds in the last place.
            return abs(given - wanted.value) <= abs(wanted.value) * Fraction(1, 10**12)
        return abs(given - wanted.value) <= max(Fraction(self.absolute), Fraction(self.relative) * abs(wanted.value))


def read_quantity(answer: str) -> Quantity | None:
    """The number that an answer is, or that its first sentence is, or the only one in it."""
    return parse_quantity(answer) or parse_quantity(first_sentence(answer)) or only_number(answer)


def _is_worded(unit: str) -> bool:
    """Whether what follows a number is a unit or words; ``x`` in ``5x`` is neither."""
    return parse_unit(unit) is not None or all(len(word) > 1 and word.isalpha() for word in unit.split())
