"""The cache of decoding: latents of the tokens so far, in buffers that grow by halves.

transformers' dynamic cache makes a new tensor of the whole cache at every step, which for small models is most of
a step's time. Here a step writes its one place into a buffer with room to spare.
Legend: B rows, L tokens, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

_ROOM = 64  # tokens of room in a new buffer, beside half of its length


class GrowingLayer(DynamicLayer):
    """One decoder layer's part of the cache. `keys` and `values` are views of the filled part of the buffers.

    A method of transformers that replaces them (beam search, repetition of rows, cropping) costs one copy at the
    next update. Where gradients are on, tensors are concatenated as usual: a buffer written in place has none.
    """

    keys: Tensor
    values: Tensor
    _buffers: tuple[Tensor, Tensor] | None = None
    _filled: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append (B, 1, L, D) states; returns all states so far."""
        if torch.is_grad_enabled() or not self.is_initialized or self.get_seq_length() == 0:
            return super().update(key_states, value_states, *args, **kwargs)
        old = self.keys.shape[-2]
        new = old + key_states.shape[-2]
        replaced = self._filled is None or self.keys is not self._filled[0] or self.values is not self._filled[1]
        if replaced or self._buffers is None or self._buffers[0].shape[-2] < new:
            self._buffers = (_with_room(self.keys, new), _with_room(self.values, new))
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[..., old:new, :] = states
        self.keys, self.values = (buffer[..., :new, :] for buffer in self._buffers)
        self._filled = (self.keys, self.values)
        return self._filled


def _with_room(states: Tensor, length: int) -> Tensor:
    """A buffer for half as many tokens again as `length`, filled with `states`."""
    buffer = states.new_empty(*states.shape[:-2], length + length // 2 + _ROOM, states.shape[-1])
    buffer[..., : states.shape[-2], :] = states
    return buffer


def decoding_cache() -> Cache:
    """A cache of `GrowingLayer`s; the model makes one where it is asked for a cache and has none."""
    return Cache(layer_class_to_replicate=GrowingLayer)
