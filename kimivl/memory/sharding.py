"""What FSDP2 takes on a device beside its share: parameters that are gathered, gradients that are to be summed.

`kimivl.model.parallel` makes a group of each decoder layer, each vision block, and of the rest (embedding, head,
projector, norms). The rest is gathered from the first forward pass to the end of the backward pass. Of the blocks, the
one at work is whole, and the next is being gathered. A block's gradients are whole until they have been copied, in
float32, into the buffer that is summed over the ranks; that buffer is there while the next block is at work.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

REDUCED = 4
"""Bytes of a number in which gradients are summed."""


@dataclass(frozen=True, slots=True)
class Group:
    """Numbers of parameters that are gathered together, and of those of them that train; bytes of one."""

    numel: int
    trained: int
    size: int

    @classmethod
    def of(cls, parameters: Iterable[nn.Parameter]) -> Group:
        listed = list(parameters)
        return cls(
            sum(parameter.numel() for parameter in listed),
            sum(parameter.numel() for parameter in listed if parameter.requires_grad),
            max((parameter.element_size() for parameter in listed), default=0),
        )

    @property
    def weights(self) -> int:
        return self.numel * self.size

    @property
    def gradients(self) -> int:
        return self.trained * self.size

    @property
    def buffer(self) -> int:
        """What is summed over the ranks."""
        return self.trained * REDUCED


@dataclass(frozen=True, slots=True)
class Groups:
    """The largest decoder layer, the largest vision block, and the rest."""

    layer: Group
    block: Group
    rest: Group

    @classmethod
    def of(cls, model: Any) -> Groups:
        layers, blocks = model.language_model.model.layers, model.vision_tower.encoder.blocks
        own = {id(parameter) for part in (*layers, *blocks) for parameter in part.parameters()}
        rest = [parameter for parameter in model.parameters() if id(parameter) not in own]
        return cls(
            layer=max((Group.of(layer.parameters()) for layer in layers), key=lambda group: group.numel),
            block=max((Group.of(block.parameters()) for block in blocks), key=lambda group: group.numel),
            rest=Group.of(rest),
        )

    def rows(self, moment: str, whole: int, head: int) -> dict[str, float]:
        """The rows of a moment of `kimivl.memory.estimate`.

        Args:
            whole: bytes of all weights. head: of the head's gradient, the first of the rest's.
        """
        gathered, summed = {
            "forward's end": (self.rest.weights + self.layer.weights, 0),
            "loss backward": (self.rest.weights + self.layer.weights, head),
            "last layer's backward": self._at(self.layer, head),
            "first layer's backward": self._at(self.layer, head),
            "vision backward": self._at(self.block, self.rest.gradients),
            "last sums": (0, self.rest.gradients + self.rest.buffer),
            "update": (0, 0),
            "rollouts": (whole, 0),
            "evaluation": (whole, 0),
        }[moment]
        return {"weights gathered": float(gathered), "gradients to be summed": float(summed)}

    def _at(self, group: Group, before: int) -> tuple[int, int]:
        """A block at work: the next is being gathered, the one before is being summed."""
        return self.rest.weights + 2 * group.weights, before + group.gradients + group.buffer
