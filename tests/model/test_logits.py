"""Logits are float32 whatever the model is: what is drawn from them has the probabilities that training finds."""

import copy

import pytest
import torch
import torch.nn.functional as F

from kimivl.model.loss import chunked_log_probs, linear_logits


@pytest.fixture
def bf16(tiny):
    model = copy.deepcopy(tiny).to(torch.bfloat16)
    model.language_model.lm_head.weight.data.mul_(20)  # logits of a trained model's size, where bf16 rounds by 0.05
    return model


def rounded(values: torch.Tensor) -> bool:
    return torch.equal(values.float(), values.bfloat16().float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_logits_are_the_exact_product(dtype):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 5, 16, generator=generator).to(dtype)
    weight = torch.randn(30, 16, generator=generator).to(dtype)
    found = linear_logits(hidden, weight)
    assert found.dtype == torch.promote_types(dtype, torch.float32) and found.shape == (2, 5, 30)
    torch.testing.assert_close(found.double(), F.linear(hidden.double(), weight.double()), atol=1e-5, rtol=1e-5)


def test_generation_draws_from_the_probabilities_of_training(bf16, make_sample):
    """Log-softmax of the logits is `target_log_probs`, far within what rounding to bf16 would do."""
    ids, _, _ = make_sample(24)
    cu_seqlens, targets = torch.tensor([0, 24], dtype=torch.int32), torch.cat([ids[1:], torch.tensor([-100])])
    with torch.no_grad():
        logits = bf16(ids[None], cu_seqlens=cu_seqlens).logits[0]
        logp = bf16.target_log_probs(ids, targets, cu_seqlens)
    assert logits.dtype == torch.float32 and not rounded(logits)
    drawn = logits[:-1].log_softmax(1).gather(1, ids[1:, None])[:, 0]
    torch.testing.assert_close(drawn, logp, atol=2e-5, rtol=0)
    coarse = logits[:-1].bfloat16().float().log_softmax(1).gather(1, ids[1:, None])[:, 0]
    assert (coarse - logp).abs().max() > 1e-3


def test_under_autocast_too(tiny, make_sample):
    ids, _, _ = make_sample(12)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = tiny(ids[None]).logits
    assert logits.dtype == torch.float32 and not rounded(logits)


def test_log_probs_of_a_bf16_head_are_not_rounded():
    generator = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(size, 16, generator=generator).bfloat16() for size in (6, 40))
    targets = torch.arange(6)
    found = chunked_log_probs(hidden, weight, targets)
    exact = (hidden.double() @ weight.double().t()).log_softmax(1)[torch.arange(6), targets]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, atol=1e-5, rtol=0)


def test_gradients_flow_through_the_logits(bf16, make_sample):
    ids, _, _ = make_sample(12)
    bf16(ids[None]).logits.logsumexp(-1).sum().backward()
    head = bf16.language_model.lm_head.weight
    assert head.grad is not None and head.grad.dtype == torch.bfloat16 and head.grad.abs().max() > 0
