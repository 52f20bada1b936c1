"""Newton-Schulz: many matrices of one shape orthogonalised by batched products (Keller Jordan's Muon).

Shapes: B matrices of one shape, R rows <= C columns.
"""

import torch
from torch import Tensor

NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NS_EPS = 1e-7


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Replace the singular values of each matrix by values near 1. Overwrites its argument.

    The quintic of Keller Jordan's Muon, whose coefficients trade exactness (values end in about [0.7, 1.2])
    for the steepest rise from 0.

    Args:
        matrices: (B, R, C), R <= C, in the dtype to compute in.
        steps: iterations.

    Returns:
        (B, R, C) in the same dtype.
    """
    a, b, c = NS_COEFFICIENTS
    norms = torch.linalg.vector_norm(matrices, dim=(1, 2), keepdim=True)
    x = matrices.div_(norms.clamp_(min=NS_EPS))
    spare = torch.empty_like(x)
    gram = x.new_empty(len(x), x.shape[1], x.shape[1])
    polynomial = torch.empty_like(gram)
    for _ in range(steps):
        torch.bmm(x, x.mT, out=gram)
        torch.baddbmm(gram, gram, gram, beta=b, alpha=c, out=polynomial)
        torch.baddbmm(x, polynomial, x, beta=a, out=spare)
        x, spare = spare, x
    return x


def newton_schulz_flops(number: int, rows: int, cols: int, steps: int = 5) -> int:
    """Floating-point operations of ``orthogonalise`` for ``number`` matrices, two per multiplication and addition."""
    short, long = sorted((rows, cols))
    return number * steps * (4 * short * short * long + 2 * short**3)
