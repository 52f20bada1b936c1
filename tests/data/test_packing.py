"""Packing of one window: what is carried, what is filled, what is spread."""

import numpy as np
import pytest

from kimivl.data.packing import CARRIED, _largest_that_fit, pack_items


def pack(tokens, patches=None, *, max_length: int = 1000, max_patches: int = 4000, last: bool = True, seed: int = 0):
    tokens = np.asarray(tokens)
    patches = np.zeros_like(tokens) if patches is None else np.asarray(patches)
    generator = np.random.default_rng(seed)
    limits = {"max_length": max_length, "max_patches": max_patches}
    return pack_items(tokens, patches, np.arange(len(tokens)), generator, last=last, **limits)


def test_the_worked_example():
    """6 is spread, 5 and 4 flow together, 3 joins 6, and 2 opened a pack that is dissolved."""
    found = pack([6, 5, 4, 3, 2], max_length=10, last=False)
    assert found[0] == found[3] != found[1] == found[2]
    assert found[4] == CARRIED
    assert sorted(set(pack([6, 5, 4, 3, 2], max_length=10).tolist())) == [0, 1, 2]


def test_each_pack_takes_the_largest_that_fits_and_none_twice():
    room, sizes = np.array([3, 9, 1, 9]), np.array([2, 3, 5, 8])
    packs, places = _largest_that_fit(room, sizes)
    assert dict(zip(packs.tolist(), sizes[places].tolist(), strict=True)) == {1: 8, 3: 5, 0: 3}


def test_packs_give_way_when_small_items_run_out():
    packs, places = _largest_that_fit(np.array([5, 5, 5]), np.array([4, 4, 9]))
    assert len(packs) == 2
    assert sorted(places.tolist()) == [0, 1]


@pytest.mark.parametrize(("bind", "fill"), [(False, 0.996), (True, 0.98)])
def test_little_is_carried_and_the_rest_is_full(bind, fill):
    """Even with ten items to a pack only, where next fit alone leaves a tenth empty."""
    generator = np.random.default_rng(3)
    tokens = generator.integers(1, 200, 20_000)
    patches = np.where(generator.random(20_000) < 0.4, 4 * tokens, 0)
    found = pack(tokens, patches, max_patches=2000 if bind else 4000, last=False)
    kept = found != CARRIED
    assert 0 < tokens[~kept].sum() < (0.3 if bind else 0.15) * tokens.sum()
    assert np.bincount(found[kept], tokens[kept]).mean() > 1000 * fill
    assert np.bincount(found[kept], patches[kept]).max() <= (2000 if bind else 4000)


def test_long_items_open_packs_of_their_own_and_are_joined_by_short_ones():
    tokens = np.array([900] * 50 + [100] * 200)
    found = pack(tokens)
    assert len(set(found[:50].tolist())) == 50
    assert np.bincount(found).shape == (65,)
    assert (np.bincount(found, tokens) == 1000).all()


def test_all_long_items_come_to_an_end():
    assert len(set(pack([600] * 500).tolist())) == 500
    assert len(set(pack([600] * 500, [3000] * 500).tolist())) == 500


def test_where_images_fill_the_patch_budget_text_is_spread_evenly():
    """Packs hold images and text in the proportion of the set, rather than text first and images alone at the end."""
    generator = np.random.default_rng(4)
    tokens = generator.integers(10, 60, 20_000)
    patches = np.where(np.arange(20_000) % 2, 4 * tokens, 0)
    found = pack(tokens, patches, max_patches=1000)
    share = np.bincount(found, patches) / 4 / np.bincount(found, tokens)
    assert np.mean(np.abs(share - 0.5) < 0.15) > 0.9
