from __future__ import annotations

import numpy as np
import torch
from transformers import DynamicCache

from kimivl.model.cache import SlotCache, decoding_cache, joined


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


@torch.no_grad()
def test_halves_of_a_buffer_are_joined_without_a_copy():
    cache = decoding_cache()
    cache.update(*states(5), layer_idx=0)
    keys, values = cache.update(*states(1), layer_idx=0)
    both = joined(keys, values)
    assert both.data_ptr() == keys.data_ptr() and torch.equal(both, torch.cat((keys, values), -1))
    apart = states(6)
    assert torch.equal(joined(*apart), torch.cat(apart, -1))


@torch.no_grad()
def test_slots_hold_what_sequences_of_their_own_would():
    """Sequences come, grow, move and leave; each slot's last columns are the sequence that it holds."""
    generator = np.random.default_rng(0)
    cache, held = SlotCache(4, layers=2), {}
    for step in range(400):
        for slot in [slot for slot in range(4) if slot not in held or generator.random() < 0.02]:
            length = int(generator.integers(1, 90))
            source = DynamicCache()
            for layer in range(2):
                source.update(*states(length + 3, rows=3), layer_idx=layer)
            row = int(generator.integers(3))
            cache.admit(torch.tensor([slot]), source, torch.tensor([row]), length)
            held[slot] = [torch.cat((a.keys[row, 0], a.values[row, 0]), -1)[-length:] for a in source.layers]
        if step % 50 == 49:
            cache.move(torch.tensor([3, 2]), torch.tensor([0, 1]), max(len(held[3][0]), len(held[2][0])))
            held[0], held[1] = [*held[3]], [*held[2]]
        cache.step(4, max(len(sequence[0]) for sequence in held.values()) + 1)
        for layer in range(2):
            new = states(1, rows=4)
            keys, values = cache.update(*new, layer_idx=layer)
            both = joined(keys, values)
            assert both.data_ptr() == keys.data_ptr() and bool(both.isfinite().all())
            for slot in range(4):
                held[slot][layer] = torch.cat((held[slot][layer], torch.cat((new[0], new[1]), -1)[slot, 0]))
                assert torch.equal(both[slot, 0, -len(held[slot][layer]) :], held[slot][layer])


@torch.no_grad()
def test_fewer_rows_than_slots_and_a_small_buffer():
    cache = SlotCache(8, layers=1)
    for length in range(1, 1000):
        cache.step(2, length)
        keys, _ = cache.update(*states(1, rows=2), layer_idx=0)
        assert keys.shape == (2, 1, length, 4)
    assert cache.columns < 1000 + 300
    for _ in range(1000):  # only short sequences are left: the window moves back, the buffer stays
        cache.step(2, 10)
        keys, _ = cache.update(*states(1, rows=2), layer_idx=0)
    assert keys.shape == (2, 1, 10, 4) and cache.columns < 1000 + 300
