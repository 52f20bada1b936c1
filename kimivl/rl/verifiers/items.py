"""Lists and sets of short answers."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Literal

from kimivl.rl.verifiers.exact import normal
from kimivl.rl.verifiers.extract import Place, final_answer
from kimivl.rl.verifiers.numbers import parse_quantity

_OPEN, _CLOSE = "([{", ")]}"
_AND = re.compile(r"\s*,?\s+(?:and|or)\s+|\s*,?\s*\\(?:text|mathrm)\{\s*(?:and|or)\s*\}\s*|\s*&\s*")


@dataclass(frozen=True)
class Items:
    """The final answer has the expected items: ``{1, 2}``, ``3, 1 and 2``, ``[red, blue]``, ``(0, 5)``.

    Items are compared as numbers where they are numbers (``0.5`` is ``1/2``), else as text without case.

    Args:
        kind: ``set``: in any order, repeated or not; ``multiset``: in any order; ``sequence``: in this order.
        place: where an answer may stand.
    """

    kind: Literal["set", "multiset", "sequence"] = "set"
    place: Place = "whole"

    def __call__(self, text: str, expected: str) -> bool:
        answer = final_answer(text, self.place)
        if answer is None:
            return False
        given, wanted = (list(map(_key, split_items(side))) for side in (answer, expected))
        if self.kind == "sequence":
            return given == wanted
        return set(given) == set(wanted) if self.kind == "set" else Counter(given) == Counter(wanted)


def split_items(text: str) -> list[str]:
    """What stands between the commas (or semicolons, lines, "and") that are inside no bracket but the outer one."""
    text = re.sub(r"\\(?:left|right|[,;:! ])", " ", text).replace(r"\{", "{").replace(r"\}", "}")
    text = text.strip(" \t\r\n.$")
    if encloses(text):
        text = text[1:-1]
    text = _AND.sub(",", text.replace("{,}", ""))
    if re.search(r"[,;]\s", text):  # then a comma without a space is one inside a number
        text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    depth, start, items = 0, 0, []
    for place, character in enumerate(text):
        depth += (character in _OPEN) - (character in _CLOSE)
        if depth == 0 and character in ",;\n":
            items.append(text[start:place])
            start = place + 1
    items.append(text[start:])
    return [item.strip() for item in items if item.strip()]


def encloses(text: str) -> bool:
    """Whether the first bracket closes with the last character."""
    if len(text) < 2 or text[0] not in _OPEN or text[-1] != _CLOSE[_OPEN.index(text[0])]:
        return False
    depth = 0
    for place, character in enumerate(text):
        depth += (character in _OPEN) - (character in _CLOSE)
        if depth == 0:
            return place == len(text) - 1
    return False


def _key(item: str) -> object:
    quantity = parse_quantity(item)
    if quantity is not None:
        return quantity.value, quantity.unit.casefold()
    return re.sub(r"\s+", "", normal(item)).strip("\"'").casefold()
