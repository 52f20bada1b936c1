"""Advantages of responses: their reward against a baseline of the other responses to the same problem.

Legend: R responses of an iteration, B problems (groups) of it, k responses of a group.
"""

from __future__ import annotations

import logging
from typing import Literal

import torch
from torch import Tensor

log = logging.getLogger(__name__)

Baseline = Literal["mean", "leave_one_out", "log_partition", "none"]
Std = Literal["none", "group", "batch"]

SMALLEST_STD = 1e-6
"""Added to a standard deviation before dividing by it, as public implementations of GRPO do."""


def advantages(
    rewards: Tensor, group: Tensor, baseline: Baseline = "mean", std: Std = "none", tau: float = 0.0
) -> Tensor:
    """(R,) rewards and (R,) group numbers 0..B-1 -> (R,) advantages; groups may have unequal sizes.

    With r the rewards of a group of k:

    - ``mean``: ``r - mean r``. GRPO (arXiv 2402.03300, section 4.1.2); in Kimi k1.5 (arXiv 2501.12599, section 2.3.2)
      it stands for ``tau log Z``, its limit for a large tau.
    - ``leave_one_out``: ``r_j - mean of the others = k/(k-1) (r_j - mean r)``; independent of r_j, so the policy
      gradient with it is unbiased (RLOO, arXiv 2402.14740).
    - ``log_partition``: ``r - tau log mean exp(r / tau)``, the estimate of ``tau log Z`` from the samples that
      k1.5 gives beside it; the limit at tau = 0 is ``r - max r``.
    - ``none``: ``r``.

    ``std`` divides by the sample standard deviation (k - 1) of the rewards of the group, or of the whole batch.
    A group whose rewards are all equal has advantages of exactly 0 unless the baseline is ``none``; so has a group of
    one response, which has nothing to be compared with, and a warning says how many there are.

    Worked example: rewards [1, 0, 0, 0] -> mean [0.75, -0.25, ...], leave_one_out [1, -1/3, ...], log_partition with
    tau = 1 [0.643, -0.357, ...]; mean with std=group [1.5, -0.5, ...].
    """
    if not rewards.numel():
        return rewards.clone()
    values = rewards.double()
    sizes = torch.bincount(group)
    single = int((sizes == 1).sum())
    if single and baseline != "none":
        log.warning(
            "%d of %d problems have a single response: without others to compare it with its advantage is 0; raise "
            "data.responses, or choose objective.baseline=none",
            single,
            int((sizes > 0).sum()),
        )
    result = values - _baseline(values, group, sizes, baseline, tau)
    if std == "group":
        result = result / (_group_std(values, group, sizes)[group] + SMALLEST_STD)
    elif std == "batch":
        result = result / ((values.std() if len(values) > 1 else values.new_zeros(())) + SMALLEST_STD)
    if baseline != "none":
        high, low = _extreme(values, group, "amax"), _extreme(values, group, "amin")
        result = torch.where(high == low, 0.0, result)
    return result.to(rewards.dtype)


def _baseline(values: Tensor, group: Tensor, sizes: Tensor, baseline: Baseline, tau: float) -> Tensor:
    """(R,) what each reward is compared with."""
    if baseline == "none":
        return torch.zeros_like(values)
    if baseline == "log_partition":
        highest = _extreme(values, group, "amax")
        if tau == 0:
            return highest
        return highest + tau * (_sums(((values - highest) / tau).exp(), group, sizes) / sizes).log()[group]
    sums = _sums(values, group, sizes)
    if baseline == "mean":
        return (sums / sizes)[group]
    others = (sizes - 1)[group]
    return torch.where(others > 0, (sums[group] - values) / others.clamp_min(1), values)


def _group_std(values: Tensor, group: Tensor, sizes: Tensor) -> Tensor:
    """(B,) sample standard deviations; 0 for a group of one."""
    centred = values - (_sums(values, group, sizes) / sizes)[group]
    return (_sums(centred.square(), group, sizes) / (sizes - 1).clamp_min(1)).sqrt()


def _sums(values: Tensor, group: Tensor, sizes: Tensor) -> Tensor:
    return values.new_zeros(len(sizes)).index_add(0, group, values)


def _extreme(values: Tensor, group: Tensor, reduce: Literal["amax", "amin"]) -> Tensor:
    """(R,) the largest or the smallest value of each one's group."""
    found = values.new_zeros(int(group.max()) + 1).scatter_reduce(0, group, values, reduce, include_self=False)
    return found[group]
