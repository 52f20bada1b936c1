"""The caches of decoding: latents of the tokens so far, in buffers with room to spare.

transformers' dynamic cache makes a new tensor of the whole cache at every step, which for small models is most of
a step's time. Here a step writes its one place. The latent and the rotary key of a token lie side by side in one
buffer, so that attention scores are one product (`joined`).
Legend: B rows, L tokens, R latent width, P rotary width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from kimivl.model.segment_attention import compute_dtype

_ROOM = (128, 256)  # tokens of room in a new buffer: half of its length, but at least and at most these


class GrowingLayer(DynamicLayer):
    """One decoder layer's part of the cache. `keys` and `values` are views of the filled part of the buffer.

    A method of transformers that replaces them (beam search, repetition of rows, cropping) costs one copy at the
    next update. Where gradients are on, tensors are concatenated as usual: a buffer written in place has none.
    """

    keys: Tensor
    values: Tensor
    _buffer: Tensor | None = None
    _filled: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append (B, 1, L, R) and (B, 1, L, P) states; returns all states so far."""
        if torch.is_grad_enabled() or not self.is_initialized or self.get_seq_length() == 0:
            return super().update(key_states, value_states, *args, **kwargs)
        old = self.keys.shape[-2]
        new = old + key_states.shape[-2]
        replaced = self._filled is None or self.keys is not self._filled[0] or self.values is not self._filled[1]
        if replaced or self._buffer is None or self._buffer.shape[-2] < new:
            self._buffer = _buffer_for(self.keys, self.values, new)
            _write(self._buffer[..., :old, :], self.keys, self.values)
        _write(self._buffer[..., old:new, :], key_states, value_states)
        self._filled = _halves(self._buffer[..., :new, :], key_states.shape[-1])
        self.keys, self.values = self._filled
        return self._filled


class SlotLayer(DynamicLayer):
    """One decoder layer's part of a `SlotCache`: `buffer` (slots, 1, columns, R + P)."""

    buffer: Tensor | None = None

    def __init__(self, cache: SlotCache) -> None:
        super().__init__()
        self.cache = cache

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write (rows, 1, 1, R) and (rows, 1, 1, P) states to the step's column; returns the step's window."""
        cache = self.cache
        self.make_room(key_states, value_states)
        window = self.buffer[: cache.rows, :, cache.end - cache.width : cache.end]  # type: ignore[index]
        _write(window[..., -1:, :], key_states, value_states)
        return _halves(window, key_states.shape[-1])

    def make_room(self, keys: Tensor, values: Tensor) -> None:
        """The buffer as large as the cache says, in the dtype that attention computes in.

        Zeros, since what is masked out is still multiplied by zero, and new memory may hold NaN.
        """
        cache = self.cache
        if self.buffer is None:
            width = keys.shape[-1] + values.shape[-1]
            self.buffer = keys.new_zeros(cache.slots, 1, cache.columns, width, dtype=compute_dtype(keys))

    def shift(self, source: slice, target: slice, columns: int) -> None:
        """Move the columns ``source`` to ``target``, into a buffer of ``columns``."""
        old = self.buffer
        if old is None:
            return
        if columns == old.shape[2]:
            old[:, :, target] = old[:, :, source].clone()
        else:
            self.buffer = old.new_zeros(*old.shape[:2], columns, old.shape[3])
            self.buffer[:, :, target] = old[:, :, source]

    def get_seq_length(self) -> int:
        return self.cache.width

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.width, 0


class SlotCache(Cache):
    """The cache of continuous batching: each row is a slot that sequences of any length come to and leave.

    All sequences end at the same column, so a step writes one column, whatever the lengths, and reads a window as
    wide as the longest sequence. Before a step that has just taken in row 2::

        columns   0 1 2 3 4 5 6 7 8
        row 0     . . . a a a a a       a: tokens so far; the caller masks what is left of them
        row 1     . . . . . . b b
        row 2     . . . . c c c c       end = 8: the step's column

    Nothing of a sequence that left is cleared. At the right end of the buffers the window moves back to the left.

    Args:
        slots: rows. layers: decoder layers.
    """

    def __init__(self, slots: int, layers: int) -> None:
        self.slots = slots
        self.columns = 0
        self.end = 0
        self.rows = self.width = 0
        super().__init__(layers=[SlotLayer(self) for _ in range(layers)])

    def admit(self, slots: Tensor, source: Cache, rows: Tensor, length: int) -> None:
        """Copy the last ``length`` columns of ``rows`` (n,) of another cache to ``slots`` (n,)."""
        if length > self.end or self.columns == 0:
            self._place(max(length, self.end))
        for layer, other in zip(self.layers, source.layers, strict=True):
            keys, values = other.keys[rows, :, -length:], other.values[rows, :, -length:]
            layer.make_room(keys, values)
            layer.buffer[slots, :, self.end - length : self.end] = torch.cat((keys, values), -1).to(layer.buffer.dtype)

    def move(self, source: Tensor, target: Tensor, length: int) -> None:
        """Copy the last ``length`` columns of the slots ``source`` (n,) to the slots ``target`` (n,)."""
        columns = slice(self.end - length, self.end)
        for layer in self.layers:
            layer.buffer[target, :, columns] = layer.buffer[source, :, columns]

    def step(self, rows: int, width: int) -> None:
        """The next forward pass is of one token in each of the first ``rows`` slots, and reads ``width`` columns."""
        if self.end >= self.columns:
            self._place(width - 1)
        self.end += 1
        self.rows, self.width = rows, width

    def _place(self, end: int) -> None:
        """Move the window so that it ends at column ``end``, with room behind it."""
        room = min(max(end // 2, _ROOM[0]), _ROOM[1])
        columns = self.columns if self.columns > end + room // 2 else end + room
        kept = min(end, self.end, self.columns)
        for layer in self.layers:
            layer.shift(slice(self.end - kept, self.end), slice(end - kept, end), columns)
        self.columns, self.end = columns, end


def _buffer_for(keys: Tensor, values: Tensor, length: int) -> Tensor:
    """A buffer for ``length`` tokens and some room."""
    room = min(max(length // 2, _ROOM[0]), _ROOM[1])
    width = keys.shape[-1] + values.shape[-1]
    dtype = torch.promote_types(keys.dtype, values.dtype)
    return keys.new_empty(*keys.shape[:-2], length + room, width, dtype=dtype)


def _write(place: Tensor, keys: Tensor, values: Tensor) -> None:
    place[..., : keys.shape[-1]] = keys
    place[..., keys.shape[-1] :] = values


def _halves(buffer: Tensor, width: int) -> tuple[Tensor, Tensor]:
    return buffer[..., :width], buffer[..., width:]


def joined(keys: Tensor, values: Tensor) -> Tensor:
    """(B, L, R) and (B, L, P) -> (B, L, R + P): the buffer that they are the halves of, or else a copy."""
    side_by_side = (
        keys.untyped_storage().data_ptr() == values.untyped_storage().data_ptr()
        and keys.storage_offset() + keys.shape[-1] == values.storage_offset()
        and keys.stride() == values.stride()
    )
    if not side_by_side or keys.requires_grad or values.requires_grad:
        return torch.cat((keys, values.to(keys.dtype)), -1)
    size = (*keys.shape[:-1], keys.shape[-1] + values.shape[-1])
    return keys.as_strided(size, keys.stride(), keys.storage_offset())


def decoding_cache() -> Cache:
    """A cache of `GrowingLayer`s; the model makes one where it is asked for a cache and has none."""
    return Cache(layer_class_to_replicate=GrowingLayer)
