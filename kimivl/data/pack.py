"""The one batch type that data, model and stages share.

Legend: ``L`` tokens of one sample, ``T`` tokens of a pack, ``S`` samples (segments) in a pack,
``P`` image patches, ``I`` images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

IGNORE = -100
"""Target value of a position that is not supervised."""


@dataclass(frozen=True, slots=True)
class EncodedSample:
    """One chat as the model reads it.

    ``input_ids (L,)`` with every image already expanded to its placeholder tokens; ``labels (L,)`` the same ids
    where a token is supervised and ``IGNORE`` elsewhere (not shifted); ``pixel_values (P, 3, 14, 14)`` uint8;
    ``image_grid_hws (I, 2)`` height and width of each image in patches.
    """

    input_ids: Tensor
    labels: Tensor
    pixel_values: Tensor
    image_grid_hws: Tensor

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def num_targets(self) -> int:
        """Supervised positions once shifted: a label on the first token can never be predicted."""
        return int((self.labels[1:] != IGNORE).sum())


@dataclass(slots=True)
class PackedBatch:
    """Several samples in one row, isolated from each other by ``cu_seqlens``.

    Worked example, two samples of 3 and 2 tokens of which the last two and the last one are supervised::

        input_ids    a  b  c | d  e
        targets      b  c  . | e  .      targets[t] is the token that position t predicts; . is IGNORE
        cu_seqlens   0, 3, 5             (S + 1,) int32: segment s is [cu_seqlens[s], cu_seqlens[s + 1])

    ``step_targets`` is the number of supervised tokens of the whole optimiser step, over all ranks and
    accumulated packs; sums of losses are divided by it, in one place (``stages.base``).
    """

    input_ids: Tensor
    targets: Tensor
    cu_seqlens: Tensor
    pixel_values: Tensor
    image_grid_hws: Tensor
    step_targets: int

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    @property
    def num_samples(self) -> int:
        return len(self.cu_seqlens) - 1

    @property
    def target_segments(self) -> Tensor:
        """(K,) the segment that each supervised position belongs to, in the order of ``target_log_probs``."""
        positions = (self.targets != IGNORE).nonzero().squeeze(1)
        return torch.searchsorted(self.cu_seqlens.long(), positions, right=True) - 1

    def sum_by_segment(self, values: Tensor) -> Tensor:
        """(K,) values of the supervised positions -> (S,) their sum in each segment."""
        return values.new_zeros(self.num_samples).index_add(0, self.target_segments.to(values.device), values)

    def to(self, device: torch.device) -> PackedBatch:
        """The same pack on another device."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self) if field.type == "Tensor"}
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items()})

    def model_inputs(self) -> dict[str, Any]:
        """Arguments of ``KimiVLForConditionalGeneration.target_log_probs``."""
        return {
            "input_ids": self.input_ids,
            "targets": self.targets,
            "cu_seqlens": self.cu_seqlens,
            "pixel_values": self.pixel_values,
            "image_grid_hws": self.image_grid_hws,
        }


def pack_samples(samples: Sequence[EncodedSample], step_targets: int | None = None) -> PackedBatch:
    """Lay whole samples end to end; nothing is padded, cut or shared between them.

    Without ``step_targets`` the pack is a step of its own.
    """
    if not samples:
        raise ValueError("a pack needs at least one sample")
    lengths = torch.tensor([len(sample) for sample in samples])
    targets = [torch.cat([sample.labels[1:], torch.tensor([IGNORE])]) for sample in samples]
    return PackedBatch(
        input_ids=torch.cat([sample.input_ids for sample in samples]),
        targets=torch.cat(targets),
        cu_seqlens=torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int(),
        pixel_values=torch.cat([sample.pixel_values for sample in samples]),
        image_grid_hws=torch.cat([sample.image_grid_hws for sample in samples]),
        step_targets=sum(sample.num_targets for sample in samples) if step_targets is None else step_targets,
    )
