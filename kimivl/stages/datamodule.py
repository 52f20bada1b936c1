"""What the datamodules of all stages share: the processor, the problems to evaluate on, and the plan of phases."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import rich.progress
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from kimivl.checkpoint import load_processor
from kimivl.data.chat import SampleEncoder
from kimivl.data.index import Index
from kimivl.data.sample import SampleError
from kimivl.data.scan import Check, build_index
from kimivl.data.shards import expand
from kimivl.data.storage import Storage
from kimivl.model.tokenizer import text_encoder
from kimivl.rl.types import Problem
from kimivl.runtime import ranks

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
        counts = {"epochs": self.epochs, "max_length": self.max_length, "max_patches": self.max_patches}
        for name, count in counts.items():
            if not (isinstance(count, int) and count >= 1 or count is None and name != "epochs"):
                raise ValueError(f"data.phases: {name} must be a whole number of at least 1, not {count!r}")
        if not isinstance(self.lr, Sequence) or [isinstance(rate, int | float) for rate in self.lr] != [True, True]:
            raise ValueError(f"data.phases: a phase needs lr: [start, end], not {self.lr!r}")


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
        shards, val_shards, test_shards: paths, URLs, braces, globs and folders. The held-out ones hold problems with
            answers.
        phases: the schedule, read by the loader and by the learning rate.
        prepare: called once before anything is read; a task that makes its own data puts it there.
        max_dropped: share of unusable samples above which a shard set is refused, and a run stopped.
        cache: folder for blocks of remote shards, and for indexes that cannot lie beside their shards.
        cache_gb: most that those blocks take on disk, in 10^9 bytes.
        seed: of the order of the data.
        lr_scale: factor of the learning rates of all phases.
    """

    trains_on_problems = False
    prepare_data_per_node = False  # the ranks of a run share their disk

    def __init__(
        self,
        processor: str | None,
        shards: str | list[str],
        val_shards: str | list[str] | None,
        test_shards: str | list[str] | None,
        phases: Sequence[dict[str, Any]],
        prepare: Callable[[], Any] | None = None,
        max_dropped: float = 0.01,
        cache: str | None = None,
        cache_gb: float = 64.0,
        seed: int = 0,
        lr_scale: float = 1.0,
    ) -> None:
        super().__init__()
        if not 0 <= max_dropped <= 1:
            raise ValueError(f"data.max_dropped={max_dropped} must be a share from 0 to 1")
        if processor is None:
            raise ValueError("data.processor is null: name a folder with a tokenizer there, or a model with init_from")
        self.processor_folder = processor
        self.shards = shards
        self.held_out = {"val": val_shards, "test": test_shards}
        if lr_scale <= 0:
            raise ValueError(f"data.lr_scale={lr_scale}: give a factor above 0 for the learning rates of data.phases")
        planned = [_phase(phase) for phase in phases]
        self.phases = [replace(phase, lr=[lr_scale * rate for rate in phase.lr]) for phase in planned]
        self.prepare = prepare
        self.max_dropped = max_dropped
        self.cache = None if cache is None else Path(cache)
        self.storage = Storage(self.cache, int(cache_gb * 1e9))
        self.seed = seed
        self._unread: dict[Path, dict[int, str]] = {}
        self._held_out: dict[str, Index] = {}

    @property
    def max_epochs(self) -> int:
        """Epochs of all phases; the trainer's ``max_epochs``."""
        return sum(phase.epochs for phase in self.phases)

    def prepare_data(self) -> None:
        if self.prepare is not None:
            log.info("preparing the data")
            self.prepare()
            self.prepare = None  # Lightning asks again before each validation and test

    def setup(self, stage: str) -> None:
        if hasattr(self, "processor"):
            return
        self.processor = load_processor(self.processor_folder)
        tokenizer = self.processor.tokenizer
        self.encoder = SampleEncoder(tokenizer, self.processor.image_processor, text_encoder(tokenizer))
        with ranks.first():
            self.index = self.make_index(self.shards, self.trains_on_problems, self.sample_check)

    @property
    def sample_check(self) -> Check | None:
        """A stage's own test of each training sample; raises ``SampleError`` to drop it."""
        return None

    def make_index(self, shards: str | list[str], problems: bool, check: Check | None = None) -> Index:
        """Index a shard set, and say what was dropped."""
        found = expand(shards, self.storage)

        def track(done: Iterable[None], total: int) -> Iterable[None]:
            return rich.progress.track(done, f"indexing {total} shards", total, transient=True)

        index = build_index(
            found,
            self.encoder,
            self.storage,
            prompts=problems,
            check=check,
            max_dropped=self.max_dropped,
            folder=self.cache,
            track=track,
        )
        for reason, count in index.dropped.items() if ranks.is_first() else ():
            log.warning("%d samples of %s dropped: %s (listed in %s)", count, shards, reason, index.dropped_file)
        return index

    @property
    def dropped(self) -> dict[str, int]:
        """Training samples left out so far, by reason; logged as ``data/dropped/<reason>``."""
        return dict(Counter(self.index.dropped) + Counter(self._unread_of(self.index).values()))

    def _unread_of(self, index: Index) -> dict[int, str]:
        """Problems of a set that could not be read, number -> reason."""
        return self._unread.setdefault(index.path, {})

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

    def read_problems(self, index: Index, numbers: Iterable[int]) -> list[Problem]:
        """The problems of these numbers; one that cannot be read is left out and counted, once.

        Raises:
            ValueError: when more than ``max_dropped`` of the set could not be read.
        """
        problems = []
        for number in numbers:
            try:
                problems.append(self._read_problem(index, number))
            except SampleError as fault:
                self._unread_of(index)[number] = fault.reason
                log.warning("left out: %s", fault)
                self.check_unread(index, f"; the last: {fault}")
        return problems

    def check_unread(self, index: Index, detail: str = "") -> None:
        """ValueError when more than ``max_dropped`` of the problems could not be read."""
        unread = len(self._unread_of(index))
        if unread > self.max_dropped * len(index):
            raise ValueError(
                f"{unread} of {len(index)} problems could not be read, more than data.max_dropped={self.max_dropped} "
                f"allows{detail}"
            )

    def _read_problem(self, index: Index, number: int) -> Problem:
        sample = index.read(number)
        prompt = self.encoder.encode_prompt(sample, index.shard_of(number))
        return Problem(number, sample, prompt, int(index.difficulty[number]))

    def _held_out_loader(self, split: str) -> Any:
        shards = self.held_out[split]
        if shards is None:
            return []
        if split not in self._held_out:
            with ranks.first():
                self._held_out[split] = self.make_index(shards, problems=True)
        index = self._held_out[split]
        # Read when their turn comes: a held-out set with its images need not fit into memory.
        world = ranks.world_size()
        own = range(ranks.rank(), len(index), world)
        # As many batches on every rank, the last perhaps empty: what a rank does to evaluate, all do.
        batches: Any = [
            own[start : start + EVALUATION_BATCH] for start in range(0, -(-len(index) // world), EVALUATION_BATCH)
        ]
        return DataLoader(
            range(len(index)),  # type: ignore[arg-type]
            batch_sampler=batches,
            collate_fn=lambda chosen: self.read_problems(index, chosen),
        )

    def val_dataloader(self) -> Any:
        return self._held_out_loader("val")

    def test_dataloader(self) -> Any:
        return self._held_out_loader("test")
