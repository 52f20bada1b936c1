"""Experience for stage 3: each epoch's loader is made of responses that the current policy has just drawn."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from lightning.pytorch.plugins import MixedPrecision

from kimivl.data.pack import pack_samples
from kimivl.rl.collect import Collector
from kimivl.rl.experience import Experience, TrajectoryBatch, deal, trajectory
from kimivl.rl.objectives import StepCounts, Trajectories
from kimivl.rl.sampler import CurriculumSampler
from kimivl.rl.types import Problem, Sampling
from kimivl.stages.datamodule import StageDataModule


class ExperienceLoader:
    """The packs of one iteration from ``start`` on; sized as the whole iteration, like ``PackLoader``."""

    def __init__(self, make: Callable[[int], TrajectoryBatch], length: int, start: int) -> None:
        self._make, self._length, self._start = make, length, start

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[TrajectoryBatch]:
        return map(self._make, range(self._start, self._length))


class RLDataModule(StageDataModule):
    """Asks the sampler for problems, the engine for responses, the reward for scores.

    Args:
        sampler: (columns of the index) -> the sampler.
        problems: problems of an iteration. responses: responses to each, k in the paper.
        updates: optimiser steps of an iteration.
        max_new_tokens: hard cap of a response. temperature: of the draw.
    """

    trains_on_problems = True

    def __init__(
        self,
        sampler: Callable[[Mapping[str, np.ndarray]], CurriculumSampler],
        problems: int = 32,
        responses: int = 8,
        updates: int = 1,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        **stage: Any,
    ) -> None:
        super().__init__(**stage)
        if temperature <= 0:
            raise ValueError(f"data.temperature={temperature}: responses to learn from are drawn above 0")
        self.make_sampler = sampler
        self.problems = problems
        self.responses = responses
        self.updates = updates
        self.sampling = Sampling(max_new_tokens, temperature)
        self.experience: Experience | None = None
        self.figures: dict[str, float] = {}
        self._problems: dict[int, Problem] = {}

    def setup(self, stage: str) -> None:
        if hasattr(self, "sampler"):
            return
        super().setup(stage)
        self.sampler = self.make_sampler({"difficulty": self.index.difficulty})

    def schedule_phases(self) -> list[dict[str, Any]]:
        return [{"steps": phase.epochs * self.updates, "lr": list(phase.lr)} for phase in self.phases]

    def train_dataloader(self) -> ExperienceLoader:
        assert self.trainer is not None
        iteration, start = self.trainer.current_epoch, 0
        if self.experience is not None and self.experience.iteration == iteration:
            # An interrupted run goes on inside the iteration whose experience its checkpoint holds.
            start = (self.trainer.global_step - iteration * self.updates) * self.trainer.accumulate_grad_batches
            if not self._problems:
                self._read_again(self.experience)
        else:
            with self._autocast():
                self.experience = self._collect(iteration)
        packs = self._deal(self.experience)
        return ExperienceLoader(lambda number: self._batch(packs, number), len(packs), start)

    def _autocast(self) -> AbstractContextManager[Any]:
        """Rollouts and reference in the dtypes of the training steps, which Lightning puts into this context itself."""
        assert self.trainer is not None
        plugin = self.trainer.precision_plugin
        return plugin.forward_context() if isinstance(plugin, MixedPrecision) else nullcontext()

    def _read(self, numbers: Sequence[int]) -> list[Problem]:
        """Read the problems of an iteration, once: its packs refer to them."""
        problems = self.read_problems(self.index, numbers)
        self._problems = {problem.number: problem for problem in problems}
        return problems

    def _read_again(self, experience: Experience) -> None:
        """After a resume: the problems that the checkpoint's experience answers."""
        wanted = experience.problem.unique().tolist()
        if len(self._read(wanted)) < len(wanted):
            raise ValueError(
                "problems that the checkpoint has responses to can no longer be read (see the warnings above): bring "
                "back their shards, or start anew without ckpt_path"
            )

    @property
    def collector(self) -> Collector:
        assert self.trainer is not None
        module: Any = self.trainer.lightning_module
        return Collector(
            self.sampler,
            self._read,
            self.sampling,
            module.objective.advantages,
            problems=self.problems,
            responses=self.responses,
            seed=self.seed,
        )

    def _collect(self, iteration: int) -> Experience:
        assert self.trainer is not None
        module: Any = self.trainer.lightning_module
        progress = iteration / self.max_epochs
        synced = module.engine.sync()
        experience, figures, _ = self.collector.collect(module.engine, module.reward, iteration, progress)
        self.experience = experience
        started = time.perf_counter()
        self._fill_reference(experience, module)
        self.figures = figures | synced | {"perf/reference_s": time.perf_counter() - started}
        return experience

    @torch.no_grad()
    def _fill_reference(self, experience: Experience, module: Any) -> None:
        """Log-probabilities of the tokens under the policy as it stands, through the very packs of training."""
        packs = self._deal(experience)
        for number, members in enumerate(packs):
            pack = self._batch(packs, number).pack.to(module.device)
            places = torch.cat([torch.arange(*experience.starts[member : member + 2]) for member in members])
            experience.ref_logp[places] = module.target_log_probs(pack, self.sampling.temperature).cpu()
        experience.rollout_logp = experience.ref_logp.clone()

    def _deal(self, experience: Experience) -> list[list[int]]:
        assert self.trainer is not None
        seed = [self.seed, experience.iteration, 2]
        packs_per_step = self.trainer.accumulate_grad_batches
        prompts = torch.from_numpy(self.index.tokens[experience.problem.numpy()])
        return deal(prompts + experience.lengths, experience.problem, self.updates, packs_per_step, seed)

    def _batch(self, packs: list[list[int]], number: int) -> TrajectoryBatch:
        assert self.trainer is not None and self.experience is not None
        experience, members = self.experience, packs[number]
        step = number - number % self.trainer.accumulate_grad_batches
        of_step = [member for pack in packs[step : step + self.trainer.accumulate_grad_batches] for member in pack]
        prompts = [self._problems[int(experience.problem[member])].prompt for member in members]
        samples = [
            trajectory(prompt, experience.response(member)) for prompt, member in zip(prompts, members, strict=True)
        ]
        places = torch.cat([torch.arange(*experience.starts[member : member + 2]) for member in members])
        lengths = experience.lengths
        same = experience.problem[members][:, None] == experience.problem[None]
        trajectories = Trajectories(
            advantage=experience.advantage[members],
            segment=torch.arange(len(members)).repeat_interleave(lengths[members]),
            ref_logp=experience.ref_logp[places],
            rollout_logp=experience.rollout_logp[places],
            weight=experience.weight[places],
            response_tokens=lengths[members],
            group_tokens=(same * lengths).sum(1),
            group_responses=same.sum(1),
            counts=StepCounts(
                responses=len(of_step),
                tokens=int(lengths[of_step].sum()),
                prompts=len(experience.problem[of_step].unique()),
            ),
        )
        return TrajectoryBatch(pack_samples(samples), trajectories)

    def state_dict(self) -> dict[str, Any]:
        """The iteration's experience and what the sampler has learned: a resume draws nothing again."""
        experience = self.experience
        kept = experience and {field.name: getattr(experience, field.name) for field in fields(Experience)}
        return {"experience": kept, "figures": self.figures, "sampler": self.sampler.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        kept = state_dict["experience"]
        self.experience = kept and Experience(**kept)
        self.figures = state_dict["figures"]
        self.sampler.load_state_dict(state_dict["sampler"])
