"""The engine that drew the responses against the trainer that learns from them.

Both compute log-probabilities of the same weights with other kernels, and round differently (a mixture of experts may
even choose other experts), so responses are drawn from a policy ``mu`` that is not quite the reference ``pi_i``. This
file measures the difference once an iteration and, where asked to, corrects for it:

- truncated importance weights ``min(pi_i / mu, cap)`` of tokens or of whole sequences (Yao et al. 2025, "Your efficient
  RL framework secretly brings you off-policy RL training"; IMPALA, arXiv 1802.01561),
- masks of the sequences whose ratio leaves a band, as masked importance sampling does.

Use, once an iteration, after the reference log-probabilities are there and before training::

    figures |= compare(experience.rollout_logp, experience.ref_logp, experience.segment, experience.weight > 0)
    experience.weight, counts = mismatch(
        experience.ref_logp, experience.rollout_logp, experience.segment, experience.weight
    )
    figures |= counts

``rollout_logp`` is NaN where the engine gave none; such tokens are not compared and have importance weight 1.

Legend: N tokens of all responses end to end, R responses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Importance = Literal["none", "token", "sequence"]
Masking = Literal["none", "geometric_mean", "max"]

SMALLEST_WEIGHT = 1e-30
"""No importance weight is below this: only a mask leaves a token out, and so out of the means."""


class Correction(NamedTuple):
    """``weight`` (N,) of each token in the loss; 0 leaves it out. ``figures``: how many were touched."""

    weight: Tensor
    figures: dict[str, float]


@dataclass(frozen=True, slots=True)
class Mismatch:
    """How the difference of engine and trainer enters the loss; by default it does not.

    A token that the trainer holds impossible (its log-probability is not finite) is always left out, and counted.

    Args:
        importance: weigh by ``pi_i / mu``: of each ``token``, of the ``sequence`` (the product over its tokens, the
            same weight for all of them), or ``none``.
        cap: largest weight.
        mask: leave out the sequences whose ``geometric_mean`` of token ratios is outside of [low, high], or which have
            one token ratio outside of it (``max``); ``none`` keeps them all.
        low, high: the band of the mask; ratios, so 1 is agreement.
    """

    importance: Importance = "none"
    cap: float = 2.0
    mask: Masking = "none"
    low: float = 0.5
    high: float = 2.0

    def __post_init__(self) -> None:
        for name, choices in (("importance", get_args(Importance)), ("mask", get_args(Masking))):
            if getattr(self, name) not in choices:
                raise ValueError(f"module.mismatch.{name}={getattr(self, name)}: choose one of {', '.join(choices)}")
        if not 0 < self.cap < math.inf:
            raise ValueError(f"module.mismatch.cap={self.cap}: the largest importance weight must be a number above 0")
        if not 0 <= self.low <= 1 <= self.high:
            raise ValueError(
                f"module.mismatch.low={self.low}, module.mismatch.high={self.high}: the band of ratios that are kept "
                "must hold 1"
            )

    def __call__(
        self, ref_logp: Tensor, rollout_logp: Tensor, segment: Tensor, weight: Tensor | None = None
    ) -> Correction:
        """(N,) log-probabilities by the trainer and by the engine, (N,) response numbers 0..R-1 -> the weights.

        ``weight`` (N,): what tokens counted before; those of 0 are neither read nor brought back.
        """
        before = torch.ones_like(ref_logp) if weight is None else weight
        wanted = before > 0
        possible = wanted & ref_logp.isfinite()
        log_ratio = torch.where(possible & rollout_logp.isfinite(), ref_logp.double() - rollout_logp, 0.0)
        responses = int(segment.max()) + 1 if len(segment) else 0
        log_weight = self._log_weights(log_ratio, segment, responses)
        masked = self._masked(log_ratio, possible, segment, responses) & possible
        truncated = (log_weight > math.log(self.cap)) & possible
        weights = log_weight.clamp_max(math.log(self.cap)).exp().clamp_min(SMALLEST_WEIGHT)
        kept = possible & ~masked
        result = torch.where(kept, before * weights.to(before), 0.0)
        return Correction(
            result,
            {
                "policy/truncated_tokens": float((truncated & kept).sum()),
                "policy/masked_sequences": float(len(segment[masked].unique())),
                "policy/impossible_tokens": float((wanted & ~possible).sum()),
                "policy/importance_weight": float(weights[kept].mean()) if bool(kept.any()) else 1.0,
            },
        )

    def _log_weights(self, log_ratio: Tensor, segment: Tensor, responses: int) -> Tensor:
        """(N,) float64 logarithm of each token's importance weight, before the cap."""
        if self.importance == "none":
            return torch.zeros_like(log_ratio)
        return log_ratio if self.importance == "token" else _sums(log_ratio, segment, responses)[segment]

    def _masked(self, log_ratio: Tensor, counted: Tensor, segment: Tensor, responses: int) -> Tensor:
        """(N,) whether a token's sequence leaves the band."""
        low, high = math.log(self.low) if self.low else -math.inf, math.log(self.high)
        if self.mask == "none":
            return torch.zeros_like(counted)
        if self.mask == "geometric_mean":
            lengths = _sums(counted.double(), segment, responses).clamp_min(1)
            mean = _sums(log_ratio, segment, responses) / lengths
            return ((mean < low) | (mean > high))[segment]
        outside = ((log_ratio < low) | (log_ratio > high)).double()
        return (_sums(outside, segment, responses) > 0)[segment]


def compare(
    rollout_logp: Tensor, ref_logp: Tensor, segment: Tensor | None = None, counted: Tensor | None = None
) -> dict[str, float]:
    """Figures of the difference of engine and trainer over the (N,) tokens, or over those that are ``counted``.

    ``policy/mismatch_kl`` is the k3 estimate of KL(mu || pi_i), ``policy/mismatch_k1`` the plain mean of
    ``log mu - log pi_i``; ``policy/mismatch_p50``, ``_p99`` and ``_max`` are of its absolute value, and
    ``policy/mismatch_sequence_max`` is the largest of its sums over a response (where ``segment`` is given). All are
    exactly 0 where the two agree. Empty where the engine gave no log-probabilities: nothing was compared.
    """
    known = rollout_logp.isfinite() & ref_logp.isfinite()
    if counted is not None:
        known &= counted
    if not bool(known.any()):
        return {}
    difference = (rollout_logp.double() - ref_logp)[known]
    size = difference.abs()
    figures = {
        "policy/mismatch_kl": float(((-difference).exp() - 1 + difference).mean()),
        "policy/mismatch_k1": float(difference.mean()),
        "policy/mismatch_p50": _quantile(size, 0.5),
        "policy/mismatch_p99": _quantile(size, 0.99),
        "policy/mismatch_max": float(size.max()),
    }
    if segment is not None:
        sums = _sums(difference, segment[known], int(segment.max()) + 1)
        figures["policy/mismatch_sequence_max"] = float(sums.abs().max())
    return figures


def _quantile(values: Tensor, share: float) -> float:
    """The smallest value that at least ``share`` of them do not exceed (torch.quantile takes 16M values at most)."""
    return float(values.kthvalue(max(1, math.ceil(share * len(values)))).values)


def _sums(values: Tensor, segment: Tensor, responses: int) -> Tensor:
    """(N,) -> (R,)."""
    return values.new_zeros(responses).index_add(0, segment, values)
