"""What a teacher wrote, as one trace: thinking and answer, in Kimi-VL's marks."""

from __future__ import annotations

from dataclasses import dataclass

from kimivl.data.chat import THINK_CLOSE, THINK_OPEN

_OPEN, _CLOSE = "<think>", "</think>"


class Unfit(Exception):
    """A trace that is not to be learned from; ``reason`` is the name under which it is counted."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, slots=True)
class Trace:
    thinking: str
    answer: str

    @property
    def text(self) -> str:
        """What the assistant says in the sample."""
        return f"{THINK_OPEN}{self.thinking}{THINK_CLOSE}{self.answer}"


def read_trace(text: str) -> Trace:
    """The trace in a response; thinking in ``<think>`` tags is given our marks.

    A response that only closes a ``<think>`` was given the opening tag in its prompt, as some chat templates do.

    Raises:
        Unfit: ``think_marks`` where there is not one pair of marks with the thinking in it and the answer behind;
            ``no_thinking`` and ``no_answer`` where one of the two is empty.
    """
    foreign = _CLOSE in text or _OPEN in text
    if foreign:
        text = text.strip()
        if _OPEN not in text and THINK_OPEN not in text:
            text = _OPEN + text
        text = text.replace(_OPEN, THINK_OPEN).replace(_CLOSE, THINK_CLOSE)
    if text.count(THINK_OPEN) != 1 or text.count(THINK_CLOSE) != 1 or not text.startswith(THINK_OPEN):
        found = f"{text.count(THINK_OPEN)} opening and {text.count(THINK_CLOSE)} closing marks"
        raise Unfit("think_marks", f"{found}, not one pair with the answer behind it")
    thinking, closed, answer = text.removeprefix(THINK_OPEN).partition(THINK_CLOSE)
    if not closed:
        raise Unfit("think_marks", "the thinking is closed before it is opened")
    if foreign:  # the tags stand on lines of their own
        thinking, answer = thinking.strip(), answer.strip()
    if not thinking.strip():
        raise Unfit("no_thinking", "there is nothing between the think marks")
    if not answer.strip():
        raise Unfit("no_answer", "there is nothing behind the thinking")
    return Trace(thinking, answer)
