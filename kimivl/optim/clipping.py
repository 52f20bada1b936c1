"""Gradient clipping by norms that are taken in float32.

torch.nn.utils.clip_grad_norm_ takes the norm of a bf16 gradient, and the norm of all these norms, in bf16: 8 bits.
"""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from kimivl.optim.matrices import local

# As in torch: a gradient of zeros is not divided by zero.
EPS = 1e-6


def gradient_norms(gradients: Sequence[Tensor]) -> list[Tensor]:
    """The norm of each gradient, float32 scalars.

    Of gradients that are cut up over ranks (all of one mesh) it is that of the whole; all ranks must call this then.
    """
    norms = list(torch._foreach_norm([local(gradient) for gradient in gradients], 2, dtype=torch.float32))
    cut = [number for number, gradient in enumerate(gradients) if isinstance(gradient, DTensor)]
    if not cut:
        return norms
    squares = torch.stack([norms[number] for number in cut]).double().square_()  # float32 could overflow
    dist.all_reduce(squares, group=gradients[cut[0]].device_mesh.get_group())  # type: ignore[attr-defined]
    for number, norm in zip(cut, squares.sqrt_().float().unbind(), strict=True):
        norms[number] = norm
    return norms


def total_norm(norms: Sequence[Tensor]) -> Tensor:
    """The norm of all gradients together from the norm of each; 0 where there are none."""
    if not norms:
        return torch.zeros(())
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))


def clip_factor(norm: Tensor, clip_norm: float) -> Tensor:
    """What to multiply gradients of this norm by, at most 1."""
    return (clip_norm / (norm + EPS)).clamp(max=1.0)


@torch.no_grad()
def clip_gradients(parameters: Iterable[Tensor], clip_norm: float | None) -> Tensor:
    """Scale all gradients so that their global norm is at most ``clip_norm`` (None: leave them); returns the norm."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = total_norm(gradient_norms(gradients) if gradients else [])
    if gradients and clip_norm is not None:
        torch._foreach_mul_([local(gradient) for gradient in gradients], clip_factor(norm, clip_norm))
    return norm
