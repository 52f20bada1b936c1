"""Experience for stage 3: each epoch's loader is made of responses that the current policy has just drawn."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.plugins import MixedPrecision

from kimivl.data.columns import read_columns
from kimivl.optim import MuonAdamWInBackward
from kimivl.rl.ahead import RolloutsAhead
from kimivl.rl.collect import Collected, Collector, Plan
from kimivl.rl.experience import Deal, Experience, TrajectoryBatch, deal, make_batch
from kimivl.rl.partial import OffPolicy, weigh
from kimivl.rl.repetition import Repetition
from kimivl.rl.sampler import ProblemSampler
from kimivl.rl.types import Problem, Sampling
from kimivl.stages.datamodule import StageDataModule

log = logging.getLogger(__name__)
SAMPLED = 512
"""Values of each weight that tell one policy from another."""


class ExperienceLoader:
    """The packs of one iteration from ``start`` on; sized as the whole iteration, like ``PackLoader``."""

    def __init__(self, make: Callable[[int], TrajectoryBatch], length: int, start: int) -> None:
        self._make, self._length, self._start = make, length, start

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[TrajectoryBatch]:
        return map(self._make, range(self._start, self._length))


class RLDataModule(StageDataModule):
    """Asks the sampler for problems, the engine for responses, the reward for scores (``kimivl.rl.collect``).

    Args:
        sampler: (columns of the index) -> the sampler.
        problems: problems of an iteration. responses: responses to each, k in the paper.
        updates: optimiser steps of an iteration.
        max_new_tokens: hard cap of a response; one that reaches it is wrong. temperature: of the draw.
        repetition: what stops a response that repeats itself; None looks for nothing.
        rounds: draws of an iteration at most, while the gates have admitted fewer than ``problems`` groups.
        budget: tokens that a response may grow by in an iteration; a longer one goes on in the next. None has none.
        off_policy: what becomes of tokens that an earlier policy wrote, ``drop`` or ``importance``.
        max_behind: iterations that rollouts may run ahead of training; 0 draws and trains in turn.
        max_length: tokens of a pack at most; a step takes as many packs as that needs, and at least
            ``trainer.accumulate_grad_batches``. None sets no limit.
        max_empty: iterations in a row without an admitted group that stop the run.
        rollouts: folder of the record of all rollouts, a file for each iteration; None keeps none, nor the responses of
            an iteration in which the engine fails.
    """

    trains_on_problems = True

    def __init__(
        self,
        sampler: Callable[[Mapping[str, np.ndarray]], ProblemSampler],
        problems: int = 32,
        responses: int = 8,
        updates: int = 1,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        repetition: Repetition | None = None,
        rounds: int = 1,
        budget: int | None = None,
        off_policy: OffPolicy = "drop",
        max_behind: int = 0,
        max_length: int | None = None,
        max_empty: int = 10,
        rollouts: str | None = None,
        **stage: Any,
    ) -> None:
        super().__init__(**stage)
        if temperature <= 0:
            raise ValueError(f"data.temperature={temperature}: responses to learn from are drawn above 0")
        if off_policy not in ("drop", "importance"):
            raise ValueError(f"data.off_policy={off_policy}: choose drop or importance")
        if max_behind < 0 or (max_behind and off_policy == "drop"):
            raise ValueError(
                f"data.max_behind={max_behind}: all that an earlier policy wrote would be left out; set "
                "data.off_policy=importance, or max_behind=0"
            )
        if not 1 <= updates <= problems:
            raise ValueError(f"data.updates={updates} must be from 1 to data.problems={problems}: an update needs one")
        self.make_sampler = sampler
        self.plan = Plan(problems, responses, rounds, budget, max_empty, self.seed)
        self.updates = updates
        self.sampling = Sampling(max_new_tokens, temperature, repetition)
        self.off_policy: OffPolicy = off_policy
        self.max_behind = max_behind
        self.max_length = max_length
        self.rollouts = None if rollouts is None else Path(rollouts)
        self.experience: Experience | None = None
        self.figures: dict[str, float] = {}
        self._problems: dict[int, Problem] = {}
        self._state: dict[str, Any] = {}
        self._collector: Collector | None = None
        self._ahead: RolloutsAhead | None = None
        self._least_packs = 0
        self._dealt: Deal | None = None

    def setup(self, stage: str) -> None:
        if hasattr(self, "sampler"):
            return
        super().setup(stage)
        self.sampler = self.make_sampler(
            {"difficulty": self.index.difficulty, "crc32": self.index.crc32} | read_columns(self.index)
        )
        needed = int(self.index.tokens.max()) + self.sampling.max_new_tokens
        if self.max_length is not None and self.max_length < needed:
            raise ValueError(
                f"data.max_length={self.max_length}: the longest prompt and a response of data.max_new_tokens="
                f"{self.sampling.max_new_tokens} take {needed} tokens, and a pack must hold them"
            )

    def schedule_phases(self) -> list[dict[str, Any]]:
        return [{"steps": phase.epochs * self.updates, "lr": list(phase.lr)} for phase in self.phases]

    @property
    def _module(self) -> Any:
        assert self.trainer is not None
        return self.trainer.lightning_module

    @property
    def collector(self) -> Collector:
        """Made once the module is there, and set to where a resumed run goes on."""
        if self._collector is None:
            objective = self._module.objective
            if self.plan.responses == 1 and getattr(objective, "baseline", "mean") != "none":
                raise ValueError(
                    "data.responses=1: the advantage of a response compares it with others to the same problem; set "
                    "2 or more, or objective.baseline=none"
                )
            advantages = objective.advantages
            self._collector = Collector(self.sampler, self._read, self.sampling, advantages, self.plan, self.rollouts)
            if self._state:
                self._collector.load_state_dict(self._state)
        return self._collector

    def _read(self, numbers: Sequence[int]) -> list[Problem]:
        return self.read_problems(self.index, numbers)

    # One iteration.

    def train_dataloader(self) -> ExperienceLoader:
        assert self.trainer is not None
        if self.max_length is not None and isinstance(self._module.optimizers(False), MuonAdamWInBackward):
            raise ValueError(
                f"data.max_length={self.max_length}: an update may take several packs, but optimizer=muon_in_backward "
                "takes one a step; set data.max_length=null, and raise data.updates for shorter packs"
            )
        iteration = self.trainer.current_epoch
        if iteration >= self.max_epochs:
            # Lightning asks for a loader before it sees that the run which it goes on from was finished.
            return ExperienceLoader(partial(self._batch, Deal([], 1)), self.updates, self.updates)
        resumed = self.experience is not None and self.experience.iteration == iteration
        if resumed and self.experience is not None:
            # An interrupted run goes on inside the iteration whose experience its checkpoint holds.
            if not self._problems:
                self._problems = self.collector.read_again(self.experience.problem.unique().tolist())
        else:
            with self._autocast():
                self._collect(iteration)
        assert self.experience is not None
        dealt = self._deal(self.experience)
        if resumed and self._dealt not in (None, dealt):
            raise ValueError(
                f"the checkpoint is inside iteration {iteration}, whose responses were dealt into other packs: go on "
                "with the data.updates, data.max_length, data.seed and trainer.accumulate_grad_batches of its run, or "
                "from a checkpoint between iterations"
            )
        self._dealt = dealt
        # Lightning reads it at every batch; the next iteration begins with its first.
        self.trainer.accumulate_grad_batches = dealt.packs_per_step
        steps = self.trainer.global_step - iteration * self.updates if resumed else 0
        return ExperienceLoader(lambda n: self._batch(dealt, n), len(dealt.packs), steps * dealt.packs_per_step)

    def _autocast(self) -> AbstractContextManager[Any]:
        """Rollouts and reference in the dtypes of the training steps, which Lightning puts into this context itself."""
        assert self.trainer is not None
        plugin = self.trainer.precision_plugin
        return plugin.forward_context() if isinstance(plugin, MixedPrecision) else nullcontext()

    def _collect(self, iteration: int) -> None:
        """Experience, figures and state of ``iteration``, from the rollouts ahead or drawn now."""
        started = time.perf_counter()
        ahead = self._rollouts_ahead() if self.max_behind else None
        collected = None if ahead is None else ahead.take(iteration)
        waited = time.perf_counter() - started
        figures: dict[str, float] = {} if ahead is None else {"perf/waited_s": waited}
        if collected is None:
            figures |= self._sync()
            self._tell("on_rollouts_start")
            collected = self._collect_now(iteration, iteration)
            self._tell("on_rollouts_end")
            version: int | None = iteration
        else:
            version = iteration if ahead is not None and ahead.idle else None
            figures |= {} if version is None else self._sync()
        self.experience, self._problems = collected.experience, collected.problems
        self._state = collected.state
        self.figures = collected.figures | figures | self._fill_reference(self.experience)
        if ahead is not None and version is not None:
            ahead.go_on(iteration)

    def _tell(self, hook: str) -> None:
        """Callbacks that have this hook: Lightning has none for what comes before the first step."""
        assert self.trainer is not None
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            getattr(callback, hook, lambda: None)()

    def _sync(self) -> dict[str, float]:
        started = time.perf_counter()
        figures: dict[str, float] = self._module.engine.sync()
        return {"perf/sync_s": time.perf_counter() - started} | figures

    def _collect_now(self, iteration: int, version: int) -> Collected:
        progress = iteration / self.max_epochs
        self.collector.advantages = self._module.objective.at(progress).advantages
        report = getattr(self.trainer.progress_bar_callback, "rollouts", None) if self.trainer is not None else None
        return self.collector.collect(
            self._module.engine,
            self._module.reward,
            iteration,
            progress,
            version=version,
            policy=self._policy,
            **({} if report is None or version != iteration else {"report": report}),
        )

    def _policy(self) -> str:
        """What tells the policy, and what it is asked and how, from another: a step of the run, a sample of its
        weights, the settings, and the set of problems."""
        assert self.trainer is not None
        asked = f"{self.trainer.global_step} {self.sampling} {self.plan} {self.sampler.digest}"
        digest = hashlib.sha256(asked.encode())
        for weight in self._module.model.parameters():
            flat = weight.detach().flatten()
            digest.update(flat[:: max(1, len(flat) // SAMPLED)].float().cpu().numpy().tobytes())
        return digest.hexdigest()

    def _rollouts_ahead(self) -> RolloutsAhead:
        if self._ahead is None:
            if getattr(self._module.engine, "concurrent", False) is not True:
                raise ValueError(
                    f"data.max_behind={self.max_behind}: {type(self._module.engine).__name__} cannot generate while "
                    "the model trains; take rollout=vllm_server, or max_behind=0"
                )
            self._ahead = RolloutsAhead(self._collect_now, self.max_behind, self.max_epochs - 1)
        return self._ahead

    def settle(self) -> None:
        """The engine answers one at a time: an evaluation waits for the rollouts that run ahead."""
        if self._ahead is not None:
            self._ahead.settle()

    def teardown(self, stage: str) -> None:
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    # Its packs.

    @torch.no_grad()
    def _fill_reference(self, experience: Experience) -> dict[str, float]:
        """Log-probabilities of the tokens under the policy as it stands, through the very packs of training; then what
        the tokens weigh. Returns figures."""
        started, module = time.perf_counter(), self._module
        dealt = self._deal(experience)
        for number, members in enumerate(dealt.packs):
            if members:
                batch = self._batch(dealt, number).to(module.device)
                experience.ref_logp[experience.places(members)] = module.log_probs(batch).float().cpu()
        figures = weigh(experience, self.off_policy, module.mismatch)
        experience.rollout_logp = torch.where(
            experience.rollout_logp.isnan(), experience.ref_logp, experience.rollout_logp
        )
        return figures | {
            "perf/reference_s": time.perf_counter() - started,
            "perf/packs_per_step": dealt.packs_per_step,
            "perf/prompts_read": dealt.shown(experience.problem),
        }

    def _deal(self, experience: Experience) -> Deal:
        assert self.trainer is not None
        # As it was configured: an iteration that needed more packs has changed the trainer's own.
        self._least_packs = self._least_packs or self.trainer.accumulate_grad_batches
        seed = [self.seed, experience.iteration, 2]
        prompts = torch.from_numpy(self.index.tokens[experience.problem.numpy()])
        lengths = prompts + experience.lengths
        return deal(lengths, experience.problem, self.updates, self._least_packs, seed, self.max_length)

    def _batch(self, dealt: Deal, number: int) -> TrajectoryBatch:
        assert self.experience is not None
        prompts = {number: problem.prompt for number, problem in self._problems.items()}
        return make_batch(self.experience, dealt, number, prompts)

    # What a checkpoint holds.

    def state_dict(self) -> dict[str, Any]:
        """The iteration's experience, and what the sampler and the waiting responses were after it was collected: a
        resume draws nothing again, but what ran ahead."""
        experience = self.experience
        if experience is not None:
            self.collector.record.saved(experience.iteration)
        kept = experience and {field.name: getattr(experience, field.name) for field in fields(Experience)}
        return {
            "experience": kept,
            "deal": self._dealt and list(self._dealt),
            "figures": self.figures,
            "collector": self._state or self.collector.state_dict(),
            "in_flight": 0 if self._ahead is None else self._ahead.in_flight,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        kept = state_dict["experience"]
        self.experience = kept and Experience(**kept)
        self._problems = {}
        self._dealt = state_dict["deal"] and Deal(*state_dict["deal"])
        self.figures = state_dict["figures"]
        self._state = state_dict["collector"]
        self.sampler.load_state_dict(self._state["sampler"])
        self._collector = None
        if state_dict["in_flight"]:
            log.warning(
                "the rollouts of %d iterations ran ahead when the checkpoint was saved: they are drawn again",
                state_dict["in_flight"],
            )
