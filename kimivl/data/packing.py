"""Packs of one window: whole samples under a token and a patch budget, a vectorised bin packing.

Next fit in a random order mixes well and fills badly; best fit fills well, sample by sample. Here nearly all samples
of a pack are neighbours in a random order, and the gap that is left is filled with the largest samples that fit, from
packs that are dissolved for it: ``pack_items`` has the steps.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from itertools import chain, repeat
from typing import NamedTuple

import numpy as np

CARRIED = -1
"""Pack number of an item that lies in no pack: it is to be packed with the next window."""

RESERVE = 2
"""Tokens of the dissolved packs over the gaps to fill. Long-tailed sets are full at 1.2; samples of a fifth of a pack
gain up to 3 and more, but what is not used is carried, and widens the reads of the next window."""

FEW = 8
"""So many packs, at the end of an epoch, are made without a reserve."""


def pack_items(
    tokens: np.ndarray,
    patches: np.ndarray,
    order: np.ndarray,
    generator: np.random.Generator,
    *,
    max_length: int,
    max_patches: int,
    last: bool,
) -> np.ndarray:
    """Give each item the number of its pack.

    1. Items of more than half a pack are spread, one to a pack.
    2. The others flow in their random order through the packs, next fit, under both budgets.
    3. The last packs of that flow, twice the waste of all, are dissolved into a reserve, and the others take from
       it, all at once and in rounds, the largest item that still fits.
    4. What is left of the reserve is carried; with ``last`` it is packed in the same way, until few packs are left,
       which take their items longest first. A set of few packs is packed longest first if that makes less of them.

    Worked example, ``max_length`` 10 and items of 6, 5, 4, 3, 2 tokens in this order: two packs are opened, and 6 is
    spread to the first; if the second comes first in the flow, it takes 5 and 4, and 3 goes to the first; 2 opens a
    third, which is dissolved, and fits nowhere (rooms 1 and 1): it is carried.

    Args:
        tokens, patches: (n,) of the items, tokens at least 1; each item fits into an empty pack.
        order: (n,) permutation of the items, the order in which they flow.
        generator: decides which packs get the long items.

    Returns:
        (n,) int64 pack numbers, consecutive from 0, or ``CARRIED``.
    """
    limits = {"max_length": max_length, "max_patches": max_patches}
    tokens, patches = tokens.astype(np.int64), patches.astype(np.int64)
    packs = _Packs(tokens, patches, **limits)
    rest = packs.take(order, generator)
    if not last:
        return _renumbered(packs.pack)
    if packs.needed(rest) > FEW:
        pack = _renumbered(packs.pack)
        again = generator.permutation(len(rest))
        pack[rest] = pack.max() + 1 + pack_items(tokens[rest], patches[rest], again, generator, last=True, **limits)
        return pack
    packs.spread(rest, 0)
    if packs.needed(order) > FEW:
        return _renumbered(packs.pack)
    longest_first = _Packs(tokens, patches, **limits)
    longest_first.spread(order, packs.needed(order))
    return min(_renumbered(packs.pack), _renumbered(longest_first.pack), key=np.max)


def _renumbered(pack: np.ndarray) -> np.ndarray:
    """The same packs, numbered from 0 without the empty ones."""
    used = np.bincount(pack[pack != CARRIED], minlength=1) > 0
    return np.where(pack == CARRIED, CARRIED, (np.cumsum(used) - 1)[pack])


class _Pool(NamedTuple):
    """Items that wait for a pack, with their sizes, which ascend."""

    items: np.ndarray
    sizes: np.ndarray

    @classmethod
    def of(cls, items: np.ndarray, sizes: np.ndarray) -> _Pool:
        order = np.argsort(sizes, kind="stable")
        return cls(items[order], sizes[order])

    def without(self, places: np.ndarray) -> _Pool:
        kept = np.ones(len(self.items), bool)
        kept[places] = False
        return _Pool(self.items[kept], self.sizes[kept])


class _Packs:
    """Packs that are being filled: room left in each, and the pack of each item.

    Where no item has a larger share of the patch budget than of the token budget, the token budget alone decides,
    and patches are not looked at (``patches_bind`` is false).
    """

    def __init__(self, tokens: np.ndarray, patches: np.ndarray, max_length: int, max_patches: int) -> None:
        self.tokens, self.patches = tokens, patches
        self.max_length, self.max_patches = max_length, max_patches
        self.patches_bind = bool((patches * max_length > tokens * max_patches).any())
        self.pack = np.full(len(tokens), CARRIED, np.int64)
        self.token_room = self.patch_room = np.zeros(0, np.int64)

    @property
    def count(self) -> int:
        return len(self.token_room)

    def open(self, count: int) -> None:
        self.token_room = np.concatenate([self.token_room, np.full(count, self.max_length)])
        self.patch_room = np.concatenate([self.patch_room, np.full(count, self.max_patches)])

    def needed(self, items: np.ndarray) -> int:
        """A number of packs below which nothing could hold the items: by their sums, and by those over a half."""
        budgets = [(self.tokens[items], self.max_length)]
        if self.patches_bind:
            budgets.append((self.patches[items], self.max_patches))
        return max(max(-(-int(sizes.sum()) // room), int((2 * sizes > room).sum())) for sizes, room in budgets)

    def take(self, order: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Pack the items in random order (steps 1 to 3 of ``pack_items``); returns what is left."""
        long = self.is_long(order)
        self.spread(order[long], self.needed(order))
        path = self.flow(self.interleaved(order[~long]), generator.permutation(self.count))
        return self.fill_gaps(self.dissolve(path))

    def is_long(self, items: np.ndarray) -> np.ndarray:
        """Items of more than half a pack in a budget; next fit would leave wide gaps before them."""
        many_patches = (2 * self.patches[items] > self.max_patches) & self.patches_bind
        return (2 * self.tokens[items] > self.max_length) | many_patches

    def spread(self, items: np.ndarray, count: int) -> None:
        """Place all items, largest first, over ``count`` new packs and as many more as it takes."""
        self.open(count)
        while len(items := self.fill(items, (self.max_length, self.max_patches))):
            self.open(max(1, self.needed(items)))

    def interleaved(self, items: np.ndarray) -> np.ndarray:
        """The items with images at a constant rate among the others, where patches bind; else as they are.

        Both kinds keep their order. By chance alone many packs would be full of patches before they are of tokens.
        """
        if not self.patches_bind:
            return items
        imaged = self.patches[items] > 0
        place = np.empty(len(items))
        for kind, amount in ((imaged, self.patches), (~imaged, self.tokens)):
            total = np.cumsum(amount[items[kind]])
            place[kind] = total / max(1, total[-1:].sum())
        return items[np.argsort(place, kind="stable")]

    def flow(self, items: np.ndarray, path: np.ndarray) -> np.ndarray:
        """Next fit: a pack takes items in their order until one does not fit; it opens the next pack of the path.

        Returns:
            (packs,) the path: all packs in the order in which the items came to them.
        """
        tokens = [0, *np.cumsum(self.tokens[items]).tolist()]
        patches = [0, *np.cumsum(self.patches[items]).tolist()] if self.patches_bind else None
        rooms = zip(self.token_room[path].tolist(), self.patch_room[path].tolist(), strict=True)
        bounds = [0]
        for token_room, patch_room in chain(rooms, repeat((self.max_length, self.max_patches))):
            start = bounds[-1]
            if start == len(items):
                break
            end = bisect_right(tokens, tokens[start] + token_room, start) - 1
            if patches:
                end = min(end, bisect_right(patches, patches[start] + patch_room, start) - 1)
            bounds.append(end)
        path = np.concatenate([path, np.arange(self.count, len(bounds) - 1)])
        self.open(len(path) - self.count)
        reached, starts, ends = path[: len(bounds) - 1], bounds[:-1], bounds[1:]
        self.pack[items] = np.repeat(reached, np.diff(bounds))
        self.token_room[reached] -= np.take(tokens, ends) - np.take(tokens, starts)
        if patches:
            self.patch_room[reached] -= np.take(patches, ends) - np.take(patches, starts)
        return path

    def dissolve(self, path: np.ndarray) -> np.ndarray:
        """Close the last packs of the path, at least one and at most half of them, and return their items."""
        sizes = np.bincount(self.pack[self.pack != CARRIED], minlength=self.count)
        used = path[sizes[path] > 0]
        waste = len(used) - self.needed(np.arange(len(self.pack)))
        closed = sizes == 0
        closed[used[-max(1, min(RESERVE * waste, len(used) // 2)) :]] = True
        self.token_room[closed] = 0
        items = np.flatnonzero(closed[self.pack])
        self.pack[items] = CARRIED
        return items

    def fill_gaps(self, reserve: np.ndarray) -> np.ndarray:
        """``fill`` for packs that are nearly full; the item with the most patches for its tokens sets the rate."""
        imaged = reserve[self.patches[reserve] > 0]
        if not (self.patches_bind and len(imaged)):
            return self.fill(reserve, (1, 1))
        worst = imaged[np.argmin(self.tokens[imaged] / self.patches[imaged])]
        return self.fill(reserve, (int(self.tokens[worst]), int(self.patches[worst])))

    def fill(self, items: np.ndarray, rate: tuple[int, int]) -> np.ndarray:
        """In rounds, every pack takes the largest item that fits into it, until none does; returns the rest.

        Where patches bind, an item with images has as its size the larger of its tokens and its patches times
        ``rate`` (tokens over patches), and the room of a pack is measured likewise: what fits by that measure fits
        both budgets, whatever the rate. Items without images need no patch room and are a pool of their own.
        """
        tokens, patches = rate
        with_images = (self.patches[items] > 0) & self.patches_bind
        imaged, plain = items[with_images], items[~with_images]
        size = np.maximum(self.tokens[imaged], -(-self.patches[imaged] * tokens // patches))
        imaged = self._rounds(
            _Pool.of(imaged, size), lambda: np.minimum(self.token_room, self.patch_room * tokens // patches)
        )
        plain = self._rounds(_Pool.of(plain, self.tokens[plain]), lambda: self.token_room)
        return np.concatenate([imaged, plain])

    def _rounds(self, pool: _Pool, room: Callable[[], np.ndarray]) -> np.ndarray:
        """Rounds in which every pack takes at most one item of the pool; returns what fits nowhere."""
        while len(pool.items):
            packs, places = _largest_that_fit(room(), pool.sizes)
            if not len(packs):
                break
            items = pool.items[places]
            self.pack[items] = packs
            self.token_room[packs] -= self.tokens[items]
            self.patch_room[packs] -= self.patches[items]
            pool = pool.without(places)
        return pool.items


def _largest_that_fit(room: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Give every pack the largest item that fits, no item twice.

    From the widest pack to the tightest, the place of the item must fall by one at least, and it may be any place
    up to the largest that fits; the running minimum of (largest place + rank) is just that.

    Worked example: rooms 9, 9, 3 and sizes 2, 3, 5, 8 -> places 3, 2, 1 (items of 8, 5, 3).

    Args:
        room: (packs,). sizes: (items,) ascending, not empty.

    Returns:
        Packs, and for each of them a place in ``sizes``; packs that get nothing are left out.
    """
    packs = np.flatnonzero(room >= sizes[0])
    packs = packs[np.argsort(-room[packs], kind="stable")]
    rank = np.arange(len(packs))
    largest = np.searchsorted(sizes, room[packs], side="right") - 1
    places = np.minimum.accumulate(largest + rank) - rank
    return packs[places >= 0], places[places >= 0]
