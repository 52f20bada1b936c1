"""Length control: what the length of a response adds to its reward or takes away.

Each is called with the lengths of one group in tokens and how right its responses are, (G,) -> (G,), and comes out
unweighted; ``Reward`` multiplies by ``weight_at(progress)``. A response whose verifier failed (``correct`` NaN) gets
NaN, and the others get what they would have got had it not been drawn: of a response that cannot be judged nobody
knows whether its length was too much.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LengthShaping(ABC):
    """The schedule that all have: off, then rising, then constant (Kimi k1.5: off at first, then constant).

    Args:
        weight: factor in the total reward.
        start: it is off until this fraction of the run.
        ramp: fraction of the run over which it then rises to ``weight``; 0 is at once.
    """

    weight: float = 0.2
    start: float = 0.0
    ramp: float = 0.0

    def __post_init__(self) -> None:
        if self.weight < 0 or not 0 <= self.start <= 1 or not 0 <= self.ramp <= 1:
            raise ValueError(f"reward.length needs weight >= 0, 0 <= start <= 1 and 0 <= ramp <= 1, not {self}")

    def weight_at(self, progress: float) -> float:
        """The factor at a fraction ``progress`` of the run."""
        if progress < self.start:
            return 0.0
        risen = (progress - self.start) / self.ramp if self.ramp > 0 else 1.0
        return self.weight * min(1.0, risen)

    def __call__(self, lengths: Tensor, correct: Tensor) -> Tensor:
        """(G,) token counts and (G,) marks from 0 to 1 (NaN: not judged) -> (G,) unweighted."""
        correct = correct.float()
        known = ~correct.isnan()
        shaped = torch.full(correct.shape, torch.nan)
        if known.any():
            shaped[known] = self.shape(lengths[known].float(), correct[known])
        return shaped

    @abstractmethod
    def shape(self, lengths: Tensor, correct: Tensor) -> Tensor:
        """The same for responses that were all judged, at least one."""


@dataclass(frozen=True)
class LengthReward(LengthShaping):
    """The paper's: shorter right answers earn more, long wrong ones less (Kimi k1.5, arXiv 2501.12599, 2.3.3).

    ``lam_j = 0.5 - (len_j - min) / (max - min)`` over ALL responses of the problem; a right response gets ``lam_j``,
    a wrong one ``min(0, lam_j)`` (one that earned a part of the mark gets the same part of the difference); all get 0
    where the lengths are equal, as they are for a single response.
    Worked example: lengths [100, 200, 300], right [1, 1, 0] -> [0.5, 0.0, -0.5].

    Args:
        floor: least value of ``max - min`` in tokens, so that answers that are all short are not told apart by
            differences that mean nothing. 0 is the paper's formula.
    """

    floor: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.floor < 0:
            raise ValueError(f"reward.length.floor={self.floor}: it is a number of tokens, 0 or more")

    def shape(self, lengths: Tensor, correct: Tensor) -> Tensor:
        shortest, longest = lengths.min(), lengths.max()
        if shortest == longest:
            return torch.zeros_like(lengths)
        lam = 0.5 - (lengths - shortest) / (longest - shortest).clamp_min(self.floor)
        return lam.clamp_max(0) + correct * lam.clamp_min(0)


@dataclass(frozen=True)
class _AgainstTheCap(LengthShaping):
    """Lengths as fractions of ``max_tokens``, the hard cap of a response."""

    max_tokens: int = 16_384

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_tokens < 1:
            raise ValueError(f"reward.length.max_tokens={self.max_tokens}: it is the hard cap of a response, 1 or more")


@dataclass(frozen=True)
class SoftOverlong(_AgainstTheCap):
    """Soft over-long punishment (DAPO, arXiv 2503.14476, 3.4): nothing until the last ``buffer`` of the room, then a
    straight line down to -1 at the hard cap, right or wrong.

    Worked example: max_tokens 100, buffer 0.2, lengths [80, 90, 100] -> [0.0, -0.5, -1.0].

    Args:
        buffer: fraction of ``max_tokens`` over which it falls.
    """

    buffer: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.buffer <= 1:
            raise ValueError(f"reward.length.buffer={self.buffer}: it is a fraction of max_tokens, above 0 and up to 1")

    def shape(self, lengths: Tensor, correct: Tensor) -> Tensor:
        buffer = self.buffer * self.max_tokens
        return ((self.max_tokens - buffer - lengths) / buffer).clamp(-1, 0)


@dataclass(frozen=True)
class AdaptivePenalty(_AgainstTheCap):
    """Adaptive length penalty (ALP, arXiv 2506.05256): tokens cost what the problem is easy.

    ``-(len_j / max_tokens) * max(solve rate, 1 / G)``, right or wrong, the solve rate being that of the group.
    Worked example: max_tokens 100, lengths [50, 100], right [1, 0] -> [-0.25, -0.5].
    """

    def shape(self, lengths: Tensor, correct: Tensor) -> Tensor:
        return -lengths / self.max_tokens * correct.mean().clamp_min(1 / len(correct))


@dataclass(frozen=True)
class LinearPenalty(_AgainstTheCap):
    """``-len_j / max_tokens`` for a right response, 0 for a wrong one: to give up is never made worth it."""

    def shape(self, lengths: Tensor, correct: Tensor) -> Tensor:
        return -lengths / self.max_tokens * correct


@dataclass(frozen=True)
class NoLength(LengthShaping):
    """Length does not matter."""

    weight: float = 0.0

    def shape(self, lengths: Tensor, correct: Tensor) -> Tensor:
        return torch.zeros_like(lengths)
