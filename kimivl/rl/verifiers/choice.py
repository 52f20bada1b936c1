"""The letter of a multiple-choice answer."""

from __future__ import annotations

import re
from dataclasses import dataclass

from kimivl.rl.verifiers.extract import Place, final_answer, last_boxed, stated
from kimivl.rl.verifiers.numbers import plain

_LEAD = re.compile(
    r"^(?:(?:the\s+)?(?:correct\s+|right\s+|best\s+)?(?:option|choice|answer|letter)s?\s*(?:is|:)?\s*)", re.I
)


@dataclass(frozen=True)
class Choice:
    """The final answer names the expected letter: ``B``, ``(B)``, ``**B**``, ``B. Paris``, ``Option B``.

    Several expected letters (``A, C``) must all be named, in any order, and no other. In running text a letter counts
    where it is marked as one (``(B)``, ``option B``, ``B.``), so that the article "A" does not; a text that names
    several names none.

    Args:
        letters: of the choices.
        place: where an answer may stand.
    """

    letters: str = "ABCDEFGHIJ"
    place: Place = "whole"

    def __post_init__(self) -> None:
        if not self.letters.isalpha() or self.letters != self.letters.upper():
            raise ValueError(f"reward.verifier.letters={self.letters!r}: give capital letters, such as ABCD")

    def __call__(self, text: str, expected: str) -> bool:
        """Raises ValueError where the expected answer is no letter."""
        wanted = self._named(expected)
        if not wanted:
            raise ValueError(
                f"the expected answer {expected!r:.120} names none of {self.letters}: choose another reward.verifier"
            )
        answer = final_answer(text, self.place)
        if answer is None:
            return False
        whole = last_boxed(text) is None and stated(text) is None
        return (self._named(answer) or (self._marked(answer) if whole or len(answer) > 3 else frozenset())) == wanted

    def _named(self, answer: str) -> frozenset[str]:
        """The letters that an answer begins with, or consists of."""
        answer = _LEAD.sub("", plain(answer).replace("*", "").replace("$", "").strip().rstrip("."))
        one = f"[{self.letters}{self.letters.lower()}]"
        if several := re.fullmatch(rf"[\[({{]?\s*({one}(?:\s*(?:,|;|&|and|\s)\s*{one})+)\s*[\])}}]?", answer):
            return frozenset(re.sub(r"and|[^A-Za-z]", " ", several.group(1)).upper().split())
        if re.fullmatch(f"[{self.letters}]{{2,}}", answer) and len(set(answer)) == len(answer):
            return frozenset(answer)
        single = re.match(rf"[\[({{]*\s*({one})\s*(?:[\])}}]+|$|[.:,]\s|[.:]$|\s+[-\u2013\u2014]\s)", answer)
        if single is None or (single.group(1).islower() and single.end() == 1 and len(answer) > 1):
            return frozenset()
        more = rf"\s*(?:or|and|,|;|/|&)\s*\(?(?![AI]\s+[A-Za-z])[{self.letters}](?![^\W_])"
        if re.match(more, answer[single.end() :]):  # `A) or B)` is no answer, whichever was expected
            return frozenset({single.group(1).upper(), "?"})
        return frozenset(single.group(1).upper())

    def _marked(self, answer: str) -> frozenset[str]:
        """The letter that running text marks as a choice, where it marks one only."""
        one = f"([{self.letters}])"
        announced = rf"\b(?:[Oo]ption|[Cc]hoice|[Aa]nswer|[Ii]s(?!\s+A\s+[a-z]))\s+\(?{one}\b"
        marked = rf"\({one}\)|\*\*\(?{one}\b|{announced}|\b{one}[.:)](?=\s|$)"
        found = {letter for match in re.findall(marked, answer) for letter in match if letter}
        return frozenset(found) if len(found) == 1 else frozenset()
