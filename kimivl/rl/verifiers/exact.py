"""Literal comparison."""

from __future__ import annotations

import re
from dataclasses import dataclass

from kimivl.rl.verifiers.extract import Place, final_answer
from kimivl.rl.verifiers.numbers import plain

_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")


def boxed(text: str, expected: str) -> bool:
    r"""Whether the last ``\boxed{...}`` of the text is the expected answer, but for surrounding spaces."""
    found = _BOXED.findall(text)
    return bool(found) and found[-1].strip() == expected.strip()


def normal(text: str) -> str:
    """What two ways to typeset the same characters have in common; case is kept."""
    return re.sub(r"\s+", " ", plain(text).strip(" \t\r\n.$*_\"'`"))


@dataclass(frozen=True)
class Exact:
    """The final answer is the expected text, but for how it is typeset.

    Args:
        place: where an answer may stand (``kimivl.rl.verifiers.extract``).
        ignore_case: ``Paris`` is ``paris``.
    """

    place: Place = "whole"
    ignore_case: bool = True

    def __call__(self, text: str, expected: str) -> bool:
        answer = final_answer(text, self.place)
        if answer is None:
            return False
        given, wanted = normal(answer), normal(expected)
        return given.casefold() == wanted.casefold() if self.ignore_case else given == wanted
