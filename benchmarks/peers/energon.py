"""megatron-energon: a crude dataset with a cooker, and a task encoder that packs a buffer greedily.

energon reads plain WebDataset tars, but wants metadata beside them (``energon prepare``); ``prepare`` makes them in a
folder of links, once and outside of the measurement, like the index of kimivl.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from megatron.energon import (
    Cooker,
    DefaultTaskEncoder,
    Sample,
    WorkerConfig,
    basic_sample_keys,
    edataclass,
    get_savable_loader,
    get_train_dataset,
    stateless,
)
from megatron.energon.flavors import CrudeWebdataset

from benchmarks.peers.webdataset_greedy import take_greedily
from benchmarks.realistic_set import RealisticSet
from benchmarks.workload import Workload
from kimivl.data.pack import EncodedSample, PackedBatch, pack_samples
from kimivl.data.sample import parse_sample
from kimivl.data.shards import expand

BUFFER = 500
"""Samples among which packs are chosen, and samples that wait to be shuffled."""
DATASET = "__module__: megatron.energon\n__class__: CrudeWebdataset\nsubflavors: {}\n"


@edataclass
class Cooked(Sample):
    """Members of a sample, extension -> bytes."""

    members: dict[str, bytes]


@edataclass
class Encoded(Sample):
    """A sample as tensors."""

    encoded: EncodedSample


@edataclass
class Packed(Sample):
    """A pack."""

    batch: PackedBatch


@stateless
def cook(raw: dict[str, Any]) -> Cooked:
    """The members of a crude sample."""
    return Cooked(
        **basic_sample_keys(raw), members={name: data for name, data in raw.items() if not name.startswith("__")}
    )


class PackingEncoder(DefaultTaskEncoder):
    """Encodes with kimivl's encoder and packs by a greedy knapsack, as Megatron's multimodal examples do."""

    decoder = None
    cookers = [Cooker(cook)]

    def __init__(self, workload: Workload) -> None:
        super().__init__()
        self.workload = workload

    @stateless
    def encode_sample(self, sample: Cooked) -> Encoded:
        parsed = parse_sample(sample.__key__, sample.members, check_images=False)
        return Encoded.derive_from(sample, encoded=self.workload.encoder.encode(parsed))

    def select_samples_to_pack(self, samples: list[Encoded]) -> list[list[Encoded]]:
        owner = {id(sample.encoded): sample for sample in samples}
        buffer = [sample.encoded for sample in samples]
        chosen = []
        while buffer:
            chosen.append([owner[id(one)] for one in take_greedily(buffer, self.workload.max_length)])
        return chosen

    @stateless
    def pack_selected_samples(self, samples: list[Encoded]) -> Packed:
        return Packed.derive_from(samples[0], batch=pack_samples([sample.encoded for sample in samples]))


def packs(workload: Workload) -> Iterator[PackedBatch]:
    """One epoch through the loader whose state can be saved."""
    dataset = get_train_dataset(
        prepare(workload.data),
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=workload.workers),
        task_encoder=PackingEncoder(workload),
        batch_size=None,
        packing_buffer_size=BUFFER,
        shuffle_buffer_size=BUFFER,
        max_samples_per_sequence=BUFFER,
        repeat=False,
    )
    for packed in get_savable_loader(dataset):
        yield packed.batch


def prepare(data: RealisticSet) -> Path:
    """The folder of the set as energon wants it, made at the first call."""
    folder = data.folder / "energon"
    if not (folder / ".nv-meta" / "dataset.yaml").is_file():
        folder.mkdir(exist_ok=True)
        shards = [Path(shard) for shard in expand(data.shards)]
        for shard in shards:
            if not (folder / shard.name).exists():
                os.link(shard, folder / shard.name)
        names = [shard.name for shard in shards]
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):  # noqa: PTH123 - the null device
            CrudeWebdataset.prepare_dataset(folder, names, split_parts_ratio=[("train", 1.0)], workers=2)
        (folder / ".nv-meta" / "dataset.yaml").write_text(DATASET)
    return folder
