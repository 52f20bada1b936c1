"""The four behaviours of a long chain of thought: planning, evaluation, reflection, exploration.

A marker is a word that such a passage is written with. Words alone say little ("Plan: compute, then check"), so each
marker that is found is also asked whether what stands around it has the structure of the behaviour.
Source: Kimi k1.5 (arXiv 2501.12599) section 2.2.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from itertools import islice

MARKERS: dict[str, tuple[str, ...]] = {
    "planning": (
        r"\bplan\b",
        r"\bsteps?\s*(?:1\b|one\b|by\s+step)",
        r"\b(?:first|to begin|to start)\b",
        r"\blet(?:'s| us| me)\s+(?:start|begin|break|think|outline)",
        r"\b(?:i|we)(?:'ll| will| need to| should| can)\s+(?:first|start|begin)",
        r"\bstrategy\b|\bapproach\b",
        r"首先|第一步|计划|思路|步骤",
    ),
    "evaluation": (
        r"\b(?:re|double)?-?check(?:s|ed|ing)?\b",
        r"\bverif(?:y|ies|ied|ying|ication)\b",
        r"\bconfirm(?:s|ed|ing)?\b",
        r"\bsanity\b",
        r"\b(?:does|do)\s+(?:this|that|it)\s+(?:make sense|hold|agree|match)",
        r"\bplug(?:ging)?\s+(?:\w+\s+){0,3}back\b|\bsubstitut\w+\s+(?:\w+\s+){0,3}back\b",
        r"检查|验证|验算|核对|代入",
    ),
    "reflection": (
        r"\bwait\b",
        r"\bhmm+\b",
        r"\bmistake\b|\bmis(?:read|took|counted|calculated)\b|\berror\b",
        r"\blook again\b|\blet me re(?:do|read|consider|think|count|compute)\w*",
        r"\bactually\b",
        r"\bthat(?:'s| is| was| can't be| cannot be)(?:\s+not)?\s+(?:wrong|right|incorrect|off)\b",
        r"\bnot\s+(?:right|correct)\b",
        r"等等|不对|错了|重新",
    ),
    "exploration": (
        r"\b(?:an)?other\s+(?:way|method|approach|option|idea)\b",
        r"\balternative(?:ly)?\b",
        r"\b(?:a )?(?:second|different)\s+(?:way|method|approach)\b",
        r"\binstead,?\s+(?:let|we|i|try|use)\b",
        r"\bwhat if\b|\bor (?:we|i) (?:could|can)\b",
        r"另一种|换一种|换个|或者",
    ),
}
"""Regular expressions by behaviour, read without regard to case. They know English and Chinese."""

BEHAVIOURS = tuple(MARKERS)

_COMPUTATION = re.compile(r"=|≈|\d\s*[-+*/×÷·^<>]\s*\d|\\(?:frac|times|cdot|sqrt|approx)|\d+\s*%")
_SENTENCE_END = re.compile(r"[.!?。！？;；](?=\s|$)|[。！？；]|\n+")
_WORD = re.compile(r"\d+(?:\.\d+)?|[^\W\d_]+")
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_EQUATION = re.compile(r"(?<![\d.])(?=(\d+(?:\.\d+)?\s*[-+*/×÷]\s*\d+(?:\.\d+)?)\s*=\s*(\d+(?:\.\d+)?))")
"""Looks ahead, so that a chain (3+4=7+8=15) gives each of its steps."""
_HAN = re.compile(r"[㐀-鿿]")
_AGREES = {"right", "correct", "fine", "same", "indeed", "ok", "okay", "good", "yes", "matches", "match", "agrees"}
_AGREES |= {"consistent", "对", "确", "致"}  # Chinese is compared by characters
_FILLERS = {
    "a",
    "an",
    "the",
    "is",
    "are",
    "was",
    "it",
    "its",
    "this",
    "that",
    "so",
    "and",
    "or",
    "but",
    "of",
    "to",
    "in",
}
_FILLERS |= {"on", "for", "with", "as", "at", "by", "be", "i", "we", "me", "my", "our", "you", "let", "lets", "s", "ll"}
_FILLERS |= {"now", "then", "again", "wait", "hmm", "actually", "no", "not", "look", "see", "check"}
_REACH = 240
"""Characters on either side of a correction in which what it changes is looked for."""


class Behaviours:
    """Finds the behaviours of a chain of thought.

    Worked example: "Plan: add. 3+4=8. Wait, 3+4=7. Check: 4+3=7." plans before its first computation, corrects 8 to 7
    behind "Wait", and checks behind a result; it does not explore.

    Args:
        markers: behaviour -> regular expressions, in place of the defaults of that behaviour; a behaviour of another
            name counts wherever one of its markers stands.
        structure: ask for the structure too, not for markers alone.
    """

    def __init__(self, markers: Mapping[str, Sequence[str]] | None = None, structure: bool = True) -> None:
        self.structure = structure
        self.markers: dict[str, str] = {}
        for name, patterns in {**MARKERS, **(markers or {})}.items():
            if isinstance(patterns, str) or not patterns:
                raise ValueError(f"behaviours.markers.{name} must be a list of regular expressions, not {patterns!r}")
            self.markers[name] = "|".join(f"(?:{pattern})" for pattern in patterns)
            try:
                re.compile(self.markers[name])
            except re.error as error:
                raise ValueError(f"behaviours.markers.{name}: {error}") from error

    @cached_property
    def _compiled(self) -> dict[str, re.Pattern[str]]:
        return {name: re.compile(pattern, re.IGNORECASE) for name, pattern in self.markers.items()}

    def __call__(self, thinking: str) -> dict[str, bool]:
        """Behaviour -> whether this chain (the text between the think marks) shows it."""
        chain = _Chain(thinking)
        return {name: self._shows(name, marker, chain) for name, marker in self._compiled.items()}

    def _shows(self, name: str, marker: re.Pattern[str], chain: _Chain) -> bool:
        holds = _STRUCTURE.get(name) if self.structure else None
        return any(holds is None or holds(chain, found) for found in marker.finditer(chain.text))


class _Chain:
    """A chain of thought, and what is asked about it at every marker, found once: long ones have hundreds.

    ``computed`` and ``stated``: where the first computation begins and the second sentence ends (or its length).
    """

    def __init__(self, text: str) -> None:
        self.text = text
        first = _COMPUTATION.search(text)
        self.computed = first.start() if first else None
        ends = [end.start() for end in islice(_SENTENCE_END.finditer(text), 2)]
        self.stated = ends[1] if len(ends) == 2 else len(text)

    def has_result(self, before: int) -> bool:
        """Whether a computation, or two whole sentences (the first may be the plan), stand before a place."""
        return (self.computed is not None and self.computed < before) or self.stated < before


def _is_plan(chain: _Chain, found: re.Match[str]) -> bool:
    """The steps are laid out before the first computation, or where there is none before the middle."""
    return found.start() < (max(1, len(chain.text) // 2) if chain.computed is None else chain.computed)


def _is_evaluation(chain: _Chain, found: re.Match[str]) -> bool:
    """Something is checked: there is a result before it, and the check says something."""
    return chain.has_result(found.start()) and _says(chain.text[found.end() : found.end() + _REACH], 1)


def _is_reflection(chain: _Chain, found: re.Match[str]) -> bool:
    """Something is mended: behind the marker stands what the sentence before it did not say.

    "3+4=7. Wait, 3+4=7 is right" changes nothing, "3+4=8. Wait, 3+4=7" does.
    """
    before = _sentences(chain.text[max(0, found.start() - _REACH) : found.start()])[-2:]
    after = _sentences(chain.text[found.end() : found.end() + _REACH])[:2]
    said, says = " ".join(before), " ".join(after)
    if not said.strip(" ,.:"):
        return False
    if set(_NUMBER.findall(says)) - set(_NUMBER.findall(said)):
        return True
    earlier = dict(_EQUATION.findall(chain.text[max(0, found.start() - 4 * _REACH) : found.start()]))
    if any(earlier.get(step, result) != result for step, result in _EQUATION.findall(says)):
        return True
    new = _words(says) - _words(said)
    return bool(new - _FILLERS - _AGREES or new & {"no"}) and not new & _AGREES


def _is_exploration(chain: _Chain, found: re.Match[str]) -> bool:
    """Another way is gone: there is a result before it, and the way says where it leads."""
    rest = chain.text[found.end() : found.end() + _REACH]
    return chain.has_result(found.start()) and bool(_says(rest, 4) or _NUMBER.search(rest))


_STRUCTURE: dict[str, Callable[[_Chain, re.Match[str]], bool]] = {
    "planning": _is_plan,
    "evaluation": _is_evaluation,
    "reflection": _is_reflection,
    "exploration": _is_exploration,
}


def _sentences(text: str) -> list[str]:
    return [piece for piece in _SENTENCE_END.split(text) if piece.strip(" ,.:;")]


def _words(text: str) -> set[str]:
    """Words in lower case and numbers; of Chinese, which has no spaces, characters."""
    plain = _WORD.findall(text.lower())
    return {word for word in plain if not _HAN.search(word)} | set(_HAN.findall(text))


def _says(text: str, words: int) -> bool:
    return len(_words(text)) >= words
