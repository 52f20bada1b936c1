"""Exact attention inside segments of a packed row, in memory linear in the pack's length.

A segment is a sample (decoder, causal) or an image (vision tower, bidirectional). The dense T x T mask is never
built: segments are batched by length and each batch is one scaled-dot-product call.

    lengths 3 5 4 3, causal      ->  one batch of 4 rows, right-padded to 5: a query sees only keys before it,
                                     so padding on the right is never seen and needs no mask
    lengths 6 8 6, bidirectional ->  batches (6, 6) and (8): padding would be seen, so lengths in a batch are equal

Legend: T packed tokens, N heads, D head width, S segments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

SEGMENT_ATTENTION = "kimivl_segments"

# Segments share a batch while the longest is at most this much longer than the shortest: the work of padding
# (quadratic) stays below the cost of one more call.
_PADDING = 1.25
_FREE_PADDING = 16


@dataclass(frozen=True, slots=True)
class Segments:
    """How the segments of one pack are batched; made once per forward, used by every layer.

    `gather` (sum of rows x length,) picks packed positions into the batches laid end to end, None when the pack is
    already that; `scatter` (T,) picks the real positions back. `batches` holds (rows, length) of each batch.
    """

    batches: tuple[tuple[int, int], ...]
    gather: Tensor | None
    scatter: Tensor | None


def plan_segments(lengths: list[int], causal: bool, device: torch.device) -> Segments:
    """Batch segments of similar length (causal) or equal length (bidirectional)."""
    if len(set(lengths)) == 1:
        return Segments(((len(lengths), lengths[0]),), None, None)
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    groups: list[list[int]] = []
    for segment in order:
        shortest = lengths[groups[-1][0]] if groups else 0
        limit = max(shortest * _PADDING, shortest + _FREE_PADDING) if causal else shortest
        if groups and lengths[segment] <= limit:
            groups[-1].append(segment)
        else:
            groups.append([segment])
    size = torch.tensor(lengths)
    start = size.cumsum(0) - size
    gather, batches, scatter = [], [], torch.empty(sum(lengths), dtype=torch.long)
    offset = 0
    for group in groups:
        longest = lengths[group[-1]]
        members = torch.tensor(group)
        within = torch.arange(longest)
        real = within < size[members, None]
        packed = start[members, None] + within
        # A padded place repeats the segment's last position: any finite value will do, nothing reads it.
        gather.append(packed.minimum((start + size - 1)[members, None]).flatten())
        scatter[packed[real]] = offset + real.flatten().nonzero().squeeze(1)
        batches.append((len(group), longest))
        offset += len(group) * longest
    return Segments(tuple(batches), torch.cat(gather).to(device), scatter.to(device))


def segment_attention(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float, causal: bool
) -> Tensor:
    """Attention of (N, T, D) heads inside each segment; returns (N, T, Dv)."""
    if segments.gather is not None:
        q, k, v = (x.index_select(1, segments.gather) for x in (q, k, v))
    sizes = [rows * length for rows, length in segments.batches]
    outputs = []
    for (rows, _), qb, kb, vb in zip(
        segments.batches, q.split(sizes, 1), k.split(sizes, 1), v.split(sizes, 1), strict=True
    ):
        # Heads take the batch dimension and segments the head dimension: no transpose is needed.
        out = F.scaled_dot_product_attention(
            qb.unflatten(1, (rows, -1)),
            kb.unflatten(1, (rows, -1)),
            vb.unflatten(1, (rows, -1)),
            scale=scale,
            is_causal=causal,
        )
        outputs.append(out.flatten(1, 2))
    joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
    return joined if segments.scatter is None else joined.index_select(1, segments.scatter)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    segments: Segments | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The decoder's attention, called by transformers: per segment on a pack, plain SDPA otherwise."""
    if segments is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = segment_attention(query[0], key[0], value[0], segments, scale, causal=True)
    return out.transpose(0, 1).unsqueeze(0), None


def register() -> None:
    """Make `SEGMENT_ATTENTION` known to transformers (attention and mask creation)."""
    ALL_ATTENTION_FUNCTIONS.register(SEGMENT_ATTENTION, attention_forward)
    ALL_MASK_ATTENTION_FUNCTIONS.register(SEGMENT_ATTENTION, sdpa_mask)
