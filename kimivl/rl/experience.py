"""One RL iteration's data: collect responses and scores, and deal them into packs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kimivl.data.pack import PackedBatch
from kimivl.rl.objectives import mean_baseline
from kimivl.rl.rewards import Reward, Scores
from kimivl.rl.rollout import RolloutEngine, response_seed
from kimivl.rl.types import Experience, Problem, Response, Sampling


@dataclass(slots=True)
class TrajectoryBatch:
    """A pack of trajectories (prompt + response), and per segment what the objective needs.

    ``advantage (S,)``, ``ref_logp (S,)``; ``step_responses`` counts the responses of the whole optimiser step.
    """

    pack: PackedBatch
    advantage: Tensor
    ref_logp: Tensor
    step_responses: int

    def to(self, device: torch.device) -> TrajectoryBatch:
        return TrajectoryBatch(
            self.pack.to(device), self.advantage.to(device), self.ref_logp.to(device), self.step_responses
        )


def collect(
    problems: Sequence[Problem],
    engine: RolloutEngine,
    reward: Reward,
    sampling: Sampling,
    *,
    group: int,
    iteration: int,
    progress: float,
    seed: int,
) -> tuple[Experience, dict[str, float]]:
    """Draw ``group`` responses to each problem and score them.

    The reference log-probabilities are left at zero for whoever owns the policy to fill in.

    Args:
        progress: fraction of the run that is done, for the length reward's warm-up.

    Returns:
        The experience, and its figures: accuracy, lengths, rewards, the share of problems with a signal.
    """
    seeds = [[response_seed(seed, iteration, p.number, g) for g in range(group)] for p in problems]
    responses = engine.generate([problem.prompt for problem in problems], seeds, sampling)
    scores = [
        reward.score(answers, problem.answer, progress) for problem, answers in zip(problems, responses, strict=True)
    ]
    flat = [response for answers in responses for response in answers]
    rewards = torch.stack([score.total for score in scores])
    experience = Experience(
        iteration=iteration,
        problem=torch.tensor([problem.number for problem in problems]).repeat_interleave(group),
        tokens=torch.tensor([token for response in flat for token in response.tokens]),
        starts=torch.tensor([0, *np.cumsum([len(response) for response in flat])]),
        correct=torch.cat([score.correct for score in scores]),
        advantage=mean_baseline(rewards).flatten(),
        ref_logp=torch.zeros(len(flat)),
    )
    return experience, _figures(scores, flat, engine)


def _figures(scores: Sequence[Scores], responses: Sequence[Response], engine: RolloutEngine) -> dict[str, float]:
    correct = torch.stack([score.correct for score in scores])
    lengths = torch.stack([score.lengths for score in scores]).float()
    return {
        "rollout/accuracy": float(correct.mean()),
        "rollout/length": float(lengths.mean()),
        "rollout/length_max": float(lengths.max()),
        "rollout/finished": sum(response.finished for response in responses) / len(responses),
        "rollout/mixed_groups": float((correct.std(1, correction=0) > 0).float().mean()),
        "reward/total": float(torch.stack([score.total for score in scores]).mean()),
        "reward/length": float(torch.stack([score.length_reward for score in scores]).mean()),
        "perf/rollout_tokens_per_s": engine.tokens_per_second,
    }


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
