"""Which kernels compute the three costly parts of the model: attention on packs, routed experts, the loss.

The result is the same with each, up to rounding; what differs is where it runs, how fast, and in how much memory.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, get_args

import torch

Attention = Literal["auto", "varlen", "flash", "flex", "sdpa"]
Experts = Literal["auto", "grouped_mm", "sorted"]
Loss = Literal["auto", "chunked", "liger"]
_CHOICES = {"attention": get_args(Attention), "experts": get_args(Experts), "loss": get_args(Loss)}


@dataclass(frozen=True, slots=True)
class Kernels:
    """A choice for each part; ``auto`` is the fastest exact one for the device and dtype at hand.

    Args:
        attention: see ``kimivl.model.segment_attention``.
        experts: see ``kimivl.model.experts``.
        loss: see ``kimivl.model.loss``.

    Raises:
        ValueError: for a name that is not among the choices.
    """

    attention: Attention = "auto"
    experts: Experts = "auto"
    loss: Loss = "auto"

    def __post_init__(self) -> None:
        for field in fields(self):
            name, choices = getattr(self, field.name), _CHOICES[field.name]
            if name not in choices:
                raise ValueError(f"kernels.{field.name}={name}: choose one of {', '.join(choices)}")

    def resolve(self, device: torch.device, dtype: torch.dtype) -> Kernels:
        """The kernels that ``auto`` stands for on this device and dtype.

        Raises:
            ValueError: when a named one cannot run there, with what can.
        """
        from kimivl.model import experts, loss, segment_attention  # they import this module

        return Kernels(
            segment_attention.resolve(self.attention, device, dtype),
            experts.resolve(self.experts, device, dtype),
            loss.resolve(self.loss, device, dtype),
        )
