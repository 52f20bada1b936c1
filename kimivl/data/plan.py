"""The plan of an epoch: which samples lie in which pack, in which order.

A pure function of (index, seed, epoch, phase), so the number of steps is known before the first one, a resume is
exact, and every sample is used exactly once per epoch over any number of workers and ranks.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np

OPEN_PACKS = 64
"""Packs that are still being filled at one time; more of them fill better and mix worse."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Packs of one epoch as CSR arrays: pack ``p`` holds ``samples[starts[p]:starts[p + 1]]``.

    ``step_targets`` has the supervised tokens of each optimiser step; step ``s`` takes the packs
    ``[s * packs_per_step, (s + 1) * packs_per_step)``. ``dropped`` counts, by reason, what fits into no pack:
    ``too_long`` (tokens) and ``too_many_patches``.
    """

    samples: np.ndarray
    starts: np.ndarray
    step_targets: np.ndarray
    packs_per_step: int
    dropped: dict[str, int]

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def num_steps(self) -> int:
        return len(self) // self.packs_per_step

    def pack(self, number: int) -> np.ndarray:
        return self.samples[self.starts[number] : self.starts[number + 1]]

    @property
    def hash(self) -> str:
        """Identity of the plan; a checkpoint carries it, and a resume on other data is refused."""
        digest = hashlib.sha256(self.samples.tobytes() + self.starts.tobytes() + b"%d" % self.packs_per_step)
        return digest.hexdigest()[:16]


def plan_epoch(
    tokens: np.ndarray,
    patches: np.ndarray,
    targets: np.ndarray,
    *,
    max_length: int,
    max_patches: int,
    packs_per_step: int,
    seed: int,
    epoch: int,
) -> Plan:
    """Shuffle the samples, fill packs by best fit under both budgets, and shuffle the packs.

    Best fit puts a sample into the open pack that it fills most closely. Worked example, ``max_length`` 10 and
    samples of 6, 5, 4, 5 tokens: 6 opens pack A; 5 opens B; 4 goes to A (4 left) rather than B (5 left); 5 fills B.

    The number of packs is made a multiple of ``packs_per_step`` by splitting the fullest packs, never by dropping
    or repeating a sample.

    Args:
        tokens, patches, targets: (N,) per sample; image patches before merging; supervised tokens.
        max_length: tokens of a pack. max_patches: image patches of a pack.

    Raises:
        ValueError: when no sample fits, or fewer than one step has packs.
    """
    short, light = tokens <= max_length, patches <= max_patches
    fits = short & light
    if not fits.any():
        raise ValueError(
            f"none of {len(tokens)} samples fits into a pack of {max_length} tokens and {max_patches} image patches; "
            "raise max_length or max_patches in data.phases"
        )
    order = np.random.default_rng([seed, epoch]).permutation(np.flatnonzero(fits))
    packs = _best_fit(order, tokens, patches, max_length, max_patches)
    packs = _split_to_multiple(packs, packs_per_step)
    shuffle = np.random.default_rng([seed, epoch, 1]).permutation(len(packs))
    # Inside a pack the order is free: neighbours of one length share an attention call.
    packs = [sorted(packs[number], key=lambda sample: tokens[sample]) for number in shuffle]
    pack_targets = np.array([targets[pack].sum() for pack in packs], np.int64)
    return Plan(
        samples=np.concatenate([np.asarray(pack, np.int64) for pack in packs]),
        starts=np.concatenate([[0], np.cumsum([len(pack) for pack in packs])]),
        step_targets=pack_targets.reshape(-1, packs_per_step).sum(1),
        packs_per_step=packs_per_step,
        dropped={"too_long": int((~short).sum()), "too_many_patches": int((short & ~light).sum())},
    )


def _best_fit(
    order: np.ndarray, tokens: np.ndarray, patches: np.ndarray, max_length: int, max_patches: int
) -> list[list[int]]:
    packs: list[list[int]] = []
    patch_room: list[int] = []
    room: list[tuple[int, int]] = []  # open packs as (tokens left, pack), ascending
    for sample in order.tolist():
        length, cost = int(tokens[sample]), int(patches[sample])
        place = bisect_left(room, (length, -1))
        while place < len(room) and patch_room[room[place][1]] < cost:
            place += 1
        if place < len(room):
            left, pack = room.pop(place)
        else:
            left, pack = max_length, len(packs)
            packs.append([])
            patch_room.append(max_patches)
        packs[pack].append(sample)
        patch_room[pack] -= cost
        insort(room, (left - length, pack))
        if len(room) > OPEN_PACKS:
            room.pop(0)
    return packs


def _split_to_multiple(packs: list[list[int]], multiple: int) -> list[list[int]]:
    wanted = max(1, -(-len(packs) // multiple)) * multiple
    samples = sum(len(pack) for pack in packs)
    if samples < wanted:
        raise ValueError(
            f"{samples} samples cannot fill the {wanted} packs of one optimiser step; use more data, fewer devices, "
            "or a smaller trainer.accumulate_grad_batches"
        )
    packs = sorted(packs, key=len)
    while len(packs) < wanted:
        largest = packs.pop()
        halves = [largest[0::2], largest[1::2]]
        for half in halves:
            insort(packs, half, key=len)
    return packs
