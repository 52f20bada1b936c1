"""The packs of one RL iteration, as each rank makes them and Lightning reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import Tensor

from kimivl.rl.experience import Deal, Experience, TrajectoryBatch, make_batch, members_of
from kimivl.rl.types import Problem
from kimivl.runtime import ranks


class ExperienceLoader:
    """The packs of one iteration from ``start`` on; sized as the whole iteration, like ``PackLoader``."""

    def __init__(self, make: Callable[[int], TrajectoryBatch], length: int, start: int) -> None:
        self._make, self._length, self._start = make, length, start

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[TrajectoryBatch]:
        return map(self._make, range(self._start, self._length))

    def again(self, number: int) -> TrajectoryBatch:
        """The ``number``-th pack of this rank in the iteration, made once more."""
        return self._make(number)


def no_packs(length: int) -> ExperienceLoader:
    """Of an iteration of ``length`` packs that are all behind."""

    def none(place: int) -> TrajectoryBatch:
        raise IndexError(place)

    return ExperienceLoader(none, length, length)


class OwnPacks:
    """This rank's packs of an iteration, equally many of each step, with the problems that they show.

    Attributes:
        numbers: of the packs, among those of all ranks.
    """

    def __init__(self, experience: Experience, dealt: Deal) -> None:
        self.experience, self.dealt = experience, dealt
        self.numbers = range(ranks.rank(), len(dealt.packs), ranks.world_size())
        self._problems: dict[int, Problem] = {}

    def bring_problems(self, there: Mapping[int, Problem], read: Callable[[Sequence[int]], dict[int, Problem]]) -> None:
        """Keep of the problems that are ``there`` those that the packs show; what another rank had them answered for
        is read here. All ranks call it."""
        shown = [member for number in self.numbers for member in members_of(self.experience, self.dealt, number)]
        needed = self.experience.problem[shown].unique().tolist()

        def bring() -> None:
            found = dict(there) | read([number for number in needed if number not in there])
            self._problems = {number: found[number] for number in needed}

        ranks.attempt(bring)

    def batch(self, number: int) -> TrajectoryBatch:
        """Pack ``number`` of all."""
        prompts = {number: problem.prompt for number, problem in self._problems.items()}
        return make_batch(self.experience, self.dealt, number, prompts)

    def fill_reference(self, log_probs: Callable[[TrajectoryBatch], Tensor]) -> None:
        """Fill in the reference log-probabilities of all responses, by a pass over the packs of each rank; over empty
        ones too, for all ranks of a sharded model make equally many. All ranks call it."""
        own = {number: log_probs(self.batch(number)).float().cpu() for number in self.numbers}
        for number, logp in (item for part in ranks.gather(own) for item in part.items()):
            if members := self.dealt.packs[number]:
                self.experience.ref_logp[self.experience.places(members)] = logp

    def loader(self, steps: int) -> ExperienceLoader:
        """From after so many optimiser steps on."""
        start = steps * self.dealt.packs_per_step // ranks.world_size()
        return ExperienceLoader(lambda place: self.batch(self.numbers[place]), len(self.numbers), start)
