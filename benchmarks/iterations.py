"""Whole RL iterations, one at a time: what both sides of ``benchmarks/rl_step.py`` are given, and our side of it.

A side is a trainer that runs in a thread of its own and waits at the door before each iteration, so that sides can take
turns. Prompts, number and lengths of the responses are the same for all sides; which tokens they are is each side's own
draw, but a response ends where it is told to: its draw is replaced by the closing token there, and never before.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate
from lightning.pytorch import Callback, Trainer

from kimivl.checkpoint import build_model, export_model, load_processor
from kimivl.config import compose_run
from kimivl.data.sample import Sample
from kimivl.data.shards import write_shards
from kimivl.model.tokenizer import train_tokenizer
from kimivl.rl.hf import HFRolloutEngine
from kimivl.rl.rewards import Reward, Verdict
from kimivl.rl.types import Policy, Problem, Response
from kimivl.tasks.digits.build import CHAT_WORDS
from kimivl.tasks.digits.questions import Problem as Question
from kimivl.tasks.digits.questions import ask

PHASES = ("generate", "score", "reference", "train", "sync")
ENDLESS = 10_000
"""Iterations that a trainer is told to do; it is stopped by the end of its process."""


@dataclass(frozen=True)
class Workload:
    """What an iteration is: ``problems`` x ``responses``, then ``updates`` optimiser steps; lengths are lognormal.

    Args:
        folder: holds what all sides read; ``model`` names a configuration of conf/model.
        median, spread: of the lengths, ``exp(spread)`` being one standard deviation; longest: the cap.
    """

    folder: Path
    model: str
    problems: int
    responses: int
    updates: int
    median: int
    longest: int
    spread: float = 0.7
    seed: int = 0

    @property
    def shards(self) -> str:
        return str(self.folder / "text-*.tar")

    @property
    def start(self) -> Path:
        """The model that every side begins with: random weights."""
        return self.folder / "model"

    def lengths(self, iteration: int) -> np.ndarray:
        """(problems * responses,) tokens of each response of an iteration, the closing one included."""
        draw = np.random.default_rng([self.seed, iteration])
        lengths = draw.lognormal(np.log(self.median), self.spread, self.problems * self.responses)
        return np.clip(np.rint(lengths), 2, self.longest).astype(int)

    def prepare(self) -> None:
        """Write problems of text, and the model, into the folder."""
        rng = Random(f"rl-step {self.seed}")
        numbers = [tuple(rng.choices(range(10), k=2 + n % 7)) for n in range(self.problems)]
        questions = [Question("text_sum", digits) for digits in numbers]
        texts = [ask(question, rng) for question in questions]
        samples = [
            Sample(f"text-{n:04d}", [_user(text)], (), question.answer, question.difficulty)
            for n, (text, question) in enumerate(zip(texts, questions, strict=True))
        ]
        write_shards(samples, self.folder / "text")
        tokenizer = self.folder / "tokenizer"
        train_tokenizer([*texts, *CHAT_WORDS], 300).save_pretrained(tokenizer)
        processor = load_processor(tokenizer)
        torch.manual_seed(self.seed)
        config = instantiate(compose_run(f"model={self.model}").model)
        export_model(build_model(config, None, processor), processor, self.start)


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "text", "text": text}]}


def rewarded(tokens: Sequence[int]) -> bool:
    """About half of all responses of a model that has learned nothing: those whose token ids sum to an even number."""
    return sum(tokens) % 2 == 0


@dataclass(frozen=True)
class Iteration:
    """What an iteration took: seconds on the wall and of the processor, in all and by phase (on the wall)."""

    tokens: int
    lengths: tuple[int, ...]
    wall_s: float
    cpu_s: float
    phases: dict[str, float]


@dataclass
class Door:
    """Where a trainer in a thread waits to be let into its next iteration; seconds of its phases while it is inside."""

    open: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    done: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    number: int = -1
    phases: dict[str, float] = field(default_factory=dict)
    lengths: list[int] = field(default_factory=list)
    error: BaseException | None = None

    def enter(self) -> None:
        """Wait to be let in; called by the trainer's thread."""
        self.open.acquire()
        self.number += 1
        self.phases, self.lengths = dict.fromkeys(PHASES, 0.0), []
        self._begun = time.perf_counter(), time.process_time()

    def leave(self) -> None:
        """Say that the iteration is over; called by the trainer's thread."""
        wall, cpu = time.perf_counter() - self._begun[0], time.process_time() - self._begun[1]
        phases = self.phases | {"train": wall - sum(self.phases[name] for name in PHASES if name != "train")}
        self.result = Iteration(sum(self.lengths), tuple(sorted(self.lengths)), wall, cpu, phases)
        self.done.release()

    def run(self, work: Callable[[], Any]) -> None:
        """Start a trainer in a thread; it goes as far as the door."""

        def guarded() -> None:
            try:
                work()
            except BaseException as error:
                self.error = error
            self.done.release()

        threading.Thread(target=guarded, daemon=True).start()

    def iterate(self) -> Iteration:
        """Let the trainer through one iteration; called by the main thread."""
        self.open.release()
        self.done.acquire()
        if self.error is not None:
            raise self.error
        return self.result

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts as a phase what is done inside."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.phases[name] += time.perf_counter() - begun


class Side:
    """A trainer behind a door. ``about``: what it is, in words."""

    about: str

    def __init__(self) -> None:
        self.door = Door()

    def iterate(self) -> Iteration:
        return self.door.iterate()

    def describe(self) -> str:
        return self.about


class ToldLengths(HFRolloutEngine):
    """The engine of a run, whose responses end where they are told to: ``lengths`` by the number of the request."""

    lengths: np.ndarray

    def _step(self, slots: Any, cache: Any, counts: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        tokens, logp, experts = super()._step(slots, cache, counts)
        wanted = self.lengths[[0 if ticket is None else ticket.number for ticket in slots.tickets[: slots.live]]]
        tokens = np.where(tokens == self.policy.stop_id, self.policy.stop_id - 1, tokens)
        return np.where(slots.count[: slots.live] + 1 == wanted, self.policy.stop_id, tokens), logp, experts


class EvenReward(Reward):
    """The reward of both sides, behind the interface of a run."""

    def judge(self, answers: Sequence[tuple[Problem, Response]]) -> list[Verdict]:
        return [Verdict(float(rewarded(response.tokens))) for _, response in answers]


class Ours(Side):
    """A run of ``train.py stage=rl``: its datamodule, its module and its trainer."""

    about = "kimivl: rollout=hf (continuous batching), packed training"

    def __init__(self, workload: Workload, overrides: Sequence[str]) -> None:
        super().__init__()
        self.workload = workload
        cfg = compose_run("stage=rl", f"model={workload.model}", *self._settings(), *overrides)
        self.datamodule = instantiate(cfg.data, _convert_="all")
        self.module = instantiate(cfg.module, rollout=self._engine, reward=EvenReward(), _convert_="all")
        collect = self.datamodule.train_dataloader
        self.datamodule.train_dataloader = lambda: self._enter(collect)
        trainer = Trainer(
            max_epochs=ENDLESS,
            accelerator="cpu",
            callbacks=[_Leave(self._leave)],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            reload_dataloaders_every_n_epochs=1,
            limit_val_batches=0,
            gradient_clip_val=cfg.trainer.gradient_clip_val,
        )
        self.door.run(lambda: trainer.fit(self.module, self.datamodule))

    def _settings(self) -> list[str]:
        w = self.workload
        return [
            f"init_from={w.start}",
            f"paths.root={w.folder}",
            "data.prepare=null",
            f"data.shards={w.shards}",
            "data.val_shards=null",
            "data.test_shards=null",
            f"data.problems={w.problems}",
            f"data.responses={w.responses}",
            f"data.updates={w.updates}",
            f"evaluation.max_new_tokens={w.longest}",
            f"data.phases=[{{epochs: {ENDLESS}, lr: [1.0e-6, 1.0e-6]}}]",
            "data.rollouts=null",
            "data.repetition=null",  # random weights do repeat themselves
            "sampler=uniform",
        ]

    def _engine(self, policy: Policy) -> ToldLengths:
        return ToldLengths(policy)

    def _enter(self, collect: Callable[[], Any]) -> Any:
        self.door.enter()
        self.module.engine.lengths = self.workload.lengths(self.door.number)
        return collect()

    def _leave(self) -> None:
        figures = self.datamodule.figures
        for name in ("generate", "score", "reference", "sync"):
            self.door.phases[name] = figures[f"perf/{name}_s"]
        self.door.lengths = self.datamodule.experience.lengths.tolist()
        self.door.leave()


class _Leave(Callback):
    def __init__(self, leave: Callable[[], None]) -> None:
        self.leave = leave

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.leave()
