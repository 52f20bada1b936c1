"""How often each sample is used in an epoch: weights of sources, and samples too long for the phase they fall into.

Counts are exact and a function of (index, seed, epoch), like the plan that is made of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import numpy as np

MAX_WEIGHT = 65_535
"""A weight beyond this is a mistake, and the counts would not fit their type."""


@dataclass(frozen=True, slots=True)
class Limits:
    """A phase of the run: budgets of its packs (tokens, image patches before merging) and its number of epochs."""

    max_length: int
    max_patches: int
    epochs: int


@dataclass(frozen=True, slots=True, eq=False)
class Uses:
    """``count (N,)`` uses of each sample in an epoch; ``moved (N,)``, uses that a later phase makes up for."""

    count: np.ndarray
    moved: np.ndarray


def uses_of_epoch(
    tokens: np.ndarray,
    patches: np.ndarray,
    source: np.ndarray,
    *,
    sources: Sequence[str],
    phases: Sequence[Limits],
    epoch: int,
    seed: int,
    mixture: Mapping[str, float] | None,
    too_long: Literal["drop", "move"],
) -> Uses:
    """Count the uses of each sample in ``epoch``, an epoch of the run over all phases.

    A source of weight ``w`` (1 where ``mixture`` is silent) gives each of its ``n`` samples ``floor(w)`` times, and
    ``round(frac(w) * n)`` of them once more. These move through the source from epoch to epoch, in an order fixed by
    the seed, so that over epochs the use is even: with weight 0.5, two epochs use each sample of four once.

    With ``too_long="move"`` a sample that no pack of this phase holds is used later instead, once for each missed
    use, spread evenly over the epochs of the first later phase whose packs hold it; so the uses of the run stay the
    same. What no later phase holds stays counted here, and ``plan.plan_epoch`` drops it by reason, as it does with
    all that are too long under ``"drop"``.

    Worked example: phases of 1 epoch at 32K and 2 at 128K, weights 1, a sample of 50K tokens: moved in epoch 0, used
    twice in epoch 1 or 2 and once in the other.

    Args:
        tokens, patches, source: (N,) columns of the index; ``source`` numbers ``sources``.
        mixture: weight by name of source.

    Raises:
        ValueError: an unknown source, a weight that is no number from 0 to ``MAX_WEIGHT``, a mixture that uses no
            sample, an epoch outside of the phases, or another word for ``too_long``.
    """
    if too_long not in ("drop", "move"):
        raise ValueError(f"data.too_long must be drop or move, not {too_long!r}")
    phase, _ = _place_of(epoch, phases)
    draw = _Draw(source, _weights(sources, mixture), seed)
    count = draw.uses(epoch)
    if not count.any():
        raise ValueError("data.mixture uses none of the samples; give a source in the data a weight above 0")
    if too_long == "drop":
        return Uses(_narrow(count), np.zeros_like(_narrow(count)))
    homes = _Homes(tokens, patches, phases)
    leaving = homes.of_phase(phase) >= 0
    moved = np.where(leaving, count, 0)
    return Uses(_narrow(count - moved + _arrivals(homes, draw, phases, epoch)), _narrow(moved))


def _narrow(count: np.ndarray) -> np.ndarray:
    return count.astype(np.min_scalar_type(int(count.max(initial=0))))


def _place_of(epoch: int, phases: Sequence[Limits]) -> tuple[int, int]:
    """Phase of an epoch of the run, and the number of the epoch in it."""
    first = 0
    for number, phase in enumerate(phases):
        if first <= epoch < first + phase.epochs:
            return number, epoch - first
        first += phase.epochs
    raise ValueError(f"epoch {epoch} lies outside of the {first} epochs of data.phases; add epochs to a phase")


def _weights(sources: Sequence[str], mixture: Mapping[str, float] | None) -> np.ndarray:
    """(sources,) the weight of each source."""
    mixture = mixture or {}
    for name, weight in mixture.items():
        if name not in sources:
            raise ValueError(f"data.mixture names the unknown source {name!r}; the data has {', '.join(sources)}")
        if not isinstance(weight, int | float) or not 0 <= weight <= MAX_WEIGHT:
            raise ValueError(f"data.mixture.{name} must be a number from 0 to {MAX_WEIGHT}, not {weight!r}")
    return np.array([mixture.get(name, 1.0) for name in sources], np.float64)


class _Draw:
    """Uses by the weights of sources; what the epochs share is made once."""

    def __init__(self, source: np.ndarray, weights: np.ndarray, seed: int) -> None:
        whole = np.floor(weights).astype(np.int32)
        self.whole = whole[source]
        self.rotations = []
        for code in np.flatnonzero(weights > whole).tolist():
            members = np.flatnonzero(source == code)
            extra = round((weights[code] - whole[code]) * len(members))
            self.rotations.append((np.random.default_rng([seed, code, 4]).permutation(members), extra))

    def uses(self, epoch: int) -> np.ndarray:
        """(N,) int32."""
        count = self.whole.copy()
        for members, extra in self.rotations:
            if extra:
                count[members[(epoch * extra + np.arange(extra)) % len(members)]] += 1
        return count


class _Homes:
    """For each phase, where the samples that its packs do not hold are used instead."""

    def __init__(self, tokens: np.ndarray, patches: np.ndarray, phases: Sequence[Limits]) -> None:
        self.fits = [(tokens <= phase.max_length) & (patches <= phase.max_patches) for phase in phases]

    def of_phase(self, phase: int) -> np.ndarray:
        """(N,) the first later phase that holds a sample, -1 where there is none or the phase itself holds it."""
        home = np.full(len(self.fits[phase]), -1, np.int16)
        for later in range(len(self.fits) - 1, phase, -1):
            home[self.fits[later]] = later
        home[self.fits[phase]] = -1
        return home


def _arrivals(homes: _Homes, draw: _Draw, phases: Sequence[Limits], epoch: int) -> np.ndarray:
    """(N,) uses that earlier phases moved to this epoch.

    Epoch ``e`` of the ``E`` of a phase takes the share from ``missed * e / E`` to ``missed * (e + 1) / E``; an offset
    that differs between neighbours keeps single uses from all falling into the last epoch.
    """
    phase, place = _place_of(epoch, phases)
    missed = np.zeros(len(draw.whole), np.int64)
    firsts = [0, *accumulate(limits.epochs for limits in phases)]
    for earlier in range(phase):
        here = np.flatnonzero(homes.of_phase(earlier) == phase)
        for missed_epoch in range(firsts[earlier], firsts[earlier + 1]) if len(here) else ():
            missed[here] += draw.uses(missed_epoch)[here]
    moved = np.flatnonzero(missed)
    epochs = phases[phase].epochs
    reached = missed[moved] * place + np.arange(len(moved)) % epochs
    arriving = np.zeros_like(missed)
    arriving[moved] = (reached + missed[moved]) // epochs - reached // epochs
    return arriving
