"""One small written set for all tests of the task."""

from pathlib import Path

import pytest

from kimivl.data.sample import Sample
from kimivl.data.shards import expand, read_sample, scan_shard
from kimivl.data.storage import Storage
from kimivl.tasks.digits import write

SIZES = {"sft": 1200, "long_cot": 800, "rl": 160, "val": 160, "test": 384}
SEED = 5


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("digits"), seed=SEED, **SIZES)


def read_all(folder: Path, name: str) -> list[Sample]:
    samples, storage = [], Storage()
    for path in expand(f"{folder}/{name}-*.tar"):
        faults: list[Exception] = []
        records = scan_shard(storage, path, faults.append)
        samples += [read_sample(storage, path, record.offset, record.size) for record in records]
        assert not faults
    return samples


@pytest.fixture(scope="session")
def sets(folder: Path) -> dict[str, list[Sample]]:
    return {name: read_all(folder, name) for name in SIZES}
