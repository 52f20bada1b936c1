"""One RL iteration's data: responses with their scores, and how they are dealt into packs.

Legend: ``R`` responses, ``N`` their tokens end to end, ``T`` tokens of a pack (prompts too).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kimivl.data.pack import IGNORE, EncodedSample, PackedBatch, pack_samples
from kimivl.rl.objectives import StepCounts, Trajectories

SLACK = 1.05
"""How much longer than without it the longest pack may become, so that the responses to a problem stay together."""


@dataclass(slots=True)
class Experience:
    """The responses of one iteration, as tensors and numbers only, so that a checkpoint can hold it.

    ``problem (R,)`` index numbers; ``tokens (N,)`` and ``starts (R + 1,)`` the responses end to end; per token (N,):
    ``ref_logp`` under the policy at the iteration's start, ``rollout_logp`` under the engine that drew it (NaN where
    it gave none), ``version`` the iteration whose policy wrote it, ``weight`` in the loss; per response (R,):
    ``correct``, ``advantage``. ``experts (M, MoE layers, experts per token)`` and ``expert_starts (R + 1,)``: where
    the engine routed the positions of each prompt and response (all but the last), end to end; None where not given.
    """

    iteration: int
    problem: Tensor
    tokens: Tensor
    starts: Tensor
    correct: Tensor
    advantage: Tensor
    ref_logp: Tensor
    rollout_logp: Tensor
    version: Tensor
    weight: Tensor
    experts: Tensor | None = None
    expert_starts: Tensor | None = None

    def __len__(self) -> int:
        return len(self.problem)

    @property
    def lengths(self) -> Tensor:
        """(R,) tokens of each response."""
        return self.starts.diff()

    @property
    def segment(self) -> Tensor:
        """(N,) the response that each token belongs to."""
        return torch.arange(len(self)).repeat_interleave(self.lengths)

    @property
    def counted(self) -> Tensor:
        """(R,) tokens of each response that count in the loss."""
        return torch.zeros(len(self), dtype=torch.int64).index_add(0, self.segment, (self.weight > 0).long())

    def response(self, number: int) -> Tensor:
        return self.tokens[self.starts[number] : self.starts[number + 1]]

    def places(self, members: Sequence[int]) -> Tensor:
        """Where the tokens of these responses stand, in order."""
        return torch.cat([torch.arange(*self.starts[member : member + 2]) for member in members])


@dataclass(slots=True)
class TrajectoryBatch:
    """A pack of trajectories (prompt + response), and what the objective needs of them.

    ``experts (T, MoE layers, experts per token)`` for router replay, -1 where the engine routed nothing (a last token);
    None where it gave none.
    """

    pack: PackedBatch
    trajectories: Trajectories
    experts: Tensor | None = None

    def to(self, device: torch.device) -> TrajectoryBatch:
        experts = None if self.experts is None else self.experts.to(device, non_blocking=True)
        return TrajectoryBatch(self.pack.to(device), self.trajectories.to(device), experts)


class Deal(NamedTuple):
    """``steps * packs_per_step`` packs of response numbers, step by step; a pack may be empty."""

    packs: list[list[int]]
    packs_per_step: int

    def of_step(self, number: int) -> list[int]:
        """The responses of the optimiser step that pack ``number`` belongs to."""
        first = number - number % self.packs_per_step
        return [member for pack in self.packs[first : first + self.packs_per_step] for member in pack]

    def shown(self, problem: Tensor) -> int:
        """Prompts that are read in all packs: those of one pack share the images of one problem."""
        return sum(len(problem[pack].unique()) for pack in self.packs)


def deal(
    lengths: Tensor,
    problem: Tensor,
    steps: int,
    packs_per_step: int,
    seed: Sequence[int],
    max_length: int | None = None,
) -> Deal:
    """Deal responses to the packs of ``steps`` optimiser steps: packs of one step about equally long.

    Problems are shuffled and stay whole within a step, so that every step sees balanced groups (with fewer problems
    than steps, their responses are shuffled instead). Within a step the responses to a problem go to one pack where
    the packs stay balanced: they share its images.

    Args:
        lengths: (R,) tokens of each trajectory. problem: (R,) the problem of each.
        packs_per_step: so many, or a multiple where packs would pass ``max_length`` tokens, so that as many ranks have
            equally many. All steps have the same number: one without responses enough has empty packs.

    Raises:
        ValueError: when a single trajectory is longer than ``max_length``.
    """
    if max_length is not None and int(lengths.max()) > max_length:
        raise ValueError(f"data.max_length={max_length}: a prompt with its response has {int(lengths.max())} tokens")
    parts = _parts(problem, steps, np.random.default_rng(seed))
    least = 1 if max_length is None else max(math.ceil(int(lengths[part].sum()) / max_length) for part in parts)
    times = math.ceil(least / packs_per_step)
    while True:
        packs = [
            pack for part in parts for pack in _balanced(lengths, problem, part, times * packs_per_step, max_length)
        ]
        if max_length is None or all(int(lengths[pack].sum()) <= max_length for pack in packs):
            return Deal(packs, times * packs_per_step)
        times += max(1, times // 50)


def _parts(problem: Tensor, steps: int, generator: np.random.Generator) -> list[list[int]]:
    """The responses of each step."""
    numbers = problem.unique().numpy()
    if len(numbers) < steps:
        return [part.tolist() for part in np.array_split(generator.permutation(len(problem)), steps)]
    shuffled = np.array_split(generator.permutation(numbers), steps)
    return [torch.isin(problem, torch.from_numpy(part)).nonzero().squeeze(1).tolist() for part in shuffled]


def _balanced(
    lengths: Tensor, problem: Tensor, members: list[int], packs: int, max_length: int | None
) -> list[list[int]]:
    """The longest response goes to the shortest pack; or problems together, where that costs little balance."""
    size = {member: int(lengths[member]) for member in members}
    apart = _fill([[member] for member in members], size, {}, packs, 0.0)
    longest = max(sum(size[member] for member in pack) for pack in apart)
    owner = {member: int(problem[member]) for member in members}
    groups: dict[int, list[int]] = {}
    for member in members:
        groups.setdefault(owner[member], []).append(member)
    limit = min(SLACK * longest, max_length or math.inf)
    together = _fill(list(groups.values()), size, owner, packs, limit)
    fits = max(sum(size[member] for member in pack) for pack in together) <= limit
    return together if fits else apart


def _fill(
    units: list[list[int]], size: Mapping[int, int], owner: Mapping[int, int], packs: int, limit: float
) -> list[list[int]]:
    """Units go whole into the shortest pack while it stays within ``limit``; the rest by single responses, to a pack
    within the limit that has their problem already, or to the shortest."""
    filled: list[list[int]] = [[] for _ in range(packs)]
    room = [0] * packs
    has: list[set[int]] = [set() for _ in range(packs)]

    def put(unit: Sequence[int], place: int) -> None:
        filled[place] += unit
        room[place] += sum(size[member] for member in unit)
        has[place].update(owner[member] for member in unit if member in owner)

    loose: list[int] = []
    for unit in sorted(units, key=lambda unit: -sum(size[member] for member in unit)):
        shortest = room.index(min(room))
        if len(unit) > 1 and room[shortest] + sum(size[member] for member in unit) > limit:
            loose += unit
        else:
            put(unit, shortest)
    for member in sorted(loose, key=lambda member: -size[member]):
        near = [p for p in range(packs) if owner[member] in has[p] and room[p] + size[member] <= limit]
        put([member], min(near or range(packs), key=lambda place: room[place]))
    return filled


def trajectory(prompt: EncodedSample, response: Tensor) -> EncodedSample:
    """A prompt and a response as one sample, supervised on the response."""
    ignored = torch.full_like(prompt.input_ids, IGNORE)
    return EncodedSample(
        input_ids=torch.cat([prompt.input_ids, response]),
        labels=torch.cat([ignored, response]),
        pixel_values=prompt.pixel_values,
        image_grid_hws=prompt.image_grid_hws,
    )


def make_batch(
    experience: Experience, dealt: Deal, number: int, prompts: Mapping[int, EncodedSample]
) -> TrajectoryBatch:
    """Pack ``number`` of a deal. ``prompts`` by problem number.

    An empty pack becomes the shortest response with weight and advantage 0: a step needs all its packs.
    """
    members = members_of(experience, dealt, number)
    trajectories = _trajectories(experience, members, dealt.of_step(number))
    if not dealt.packs[number]:
        advantage, weight = torch.zeros_like(trajectories.advantage), torch.zeros_like(trajectories.weight)
        trajectories = replace(trajectories, advantage=advantage, weight=weight)
    return TrajectoryBatch(_pack(experience, members, prompts), trajectories, _experts(experience, members))


def members_of(experience: Experience, dealt: Deal, number: int) -> list[int]:
    """The responses that pack ``number`` shows; an empty one shows the shortest of all."""
    return dealt.packs[number] or [int(experience.lengths.argmin())]


def _pack(experience: Experience, members: Sequence[int], prompts: Mapping[int, EncodedSample]) -> PackedBatch:
    problems = experience.problem[members]
    shown = zip(problems.tolist(), members, strict=True)
    pack = pack_samples([trajectory(prompts[problem], experience.response(member)) for problem, member in shown])
    return replace(pack, samples=problems)


def _trajectories(experience: Experience, members: Sequence[int], of_step: Sequence[int]) -> Trajectories:
    places, lengths, counted = experience.places(members), experience.lengths, experience.counted
    same = experience.problem[members][:, None] == experience.problem[of_step][None]
    return Trajectories(
        advantage=experience.advantage[members],
        segment=torch.arange(len(members)).repeat_interleave(lengths[members]),
        ref_logp=experience.ref_logp[places],
        rollout_logp=experience.rollout_logp[places],
        weight=experience.weight[places],
        response_tokens=counted[members],
        group_tokens=(same * counted[of_step]).sum(1),
        group_responses=same.sum(1),
        counts=StepCounts(
            responses=max(1, len(of_step)),
            tokens=max(1, int(counted[of_step].sum())),
            prompts=max(1, len(experience.problem[of_step].unique())),
        ),
    )


def _experts(experience: Experience, members: Sequence[int]) -> Tensor | None:
    if experience.experts is None or experience.expert_starts is None:
        return None
    spans = list(pairwise(experience.expert_starts.tolist()))
    last = torch.full((1, *experience.experts.shape[1:]), -1, dtype=torch.int16)
    rows = [part for member in members for part in (experience.experts[slice(*spans[member])].to(torch.int16), last)]
    return torch.cat(rows)
