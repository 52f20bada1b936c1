"""What flows through an RL iteration: problems -> requests -> responses -> groups -> experience."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from kimivl.data.pack import EncodedSample
from kimivl.data.sample import Sample
from kimivl.rl.repetition import Repetition

Stop = Literal["stop", "length", "repetition", "budget", "error"]
"""Why a response ended: it closed its turn (``stop``); it reached the hard cap (``length``); it repeated itself; it
used up this call's budget and can be gone on with (``budget``); the engine failed to produce it (``error``)."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A prompt with a verifiable answer. ``number`` is its place in the index of its shard set."""

    number: int
    sample: Sample
    prompt: EncodedSample
    difficulty: int = -1

    @property
    def key(self) -> str:
        return self.sample.key

    @property
    def answer(self) -> str:
        return str(self.sample.answer)

    @property
    def question(self) -> str:
        """The last user turn as text, for reading."""
        parts = next(message for message in reversed(self.sample.messages) if message["role"] == "user")["content"]
        return " ".join("[image]" if part["type"] == "image" else part["text"] for part in parts)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to draw responses.

    Args:
        max_new_tokens: hard cap of a response, whatever it was written in how many calls.
        temperature: 0 is greedy.
        repetition: what counts as a response that repeats itself and is stopped; None looks for nothing.
    """

    max_new_tokens: int
    temperature: float = 1.0
    repetition: Repetition | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.temperature < 0:
            raise ValueError(f"max_new_tokens must be at least 1 and temperature at least 0, not {self}")


@dataclass(frozen=True, slots=True)
class Request:
    """One response that an engine is asked for.

    Args:
        problem: its prompt and, for engines that read images themselves, its sample.
        seed: of this response; with the same seed and prompt it comes out the same however requests are batched.
        prefix: tokens of it that were written before (partial rollouts).
        budget: tokens that this call may add; None leaves the hard cap alone.
    """

    problem: Problem
    seed: int
    prefix: tuple[int, ...] = ()
    budget: int | None = None


@dataclass(frozen=True, slots=True)
class Response:
    """What the policy said.

    ``tokens`` is the whole response, prefix included, with the closing ``<|im_end|>`` when it was reached (``stop``).
    ``logp`` (len,) float32: log-probability of each token under the engine, at the temperature of the draw; NaN in the
    prefix; None where the engine gives none. ``experts`` (prompt + response - 1, MoE layers, experts per token): the
    experts that each position was routed to, for router replay; None where the engine gives none.
    """

    tokens: tuple[int, ...]
    text: str
    stop: Stop
    logp: np.ndarray | None = None
    experts: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def __reduce__(self) -> tuple[Any, ...]:
        # Ranks send each other thousands of these: an array of tokens is a fifth of the time and size of a tuple.
        return _response, (np.array(self.tokens, np.int32), self.text, self.stop, self.logp, self.experts)

    @property
    def finished(self) -> bool:
        """Whether it closed its turn by itself; only such a response has a final answer."""
        return self.stop == "stop"


def _response(tokens: np.ndarray, *rest: Any) -> Response:
    return Response(tuple(tokens.tolist()), *rest)


@dataclass(frozen=True, slots=True)
class Group:
    """The k responses to one problem, complete: none of them waits for another call."""

    problem: Problem
    responses: Sequence[Response]


@dataclass(frozen=True, slots=True)
class Policy:
    """The model that is trained, as a rollout engine sees it.

    Args:
        model: ``KimiVLForConditionalGeneration`` on the device of training.
        decode: token ids -> text. stop_id: ``<|im_end|>``. pad_id: any valid id, never attended to.
        never: ids that are not to be drawn; a drawn image placeholder would have no image in training.
        export: writes the model with its processor into a folder, in the official format.
        describe: writes the same folder without the weights, for engines that are sent them.
        encode: text -> token ids, for engines that are answered in text.
    """

    model: Any
    decode: Callable[[list[int]], str]
    stop_id: int
    pad_id: int
    never: tuple[int, ...] = ()
    export: Callable[[Path], None] | None = None
    describe: Callable[[Path], None] | None = None
    encode: Callable[[str], Sequence[int]] | None = None
