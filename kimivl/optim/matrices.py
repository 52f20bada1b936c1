"""Which parameters are matrices to Muon, how a parameter is read as a stack of them, and how stacks make batches.

Shapes: E experts, H hidden, I expert width, R rows <= C columns of a matrix laid wide.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

# Tables and heads: two dimensions or more, but rows that are looked up and not a map between spaces.
TABLES = ("embed_tokens", "lm_head", "pos_emb")
# The thin factors of an adapter: orthogonalising one would make its product, not itself, lose its scale.
LORA_FACTORS = ("lora_A", "lora_B")
# Parameters that hold several matrices stacked along their rows, by the module or parameter that names them.
SPLITS = {"wqkv": 3, "gate_up_proj": 2}


class Matrices(NamedTuple):
    """A parameter read as ``number`` matrices: ``tensor.reshape(number, rows, cols)``."""

    number: int
    rows: int
    cols: int

    def of(self, tensor: Tensor) -> Tensor:
        """(number, rows, cols) of a tensor shaped like the parameter; a view of a contiguous one."""
        return tensor.reshape(self)

    def laid_wide(self, stack: Tensor) -> Tensor:
        """(B, R, C), R <= C, of a stack (B, rows, cols): the same numbers, transposed if the matrices are tall."""
        return stack.mT if self.rows > self.cols else stack

    @property
    def wide(self) -> tuple[int, int]:
        """(R, C): what parameters of one batch have in common."""
        return min(self.rows, self.cols), max(self.rows, self.cols)


def matrices_of(name: str, parameter: Tensor, splits: Mapping[str, int]) -> Matrices | None:
    """How Muon reads a parameter, or None where it belongs to AdamW.

    Example, with the default splits::

        vision_tower.encoder.blocks.0.wqkv.weight (3456, 1152)      -> Matrices(3, 1152, 1152)
        vision_tower.patch_embed.proj.weight (1152, 3, 14, 14)      -> Matrices(1, 1152, 588)
        ...mlp.experts.gate_up_proj (64, 2816, 2048)                -> Matrices(128, 1408, 2048)
        ...mlp.experts.down_proj (64, 2048, 1408)                   -> Matrices(64, 2048, 1408)
        ...embed_tokens.weight, lm_head.weight, pos_emb.weight, lora_A, lora_B, any norm or bias -> None

    Raises:
        ValueError: for a parameter that is not contiguous, whose rows do not divide by its split, or that has
            three dimensions without being a stack of experts.
    """
    if not parameter.is_contiguous():
        raise ValueError(f"{name} is not contiguous: call .contiguous() on it before making the optimizer")
    parts = name.split(".")
    if parameter.ndim < 2 or any(part in (*TABLES, *LORA_FACTORS) for part in parts):
        return None
    split = next((count for part, count in splits.items() if part in parts), 1)
    if parameter.ndim == 3:
        if "experts" not in parts:
            raise ValueError(f"{name} {tuple(parameter.shape)}: only stacked experts may have three dimensions")
        stacked, rows, cols = parameter.shape
    else:
        stacked, rows, cols = 1, parameter.shape[0], parameter[0].numel()
    if rows % split:
        raise ValueError(f"{name} {tuple(parameter.shape)}: {rows} rows do not divide into {split} matrices")
    return Matrices(stacked * split, rows // split, cols)


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor: its rows where it is cut up over ranks, else all of it; no copy."""
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():  # outside of autograd it is the tensor itself, to be moved in place
        return tensor.to_local()


def shards_of(name: str, parameter: Tensor) -> Any:
    """The group of ranks that a parameter is cut up over, None where it is whole.

    Raises:
        ValueError: for one that is cut in another way than along its rows.
    """
    if not isinstance(parameter, DTensor):
        return None
    if tuple(parameter.placements) != (Shard(0),):
        raise ValueError(
            f"{name} lies on the ranks as {parameter.placements}: cut it along its first dimension only (fully_shard "
            "with a mesh of one dimension)"
        )
    return parameter.device_mesh.get_group()


class Piece(NamedTuple):
    """A part of a parameter (of what this rank holds of it), and of its gradient and states: ``part`` of them read as
    ``view``."""

    parameter: Tensor
    view: Sequence[int]
    part: slice

    def of(self, tensor: Tensor) -> Tensor:
        return local(tensor).reshape(self.view)[self.part]


def cut(counts: Sequence[int], limit: int) -> Iterator[list[tuple[int, slice]]]:
    """Cut stacks of so many items, laid end to end, into equal batches of at most ``limit`` items.

    Example: stacks of 5 and 1 items, at most 4 in a batch -> [(0, 0:3)], [(0, 3:5), (1, 0:1)].
    """
    total = sum(counts)
    if not total:
        return
    size = math.ceil(total / math.ceil(total / limit))
    batch: list[tuple[int, slice]] = []
    room = size
    for number, count in enumerate(counts):
        start = 0
        while start < count:
            stop = min(start + room, count)
            batch.append((number, slice(start, stop)))
            room -= stop - start
            start = stop
            if room == 0:
                yield batch
                batch, room = [], size
    if batch:
        yield batch
