r"""Where the final answer stands in a text: in the last ``\boxed{...}``, after "the answer is", or it is the whole.

One pass over the text each, whatever stands in it: a model may write any number of braces.
"""

from __future__ import annotations

import re
from typing import Literal

Place = Literal["boxed", "stated", "whole"]
r"""``boxed``: only a ``\boxed{...}`` is an answer. ``stated``: failing that, what follows "the answer is", "Answer:"
or "####". ``whole``: failing both, the whole text is the answer."""

MAX_NESTED = 4
"""Boxes in boxes that are opened; each takes another pass over the text."""

_BRACES = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_STATED = re.compile(r"\banswers?\b[^\n.:=]{0,40}?(?:\b(?:is|are)\b|[:=])|####", re.IGNORECASE)
_LEAD = re.compile(r"[\s:*_#>]*")
_SENTENCE_END = re.compile(r"[.!?](?:\s|$)")
_SPACES = re.compile(r"[^\S\n]+")
_LINES = re.compile(r" ?\n[ \n]*")


def boxed_contents(text: str) -> list[str]:
    r"""Contents of the outermost ``\boxed{...}`` (or ``\fbox``), in order. One whose brace never closes is none; braces
    inside nest, and escaped ones (``\{``) do not count."""
    opened: list[tuple[int, bool]] = []
    spans: list[tuple[int, int]] = []
    for match in _BRACES.finditer(text):
        token = match.group()
        if token == "}":
            if opened:
                start, is_box = opened.pop()
                if is_box:
                    while spans and spans[-1][0] > start:
                        spans.pop()  # it lies inside this one
                    spans.append((start, match.start()))
        elif token == "{":
            opened.append((match.end(), False))
        elif len(token) > 2:
            opened.append((match.end(), True))
    return [text[start:end] for start, end in spans]


def last_boxed(text: str) -> str | None:
    """Content of the last box, or of the box that fills it; None where there is no box."""
    content = None
    for _ in range(MAX_NESTED):
        boxes = boxed_contents(text if content is None else content)
        if not boxes:
            break
        content = boxes[-1].strip()
        if not (content.startswith(("\\boxed", "\\fbox")) and content.endswith("}")):
            break
    return content


def stated(text: str) -> str | None:
    """What the last "the answer is ..." says, to the end of its sentence; None where nothing says so."""
    last = None
    for last in _STATED.finditer(text):  # noqa: B007
        pass
    if last is None:
        return None
    start = _LEAD.match(text, last.end())
    line = text[start.end() if start else last.end() :].partition("\n")[0]
    return strip_marks(line)


def first_sentence(text: str) -> str:
    """Without what follows the first full stop; one inside a number is none."""
    end = _SENTENCE_END.search(text)
    return text[: end.start()] if end else text


def strip_marks(text: str) -> str:
    r"""Without the marks that stand around an answer: spaces, markdown, dollars, quotes, ``\( \)``, a full stop."""
    before = None
    while before != text:
        before = text
        text = text.strip(" \t\r\n*_`\"'\u201c\u201d").removesuffix(".")
        for left, right in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
            if len(text) >= len(left) + len(right) and text.startswith(left) and text.endswith(right):
                inner = text[len(left) : len(text) - len(right)]
                if left[-1] not in inner.replace("\\$", ""):
                    text = inner
    return text


def final_answer(text: str, place: Place = "whole") -> str | None:
    """The answer that a text gives, at the first of the places up to ``place`` where there is one; None for none.

    A run of spaces comes as one, and of line ends too: patterns that allow for spaces between what they read would
    otherwise take quadratic time, or worse, on a model that writes thousands of them.
    """
    if (found := last_boxed(text)) is not None:
        return _strip(found)
    if place != "boxed" and (found := stated(text)):
        return _strip(found)
    return _strip(text) if place == "whole" else None


def _strip(answer: str) -> str | None:
    return strip_marks(_LINES.sub("\n", _SPACES.sub(" ", answer))) or None
