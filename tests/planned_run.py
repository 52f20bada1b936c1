"""One rank of a run that does everything but train: loads packs, logs deliveries, keeps its place, and can be killed.

    python tests/planned_run.py FOLDER DIGITS RANK RANKS WORKERS MEETING

Ranks meet through the file ``MEETING``, and agree over gloo after every step. ``FOLDER/position.json`` is the
checkpoint, written every other step; ``FOLDER/steps.jsonl`` gets a digest of what all ranks had in each step, a step
that is done again included.
"""

import json
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import torch.distributed as dist

from kimivl.checkpoint import load_processor
from kimivl.data.audit.delivery import DeliveryLog, next_attempt
from kimivl.data.audit.epochs import write_epoch_audit
from kimivl.data.chat import SampleEncoder
from kimivl.data.loader import PackLoader
from kimivl.data.mixture import Uses
from kimivl.data.plan import plan_epoch
from kimivl.data.scan import build_index
from kimivl.data.shards import expand
from kimivl.data.storage import Storage

PACKS_PER_STEP = 8
LENGTHS = (192, 512)
"""Tokens of a pack in the first epoch, and in the second."""
STEP_SECONDS = 0.02


def main(folder: Path, digits: str, rank: int, ranks: int, workers: int, meeting: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks)
    processor = load_processor(f"{digits}/tokenizer")
    encoder = SampleEncoder(processor.tokenizer, processor.image_processor)
    storage = Storage()
    index = build_index(expand(f"{digits}/sft-*.tar", storage), encoder, storage, workers=1)
    position = folder / "position.json"
    done = json.loads(position.read_text())["step"] if position.exists() else 0
    attempt = [next_attempt(folder / "audit")]
    dist.broadcast_object_list(attempt)
    log = DeliveryLog(
        folder / "audit",
        attempt=attempt[0],
        rank=rank,
        world_size=ranks,
        packs_per_step=PACKS_PER_STEP,
        resumed_at=done,
    )
    step = 0
    for epoch, length in enumerate(LENGTHS):
        limits = {"max_length": length, "max_patches": 4 * length}
        columns = (index.tokens, index.patches, index.targets, index.shard, index.images)
        plan = plan_epoch(*columns, packs_per_step=PACKS_PER_STEP, seed=5, epoch=epoch, **limits)
        uses = Uses(np.ones(len(index), np.uint8), np.zeros(len(index), np.uint8))
        skipped = min(max(done - step, 0), plan.num_steps)
        step += skipped
        share = PACKS_PER_STEP // ranks
        loader = PackLoader(
            plan, index, encoder, rank=rank, world_size=ranks, start=skipped * share, num_workers=workers
        )
        packs = []
        for pack in loader:
            packs.append(pack)
            if len(packs) < share:
                continue
            step += 1
            time.sleep(STEP_SECONDS)
            digests = [None] * ranks
            dist.all_gather_object(digests, [digest(pack) for pack in packs])
            log.write(step, epoch, packs, uses.count)
            if rank == 0:
                say(folder / "steps.jsonl", {"step": step, "packs": sorted(sum(digests, []))})
            if step % 2 == 0:
                dist.barrier()  # no rank's log may lack a step that the checkpoint has
                if rank == 0:
                    save(position, {"step": step})
            packs = []
        dist.barrier()
        if rank == 0:
            write_epoch_audit(folder / "audit", epoch, index, uses, plan, **limits)
    dist.barrier()
    dist.destroy_process_group()  # gloo's threads may abort a process that ends with them


def digest(pack) -> tuple[int, int]:
    content = (pack.input_ids, pack.targets, pack.cu_seqlens, pack.pixel_values, pack.image_grid_hws, pack.samples)
    return pack.number, zlib.crc32(b"".join(tensor.numpy().tobytes() for tensor in content))


def say(path: Path, what: dict) -> None:
    with path.open("a") as file:
        file.write(json.dumps(what) + "\n")


def save(path: Path, state: dict) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(state))
    partial.replace(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:6]), sys.argv[6])
