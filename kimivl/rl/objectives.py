"""Objectives: pure functions from log-probabilities and advantages to a loss.

Source: Kimi k1.5 (arXiv 2501.12599) section 2.3.2, online policy mirror descent.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class StepCounts:
    """What one optimiser step holds, over all its packs and ranks: the denominators of the means."""

    responses: int
    tokens: int
    prompts: int


@dataclass(frozen=True, slots=True)
class Trajectories:
    """What an objective knows of the responses of one pack, beside their log-probabilities as they are now.

    Attributes:
        advantage (S,): of each response. segment (K,): the response that each token belongs to.
        ref_logp (K,): log-probability of each token under the reference, the policy at the iteration's start, by the
            trainer. rollout_logp (K,): under the engine that drew it; the same as ``ref_logp`` where it gave none.
        weight (K,): what a token counts: 0 leaves it out (written by an earlier policy), 1 takes it in, and an
            importance weight lies between.
        response_tokens (S,): counted tokens of the whole response. group_tokens (S,): of all responses to its problem.
        group_responses (S,): responses to its problem. counts: of the whole optimiser step.
    """

    advantage: Tensor
    segment: Tensor
    ref_logp: Tensor
    rollout_logp: Tensor
    weight: Tensor
    response_tokens: Tensor
    group_tokens: Tensor
    group_responses: Tensor
    counts: StepCounts

    def to(self, device: torch.device) -> Trajectories:
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in self.__slots__ if name != "counts"}
        return replace(self, **moved)

    def sum_by_response(self, values: Tensor) -> Tensor:
        """(K,) -> (S,)."""
        return values.new_zeros(len(self.advantage)).index_add(0, self.segment, values)


class Loss(NamedTuple):
    """A pack's share of the loss of its optimiser step, and figures to log (means over the pack)."""

    total: Tensor
    figures: dict[str, Tensor]


def mean_baseline(rewards: Tensor, group: Tensor) -> Tensor:
    """(R,) rewards and (R,) group numbers 0..B-1 -> (R,) advantages ``r - mean r``: the group's mean stands for
    ``tau log Z``."""
    sums = rewards.new_zeros(int(group.max()) + 1).index_add(0, group, rewards)
    return rewards - (sums / torch.bincount(group))[group]


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

    def advantages(self, rewards: Tensor, group: Tensor) -> Tensor:
        """(R,) rewards, (R,) group numbers -> (R,) advantages."""
        return mean_baseline(rewards, group)

    def __call__(self, logp: Tensor, tokens: Trajectories) -> Loss:
        """(K,) log-probabilities of the tokens as they are now -> the pack's share of the step's loss."""
        summed = tokens.sum_by_response(logp * tokens.weight)
        ratio = summed - tokens.sum_by_response(tokens.ref_logp * tokens.weight)
        total = (-tokens.advantage * summed + 0.5 * self.tau * ratio.square()).sum() / tokens.counts.responses
        return Loss(total, {"policy/log_ratio_squared": ratio.detach().square().mean()})
