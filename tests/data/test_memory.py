"""Host memory does not grow over an epoch, nor with the size of the set."""

import multiprocessing
import os
import random
from pathlib import Path

import pytest

from kimivl.data.loader import PackLoader
from kimivl.data.sample import Sample
from kimivl.data.shards import write_shards

MB = 2**20
WORDS = ["four", "seven", "the", "sum", "of", "digits", "is", "red", "and", "blue"]


def private_bytes(pid: int) -> int:
    """Memory that no other process shares."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_"))


def chats(count: int):
    draw = random.Random(0)
    for number in range(count):
        question, answer = (" ".join(draw.choices(WORDS, k=draw.randrange(4, 40))) for _ in range(2))
        messages = [
            {"role": role, "content": [{"type": "text", "text": text}]}
            for role, text in (("user", question), ("assistant", answer))
        ]
        yield Sample(f"chat-{number:06d}", messages)


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="needs Linux's smaps_rollup")  # noqa: PTH110
def test_an_epoch_of_50000_samples_stays_flat(make_index, encoder, plan_of, tmp_path):
    write_shards(chats(50_000), tmp_path / "sft", samples_per_shard=5000)
    index = make_index(f"{tmp_path}/*.tar")
    plan = plan_of(index, max_length=8192, max_patches=8192)
    own, worker = [], []
    for number, pack in enumerate(PackLoader(plan, index, encoder, num_workers=1)):
        if number % (len(plan) // 10) == 0:
            [process] = multiprocessing.active_children()
            own.append(private_bytes(os.getpid()))
            worker.append(private_bytes(process.pid))
        assert pack.num_samples
    assert len(own) >= 10
    assert max(worker[2:]) - worker[1] < 20 * MB, worker
    assert max(own[2:]) - own[1] < 20 * MB, own
