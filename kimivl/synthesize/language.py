"""Language mixing: how much of a trace is written in a script that its question is not."""

from __future__ import annotations

import re
from collections import Counter

_RANGES = {
    "Latin": "A-Za-zÀ-ÖØ-öø-ɏ",
    "Cyrillic": "Ѐ-ӿ",
    "Arabic": "؀-ۿ",
    "Hebrew": "א-ת",
    "Devanagari": "ऀ-ॿ",
    "Thai": "ก-๛",
    "Kana": "぀-ヿ",
    "Hangul": "가-힣ᄀ-ᇿ",
    "Han": "㐀-鿿",
}
"""Greek is not among them: its letters are mathematics in every language."""
_SCRIPTS = {name: re.compile(f"[{letters}]") for name, letters in _RANGES.items()}
_NO_LANGUAGE = re.compile(r"\\[A-Za-z]+|(?<![A-Za-z])[A-Za-z](?![A-Za-z])|\$[^$\n]*\$|`[^`\n]*`|https?://\S+")
"""Commands and variables of formulas, code and addresses: Latin letters in a text of any language."""
_OWN_SHARE = 0.1
"""A script with this share of a question's letters is one of its own."""


def letters_by_script(text: str) -> Counter[str]:
    """How many letters of each script a text has, formulas and code left out."""
    plain = _NO_LANGUAGE.sub(" ", text)
    return Counter({name: count for name, pattern in _SCRIPTS.items() if (count := len(pattern.findall(plain)))})


def foreign_share(text: str, question: str) -> float:
    """Share of the letters of ``text`` that are of no script of ``question``; 0 without letters.

    A question without letters (a picture, a formula) speaks no language: then the main script of the text is taken
    for its own.
    """
    found, asked = letters_by_script(text), letters_by_script(question)
    total = found.total()
    if total == 0:
        return 0.0
    own = {name for name, count in asked.items() if count >= _OWN_SHARE * asked.total()}
    if not own:
        own = {found.most_common(1)[0][0]}
    if "Kana" in own:  # Japanese is written with both
        own.add("Han")
    return sum(count for name, count in found.items() if name not in own) / total
