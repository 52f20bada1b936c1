from __future__ import annotations

import torch
from transformers import DynamicCache

from kimivl.model.cache import decoding_cache


def states(length, rows=2):
    return torch.randn(rows, 1, length, 4), torch.randn(rows, 1, length, 3)


@torch.no_grad()
def test_equals_the_dynamic_cache_through_every_change():
    torch.manual_seed(0)
    caches = decoding_cache(), DynamicCache()

    def append(length, rows=2):
        new = states(length, rows)
        ours, theirs = (cache.update(*new, layer_idx=0) for cache in caches)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        assert caches[0].get_seq_length() == caches[1].get_seq_length()

    append(5)
    for _ in range(200):  # past the room of the first buffer
        append(1)
    for cache in caches:
        cache.crop(-3)
    append(1)
    append(2)
    for cache in caches:
        cache.batch_repeat_interleave(3)
    append(1, rows=6)
    for cache in caches:
        cache.batch_select_indices(torch.tensor([5, 0]))
    append(1)


@torch.no_grad()
def test_a_step_copies_nothing():
    cache = decoding_cache()
    cache.update(*states(5), layer_idx=0)
    cache.update(*states(1), layer_idx=0)
    place = cache.layers[0].keys.data_ptr()
    for _ in range(10):
        cache.update(*states(1), layer_idx=0)
    assert cache.layers[0].keys.data_ptr() == place


def test_gradients_flow_through_a_cache():
    cache = decoding_cache()
    first, second = (tuple(x.requires_grad_() for x in states(1)) for _ in range(2))
    cache.update(*first, layer_idx=0)
    keys, values = cache.update(*second, layer_idx=0)
    (keys.sum() + values.sum()).backward()
    assert all(x.grad is not None for x in first + second)
