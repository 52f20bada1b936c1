"""One RL iteration's rollouts: sampler -> engine -> reward -> experience."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from kimivl.rl.experience import Experience
from kimivl.rl.rewards import Reward, Scores
from kimivl.rl.rollout import RolloutEngine, response_seed
from kimivl.rl.types import Group, Problem, Request, Sampling


class Collector:
    """Collects the experience of an iteration, and keeps what goes on into the next one.

    Args:
        sampler: see ``kimivl.rl.sampler``. read: numbers -> problems. problems, responses: of an iteration.
        advantages: (R,) rewards, (R,) group numbers -> (R,) advantages.
    """

    def __init__(
        self,
        sampler: Any,
        read: Callable[[Sequence[int]], list[Problem]],
        sampling: Sampling,
        advantages: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        *,
        problems: int,
        responses: int,
        seed: int,
    ) -> None:
        self.sampler = sampler
        self.read = read
        self.sampling = sampling
        self.advantages = advantages
        self.problems = problems
        self.responses = responses
        self.seed = seed

    def collect(
        self, engine: RolloutEngine, reward: Reward, iteration: int, progress: float
    ) -> tuple[Experience, dict[str, float], list[Problem]]:
        """The experience (``ref_logp`` still zero), its figures, and the problems that it answers."""
        problems = self.read(self.sampler.sample(self.problems, iteration, progress).tolist())
        requests = [
            Request(problem, response_seed(self.seed, iteration, problem.number, number))
            for problem in problems
            for number in range(self.responses)
        ]
        started = time.perf_counter()
        responses = engine.generate(requests, self.sampling)
        generated = time.perf_counter()
        k = self.responses
        groups = [Group(p, responses[k * n : k * (n + 1)]) for n, p in enumerate(problems)]
        scores = reward.score(groups, progress)
        success = np.array([float(score.correct.nanmean()) for score in scores])
        self.sampler.update(np.array([problem.number for problem in problems]), success, iteration)
        figures = _figures(groups, scores) | self.sampler.figures(progress)
        figures |= {
            "perf/rollout_tokens_per_s": engine.tokens_per_second,
            "perf/generate_s": generated - started,
            "perf/score_s": time.perf_counter() - generated,
        }
        return self._experience(iteration, groups, scores), figures, problems

    def _experience(self, iteration: int, groups: Sequence[Group], scores: Sequence[Scores]) -> Experience:
        flat = [response for group in groups for response in group.responses]
        sizes = torch.tensor([len(group.responses) for group in groups])
        number = torch.arange(len(groups)).repeat_interleave(sizes)
        tokens = torch.tensor([token for response in flat for token in response.tokens])
        return Experience(
            iteration=iteration,
            problem=torch.tensor([group.problem.number for group in groups])[number],
            tokens=tokens,
            starts=torch.tensor([0, *np.cumsum([len(response) for response in flat])]),
            correct=torch.cat([score.correct for score in scores]),
            advantage=self.advantages(torch.cat([score.total for score in scores]), number),
            ref_logp=torch.zeros(len(tokens)),
            rollout_logp=torch.zeros(len(tokens)),
            weight=torch.ones(len(tokens)),
        )


def _figures(groups: Sequence[Group], scores: Sequence[Scores]) -> dict[str, float]:
    flat = [response for group in groups for response in group.responses]
    lengths = np.array([len(response) for response in flat])
    correct = torch.stack([score.correct for score in scores])
    parts = {name: torch.stack([score.parts[name] for score in scores]).mean() for name in scores[0].parts}
    return {
        "rollout/accuracy": float(correct.mean()),
        "rollout/length": float(lengths.mean()),
        "rollout/length_max": float(lengths.max()),
        "rollout/finished": float(np.mean([response.finished for response in flat])),
        "rollout/mixed_groups": float((correct.std(1, correction=0) > 0).float().mean()),
        "reward/total": float(torch.stack([score.total for score in scores]).mean()),
        **{f"reward/{name}": float(value) for name, value in parts.items()},
    }
