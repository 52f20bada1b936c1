"""One side of the comparison in a process of its own: samples and tokens per CPU-second over an epoch.

``python -m benchmarks.throughput SIDE FOLDER SAMPLES DECODE`` prints the figures as JSON. CPU time is user and system
time of the process and of its workers, over one whole epoch, from the start of the worker to its end. Before that
the shards are read once, so that all sides find them in memory, and the first packs are made once, so that no side
pays for imports.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks.realistic_set import realistic_set
from benchmarks.workload import Tokens, TransformersImages, Workload, open_index
from kimivl.data.chat import SampleEncoder
from kimivl.data.index import Index
from kimivl.data.loader import PackLoader
from kimivl.data.pack import PackedBatch, pack_samples
from kimivl.data.plan import Plan
from kimivl.data.shards import expand
from kimivl.model.processor import KimiVLImageProcessor

WARM_UP = 3  # packs


def kimivl_packs(workload: Workload) -> Iterator[PackedBatch]:
    """Our own side."""
    index, plan = open_index(workload)
    return iter(PackLoader(plan, index, workload.encoder, num_workers=workload.workers))


def transformers_images(workload: Workload) -> Iterator[PackedBatch]:
    """Our index and plan, with the images of transformers' processors behind them."""
    index, plan = open_index(workload)
    encoder = workload.encoder_of(TransformersImages, KimiVLImageProcessor(resize="pil"))
    return iter(DataLoader(_Packs(plan, index, encoder), batch_size=None, num_workers=workload.workers))


class _Packs(Dataset[PackedBatch]):
    """Packs of a plan, joined from whole samples."""

    def __init__(self, plan: Plan, index: Index, encoder: SampleEncoder) -> None:
        self.plan, self.index, self.encoder = plan, index, encoder

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, number: int) -> PackedBatch:
        return pack_samples([self.encoder.encode(self.index.read(sample)) for sample in self.plan.pack(number)])


def _peer(module: str) -> Callable[[Workload], Iterator[PackedBatch]]:
    return lambda workload: import_module(f"benchmarks.peers.{module}").packs(workload)


class Side(NamedTuple):
    """A way to load an epoch: the distributions it needs, and whether it can do without decoding, and with it."""

    packs: Callable[[Workload], Iterator[PackedBatch]]
    tokens: Tokens
    needs: tuple[str, ...] = ()
    modes: tuple[bool, ...] = (False, True)


SIDES = {
    "kimivl": Side(kimivl_packs, "tiktoken"),
    "energon": Side(_peer("energon"), "transformers", ("megatron-energon",)),
    "webdataset": Side(_peer("webdataset_greedy"), "transformers", ("webdataset",)),
    "energon, tiktoken": Side(_peer("energon"), "tiktoken", ("megatron-energon",)),
    "webdataset, tiktoken": Side(_peer("webdataset_greedy"), "tiktoken", ("webdataset",)),
    "datasets + TRL": Side(_peer("trl_packing"), "transformers", ("datasets", "trl"), (False,)),
    "PIL / float32": Side(transformers_images, "tiktoken", (), (True,)),
}


def measure(name: str, folder: Path, samples: int, decode: bool) -> dict[str, Any]:
    """Run one epoch of a side and count what it cost."""
    torch.set_num_threads(1)
    side, data = SIDES[name], realistic_set(folder, samples)
    workload = Workload(data, decode, side.tokens)
    _ = workload.encoder  # made here, so that every worker inherits it
    for shard in expand(data.shards):
        Path(shard).read_bytes()
    for _ in islice(side.packs(workload), WARM_UP):
        pass
    _wait_for_workers()
    cpu, wall = _cpu_seconds(), time.perf_counter()
    seen = tokens = packs = patches = 0
    for pack in side.packs(workload):
        packs, seen, tokens = packs + 1, seen + pack.num_samples, tokens + pack.num_tokens
        patches += len(pack.pixel_values)
    wall = time.perf_counter() - wall
    _wait_for_workers()
    spent = _cpu_seconds() - cpu
    return {"cpu_s": spent, "wall_s": wall, "samples": seen, "tokens": tokens, "packs": packs, "patches": patches}


def _cpu_seconds() -> float:
    """Of this process and of the children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _wait_for_workers(seconds: float = 30.0) -> None:
    """Loaders end their workers when nobody refers to them any more; only then their time is known."""
    gc.collect()
    deadline = time.monotonic() + seconds
    while multiprocessing.active_children():
        if time.monotonic() > deadline:
            raise RuntimeError(f"workers are still there: {multiprocessing.active_children()}")
        time.sleep(0.05)


if __name__ == "__main__":
    side_name, set_folder, set_samples, decoding = sys.argv[1:]
    print(json.dumps(measure(side_name, Path(set_folder), int(set_samples), decoding == "decode")))
