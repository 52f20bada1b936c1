r"""What kind of answer a problem has, by the form of its question and its answer.

Kimi k1.5 (arXiv 2501.12599) section 2.1 leaves multiple-choice, true/false and proof problems out of RL: the first two
are right by chance too often, and a proof has no final answer to check.

    answer_kind("How many apples are left?", "12 apples")              -> "number"
    answer_kind("Which one is red? (A) sky (B) rose", "B")             -> "choice"
    answer_kind("Solve for x.", r"\frac{-b + \sqrt{b^2 - 4c}}{2}")     -> "expression"
"""

from __future__ import annotations

import re
from itertools import zip_longest
from typing import Literal

AnswerKind = Literal["number", "expression", "choice", "true_false", "proof", "text"]

_TRUE_FALSE = {
    *("true", "false", "yes", "no", "correct", "incorrect", "right", "wrong"),
    *("对", "错", "是", "否", "正确", "错误", "不对", "不是"),
}
_ASKS_TRUE_FALSE = re.compile(r"true\s*(?:or|/)\s*false|\bT\s*/\s*F\b|yes\s*(?:or|/)\s*no", re.IGNORECASE)

_PROOF = re.compile(
    r"(?:^|[.;:!?,]\s*|\band\s+|\bthen\s+|\bplease\s+|\d\)\s*)"
    r"(?:prove|disprove|show\s+that|demonstrate\s+that|give\s+a\s+proof|write\s+a\s+proof)\b"
    r"|证明|求证",
    re.IGNORECASE,
)

_LETTERS = re.compile(r"\(?[A-J]\)?(?:\s*(?:,|and|&)?\s*\(?[A-J]\)?)*[.):]?|\(?[a-j]\)")
_LETTER_AND_TEXT = re.compile(r"\(?[A-J][.):]\s*\S.*", re.DOTALL)
_MARKER = re.compile(r"(?:^|(?<=[\s;,(（]))\(?([A-Ja-j])\s?[.):）、]\s*(?=\S)", re.MULTILINE)  # noqa: RUF001
_CHOOSE = re.compile(
    r"which\s+(?:one\s+)?of\s+the\s+following|\b(?:choose|select|pick)\s+(?:the|one|from|all|an?)\b"
    r"|\b(?:options|choices)\s*:|\bmultiple.choice\b|下列|选项",
    re.IGNORECASE,
)

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+"
_PLAIN = rf"[+\-−]?\s?[$€£¥]?\s?(?:{_DIGITS})"  # noqa: RUF001
_NUMBER = re.compile(
    r"(?:[+\-−]?\s?(?:\d+\s+)?\d+\s*/\s*\d+"  # noqa: RUF001
    rf"|{_PLAIN}(?:[eE][+-]?\d+|\s*(?:\\times|\\cdot|[x×*])\s*10\^(?:\{{[+-]?\d+\}}|[+-]?\d+))?"  # noqa: RUF001
    r"|[+\-−]?\s?\d*\s?\\[dt]?frac\s*(?:\{\s*[+-]?\d+\s*\}\s*\{\s*\d+\s*\}|\d\s*\d))"  # noqa: RUF001
    r"\s*(?:\\?%|°|\^\{?\\circ\}?|\\degree)?"
)
_UNIT = re.compile(
    r"(?:[A-Za-zµμΩΩ]+[.²³]?(?:\^\{?-?\d\}?)?(?:\s?[/·*]\s?[A-Za-zµμΩ]+[²³]?(?:\^\{?-?\d\}?)?)*\s*){1,2}"
)
_NOT_UNITS = {"and", "or", "if", "when", "for", "to", "not", "is", "plus", "minus", "times"}

_DRESSES = [
    re.compile(rf"\A{dress}\Z", re.DOTALL)
    for dress in (r"\$\$(.+)\$\$", r"\$([^$]+)\$", r"\\\((.+)\\\)", r"\\\[(.+)\\\]", r"\\boxed\{(.+)\}")
]
_TEXT_COMMAND = re.compile(r"\\(?:text|mathrm|mathbf|textbf)\{([^{}]*)\}")
_IN_NUMBER = re.compile(r"(?<=\d)\\[,!](?=\d{3})")
_SPACES = re.compile(r"\\[,;! ]")
_FULL_STOP = re.compile(r"(?<=.)\s*[.。]\Z")
_LATEX_COMMAND = re.compile(r"\\[A-Za-z]+")
_WORD = re.compile(r"[^\W\d_]{3,}")
_FUNCTIONS = {"sin", "cos", "tan", "cot", "sec", "csc", "log", "exp", "sqrt", "max", "min", "mod", "gcd", "lcm", "det"}
_FUNCTIONS |= {"arcsin", "arccos", "arctan", "sinh", "cosh", "tanh", "lim", "inf", "infty", "infinity", "alpha", "beta"}
_FUNCTIONS |= {"pi", "theta", "frac", "left", "right", "begin", "end", "matrix", "pmatrix", "bmatrix", "cup", "cap"}
_INITIALS = re.compile(r"(?:[A-Z]\.){2,}")
_OPERATION = re.compile(r"[=^_+*/<>≤≥≠√π∞∪∩±×÷()\[\]{}|:,;\-−]|[\w)]!|\d\s*[A-Za-z]|^[A-Za-z]$")  # noqa: RUF001
_HAS_QUANTITY = re.compile(r"\d|π|∞|√|\b[A-Za-z]\b")


def answer_kind(question: str, answer: str) -> AnswerKind:
    """The kind of a problem with this question (the user's last turn, with its options) and expected answer."""
    plain = _undressed(answer)
    if _is_choice(question, plain):
        return "choice"
    if plain.casefold().strip(" .!。") in _TRUE_FALSE or (plain in "TFYN" and _ASKS_TRUE_FALSE.search(question)):
        return "true_false"
    if is_number(plain):
        return "number"
    if _PROOF.search(question):
        return "proof"
    return "expression" if _is_expression(plain) else "text"


def _undressed(answer: str) -> str:
    r"""Without what only sets the answer off: ``$...$``, ``\(...\)``, ``\boxed{...}``, ``\text{...}``, a full stop."""
    text, before = answer.strip(), None
    while text != before:
        before = text
        for dress in _DRESSES:
            text = dress.sub(r"\1", text).strip()
        text = _SPACES.sub(" ", _TEXT_COMMAND.sub(r" \1", _IN_NUMBER.sub("", text))).replace("\\$", "$").strip()
        text = _FULL_STOP.sub("", text)
    return text


def is_number(plain: str) -> bool:
    """Whether a text is one number, with or without a unit."""
    found = _NUMBER.match(plain)
    if found is None:
        return False
    rest = plain[found.end() :]
    if not rest.strip():
        return True
    unit = rest.strip()
    if not _UNIT.fullmatch(unit) or _NOT_UNITS & set(unit.casefold().split()):
        return False
    return rest[0].isspace() or not (len(unit) == 1 and unit not in "mgsLlVAWNJKCF")


def _is_choice(question: str, plain: str) -> bool:
    """An option's letter or an option's text, where the question lists options."""
    options = _options(question)
    letters = set(re.findall(r"[A-J]", plain.upper()))
    is_letter = _LETTERS.fullmatch(plain) or _LETTER_AND_TEXT.fullmatch(plain)
    if is_letter and (letters & options.keys() or (_CHOOSE.search(question) and len(plain.strip("().: ")) == 1)):
        return True
    if any(plain.casefold() == text for text in options.values()):
        return True
    found = _CHOOSE.search(question)
    listed = re.split(r"[,;\n]|\bor\b", question[found.end() :].casefold()) if found else []
    return len(listed) > 1 and plain.casefold() in {item.strip(" .?:") for item in listed}


def _options(question: str) -> dict[str, str]:
    """Letter -> text of the options that a question lists: at least A and B, in order."""
    marks = list(_MARKER.finditer(question))
    found: dict[str, str] = {}
    for mark, after in zip_longest(marks, marks[1:]):
        if mark[1].upper() == chr(ord("A") + len(found)):
            end = len(question) if after is None else after.start()
            found[mark[1].upper()] = question[mark.end() : end].strip(" \n.;,(").casefold()
    return found if len(found) >= 2 else {}


def _is_expression(plain: str) -> bool:
    """A formula, a tuple, a set, an interval, an equation, a list of numbers: no ordinary words in it."""
    if _LATEX_COMMAND.search(plain):
        plain = _LATEX_COMMAND.sub(" ", plain)
        return not [word for word in _WORD.findall(plain) if word.casefold() not in _FUNCTIONS]
    words = [word for word in _WORD.findall(plain) if word.casefold() not in _FUNCTIONS]
    return (
        not words
        and not _INITIALS.search(plain)
        and bool(_OPERATION.search(plain))
        and bool(_HAS_QUANTITY.search(plain))
    )
