"""One RL iteration's data: responses with their scores, and how they are dealt into packs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kimivl.data.pack import IGNORE, EncodedSample, PackedBatch
from kimivl.rl.objectives import Trajectories


@dataclass(slots=True)
class Experience:
    """The responses of one iteration, as tensors and numbers only, so that a checkpoint can hold it.

    ``problem (R,)`` index numbers; ``tokens (N,)`` and ``starts (R + 1,)`` the responses end to end; per token (N,):
    ``ref_logp`` under the policy at the iteration's start, ``rollout_logp`` under the engine that drew it, ``weight``
    in the loss; per response (R,): ``correct``, ``advantage``.
    """

    iteration: int
    problem: Tensor
    tokens: Tensor
    starts: Tensor
    correct: Tensor
    advantage: Tensor
    ref_logp: Tensor
    rollout_logp: Tensor
    weight: Tensor

    def __len__(self) -> int:
        return len(self.problem)

    @property
    def lengths(self) -> Tensor:
        """(R,) tokens of each response."""
        return self.starts.diff()

    def response(self, number: int) -> Tensor:
        return self.tokens[self.starts[number] : self.starts[number + 1]]


@dataclass(slots=True)
class TrajectoryBatch:
    """A pack of trajectories (prompt + response), and what the objective needs of them."""

    pack: PackedBatch
    trajectories: Trajectories

    def to(self, device: torch.device) -> TrajectoryBatch:
        return TrajectoryBatch(self.pack.to(device), self.trajectories.to(device))


def trajectory(prompt: EncodedSample, response: Tensor) -> EncodedSample:
    """A prompt and a response as one sample, supervised on the response."""
    ignored = torch.full_like(prompt.input_ids, IGNORE)
    return EncodedSample(
        input_ids=torch.cat([prompt.input_ids, response]),
        labels=torch.cat([ignored, response]),
        pixel_values=prompt.pixel_values,
        image_grid_hws=prompt.image_grid_hws,
    )


def deal(lengths: Tensor, problem: Tensor, steps: int, packs_per_step: int, seed: Sequence[int]) -> list[list[int]]:
    """Deal responses to ``steps * packs_per_step`` packs: step by step, packs of one step about equally long.

    Problems are shuffled and stay whole within a step, so every step sees balanced groups; inside a step the longest
    response goes to the shortest pack.

    Args:
        lengths: (R,) tokens of each trajectory. problem: (R,) the problem of each.

    Raises:
        ValueError: when there are fewer problems than steps, or fewer responses in a step than packs.
    """
    numbers = problem.unique().numpy()
    if len(numbers) < steps:
        raise ValueError(f"{len(numbers)} problems cannot be dealt to {steps} updates; lower data.updates")
    shuffled = np.random.default_rng(seed).permutation(numbers)
    packs: list[list[int]] = []
    for part in np.array_split(shuffled, steps):
        members = torch.isin(problem, torch.from_numpy(part)).nonzero().squeeze(1).tolist()
        if len(members) < packs_per_step:
            raise ValueError(
                f"an update has {len(members)} responses for {packs_per_step} packs; lower "
                "trainer.accumulate_grad_batches or data.updates"
            )
        step: list[list[int]] = [[] for _ in range(packs_per_step)]
        room = [0] * packs_per_step
        for member in sorted(members, key=lambda number: -int(lengths[number])):
            shortest = room.index(min(room))
            step[shortest].append(member)
            room[shortest] += int(lengths[member])
        packs += step
    return packs
