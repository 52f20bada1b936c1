"""bf16 parameters and moments that are computed with in float32, and how the results are rounded.

A learning rate of 2e-5 moves a weight of size 1 by less than bf16 can show (2^-8): rounded to nearest, it never
moves. Three ways to keep what a step has computed:

- ``stochastic``: up or down at random, so that the mean is exact: ``E[rounded] = value``. No memory.
- ``nearest``: torch's own rounding. Small updates are lost.
- ``master``: the parameter is the nearest bf16, and the lower half of the float32 number is kept beside it, so that
  both together are the float32 number to the bit: 2 bytes a number, where a float32 copy takes 4.

A float32 number is its bf16 truncation in the upper 16 bits and the rest in the lower 16; the views below take
halves of it by position, which is that of little-endian machines.
"""

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

ROUNDINGS = ("stochastic", "nearest", "master")


class Wide:
    """Pieces of tensors in float32, to compute with; ``store`` writes back what they have become.

    Float32 pieces are worked on in place. Of others one flat float32 copy is made, so that a thousand small ones
    cost few operations.

    Args:
        pieces: contiguous tensors of one dtype on one device.
        remainders: (as pieces) int16, what float32 numbers have beyond the bf16 ``pieces``; None: nothing.
    """

    def __init__(self, pieces: Sequence[Tensor], remainders: Sequence[Tensor] | None = None) -> None:
        self._pieces = list(pieces)
        self._remainders = None if remainders is None else list(remainders)
        self._flat: Tensor | None = None
        self.values = list(pieces)
        if pieces[0].dtype == torch.float32:
            return
        self._flat = torch.empty(sum(piece.numel() for piece in pieces), dtype=torch.float32, device=pieces[0].device)
        self.values = self._split(self._flat)
        torch._foreach_copy_(self.values, self._pieces)
        if remainders is not None:
            self._flat.view(torch.int32).add_(torch.cat([remainder.flatten() for remainder in remainders]))

    def store(self, noise: Generator | None = None) -> None:
        """Write the values back: with the remainders where there are any, with ``noise`` at random, or nearest."""
        if self._flat is None:
            return
        if self._pieces[0].dtype != torch.bfloat16 or (self._remainders is None and noise is None):
            torch._foreach_copy_(self._pieces, self.values)
            return
        # Any other NaN might carry over into the sign when bits are added, or have none in its upper half.
        self._flat.masked_fill_(self._flat.isnan(), torch.nan)
        bits = self._flat.view(torch.int32)
        if self._remainders is not None:
            torch._foreach_copy_(self._remainders, self._split(self._flat.view(torch.int16)[0::2]))
            bits.add_(2**15)  # half of the last place: with the truncation below, this rounds to nearest
        else:
            bits.add_(torch.empty_like(bits).random_(0, 2**16, generator=noise))
        torch._foreach_copy_(self._pieces, self._split(self._flat.view(torch.bfloat16)[1::2]))

    def _split(self, flat: Tensor) -> list[Tensor]:
        parts = flat.split([piece.numel() for piece in self._pieces])
        return [part.unflatten(0, piece.shape) for part, piece in zip(parts, self._pieces, strict=True)]


def master_of(parameter: Tensor, remainder: Tensor) -> Tensor:
    """The float32 numbers that a bf16 parameter and its int16 remainder are together."""
    return Wide([parameter.detach()], [remainder]).values[0]


def seed_of(step: int) -> int:
    """Seeds far apart for steps in a row (an odd factor: none comes twice); the CPU's generator takes 32 bits."""
    return step * 2654435761 % 2**32
