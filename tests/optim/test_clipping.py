"""The global norm is taken in float32, and clipping by it is torch's."""

import pytest
import torch
from torch import nn

from kimivl.optim.clipping import clip_gradients, gradient_norms


def gradients(dtype: torch.dtype) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in [(40, 30), (7,), (3, 5, 2), (9,)]]
    for parameter in parameters[:-1]:
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(dtype)
    return parameters


@pytest.mark.parametrize("clip_norm", [0.5, 1e6])
def test_float32_gradients_are_clipped_as_torch_clips(clip_norm: float):
    ours, theirs = gradients(torch.float32), gradients(torch.float32)
    norm = clip_gradients(ours, clip_norm)
    expected = nn.utils.clip_grad_norm_(theirs, clip_norm)
    torch.testing.assert_close(norm, expected)
    for first, second in zip(ours[:-1], theirs[:-1], strict=True):
        torch.testing.assert_close(first.grad, second.grad)


def test_the_norm_of_bf16_gradients_has_all_the_bits_of_float32():
    parameters = gradients(torch.bfloat16)
    exact = torch.cat([p.grad.double().flatten() for p in parameters[:-1]]).norm()
    assert abs(nn.utils.clip_grad_norm_(gradients(torch.bfloat16), 1e6).double() / exact - 1) > 1e-4
    norm = clip_gradients(parameters, 0.5)
    assert norm.dtype == torch.float32 and abs(norm.double() / exact - 1) < 1e-6
    assert parameters[0].grad.dtype == torch.bfloat16
    clipped = torch.cat([p.grad.double().flatten() for p in parameters[:-1]]).norm()
    assert abs(clipped / 0.5 - 1) < 2e-3  # each number is rounded


def test_without_a_limit_or_a_gradient_there_is_a_norm_only():
    parameters = gradients(torch.float32)
    before = parameters[0].grad.clone()
    assert clip_gradients(parameters, None) > 0
    assert torch.equal(parameters[0].grad, before)
    assert clip_gradients([nn.Parameter(torch.ones(2))], 1.0) == 0


def test_the_norm_of_a_long_gradient_is_exact_too():
    """Torch's on a CPU is wrong in the fourth digit: that of the same gradient in two halves would be another."""
    long = torch.randn(3_000_001, generator=torch.Generator().manual_seed(0))
    exact = long.double().norm()
    for dtype, limit in ((torch.float32, 2e-7), (torch.float64, 1e-12)):
        [norm] = gradient_norms([long.to(dtype).view(-1, 1)])
        assert norm.dtype == dtype and abs(norm / exact - 1) < limit
