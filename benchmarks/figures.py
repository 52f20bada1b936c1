"""Figures that need no other software: fill and balance of packs, speed of planning, resume, memory of workers.

``python -m benchmarks.figures NAME ARGUMENTS`` prints one of them as JSON, from a process of its own: the memory that
is measured is then that of nothing else.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.realistic_set import RealisticSet, realistic_set
from benchmarks.workload import Workload, open_index
from kimivl.data.loader import PackLoader, PackMaker
from kimivl.data.plan import Plan, plan_epoch

SHARD = 5_000
CHUNK = 250_000
PATCH_BYTES = 3 * 14 * 14


def synthetic(samples: int) -> dict[str, np.ndarray]:
    """Index columns like those of a training set: lognormal texts, 40% with one to four images of 256..4096 patches.

    Made in chunks, so that the memory it takes is that of the columns.
    """
    names = {"tokens": np.int32, "patches": np.int32, "targets": np.int32, "shard": np.int32, "images": np.int16}
    columns = {name: np.empty(samples, kind) for name, kind in names.items()}
    for start in range(0, samples, CHUNK):
        part = slice(start, min(start + CHUNK, samples))
        for name, values in _draw(part.stop - start, np.random.default_rng([samples, start])).items():
            columns[name][part] = values
    columns["shard"][:] = np.arange(samples) // SHARD
    return columns


def _draw(count: int, draw: np.random.Generator) -> dict[str, np.ndarray]:
    text = np.clip(draw.lognormal(np.log(200), 1.6, count), 8, 120_000).astype(np.int32)
    images = np.where(draw.random(count) < 0.4, draw.integers(1, 5, count), 0)
    each = 4 * draw.integers(64, 1025, count)
    tokens = text + images * (each // 4 + 4)
    return {"tokens": tokens, "patches": images * each, "targets": np.maximum(1, text // 2), "images": images}


def make_plan(columns: dict[str, np.ndarray], max_length: int, packs_per_step: int) -> Plan:
    """The first epoch, with the patch limit that training has by default."""
    ordered = (columns[name] for name in ("tokens", "patches", "targets", "shard", "images"))
    return plan_epoch(
        *ordered, max_length=max_length, max_patches=4 * max_length, packs_per_step=packs_per_step, seed=0, epoch=0
    )


def fill(max_length: int, samples: int) -> dict[str, Any]:
    """Share of a pack's positions that hold a token, over an epoch."""
    columns = synthetic(samples)
    plan = make_plan(columns, max_length, 8)
    tokens = int(columns["tokens"][plan.samples].sum(dtype=np.int64))
    return {"packs": len(plan), "fill": tokens / (len(plan) * max_length), "dropped": plan.dropped}


def balance(ranks: int, samples: int, max_length: int = 131_072) -> dict[str, Any]:
    """Mean over the steps of (mean / maximum over ranks) of the FLOPs of their packs."""
    columns = synthetic(samples)
    plan = make_plan(columns, max_length, ranks)
    flops = np.add.reduceat(sample_flops(columns)[plan.samples], plan.starts[:-1]).reshape(-1, ranks)
    ratios = flops.mean(1) / flops.max(1)
    return {"steps": plan.num_steps, "mean": float(ratios.mean()), "worst": float(ratios.min())}


def sample_flops(columns: dict[str, np.ndarray]) -> np.ndarray:
    """FLOPs of a training step on each sample, forward and backward, from the shapes of Kimi-VL-A3B.

    The language model multiplies 2.58e9 weights per token, and 27 layers of 16 heads attend causally with 192 + 128
    channels. The vision tower has 27 layers of width 1152 (4304 within); its patches attend within their image.
    """
    tokens, patches = (columns[name].astype(np.float64) for name in ("tokens", "patches"))
    language = 6 * 2.58e9 * tokens + 3 * 27 * 16 * (192 + 128) * tokens**2
    weights = 27 * (4 * 1152**2 + 2 * 1152 * 4304)
    attended = patches**2 / np.maximum(columns["images"], 1)
    return language + 6 * weights * patches + 3 * 27 * 4 * 1152 * attended


def plan_speed(samples: int) -> dict[str, Any]:
    """CPU seconds and memory, beyond the columns, of planning one epoch at 32K."""
    columns = synthetic(samples)
    make_plan({name: column[:1000] for name, column in columns.items()}, 131_072, 1)  # imports, first calls
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    start = time.process_time()
    plan = make_plan(columns, 32_768, 64)
    identity = plan.hash
    seconds = time.process_time() - start
    return {"cpu_s": seconds, "bytes": _memory("VmHWM") - before, "packs": len(plan), "hash": identity}


def _memory(field: str) -> int:
    """Bytes of this process, by a field of its status file."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise ValueError(f"/proc/self/status has no {field}; this figure needs Linux")
    return int(found[1]) * 1024


def resume(folder: str, samples: int) -> dict[str, Any]:
    """Seconds to the first pack of an interrupted epoch, less those that the pack itself takes, and the state.

    ``seconds`` counts from the loader's construction; ``from_files_s`` also opens the index and plans the epoch.
    """
    workload = Workload(realistic_set(Path(folder), samples), decode=True)
    encoder = workload.encoder
    open_index(workload)  # makes it where there is none
    begun = time.perf_counter()
    index, plan = open_index(workload)
    planned = time.perf_counter()
    start = len(plan) // 2
    packs = iter(PackLoader(plan, index, encoder, start=start, num_workers=workload.workers))
    next(packs)
    seconds = time.perf_counter() - planned
    packs.close()  # type: ignore[attr-defined]  # its worker would slow down what follows
    own = min(_seconds(lambda: PackMaker(plan, index, encoder)[start]) for _ in range(3))
    state = {"plan": plan.hash, "epoch": 0, "step": start}
    return {
        "seconds": seconds - own,
        "pack_s": own,
        "from_files_s": planned - begun + seconds - own,
        "state_bytes": len(pickle.dumps(state)),
    }


def _seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def worker_memory(folder: str, samples: int, times: int, max_length: int = 131_072) -> dict[str, Any]:
    """The most memory that a worker has for itself in an epoch over the set, or over so many copies of it."""
    data = realistic_set(Path(folder), samples)
    if times > 1:
        data = _repeated(data, times)
    workload = Workload(data, decode=True, max_length=max_length)
    index, plan = open_index(workload)
    patches = np.add.reduceat(index.patches[plan.samples].astype(np.int64), plan.starts[:-1])
    with _watched() as peak:
        trained = sum(
            pack.num_samples for pack in PackLoader(plan, index, workload.encoder, num_workers=workload.workers)
        )
    return {
        "bytes": peak[0],
        "pack_bytes": int(patches.max()) * PATCH_BYTES,
        "packs": len(plan),
        "samples": trained,
    }


def _repeated(data: RealisticSet, times: int) -> RealisticSet:
    """The set several times over, by links to its shards."""
    folder = data.folder.with_name(f"{data.folder.name}-x{times}")
    (folder / "shards").mkdir(parents=True, exist_ok=True)
    for shard in sorted((data.folder / "shards").glob("set-*.tar")):
        for copy in range(times):
            link = folder / "shards" / f"{shard.stem}-{copy}.tar"
            if not link.exists():
                os.link(shard, link)
    if not (folder / "tokenizer").exists():
        (folder / "tokenizer").symlink_to(data.tokenizer)
    return replace(data, folder=folder, samples=data.samples * times, images=data.images * times)


@contextmanager
def _watched(interval: float = 0.05) -> Iterator[list[int]]:
    """In the list: the largest private memory, in bytes, that any child process has had so far."""
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(interval):
            peak[0] = max([peak[0], *(_private(child.pid) for child in multiprocessing.active_children())])

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


def _private(pid: int | None) -> int:
    """Bytes that a process shares with no other; 0 when it has just ended."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    return 1024 * sum(int(kilobytes) for kilobytes in re.findall(r"^Private_\w+:\s+(\d+) kB", text, re.MULTILINE))


FIGURES: dict[str, Callable[..., dict[str, Any]]] = {
    "fill": fill,
    "balance": balance,
    "plan": plan_speed,
    "resume": resume,
    "memory": worker_memory,
}

if __name__ == "__main__":
    print(json.dumps(FIGURES[sys.argv[1]](**json.loads(sys.argv[2]))))
