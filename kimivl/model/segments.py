"""The segments of a packed row: what attention may see.

A segment is a sample of the decoder's pack (causal inside) or an image of the vision tower (bidirectional inside).
One object per pack and tower is made where the pack enters the model and shared by all layers, so that lengths are
read from the device once and masks are built once.
Legend: T packed tokens, S segments, B blocks of `BLOCK` tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import accumulate, groupby, pairwise

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128  # tokens; the block of FlexAttention's kernels

Runs = tuple[tuple[int, int], ...]


class Segments:
    """Consecutive segments that cover a row of T tokens.

        lengths 3 5 5 4  ->  cu_seqlens 0 3 8 13 17, max_length 5, runs (1, 3) (2, 5) (1, 4)

    Attributes:
        lengths: tokens of each segment.
        cu_seqlens: (S + 1,) int32 on the device of the row: segment s is [cu_seqlens[s], cu_seqlens[s + 1]).
        max_length: tokens of the longest segment.
    """

    def __init__(self, lengths: Sequence[int], cu_seqlens: Tensor) -> None:
        if not lengths or min(lengths) <= 0:
            raise ValueError(f"a pack needs segments of at least one token each, got lengths {list(lengths)[:8]}")
        self.lengths = list(lengths)
        self.cu_seqlens = cu_seqlens
        self.max_length = max(lengths)
        self._block_masks: dict[bool, BlockMask] = {}

    @classmethod
    def of(cls, cu_seqlens: Tensor, tokens: int | None = None) -> Segments:
        """Segments of a pack, from (S + 1,) cumulative lengths; waits for the device once.

        Raises:
            ValueError: when they do not rise, at every step, from 0 (to ``tokens``, where given).
        """
        ends = cu_seqlens.tolist() if cu_seqlens.ndim == 1 else [-1]
        lengths = [end - start for start, end in pairwise(ends)]
        if ends[:1] != [0] or min(lengths, default=0) <= 0 or tokens not in (None, ends[-1]):
            goal = "to the length of the row" if tokens is None else f"to the {tokens} tokens of the row"
            empty = next((number for number, length in enumerate(lengths) if length <= 0), None)
            detail = f"{ends[:4]} ... {ends[-1:]}" if empty is None else f"{lengths[empty]} tokens in segment {empty}"
            raise ValueError(f"cu_seqlens must rise from 0 {goal}, got {detail}; leave out empty samples")
        return cls(lengths, cu_seqlens.to(torch.int32))

    @classmethod
    def of_lengths(cls, lengths: Sequence[int], device: torch.device | str) -> Segments:
        """Segments of known lengths, for a row on ``device``."""
        ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        return cls(lengths, ends.to(device, non_blocking=True))

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @cached_property
    def runs(self) -> Runs:
        """(count, length) of each run of neighbouring segments of equal length: each is one batched call."""
        return tuple((len(list(same)), length) for length, same in groupby(self.lengths))

    @cached_property
    def numbers(self) -> Tensor:
        """(T,) int32: the segment of each token."""
        numbers = torch.arange(len(self.lengths), dtype=torch.int32, device=self.cu_seqlens.device)
        # with the size given, no kernel has to wait for the sum of the lengths
        return numbers.repeat_interleave(self.cu_seqlens.diff(), output_size=self.tokens)

    @property
    def positions(self) -> Tensor:
        """(1, T) positions that restart at each segment: lengths 3 2 -> [[0, 1, 2, 0, 1]]."""
        start = self.cu_seqlens[:-1].repeat_interleave(self.cu_seqlens.diff(), output_size=self.tokens)
        return (torch.arange(self.tokens, device=start.device) - start)[None]

    def block_mask(self, causal: bool) -> BlockMask:
        """FlexAttention's mask, built on first use: B x B numbers, never T x T."""
        if causal not in self._block_masks:
            self._block_masks[causal] = self._make_block_mask(causal)
        return self._block_masks[causal]

    def _make_block_mask(self, causal: bool) -> BlockMask:
        """Which blocks hold a visible pair, and which hold visible pairs only.

        `create_block_mask` would find out by evaluating the mask at all T x T pairs. Segments are in order, so two
        blocks share one exactly when the ranges of their segment numbers overlap.
        """
        tokens, numbers = self.tokens, self.numbers
        start = torch.arange(0, tokens, BLOCK, device=numbers.device)
        first, last = numbers[start], numbers[(start + BLOCK - 1).clamp_max(tokens - 1)]
        some = (first[:, None] <= last) & (first <= last[:, None])
        whole = (first == last) & (start + BLOCK <= tokens)  # one segment, and not cut by the end of the row
        every = (first[:, None] == first) & whole[:, None] & whole
        if causal:
            some, every = some.tril(), every.tril(-1)
        return BlockMask.from_kv_blocks(
            *_ordered(some & ~every),
            *_ordered(every),
            BLOCK_SIZE=BLOCK,
            mask_mod=_causal_mask(numbers) if causal else _mutual_mask(numbers),
            seq_lengths=(tokens, tokens),
        )


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """(B, B) blocks of keys that each block of queries visits -> their count (1, 1, B), and they first (1, 1, B, B)."""
    indices = blocks.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    return blocks.sum(1, dtype=torch.int32)[None, None], indices.to(torch.int32)[None, None]


MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def _causal_mask(numbers: Tensor) -> MaskMod:
    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (numbers[query] == numbers[key]) & (query >= key)

    return visible


def _mutual_mask(numbers: Tensor) -> MaskMod:
    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return numbers[query] == numbers[key]

    return visible
