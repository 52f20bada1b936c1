"""Curated prompts: how a problem is put to the teacher so that it shows a behaviour. They never reach a sample."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from kimivl.data.sample import Sample

LEAK_WORDS = 8
"""So many words of an instruction in a row, found in a trace, are no coincidence."""
_WORD = re.compile(r"\w+")


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is said around a problem.

    Args:
        name: of the prompt, in the report. system: a system turn; behind the problem's own where it has one.
        prefix, suffix: text before and behind the question, in its user turn.
    """

    name: str
    system: str | None = None
    prefix: str | None = None
    suffix: str | None = None

    def put(self, sample: Sample) -> Sample:
        """The problem as the teacher gets it, without the answer of an assistant."""
        turns = question_turns(sample)
        if self.system:
            own = turns.pop(0)["content"] if turns[0]["role"] == "system" else []
            turns.insert(0, {"role": "system", "content": [*own, _text(("\n\n" if own else "") + self.system)]})
        last = max(number for number, turn in enumerate(turns) if turn["role"] == "user")
        content = list(turns[last]["content"])
        before = [_text(f"{self.prefix}\n\n")] if self.prefix else []
        after = [_text(f"\n\n{self.suffix}")] if self.suffix else []
        turns[last] = {"role": "user", "content": [*before, *content, *after]}
        return Sample(sample.key, turns, sample.images, sample.answer, sample.difficulty, sample.source, sample.task)

    def leaks_into(self, text: str) -> str | None:
        """The first ``LEAK_WORDS`` words in a row of this prompt that stand in ``text``, or None."""
        said = " ".join(_WORD.findall(text.lower()))
        for part in (self.system, self.prefix, self.suffix):
            words = _WORD.findall((part or "").lower())
            for first in range(len(words) - LEAK_WORDS + 1):
                if (run := " ".join(words[first : first + LEAK_WORDS])) in said:
                    return run
        return None


def read_prompts(settings: Mapping[str, Any]) -> list[Prompt]:
    """The prompts of ``synthesize.prompts``: name -> {system, prefix, suffix}.

    Raises:
        ValueError: naming the key that is wrong.
    """
    if not settings:
        raise ValueError("synthesize.prompts is empty: choose some, such as synthesize/prompts=[planning,thorough]")
    known = {field.name for field in fields(Prompt)} - {"name"}
    prompts = []
    for name, parts in settings.items():
        if not isinstance(parts, Mapping) or (unknown := sorted(parts.keys() - known)):
            wrong = f"not {unknown[0]}" if isinstance(parts, Mapping) else f"not {parts!r}"
            raise ValueError(f"synthesize.prompts.{name} takes {', '.join(sorted(known))}, {wrong}")
        for part, text in parts.items():
            if text is not None and not isinstance(text, str):
                raise ValueError(f"synthesize.prompts.{name}.{part} must be text, not {text!r}")
        prompts.append(Prompt(name, **parts))
    return prompts


def question_turns(sample: Sample) -> list[dict[str, Any]]:
    """The turns of a problem up to its question."""
    turns = list(sample.messages)
    return turns[:-1] if turns[-1]["role"] == "assistant" else turns


def prompt_of(prompts: Sequence[Prompt], problem: int, sample: int) -> Prompt:
    """The prompt of trajectory ``sample`` of a problem: in turn, and beginning with another for each problem."""
    return prompts[(problem + sample) % len(prompts)]


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}
