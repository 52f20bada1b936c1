"""Experience for stage 3: each epoch's loader is made of responses that the current policy has just drawn."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.plugins import MixedPrecision

from kimivl.data.columns import read_columns
from kimivl.model.parallel import gathered
from kimivl.optim import MuonAdamWInBackward
from kimivl.rl.ahead import RolloutsAhead
from kimivl.rl.collect import Collected, Collector, Plan
from kimivl.rl.exchange import Exchange
from kimivl.rl.experience import Deal, Experience, deal
from kimivl.rl.partial import OffPolicy, weigh
from kimivl.rl.repetition import Repetition
from kimivl.rl.sampler import ProblemSampler
from kimivl.rl.scored import over_ranks
from kimivl.rl.types import Problem, Sampling
from kimivl.rl.weights import weights_digest
from kimivl.runtime import ranks
from kimivl.stages.datamodule import StageDataModule
from kimivl.stages.rl.loader import ExperienceLoader, OwnPacks, no_packs

log = logging.getLogger(__name__)


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
        self._state: dict[str, Any] = {}
        self._collector: Collector | None = None
        self._ahead: RolloutsAhead | None = None
        self._least_packs = 0
        self._drawn_by = ""
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
            exchange = Exchange(partial(self._tell, "on_answers_start"), partial(self._tell, "on_answers_end"))
            self._collector = Collector(
                self.sampler, self._read, self.sampling, advantages, self.plan, self.rollouts, exchange
            )
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
            return no_packs(self.updates)
        resumed = self.experience is not None and self.experience.iteration == iteration
        if resumed and self.experience is not None:
            # An interrupted run goes on inside the iteration whose experience its checkpoint holds.
            own = self._own_packs(self.experience, {})
        else:
            with self._autocast():
                own = self._collect(iteration)
        if resumed and self._dealt not in (None, own.dealt):
            raise ValueError(
                f"the checkpoint is inside iteration {iteration}, whose responses were dealt into other packs: go on "
                "with the data.updates, data.max_length and data.seed of its run, and with as many packs in a step "
                "(devices * nodes * trainer.accumulate_grad_batches), or from a checkpoint between iterations"
            )
        self._dealt = own.dealt
        # Lightning reads it at every batch; the next iteration begins with its first.
        self.trainer.accumulate_grad_batches = own.dealt.packs_per_step // ranks.world_size()
        return own.loader(self.trainer.global_step - iteration * self.updates if resumed else 0)

    def _autocast(self) -> AbstractContextManager[Any]:
        """Rollouts and reference in the dtypes of the training steps, which Lightning puts into this context itself."""
        assert self.trainer is not None
        plugin = self.trainer.precision_plugin
        return plugin.forward_context() if isinstance(plugin, MixedPrecision) else nullcontext()

    def _collect(self, iteration: int) -> OwnPacks:
        """Experience, figures and state of ``iteration``, from the rollouts ahead or drawn now; its packs."""
        started = time.perf_counter()
        ahead = self._rollouts_ahead() if self.max_behind else None
        collected = None if ahead is None else ahead.take(iteration)
        waited = time.perf_counter() - started
        figures: dict[str, float] = {} if ahead is None else {"perf/waited_s": waited}
        if collected is None:
            self._tell("on_rollouts_start")
            collected, synced = self._sync_and_collect(iteration)
            self._tell("on_rollouts_end")
            version: int | None = iteration
        else:
            idle = ahead is not None and all(ranks.gather(ahead.idle))
            version, synced = (iteration, self._sync()) if idle else (None, {})
        self.experience, self._state = collected.experience, collected.state
        self._agree_on_unread()
        started = time.perf_counter()
        own = self._own_packs(collected.experience, collected.problems)
        weighed = self._fill_reference(own)
        figures |= synced | {"perf/reference_s": time.perf_counter() - started}
        self.figures = collected.figures | weighed | over_ranks(ranks.gather(figures))
        if ahead is not None and version is not None:
            ahead.go_on(iteration)
        return own

    def _tell(self, hook: str, *args: Any) -> None:
        """Callbacks that have this hook: Lightning has none for what comes before the first step."""
        assert self.trainer is not None
        if threading.current_thread() is not threading.main_thread():
            return  # rollouts ahead of training: the run is between other hooks
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            getattr(callback, hook, lambda *_: None)(*args)

    def _sync_and_collect(self, iteration: int) -> tuple[Collected, dict[str, float]]:
        """An engine that is the model itself needs the whole of it on each rank for as long as it answers."""
        if getattr(self._module.engine, "concurrent", False) is True:
            synced = self._sync()
            return self._collect_now(iteration, iteration), synced
        with gathered(self._module.model):
            synced = self._take_over()
            return self._collect_now(iteration, iteration), synced

    def _sync(self) -> dict[str, float]:
        with gathered(self._module.model):
            return self._take_over()

    def _take_over(self) -> dict[str, float]:
        started = time.perf_counter()
        figures: dict[str, float] = self._module.engine.sync()
        self._drawn_by = self._policy()
        return {"perf/sync_s": time.perf_counter() - started} | figures

    def _collect_now(self, iteration: int, version: int) -> Collected:
        progress = iteration / self.max_epochs
        self.collector.advantages = self._module.objective.at(progress).advantages
        report = None if version != iteration else partial(self._tell, "rollouts")
        return self.collector.collect(
            self._module.engine,
            self._module.reward,
            iteration,
            progress,
            version=version,
            policy=lambda: self._drawn_by,
            **({} if report is None else {"report": report}),
        )

    def _policy(self) -> str:
        """What tells the policy, and what it is asked and how, from another: a step of the run, a sample of its
        weights, the settings, and the set of problems."""
        assert self.trainer is not None
        asked = f"{self.trainer.global_step} {self.sampling} {self.plan} {self.sampler.digest}"
        return weights_digest(self._module.model, asked)

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
    def _fill_reference(self, own: OwnPacks) -> dict[str, float]:
        """Log-probabilities of the tokens under the policy as it stands, through the very packs of training; then what
        the tokens weigh. Returns figures."""
        own.fill_reference(lambda batch: self._module.log_probs(batch.to(self._module.device)))
        experience, dealt = own.experience, own.dealt
        figures = weigh(experience, self.off_policy, self._module.mismatch)
        experience.rollout_logp = torch.where(
            experience.rollout_logp.isnan(), experience.ref_logp, experience.rollout_logp
        )
        shown = dealt.shown(experience.problem)
        return figures | {"perf/packs_per_step": dealt.packs_per_step, "perf/prompts_read": shown}

    def _own_packs(self, experience: Experience, problems: Mapping[int, Problem]) -> OwnPacks:
        own = OwnPacks(experience, self._deal(experience))
        own.bring_problems(problems, self.collector.read_again)
        return own

    def _agree_on_unread(self) -> None:
        """The problems that one rank could not read count on all."""
        unread = self._unread_of(self.index)
        for part in ranks.gather(dict(unread)):
            unread |= part
        self.check_unread(self.index)

    def _deal(self, experience: Experience) -> Deal:
        assert self.trainer is not None
        # As it was configured: an iteration that needed more packs has changed the trainer's own.
        self._least_packs = self._least_packs or self.trainer.accumulate_grad_batches * ranks.world_size()
        seed = [self.seed, experience.iteration, 2]
        prompts = torch.from_numpy(self.index.tokens[experience.problem.numpy()])
        lengths = prompts + experience.lengths
        return deal(lengths, experience.problem, self.updates, self._least_packs, seed, self.max_length)

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
