"""Online policy mirror descent: its gradient is the paper's equation."""

import pytest
import torch

from kimivl.rl.objectives import MirrorDescent, mean_baseline

GROUP, VOCABULARY = 6, 9


def policy(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of a small categorical policy over whole responses, reference log-probabilities, drawn responses."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(VOCABULARY, generator=generator, dtype=torch.float64).requires_grad_()
    reference = torch.randn(VOCABULARY, generator=generator, dtype=torch.float64).log_softmax(0)
    return logits, reference, torch.randint(VOCABULARY, (GROUP,), generator=generator)


@pytest.mark.parametrize("tau", [0.0, 0.1, 1.0])
def test_gradient_is_the_papers_equation(tau):
    logits, reference, drawn = policy(0)
    rewards = torch.tensor([1.0, 0, 0, 1, 1, 0], dtype=torch.float64)
    logp = logits.log_softmax(0)[drawn]
    loss = MirrorDescent(tau)(logp, reference[drawn], mean_baseline(rewards)) / GROUP
    (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)

    ascent = torch.zeros_like(logits)  # 1/k sum_j [ grad logp_j (r_j - mean r) - tau/2 grad (logp_j - ref_j)^2 ]
    for j in range(GROUP):
        (grad_logp,) = torch.autograd.grad(logp[j], logits, retain_graph=True)
        squared = (logp[j] - reference[drawn[j]]) ** 2
        (grad_squared,) = torch.autograd.grad(squared, logits, retain_graph=True)
        ascent += grad_logp * (rewards[j] - rewards.mean()) - tau / 2 * grad_squared
    torch.testing.assert_close(gradient, -ascent / GROUP, rtol=1e-12, atol=1e-14)


def test_equal_rewards_at_the_reference_have_no_gradient():
    logits, _, drawn = policy(1)
    logp = logits.log_softmax(0)[drawn]
    loss = MirrorDescent(0.1)(logp, logp.detach(), mean_baseline(torch.ones(GROUP, dtype=torch.float64)))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.abs().max() == 0


def test_baseline_is_per_problem():
    rewards = torch.tensor([[1.0, 1, 0, 0], [1, 1, 1, 1]])
    assert mean_baseline(rewards).tolist() == [[0.5, 0.5, -0.5, -0.5], [0, 0, 0, 0]]


def test_negative_tau_names_the_key():
    with pytest.raises(ValueError, match="objective.tau"):
        MirrorDescent(-0.1)
