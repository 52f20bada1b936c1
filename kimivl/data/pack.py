"""The one batch type that data, model and stages share.

Legend: ``L`` tokens of one sample, ``T`` tokens of a pack, ``S`` samples (segments) in a pack,
``P`` image patches, ``I`` images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

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


class Hole(NamedTuple):
    """A sample that could not be read when its pack was made, under the ``reason`` it is counted by.

    ``sample`` is its number in the index. Its place in the pack keeps its length, without targets and images, so
    that the plan and the packs of the other ranks stay as they are.
    """

    sample: int
    reason: str
    key: str
    shard: str
    detail: str


@dataclass(slots=True)
class PackedBatch:
    """Several samples in one row, isolated from each other by ``cu_seqlens``.

    Worked example, two samples of 3 and 2 tokens of which the last two and the last one are supervised::

        input_ids    a  b  c | d  e
        targets      b  c  . | e  .      targets[t] is the token that position t predicts; . is IGNORE
        cu_seqlens   0, 3, 5             (S + 1,) int32: segment s is [cu_seqlens[s], cu_seqlens[s + 1])

    ``step_targets`` is the number of supervised tokens of the whole optimiser step, over all ranks and
    accumulated packs; sums of losses are divided by it, in one place (``stages.base``). It is the plan's number, and
    a hole in a pack does not lower it: the other ranks could not know.

    ``image_order (J,)`` names the image that each of the J image places shows, in order, where one image is shown at
    several: the responses to one problem share its picture. None: each place has its own.

    ``number`` is the pack's place in the plan of its epoch (-1 where there is none), ``samples (S,)`` the numbers of
    its samples in the index, ``holes`` those of them that could not be read.
    """

    input_ids: Tensor
    targets: Tensor
    cu_seqlens: Tensor
    pixel_values: Tensor
    image_grid_hws: Tensor
    step_targets: int
    image_order: Tensor | None = None
    number: int = -1
    samples: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    holes: tuple[Hole, ...] = ()

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
        """The same pack on another device; what comes from pinned memory is copied while the device works."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> PackedBatch:
        """The same pack in page-locked memory; a DataLoader with ``pin_memory`` calls this."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, change: Callable[[Tensor], Tensor]) -> PackedBatch:
        changed: dict[str, Any] = {
            name: change(tensor) for name, tensor in self.model_inputs().items() if tensor is not None
        }
        return replace(self, **changed)

    def model_inputs(self) -> dict[str, Any]:
        """Arguments of ``KimiVLForConditionalGeneration.target_log_probs``."""
        return {
            "input_ids": self.input_ids,
            "targets": self.targets,
            "cu_seqlens": self.cu_seqlens,
            "pixel_values": self.pixel_values,
            "image_grid_hws": self.image_grid_hws,
            "image_order": self.image_order,
        }


def pack_samples(samples: Sequence[EncodedSample], step_targets: int | None = None) -> PackedBatch:
    """Lay whole samples end to end; nothing is padded, cut or shared between them but images.

    Samples that hold the same ``pixel_values`` object, as the responses to one problem do, share one copy of it.
    Without ``step_targets`` the pack is a step of its own.
    """
    if not samples:
        raise ValueError("a pack needs at least one sample")
    lengths = torch.tensor([len(sample) for sample in samples])
    targets = [torch.cat([sample.labels[1:], torch.tensor([IGNORE])]) for sample in samples]
    distinct = {id(sample.pixel_values): sample for sample in samples}.values()
    return PackedBatch(
        input_ids=torch.cat([sample.input_ids for sample in samples]),
        targets=torch.cat(targets),
        cu_seqlens=torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int(),
        pixel_values=torch.cat([sample.pixel_values for sample in distinct]),
        image_grid_hws=torch.cat([sample.image_grid_hws for sample in distinct]),
        step_targets=sum(sample.num_targets for sample in samples) if step_targets is None else step_targets,
        image_order=None if len(distinct) == len(samples) else _image_order(samples),
    )


def _image_order(samples: Sequence[EncodedSample]) -> Tensor:
    """(J,) numbers of the images, in the order in which ``samples`` show them."""
    numbers: dict[int, Tensor] = {}
    count = 0
    for sample in samples:
        if id(sample.pixel_values) not in numbers:
            numbers[id(sample.pixel_values)] = torch.arange(count, count + len(sample.image_grid_hws))
            count += len(sample.image_grid_hws)
    return torch.cat([numbers[id(sample.pixel_values)] for sample in samples])
