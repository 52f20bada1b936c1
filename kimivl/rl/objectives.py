r"""Objectives: pure functions from log-probabilities and advantages to a loss.

A method is a YAML of choices (``conf/objective``), of two classes:

- ``MirrorDescent``: the paper's squared regularisation towards the policy at the iteration's start, no clipping.
- ``PolicyGradient``: importance ratios to that policy, clipped or not; GRPO, Dr. GRPO, DAPO, GSPO, CISPO.

Both take the baseline and the scale of the advantages (``kimivl.rl.advantages``) and the aggregation. With ``l_jt`` the
loss of token t of response j to problem b, B problems of the step and k_b responses to one, ``aggregation`` is

    token       sum_bjt l / sum_bjt 1                            every token counts the same
    sequence    1/B sum_b 1/k_b sum_j 1/|y_j| sum_t l            every response (GRPO, GSPO)
    prompt      1/B sum_b sum_jt l / sum_j |y_j|                 every problem, its tokens alike (DAPO, CISPO)
    constant    1/B sum_b 1/k_b sum_j 1/constant sum_t l         sums over tokens (mirror descent: 1; Dr. GRPO)

A token is counted where its weight is above 0; others (written by an earlier policy, or masked) are neither in the sums
nor in the lengths. A response without a counted token adds 0 and stays in k_b. The weights themselves multiply what a
token adds, and are not normalised.

Legend: K response tokens of a pack, S responses of it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Self, get_args

import torch
from torch import Tensor

from kimivl.rl.advantages import Baseline, Std, advantages

Aggregation = Literal["token", "sequence", "prompt", "constant"]
Level = Literal["token", "sequence"]
Clip = Literal["objective", "weight"]

LARGEST_LOG_RATIO = 20.0
"""Log-ratios beyond this count as this where they are exponentiated (4.9e8): a loss stays a number."""


@dataclass(frozen=True, slots=True)
class StepCounts:
    """What one optimiser step holds, over all its packs and ranks: the denominators of the means.

    ``responses`` and ``prompts`` count all, ``tokens`` those with a weight above 0.
    """

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
            importance weight (``kimivl.rl.mismatch``) is any other positive number.
        response_tokens (S,): counted tokens (weight above 0) of the whole response. group_tokens (S,): of all
            responses to its problem. group_responses (S,): responses to its problem, all of which are in this step.
        counts: of the whole optimiser step.
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
    """A pack's share of the loss of its optimiser step (the shares of its packs sum to the step's loss), and figures
    to log: means over the counted tokens or the responses of the pack, and ``_max``ima."""

    total: Tensor
    figures: dict[str, Tensor]


def shares(tokens: Trajectories, aggregation: Aggregation, constant: float = 1.0) -> Tensor:
    """(S,) the factor of each response's sum over tokens in the step's loss: see the top of this file."""
    counts = tokens.counts
    if aggregation == "token":
        return torch.full_like(tokens.advantage, 1 / max(counts.tokens, 1))
    if aggregation == "prompt":
        return 1 / (tokens.group_tokens.clamp_min(1) * max(counts.prompts, 1)).to(tokens.advantage)
    length = tokens.response_tokens.clamp_min(1) if aggregation == "sequence" else constant
    return 1 / (tokens.group_responses.clamp_min(1) * length * max(counts.prompts, 1)).to(tokens.advantage)


class _Tokens(NamedTuple):
    """The tokens that count (K,), with the others at zero: ``log_ratio`` to the reference, ``logp``, ``weight``."""

    log_ratio: Tensor
    logp: Tensor
    weight: Tensor
    counted: Tensor
    figures: dict[str, Tensor]


def _prepare(logp: Tensor, tokens: Trajectories) -> _Tokens:
    """Leave out what does not count. Zeros are put in by selection: 0 * inf would be no number, nor its gradient.

    A token that is to count but has no finite log-probability (now, or under the reference) is left out too, and
    counted in ``policy/nonfinite_tokens``.
    """
    wanted = tokens.weight > 0
    counted = wanted & logp.detach().isfinite() & tokens.ref_logp.isfinite()
    logp = torch.where(counted, logp, 0.0)
    log_ratio = logp - torch.where(counted, tokens.ref_logp, 0.0)
    with torch.no_grad():
        count = counted.sum().clamp_min(1)
        figures = {
            "policy/kl": _k3(log_ratio).where(counted, 0.0).sum() / count,
            "policy/ratio_max": _bounded(log_ratio).where(counted, 0.0).exp().max() if len(logp) else logp.new_ones(()),
            "policy/nll_per_token": -logp.sum() / count,
            "policy/log_ratio_squared": tokens.sum_by_response(log_ratio).square().mean(),
            "policy/nonfinite_tokens": (wanted & ~counted).sum().to(logp),
        }
    return _Tokens(log_ratio, logp, torch.where(counted, tokens.weight, 0.0), counted, figures)


def _bounded(log_ratio: Tensor) -> Tensor:
    """Values within ``LARGEST_LOG_RATIO``, with the gradient of the values as they were."""
    beyond = log_ratio - log_ratio.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
    return log_ratio - beyond.detach()


def _k3(log_ratio: Tensor) -> Tensor:
    """The estimate of KL(pi || ref) from a token, ``ref/pi - log(ref/pi) - 1`` (GRPO, arXiv 2402.03300, equation 4)."""
    inverse = -_bounded(log_ratio)
    return inverse.exp() - inverse - 1


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"objective.{name}={value}: choose one of {', '.join(choices)}")


def _check(baseline: str, std: str, aggregation: str, constant: float) -> None:
    _one_of("baseline", baseline, get_args(Baseline))
    _one_of("std", std, get_args(Std))
    _one_of("aggregation", aggregation, get_args(Aggregation))
    if not constant > 0:
        raise ValueError(f"objective.constant={constant}: the sum over tokens is divided by it, give a number above 0")


@dataclass(frozen=True, slots=True)
class MirrorDescent:
    """``maximise E[r] - tau KL(pi || pi_i)`` from samples of ``pi_i``, the policy at the iteration's start.

    The ascent direction of Kimi k1.5 (arXiv 2501.12599, equation 3) is, for the k responses to a problem,

        1/k sum_j [ grad logp_j (r_j - mean r) - tau/2 grad (logp_j - ref_j)^2 ]

    with log-probabilities summed over the tokens of a response. So the loss of a response is
    ``-(r_j - mean r) logp_j + tau/2 (logp_j - ref_j)^2``.

    Importance weights: a token's weight multiplies its part of the first term, the mean weight of a response's counted
    tokens the second; so weights of whole sequences multiply the loss of a response.

    Args:
        tau: strength of the regularisation; 0 leaves the reward alone. tau_end: its value at the end of the run, to
            which it goes linearly; None keeps it.
        level: ``sequence`` squares the log-ratio of the whole response, as the paper does; ``token`` squares that of
            each token and sums: far weaker for long responses.
        baseline, std: of the advantages. aggregation, constant: see the top of this file.
    """

    tau: float = 0.1
    tau_end: float | None = None
    level: Level = "sequence"
    baseline: Baseline = "mean"
    std: Std = "none"
    aggregation: Aggregation = "constant"
    constant: float = 1.0

    def __post_init__(self) -> None:
        for name in ("tau", "tau_end"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise ValueError(f"objective.{name} must not be negative, but is {value}")
        _one_of("level", self.level, get_args(Level))
        _check(self.baseline, self.std, self.aggregation, self.constant)

    def at(self, progress: float) -> Self:
        """The objective of an iteration that begins at a fraction ``progress`` of the run."""
        if self.tau_end is None:
            return self
        return replace(self, tau=self.tau + (self.tau_end - self.tau) * min(max(progress, 0.0), 1.0), tau_end=None)

    def advantages(self, rewards: Tensor, group: Tensor) -> Tensor:
        """(R,) rewards, (R,) group numbers -> (R,) advantages."""
        return advantages(rewards, group, self.baseline, self.std, self.tau)

    def __call__(self, logp: Tensor, tokens: Trajectories) -> Loss:
        """(K,) log-probabilities of the tokens as they are now -> the pack's share of the step's loss."""
        own = _prepare(logp, tokens)
        ascent = tokens.advantage * tokens.sum_by_response(own.weight * own.logp)
        if self.level == "token":
            squared = tokens.sum_by_response(own.weight * own.log_ratio.square())
        else:
            counted = tokens.sum_by_response(own.counted.to(logp)).clamp_min(1)
            squared = tokens.sum_by_response(own.log_ratio).square() * tokens.sum_by_response(own.weight) / counted
        share = shares(tokens, self.aggregation, self.constant)
        total = (share * (0.5 * self.tau * squared - ascent)).sum()
        return Loss(total, own.figures | {"policy/tau": logp.new_tensor(self.tau)})


@dataclass(frozen=True, slots=True)
class PolicyGradient:
    """Importance-weighted policy gradient with clipping, and its KL penalty.

    With ``rho`` the ratio of a token's probability to that at the iteration's start, and A the advantage, the loss of a
    token is

        clip=objective   -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A)          (PPO, GRPO and their kin)
        clip=weight      -stop_gradient(clip(rho, 1 - clip_low, 1 + clip_high)) A logp  (CISPO: no token is dropped)

    plus ``kl`` times the k3 estimate of KL(pi || reference). What each method chooses:

    - GRPO (arXiv 2402.03300, equations 3 and 4): baseline mean, std group, clip 0.2, kl 0.04, aggregation sequence.
      Its reference is a model that is replaced now and then; here it is the policy at the iteration's start.
    - Dr. GRPO (arXiv 2503.20783, section 3): no division by the std, nor by the response's length but by a constant.
    - DAPO (arXiv 2503.14476, equation 8): clip 0.2 and 0.28, no KL, aggregation prompt. Its dynamic sampling is
      the sampler's, its soft over-long punishment the reward's.
    - GSPO (arXiv 2507.18071, equations 5 to 7): ``ratio=sequence``, the geometric mean of a response's ratios, in the
      place of each token's; clip 3e-4 and 4e-4.
    - CISPO (arXiv 2506.13585, equations 4 and 5): clip=weight without a lower bound, aggregation prompt.

    Args:
        ratio: of each token, or of the sequence (geometric mean over its counted tokens, the same for all of them).
        clip: what is clipped. clip_low, clip_high: the bounds, as above; None is no bound.
        kl: factor of the KL term; 0 leaves it out.
        baseline, std: of the advantages. aggregation, constant: see the top of this file.
    """

    ratio: Level = "token"
    clip: Clip = "objective"
    clip_low: float | None = 0.2
    clip_high: float | None = 0.2
    kl: float = 0.0
    baseline: Baseline = "mean"
    std: Std = "group"
    aggregation: Aggregation = "sequence"
    constant: float = 1.0

    def __post_init__(self) -> None:
        _one_of("ratio", self.ratio, get_args(Level))
        _one_of("clip", self.clip, get_args(Clip))
        _check(self.baseline, self.std, self.aggregation, self.constant)
        if self.baseline == "log_partition":
            raise ValueError("objective.baseline=log_partition needs a tau, which only mirror descent has: choose mean")
        for name in ("clip_low", "clip_high", "kl"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"objective.{name} must not be negative, but is {value}")

    def at(self, progress: float) -> Self:
        """The objective of an iteration that begins at a fraction ``progress`` of the run: always the same."""
        return self

    def advantages(self, rewards: Tensor, group: Tensor) -> Tensor:
        """(R,) rewards, (R,) group numbers -> (R,) advantages."""
        return advantages(rewards, group, self.baseline, self.std)

    def __call__(self, logp: Tensor, tokens: Trajectories) -> Loss:
        """(K,) log-probabilities of the tokens as they are now -> the pack's share of the step's loss."""
        own = _prepare(logp, tokens)
        advantage = tokens.advantage[tokens.segment]
        ratio = self._log_ratio(own, tokens).exp()
        clipped = ratio.clamp(*self._bounds())
        if self.clip == "weight":
            loss, cut = -clipped.detach() * advantage * own.logp, clipped != ratio
        else:
            loss, cut = -torch.minimum(ratio * advantage, clipped * advantage), clipped * advantage < ratio * advantage
        if self.kl:
            loss = loss + self.kl * _k3(own.log_ratio)
        share = shares(tokens, self.aggregation, self.constant)
        total = (share * tokens.sum_by_response(own.weight * loss)).sum()
        fraction = (cut & own.counted).sum() / own.counted.sum().clamp_min(1)
        return Loss(total, own.figures | {"policy/clip_fraction": fraction})

    def _bounds(self) -> tuple[float, float]:
        low = 0.0 if self.clip_low is None else 1 - self.clip_low
        return low, float("inf") if self.clip_high is None else 1 + self.clip_high

    def _log_ratio(self, own: _Tokens, tokens: Trajectories) -> Tensor:
        """(K,) log-ratio that is exponentiated."""
        if self.ratio == "token":
            return _bounded(own.log_ratio)
        counted = tokens.sum_by_response(own.counted.to(own.log_ratio)).clamp_min(1)
        return _bounded(tokens.sum_by_response(own.log_ratio) / counted)[tokens.segment]
