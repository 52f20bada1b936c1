"""What the datamodules of all stages share: the processor, the problems to evaluate on, and the plan of phases."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any

import rich.progress
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from kimivl.checkpoint import load_processor
from kimivl.data.chat import SampleEncoder
from kimivl.data.index import Index, build_index
from kimivl.data.sample import Sample
from kimivl.data.shards import expand
from kimivl.rl.types import Problem

log = logging.getLogger(__name__)
EVALUATION_BATCH = 128


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of training: ``epochs`` epochs, the learning rate from ``lr[0]`` to ``lr[1]`` by cosine.

    ``max_length`` is the length of a pack in tokens, ``max_patches`` its limit of image patches (SFT stages).
    """

    epochs: int
    lr: Sequence[float]
    max_length: int | None = None
    max_patches: int | None = None

    def __post_init__(self) -> None:
        if self.epochs < 1 or len(self.lr) != 2:
            raise ValueError(f"data.phases: a phase needs epochs >= 1 and lr: [start, end], not {asdict(self)}")


def _phase(settings: dict[str, Any]) -> Phase:
    known = [field.name for field in fields(Phase)]
    if unknown := sorted(settings.keys() - set(known)):
        raise ValueError(f"data.phases: a phase takes {', '.join(known)}, not {unknown[0]}")
    if missing := sorted({"epochs", "lr"} - settings.keys()):
        raise ValueError(f"data.phases: a phase needs {missing[0]}")
    return Phase(**settings)


class StageDataModule(LightningDataModule):
    """Reads WebDataset shards.

    Args:
        processor: folder with the tokenizer (and image processor).
        shards, val_shards, test_shards: paths, braces and globs. The held-out ones hold problems with answers.
        phases: the schedule, read by the loader and by the learning rate.
        prepare: called once before anything is read; a task that makes its own data puts it there.
        max_dropped: share of unusable samples above which a shard set is refused.
        seed: of the order of the data.
    """

    trains_on_problems = False

    def __init__(
        self,
        processor: str | None,
        shards: str | list[str],
        val_shards: str | list[str] | None,
        test_shards: str | list[str] | None,
        phases: Sequence[dict[str, Any]],
        prepare: Callable[[], Any] | None = None,
        max_dropped: float = 0.01,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if processor is None:
            raise ValueError("data.processor is null: name a folder with a tokenizer there, or a model with init_from")
        self.processor_folder = processor
        self.shards = shards
        self.held_out = {"val": val_shards, "test": test_shards}
        self.phases = [_phase(phase) for phase in phases]
        self.prepare = prepare
        self.max_dropped = max_dropped
        self.seed = seed
        self._problems: dict[str, list[Problem]] = {}

    @property
    def max_epochs(self) -> int:
        """Epochs of all phases; the trainer's ``max_epochs``."""
        return sum(phase.epochs for phase in self.phases)

    def prepare_data(self) -> None:
        if self.prepare is not None:
            log.info("preparing the data")
            self.prepare()

    def setup(self, stage: str) -> None:
        if hasattr(self, "processor"):
            return
        self.processor = load_processor(self.processor_folder)
        self.encoder = SampleEncoder(self.processor.tokenizer, self.processor.image_processor)
        self.index = self.make_index(self.shards, self.trains_on_problems, self.sample_check)

    def sample_check(self, sample: Sample) -> None:
        """A stage's own test of each training sample; raises ``SampleError`` to drop it."""

    def make_index(
        self, shards: str | list[str], problems: bool, check: Callable[[Sample], None] | None = None
    ) -> Index:
        """Index a shard set, and say what was dropped."""
        paths = expand(shards)
        track = partial(rich.progress.track, description=f"reading {len(paths)} shards", transient=True)
        index = build_index(
            paths, self.encoder, prompts=problems, check=check, max_dropped=self.max_dropped, track=track
        )
        for reason, count in index.dropped.items():
            log.warning("%d samples of %s dropped: %s", count, shards, reason)
        return index

    @property
    def dropped(self) -> dict[str, int]:
        """Training samples left out, by reason; logged as ``data/dropped/<reason>``."""
        return dict(self.index.dropped)

    def phase_of(self, epoch: int) -> Phase:
        """The phase that an epoch of the run belongs to."""
        for phase in self.phases:
            if epoch < phase.epochs:
                return phase
            epoch -= phase.epochs
        return self.phases[-1]

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run."""
        return sum(phase["steps"] for phase in self.schedule_phases())

    def schedule_phases(self) -> list[dict[str, Any]]:
        """``[{"steps": optimiser steps, "lr": [start, end]}, ...]``, one per phase."""
        raise NotImplementedError

    def read_problem(self, index: Index, number: int) -> Problem:
        sample = index.read(number)
        parts = next(message for message in reversed(sample.messages) if message["role"] == "user")["content"]
        return Problem(
            number=number,
            key=sample.key,
            prompt=self.encoder.encode_prompt(sample),
            question=" ".join("[image]" if part["type"] == "image" else part["text"] for part in parts),
            answer=str(sample.answer),
            difficulty=int(index.difficulty[number]),
        )

    def _held_out_loader(self, split: str) -> Any:
        shards = self.held_out[split]
        if shards is None:
            return []
        if split not in self._problems:
            index = self.make_index(shards, problems=True)
            self._problems[split] = [self.read_problem(index, number) for number in range(len(index))]
        return DataLoader(self._problems[split], batch_size=EVALUATION_BATCH, collate_fn=list)  # type: ignore[arg-type]

    def val_dataloader(self) -> Any:
        return self._held_out_loader("val")

    def test_dataloader(self) -> Any:
        return self._held_out_loader("test")
