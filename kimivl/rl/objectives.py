"""Objectives: pure functions from log-probabilities and advantages to a loss.

Source: Kimi k1.5 (arXiv 2501.12599) section 2.3.2, online policy mirror descent.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


def mean_baseline(rewards: Tensor) -> Tensor:
    """(B, G) rewards -> (B, G) advantages ``r - mean r``: the group's mean stands for ``tau log Z``.

    No division by the standard deviation. Worked example: [1, 1, 0, 0] -> [0.5, 0.5, -0.5, -0.5]; equal rewards
    give zeros, and such a problem has no gradient at the reference.
    """
    return rewards - rewards.mean(-1, keepdim=True)


@dataclass(frozen=True, slots=True)
class MirrorDescent:
    """``maximise E[r] - tau KL(pi || pi_i)`` from the samples of ``pi_i``.

    The ascent direction of the paper (its equation 3), for response j of a problem, is
    ``grad logp_j (r_j - mean r) - tau/2 grad (logp_j - ref_j)^2``, with log-probabilities summed over the tokens of
    the response. So the loss of a response is ``-(r_j - mean r) logp_j + tau/2 (logp_j - ref_j)^2``.
    """

    tau: float = 0.1

    def __post_init__(self) -> None:
        if self.tau < 0:
            raise ValueError(f"objective.tau must not be negative, but is {self.tau}")

    def __call__(self, logp: Tensor, ref_logp: Tensor, advantage: Tensor) -> Tensor:
        """(R,) each -> the SUM of the losses of these responses; the caller divides by the responses of the step."""
        return (-advantage * logp + 0.5 * self.tau * (logp - ref_logp).square()).sum()
