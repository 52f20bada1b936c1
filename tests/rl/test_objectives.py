"""Objectives: gradients are the papers' equations, and a step's loss does not depend on how it is cut into packs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from functools import cache

import pytest
import torch
from hydra.utils import instantiate

from kimivl.config import CONF, compose_run
from kimivl.rl.objectives import MirrorDescent, PolicyGradient, StepCounts, Trajectories

METHODS = sorted(path.stem for path in (CONF / "objective").glob("*.yaml"))
AGGREGATIONS = ["token", "sequence", "prompt", "constant"]


@cache
def method(name: str) -> MirrorDescent | PolicyGradient:
    """As ``objective=NAME`` on the command line makes it."""
    return instantiate(compose_run("stage=rl", f"objective={name}").objective, _convert_="all")


class Step:
    """Responses of an optimiser step; ``lengths`` by problem, for example [[3, 1], [2, 2, 4]]."""

    def __init__(self, lengths: list[list[int]], seed: int = 0, drift: float = 0.3) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.length = torch.tensor([length for group in lengths for length in group])
        self.problem = torch.tensor([number for number, group in enumerate(lengths) for _ in group])
        tokens = int(self.length.sum())

        def draw(size: int) -> torch.Tensor:
            return torch.randn(size, generator=generator, dtype=torch.float64)

        self.ref = -draw(tokens).abs()
        self.logp = (self.ref + drift * draw(tokens)).requires_grad_()
        self.advantage = draw(len(self.length))
        self.weight = torch.ones(tokens, dtype=torch.float64)

    @property
    def segment(self) -> torch.Tensor:
        return torch.arange(len(self.length)).repeat_interleave(self.length)

    def pack(self, members: list[int]) -> tuple[torch.Tensor, Trajectories]:
        """The log-probabilities and the rest of a pack of some of the step's responses, in that order."""
        places = torch.cat([(self.segment == member).nonzero()[:, 0] for member in members])
        counted = torch.zeros_like(self.length).index_add(0, self.segment, (self.weight > 0).long())
        same = self.problem[members][:, None] == self.problem[None]
        return self.logp[places], Trajectories(
            advantage=self.advantage[members],
            segment=torch.arange(len(members)).repeat_interleave(self.length[members]),
            ref_logp=self.ref[places],
            rollout_logp=self.ref[places],
            weight=self.weight[places],
            response_tokens=counted[members],
            group_tokens=(same * counted).sum(1),
            group_responses=same.sum(1),
            counts=StepCounts(len(self.length), int(counted.sum()), len(self.problem.unique())),
        )

    def loss(self, objective, packs: list[list[int]] | None = None) -> tuple[float, torch.Tensor]:
        """The step's loss and its gradient (N,), from its packs (None: one)."""
        packs = packs or [list(range(len(self.length)))]
        total = torch.stack([objective(*self.pack(members)).total for members in packs]).sum()
        (gradient,) = torch.autograd.grad(total, self.logp)
        return float(total.detach()), gradient

    def sums(self, values: torch.Tensor) -> torch.Tensor:
        return values.new_zeros(len(self.length)).index_add(0, self.segment, values)


CUTS = [
    [[0, 1, 2, 3, 4], [5, 6, 7, 8]],
    [[8, 3, 0], [4, 1], [7], [2, 5, 6]],
    [[number] for number in range(9)],
]


def uneven(seed: int) -> Step:
    """Groups of unequal size, masked tokens, importance weights, and a response without a counted token."""
    step = Step([[3, 5, 1], [2, 7], [4, 4, 2, 6]], seed)
    generator = torch.Generator().manual_seed(seed + 100)
    kind = torch.randint(0, 3, step.weight.shape, generator=generator)
    step.weight = torch.where(kind == 0, 0.0, torch.where(kind == 1, 1.0, 1.7 * torch.rand(kind.shape).double() + 0.01))
    step.weight[step.segment == 3] = 0.0
    return step


@pytest.mark.parametrize("cut", CUTS, ids=["halves", "mixed", "singles"])
@pytest.mark.parametrize("name", METHODS)
def test_a_steps_loss_does_not_depend_on_its_packs(name, cut):
    step = uneven(1)
    whole, gradient = step.loss(method(name))
    parts, in_parts = step.loss(method(name), cut)
    assert parts == pytest.approx(whole, rel=1e-12)
    torch.testing.assert_close(in_parts, gradient, rtol=1e-11, atol=1e-14)
    assert gradient.abs().max() > 0


def every_choice() -> Iterator[MirrorDescent | PolicyGradient]:
    for aggregation, level in itertools.product(AGGREGATIONS, ["token", "sequence"]):
        yield MirrorDescent(0.2, level=level, aggregation=aggregation, constant=3.0)
        for clip in ("objective", "weight"):
            yield PolicyGradient(level, clip, 0.1, 0.2, kl=0.05, aggregation=aggregation, constant=3.0)


@pytest.mark.parametrize("objective", list(every_choice()), ids=str)
def test_neither_with_any_other_choice(objective):
    step = uneven(2)
    whole, gradient = step.loss(objective)
    parts, in_parts = step.loss(objective, CUTS[1])
    assert parts == pytest.approx(whole, rel=1e-12)
    torch.testing.assert_close(in_parts, gradient, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("objective", list(every_choice()), ids=str)
def test_a_token_of_weight_0_might_as_well_not_be_there(objective):
    """It is in no sum and in no length: the loss is that of the step from which it was taken out."""
    step, less = Step([[3, 5, 2], [2, 7]], 3), Step([[2, 4, 2], [2, 4]], 3)
    gone = torch.zeros(len(step.weight), dtype=torch.bool)
    gone[[0, 6, 13, 14, 18]] = True
    step.weight[gone] = 0.0
    step.ref[0] = float("-inf")  # what it would say is not even looked at
    less.ref, less.advantage = step.ref[~gone], step.advantage
    less.logp = step.logp.detach()[~gone].requires_grad_()
    less.weight = step.weight[~gone]
    loss, gradient = step.loss(objective)
    wanted, expected = less.loss(objective)
    assert loss == pytest.approx(wanted, rel=1e-12)
    torch.testing.assert_close(gradient[~gone], expected)
    assert gradient[gone].abs().max() == 0


# ---- mirror descent -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [0.0, 0.1, 1.0])
def test_gradient_is_the_papers_equation(tau):
    """1/k sum_j [ grad logp_j (r_j - mean r) - tau/2 grad (logp_j - ref_j)^2 ], by autograd, of a softmax policy over
    sequences of three tokens."""
    generator = torch.Generator().manual_seed(0)
    weights, ref = (torch.randn(3, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    weights.requires_grad_()
    drawn = torch.randint(5, (6, 3), generator=generator)  # k = 6
    rewards = torch.tensor([1.0, 0, 0, 1, 1, 0], dtype=torch.float64)

    def log_probs(table: torch.Tensor) -> torch.Tensor:
        return table.log_softmax(1)[torch.arange(3), drawn]  # (6, 3)

    step = Step([[3] * 6])
    step.logp, step.ref = log_probs(weights).flatten(), log_probs(ref).flatten()
    objective = MirrorDescent(tau)
    step.advantage = objective.advantages(rewards, step.problem)
    (gradient,) = torch.autograd.grad(objective(*step.pack(list(range(6)))).total, weights, retain_graph=True)

    ascent = torch.zeros_like(weights)
    for j in range(6):
        summed = log_probs(weights)[j].sum()
        (grad_logp,) = torch.autograd.grad(summed, weights, retain_graph=True)
        (grad_squared,) = torch.autograd.grad((summed - log_probs(ref)[j].sum()) ** 2, weights)
        ascent += grad_logp * (rewards[j] - rewards.mean()) - tau / 2 * grad_squared
    torch.testing.assert_close(gradient, -ascent / 6, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("tau", [0.05, 1.0])
def test_the_closed_form_solution_is_stationary(tau):
    """pi* = pi_i exp(r / tau) / Z (k1.5, section 2.3.2). All responses of a uniform reference once each: the baseline
    log_partition is exact, and no response has a gradient left."""
    rewards = torch.tensor([1.0, 0, 0.3, 0.3, 0.9], dtype=torch.float64)
    objective = MirrorDescent(tau, baseline="log_partition")
    step = Step([[1] * 5])
    step.ref = torch.full((5,), -math.log(5), dtype=torch.float64)
    step.advantage = objective.advantages(rewards, step.problem)
    step.logp = (rewards / tau).log_softmax(0).requires_grad_()
    assert step.loss(objective)[1].abs().max() < 1e-12
    step.logp = step.ref.clone().requires_grad_()
    assert step.loss(objective)[1].abs().max() > 0.01


def test_the_level_of_tokens_squares_each_log_ratio():
    step = Step([[3, 2], [4]], 5)
    log_ratio = step.logp - step.ref
    expected = step.advantage * step.sums(step.logp) * -1 + 0.5 * 0.4 * step.sums(log_ratio.square())
    wanted = (expected[:2].mean() + expected[2]) / 2
    assert step.loss(MirrorDescent(0.4, level="token"))[0] == pytest.approx(float(wanted.detach()))


def test_weights_of_whole_sequences_multiply_their_loss():
    step = Step([[3, 2]], 6)
    one, _ = step.loss(MirrorDescent(0.4))
    step.weight = torch.where(step.segment == 0, 0.25, 1.0).double()
    weighted, _ = step.loss(MirrorDescent(0.4))
    step.weight = torch.ones_like(step.weight)
    step.advantage[0] = 0.0
    step.ref = torch.where(step.segment == 0, step.logp.detach(), step.ref)
    second, _ = step.loss(MirrorDescent(0.4))
    assert weighted == pytest.approx(0.25 * (one - second) + second)


def test_tau_goes_linearly_over_the_run():
    objective = MirrorDescent(0.1, tau_end=0.02, baseline="log_partition")
    assert [objective.at(progress).tau for progress in (0, 0.5, 1)] == pytest.approx([0.1, 0.06, 0.02])
    assert MirrorDescent(0.1).at(0.7).tau == 0.1
    rewards, group = torch.tensor([1.0, 0.0]), torch.tensor([0, 0])
    at_end = MirrorDescent(0.02, baseline="log_partition").advantages(rewards, group)
    assert torch.equal(objective.at(1.0).advantages(rewards, group), at_end)
    step = Step([[2]])
    assert float(objective.at(0.5)(*step.pack([0])).figures["policy/tau"]) == pytest.approx(0.06)


# ---- exact expectations of a tiny policy --------------------------------------------------------------------------


class Tiny:
    """Two-token responses over three words: nine responses, a table of logits for each of the two tokens."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(7)
        self.first = torch.randn(3, generator=generator, dtype=torch.float64).requires_grad_()
        self.second = torch.randn(3, 3, generator=generator, dtype=torch.float64).requires_grad_()
        self.responses = list(itertools.product(range(3), range(3)))
        self.rewards = torch.rand(9, generator=generator, dtype=torch.float64)

    def logp(self, number: int) -> torch.Tensor:
        a, b = self.responses[number]
        return torch.stack([self.first.log_softmax(0)[a], self.second.log_softmax(1)[a, b]])

    def expected_gradient(self, objective, k: int) -> list[torch.Tensor]:
        """Of the loss of a group of k drawn from the policy itself, over all groups there are."""
        total = torch.zeros((), dtype=torch.float64)
        step = Step([[2] * k])
        for group in itertools.product(range(9), repeat=k):
            step.logp = torch.cat([self.logp(number) for number in group])
            step.ref = step.logp.detach()
            step.advantage = objective.advantages(self.rewards[list(group)], step.problem)
            probability = step.ref.sum().exp()
            total = total + probability * objective(*step.pack(list(range(k)))).total
        return list(torch.autograd.grad(total, [self.first, self.second]))

    def reward_gradient(self) -> list[torch.Tensor]:
        expected = torch.stack([self.logp(n).sum().exp() * self.rewards[n] for n in range(9)]).sum()
        return list(torch.autograd.grad(expected, [self.first, self.second]))


@pytest.mark.parametrize(
    ("objective", "factor"),
    [
        (MirrorDescent(0.3, baseline="leave_one_out"), 1.0),
        (MirrorDescent(0.3, baseline="mean"), 0.5),  # (k - 1) / k
        (MirrorDescent(0.3, baseline="none"), 1.0),
        (PolicyGradient(baseline="leave_one_out", std="none", aggregation="constant"), 1.0),
        (PolicyGradient(baseline="mean", std="none", aggregation="constant", constant=4.0, kl=0.1), 0.125),
        (PolicyGradient("sequence", baseline="leave_one_out", std="none"), 0.5),  # 1 / |y|
        (PolicyGradient(clip="weight", baseline="none", std="none", aggregation="constant"), 1.0),
    ],
    ids=str,
)
def test_the_expected_gradient_on_policy_is_that_of_the_reward(objective, factor):
    tiny = Tiny()
    for found, wanted in zip(tiny.expected_gradient(objective, 2), tiny.reward_gradient(), strict=True):
        torch.testing.assert_close(found, -factor * wanted, rtol=1e-9, atol=1e-12)


def test_the_kl_figure_is_the_divergence_in_expectation():
    """k3 over draws of a policy, against another one: exact when summed over all words."""
    generator = torch.Generator().manual_seed(8)
    logp, ref = (torch.randn(9, generator=generator, dtype=torch.float64).log_softmax(0) for _ in range(2))
    step = Step([[1]])
    expected = 0.0
    for word in range(9):
        step.logp, step.ref = logp[word : word + 1], ref[word : word + 1]
        expected += float(logp[word].exp() * PolicyGradient()(*step.pack([0])).figures["policy/kl"])
    assert expected == pytest.approx(float((logp.exp() * (logp - ref)).sum()))


# ---- clipped policy gradients -------------------------------------------------------------------------------------


def test_grpo_at_the_reference_is_reinforce_with_normalised_advantages():
    step = Step([[3, 1, 5], [2, 2, 4]], 9, drift=0.0)
    grpo = method("grpo")
    rewards = torch.tensor([1.0, 0, 1, 0, 0, 1], dtype=torch.float64)
    step.advantage = grpo.advantages(rewards, step.problem)
    for first in (0, 3):
        group = rewards[first : first + 3]
        expected = (group - group.mean()) / (group.std() + 1e-6)
        torch.testing.assert_close(step.advantage[first : first + 3], expected)
    _, gradient = step.loss(grpo)
    torch.testing.assert_close(gradient, -(step.advantage / step.length)[step.segment] / 6)  # 1/B 1/k 1/|y|


def test_grpo_is_equation_3_term_by_term():
    step, grpo = Step([[3, 1], [2, 4]], 10), method("grpo")
    total = 0.0
    for problem in (0, 1):
        for response in (step.problem == problem).nonzero()[:, 0]:
            own = step.segment == response
            ratio = (step.logp - step.ref)[own].exp()
            a = step.advantage[response]
            kl = (step.ref - step.logp)[own].exp() - (step.ref - step.logp)[own] - 1
            inside = torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a) - 0.04 * kl
            total = total - inside.mean() / 2 / 2
    loss, gradient = step.loss(grpo)
    assert loss == pytest.approx(float(total.detach()))
    torch.testing.assert_close(gradient, torch.autograd.grad(total, step.logp)[0])


def test_the_kl_term_pulls_by_its_derivative():
    step = Step([[4, 2]], 11)
    step.advantage = torch.zeros(2, dtype=torch.float64)
    _, gradient = step.loss(PolicyGradient(kl=0.5, aggregation="token"))
    torch.testing.assert_close(gradient, 0.5 * (1 - (step.ref - step.logp.detach()).exp()) / 6)


@pytest.mark.parametrize(("low", "high"), [(0.2, 0.2), (0.2, 0.28), (0.1, None), (None, 0.3)])
def test_clipping_stops_only_what_goes_too_far(low, high):
    """A ratio beyond its bound in the direction of the advantage has no gradient; in the other one it has."""
    ratio = torch.tensor([0.5, 0.85, 1.0, 1.25, 1.29, 2.0] * 2, dtype=torch.float64)
    step = Step([[6, 6]])
    step.ref = torch.full((12,), -1.0, dtype=torch.float64)
    step.logp = (step.ref + ratio.log()).requires_grad_()
    step.advantage = torch.tensor([1.0, -1.0], dtype=torch.float64)
    loss, gradient = step.loss(PolicyGradient(clip_low=low, clip_high=high, aggregation="token"))
    rises, falls = ratio[:6] > 1 + (math.inf if high is None else high), ratio[6:] < 1 - (1.0 if low is None else low)
    stopped = torch.cat([rises, falls])
    assert torch.equal(gradient == 0, stopped)
    sign = torch.cat([-torch.ones(6), torch.ones(6)]).double()
    torch.testing.assert_close(gradient[~stopped], (sign * ratio / 12)[~stopped])
    figures = PolicyGradient(clip_low=low, clip_high=high)(*step.pack([0, 1])).figures
    assert float(figures["policy/clip_fraction"]) == pytest.approx(float(stopped.double().mean()))
    assert float(figures["policy/ratio_max"]) == pytest.approx(2.0)


def test_dr_grpo_sums_and_divides_by_a_constant():
    step = Step([[3, 1], [2, 4]], 12, drift=0.0)
    objective = PolicyGradient(std="none", aggregation="constant", constant=192.0)
    _, gradient = step.loss(objective)
    torch.testing.assert_close(gradient, -step.advantage[step.segment] / (4 * 192))
    rewards = torch.tensor([1.0, 0, 0, 1], dtype=torch.float64)
    assert method("dr_grpo").advantages(rewards, step.problem).tolist() == [0.5, -0.5, -0.5, 0.5]
    assert method("dr_grpo").constant == 192


def test_dapo_takes_a_problems_tokens_alike():
    """Equation 8: 1 / sum_i |o_i| inside of the expectation over problems; with one problem that is the token mean."""
    step, dapo = Step([[3, 1], [2, 4]], 13, drift=0.0), method("dapo")
    _, gradient = step.loss(dapo)
    tokens = torch.tensor([4.0, 6.0], dtype=torch.float64)[step.problem][step.segment]
    torch.testing.assert_close(gradient, -step.advantage[step.segment] / tokens / 2)
    alone = Step([[3, 1, 6]], 14)
    by_token = PolicyGradient(clip_low=0.2, clip_high=0.28, aggregation="token")
    assert alone.loss(dapo)[0] == pytest.approx(alone.loss(by_token)[0])


def test_gspo_is_equation_5_with_the_gradient_of_equation_10():
    """s_i = (pi / pi_old)^(1/|y|); grad = 1/G sum s_i A_i mean_t grad logp."""
    step = Step([[3, 5, 2]], 15, drift=1e-4)  # inside of the bounds
    _, gradient = step.loss(method("gspo"))
    s = (step.sums((step.logp - step.ref).detach()) / step.length).exp()
    torch.testing.assert_close(gradient, -(s * step.advantage / step.length)[step.segment] / 3)
    far = Step([[3, 5, 2]], 15, drift=0.5)
    s = (far.sums((far.logp - far.ref).detach()) / far.length).exp()
    clipped = torch.minimum(s * far.advantage, s.clamp(1 - 3e-4, 1 + 4e-4) * far.advantage)
    loss, gradient = far.loss(method("gspo"))
    assert loss == pytest.approx(-float(clipped.mean()))
    stopped = (clipped != s * far.advantage)[far.segment]
    assert torch.equal(gradient == 0, stopped) and 0 < stopped.sum() < len(stopped)


def test_gspo_is_grpo_for_responses_of_one_token():
    step = Step([[1, 1, 1], [1, 1]], 16)
    by_sequence, by_token = (PolicyGradient(ratio, clip_low=0.1, clip_high=0.2) for ratio in ("sequence", "token"))
    assert step.loss(by_sequence)[0] == pytest.approx(step.loss(by_token)[0])
    torch.testing.assert_close(step.loss(by_sequence)[1], step.loss(by_token)[1])
    longer = Step([[2, 3]], 16)
    assert longer.loss(by_sequence)[0] != pytest.approx(longer.loss(by_token)[0])


def test_cispo_drops_no_token():
    """Equation 4: sg(min(rho, cap)) A grad logp, whichever way the ratio has gone."""
    step, cispo = Step([[6, 6]], 17, drift=3.0), method("cispo")
    ratio = (step.logp - step.ref).exp().detach()
    assert (ratio > 5).any() and (ratio < 0.1).any()
    _, gradient = step.loss(cispo)
    torch.testing.assert_close(gradient, -ratio.clamp_max(5.0) * step.advantage[step.segment] / 12)
    assert (step.loss(method("dapo"))[1] == 0).any()
    assert (gradient != 0).all()


def test_importance_weights_multiply_what_a_token_adds():
    step = Step([[3, 2]], 18)
    _, plain = step.loss(PolicyGradient())
    step.weight = torch.tensor([0.5, 2.0, 1.0, 0.1, 1.0], dtype=torch.float64)
    torch.testing.assert_close(step.loss(PolicyGradient())[1], plain * step.weight)


# ---- numbers that are none, and settings that are wrong -----------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_impossible_tokens_are_left_out_and_counted(name):
    step = Step([[3, 2], [2]], 19)
    step.ref[1] = float("-inf")
    step.logp = step.logp.detach().clone()
    step.logp[4] = float("-inf")
    step.logp.requires_grad_()
    loss, gradient = step.loss(method(name))
    assert math.isfinite(loss) and gradient.isfinite().all()
    assert gradient[[1, 4]].tolist() == [0, 0] and (gradient != 0).sum() >= 2
    assert float(method(name)(*step.pack([0, 1, 2])).figures["policy/nonfinite_tokens"]) == 2


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("by", [-400.0, 400.0])
def test_huge_ratios_stay_numbers(name, by):
    step = Step([[3, 2], [2]], 20)
    step.ref, step.logp = step.ref.float(), (step.ref.float() + by).requires_grad_()
    step.advantage, step.weight = step.advantage.float(), step.weight.float()
    loss, gradient = step.loss(method(name))
    assert math.isfinite(loss) and gradient.isfinite().all()
    found = method(name)(*step.pack([0, 1, 2]))
    assert all(value.isfinite() for value in found.figures.values())


def test_a_ratio_beyond_all_bounds_still_pulls_back():
    step = Step([[1]])
    step.logp = (step.ref + 50).requires_grad_()
    step.advantage = torch.tensor([-1.0], dtype=torch.float64)
    assert float(step.loss(PolicyGradient())[1]) > 1e6


@pytest.mark.parametrize("name", METHODS)
def test_a_pack_without_a_counted_token_adds_nothing(name):
    step = Step([[3, 2], [2]], 21)
    step.weight[:] = 0.0
    loss, gradient = step.loss(method(name))
    assert loss == 0 and gradient.abs().max() == 0
    assert all(value.isfinite() for value in method(name)(*step.pack([0])).figures.values())


@pytest.mark.parametrize("name", METHODS)
def test_without_signal_at_the_reference_nothing_moves(name):
    """All right, all wrong."""
    for reward in (0.0, 1.0):
        step = Step([[3, 2], [2, 2]], 22, drift=0.0)
        step.advantage = method(name).advantages(torch.full((4,), reward, dtype=torch.float64), step.problem)
        assert step.loss(method(name))[1].abs().max() == 0


@pytest.mark.parametrize("name", METHODS)
def test_figures(name):
    step = Step([[3, 2], [2]], 23, drift=0.0)
    figures = method(name)(*step.pack([0, 1, 2])).figures
    assert {"policy/kl", "policy/ratio_max", "policy/nll_per_token", "policy/log_ratio_squared"} <= set(figures)
    assert ("policy/tau" in figures) == (name == "mirror_descent") == ("policy/clip_fraction" not in figures)
    assert float(figures["policy/kl"]) == 0 and float(figures["policy/ratio_max"]) == 1
    assert float(figures["policy/nll_per_token"]) == pytest.approx(-float(step.logp.mean()))
    assert not any(value.requires_grad for value in figures.values())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MirrorDescent(-0.1), "objective.tau must not be negative"),
        (lambda: MirrorDescent(float("inf")), "objective.tau"),
        (lambda: MirrorDescent(0.1, tau_end=-1), "objective.tau_end"),
        (lambda: MirrorDescent(level="word"), "objective.level=word: choose one of token, sequence"),
        (lambda: MirrorDescent(baseline="median"), "objective.baseline=median: choose one of mean, leave_one_out"),
        (lambda: MirrorDescent(constant=0), "objective.constant=0"),
        (lambda: PolicyGradient(clip="hard"), "objective.clip=hard"),
        (lambda: PolicyGradient(clip_low=-0.2), "objective.clip_low must not be negative"),
        (lambda: PolicyGradient(std="all"), "objective.std=all"),
        (lambda: PolicyGradient(aggregation="mean"), "objective.aggregation=mean"),
        (lambda: PolicyGradient(baseline="log_partition"), "needs a tau"),
    ],
)
def test_wrong_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
