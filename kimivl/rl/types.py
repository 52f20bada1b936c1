"""What flows through an RL iteration: problems -> responses -> experience."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kimivl.data.pack import IGNORE, EncodedSample


@dataclass(frozen=True, slots=True)
class Problem:
    """A prompt with a verifiable answer. ``number`` is its place in the index of its shard set."""

    number: int
    key: str
    prompt: EncodedSample
    question: str
    answer: str
    difficulty: int


@dataclass(frozen=True, slots=True)
class Response:
    """What the policy said. ``tokens`` include the closing ``<|im_end|>`` when it was reached (``finished``)."""

    tokens: tuple[int, ...]
    text: str
    finished: bool

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to draw responses: ``temperature`` 0 is greedy; ``max_new_tokens`` is the hard cap."""

    max_new_tokens: int
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.temperature < 0:
            raise ValueError(f"max_new_tokens must be at least 1 and temperature at least 0, not {self}")


@dataclass(slots=True)
class Experience:
    """One iteration's responses with their scores, as tensors and numbers only, so that a checkpoint can hold it.

    ``problem (R,)`` index numbers; ``tokens`` and ``starts`` (R + 1,) the responses end to end; ``correct (R,)`` 0/1;
    ``advantage (R,)``; ``ref_logp (R,)`` summed log-probability of each response under the policy that wrote it (the
    reference of the iteration).
    """

    iteration: int
    problem: Tensor
    tokens: Tensor
    starts: Tensor
    correct: Tensor
    advantage: Tensor
    ref_logp: Tensor

    def __len__(self) -> int:
        return len(self.problem)

    @property
    def lengths(self) -> Tensor:
        """(R,) tokens of each response."""
        return self.starts.diff()

    def response(self, number: int) -> Tensor:
        return self.tokens[self.starts[number] : self.starts[number + 1]]


def trajectory(prompt: EncodedSample, response: Tensor) -> EncodedSample:
    """A prompt and a response as one sample, supervised on the response."""
    ignored = torch.full_like(prompt.input_ids, IGNORE)
    return EncodedSample(
        input_ids=torch.cat([prompt.input_ids, response]),
        labels=torch.cat([ignored, response]),
        pixel_values=prompt.pixel_values,
        image_grid_hws=prompt.image_grid_hws,
    )
