"""What a right trace must also be, to be learned from."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from kimivl.rl.behaviours import BEHAVIOURS, Behaviours
from kimivl.rl.repetition import Repetition
from kimivl.synthesize.language import foreign_share
from kimivl.synthesize.prompts import Prompt
from kimivl.synthesize.traces import Trace, Unfit

LEAKS = (
    r"\bas (?:you |the user |the prompt )?(?:instructed|requested in the prompt)\b",
    r"\b(?:according to|per|following) (?:the|your|my) (?:system )?(?:instructions?|prompt)\b",
    r"\bthe (?:system )?(?:instructions?|prompt) (?:says?|asks?|tells?|wants?|requires?)\b",
    r"\bsystem prompt\b",
)
"""Talk about instructions that the sample does not have."""


class Checks:
    """Tests of a trace whose answer is right.

    Args:
        min_tokens, max_tokens: of the thinking and of the whole trace, by the student's tokenizer.
        max_foreign: largest share of letters in a script that the question is not written in.
        repetition: what counts as going round in circles, anywhere in the trace; null looks for nothing.
        behaviours: finds the four behaviours. required: those that every trace must show.
        min_behaviours: how many different ones it must show at least.
        leaks: regular expressions of talk about the instructions of a prompt.
    """

    def __init__(
        self,
        min_tokens: int = 16,
        max_tokens: int = 16384,
        max_foreign: float = 0.05,
        repetition: Repetition | None = None,
        behaviours: Behaviours | None = None,
        required: Sequence[str] = (),
        min_behaviours: int = 1,
        leaks: Sequence[str] = LEAKS,
    ) -> None:
        self.behaviours = behaviours or Behaviours()
        if not 0 <= min_tokens <= max_tokens or not 0 <= max_foreign <= 1:
            raise ValueError("synthesize.checks needs 0 <= min_tokens <= max_tokens and max_foreign from 0 to 1")
        known = list(self.behaviours.markers)
        if unknown := sorted(set(required) - set(known)):
            raise ValueError(f"synthesize.checks.required: {unknown[0]} is none of {', '.join(known)}")
        if not 0 <= min_behaviours <= len(known):
            raise ValueError(f"synthesize.checks.min_behaviours={min_behaviours} must be from 0 to {len(known)}")
        self.min_tokens = min_tokens
        self.max_tokens = max_tokens
        self.max_foreign = max_foreign
        self.repetition = repetition
        self.required = tuple(required)
        self.min_behaviours = min_behaviours
        try:
            self._leaks = re.compile("|".join(f"(?:{leak})" for leak in leaks) or r"(?!)", re.IGNORECASE)
        except re.error as error:
            raise ValueError(f"synthesize.checks.leaks: {error}") from error

    def __call__(self, trace: Trace, question: str, prompt: Prompt, thinking: np.ndarray, answer: np.ndarray) -> None:
        """Refuse a trace that teaches something wrong; ``thinking`` and ``answer`` are its tokens.

        Raises:
            Unfit: ``too_short``, ``too_long``, ``repetition``, ``language_mixing``, ``prompt_leak``.
        """
        if len(thinking) < self.min_tokens:
            raise Unfit("too_short", f"{len(thinking)} tokens of thinking, fewer than {self.min_tokens}")
        if (length := len(thinking) + len(answer)) > self.max_tokens:
            raise Unfit("too_long", f"{length} tokens, more than {self.max_tokens}")
        if self.repetition is not None and (place := self.repetition.first(thinking)) is not None:
            raise Unfit("repetition", f"the thinking repeats itself up to token {place}")
        if (share := foreign_share(trace.text, question)) > self.max_foreign:
            raise Unfit("language_mixing", f"{share:.0%} of its letters are of a script that the question is not")
        if found := self._leaks.search(trace.text):
            raise Unfit("prompt_leak", f"it speaks of instructions: {found.group()!r}")
        if leak := prompt.leaks_into(trace.text):
            raise Unfit("prompt_leak", f"it quotes the prompt {prompt.name}: {leak!r}")

    def check_behaviours(self, shown: dict[str, bool]) -> None:
        """Raises Unfit ``behaviours`` where too few of them, or not the required ones, are shown."""
        if missing := [name for name in self.required if not shown.get(name)]:
            raise Unfit("behaviours", f"no {missing[0]}")
        if (count := sum(shown.values())) < self.min_behaviours:
            raise Unfit("behaviours", f"{count} behaviours, fewer than {self.min_behaviours}")

    @property
    def names(self) -> tuple[str, ...]:
        """Of the behaviours, the four first."""
        return (*BEHAVIOURS, *(name for name in self.behaviours.markers if name not in BEHAVIOURS))
