"""Gradient clipping by norms that are taken in float32 (in float64 where there are float64 gradients).

torch.nn.utils.clip_grad_norm_ takes the norm of a bf16 gradient, and the norm of all these norms, in bf16: 8 bits.
"""

from collections.abc import Iterable, Sequence
from functools import reduce

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from kimivl.optim.matrices import local

# As in torch: a gradient of zeros is not divided by zero.
EPS = 1e-6

BLOCK = 4096
"""A CPU adds the squares of a tensor one after the other: of ten million float32 numbers the norm is then wrong by
6e-4, of this many by 1e-7. CUDA adds them as a tree."""


def gradient_norms(gradients: Sequence[Tensor]) -> list[Tensor]:
    """The norm of each gradient, scalars of one dtype, float32 at least.

    Of gradients that are cut up over ranks (all of one mesh) it is that of the whole; all ranks must call this then.
    """
    wide = reduce(torch.promote_types, {gradient.dtype for gradient in gradients}, torch.float32)
    norms = _norms([local(gradient) for gradient in gradients], wide)
    cut = [number for number, gradient in enumerate(gradients) if isinstance(gradient, DTensor)]
    if not cut:
        return norms
    squares = torch.stack([norms[number] for number in cut]).double().square_()  # float32 could overflow
    dist.all_reduce(squares, group=gradients[cut[0]].device_mesh.get_group())  # type: ignore[attr-defined]
    for number, norm in zip(cut, squares.sqrt_().to(wide).unbind(), strict=True):
        norms[number] = norm
    return norms


def _norms(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    long = {n for n, tensor in enumerate(tensors) if tensor.device.type == "cpu" and tensor.numel() > BLOCK}
    short = [tensor for n, tensor in enumerate(tensors) if n not in long]
    others = iter(torch._foreach_norm(short, 2, dtype=dtype) if short else ())
    return [_in_blocks(tensor, dtype) if n in long else next(others) for n, tensor in enumerate(tensors)]


def _in_blocks(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    flat = tensor.reshape(-1)
    whole = len(flat) - len(flat) % BLOCK
    blocks = torch.linalg.vector_norm(flat[:whole].view(-1, BLOCK), dim=1, dtype=dtype)
    rest = torch.linalg.vector_norm(flat[whole:], dtype=dtype)
    return torch.linalg.vector_norm(torch.cat([blocks, rest.view(1)]), dtype=torch.float64).to(dtype)


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
