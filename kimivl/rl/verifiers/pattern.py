"""Answers that a regular expression describes."""

from __future__ import annotations

import re
from dataclasses import dataclass

from kimivl.rl.verifiers.extract import Place, final_answer


@dataclass(frozen=True)
class Pattern:
    """The whole final answer matches the expected answer, which is a regular expression: ``(twenty|20)( apples)?``.

    An expression can take for ever on some answer: use worker processes (``reward.workers``).

    Args:
        ignore_case: of letters.
        place: where an answer may stand.
    """

    ignore_case: bool = True
    place: Place = "whole"

    def __call__(self, text: str, expected: str) -> bool:
        """Raises ``re.error`` where the expected answer is no regular expression."""
        expression = re.compile(expected, re.IGNORECASE if self.ignore_case else 0)
        answer = final_answer(text, self.place)
        return answer is not None and expression.fullmatch(answer) is not None
