"""Hugging Face datasets with TRL's packing, as its ``SFTTrainer`` does it before training.

Texts alone: TRL refuses to pack images. What is longer than a pack it cuts.

The Arrow copy of the set is made once and outside of the measurement; tokenising and packing belong to the epoch, since
they are made anew for every tokenizer, length and set.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import torch
from torch.utils.data import DataLoader
from trl import pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from benchmarks.realistic_set import RealisticSet
from benchmarks.workload import Workload
from kimivl.data.pack import PackedBatch
from kimivl.data.sample import Sample
from kimivl.data.shards import expand, read_sample, scan_shard
from kimivl.data.storage import Storage


def packs(workload: Workload) -> Iterator[PackedBatch]:
    """One epoch: tokenise with the chat template, pack best-fit-decreasing, collate without padding."""
    datasets.disable_caching()
    datasets.disable_progress_bars()
    data = datasets.load_from_disk(str(prepare(workload.data))).shuffle(seed=0)
    tokenizer = workload.tokenizer
    data = data.map(lambda row: {"input_ids": _ids(tokenizer, row["messages"])}, remove_columns=data.column_names)
    data = pack_dataset(data, workload.max_length, "bfd")
    collator = DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id, padding_free=True)
    loader = DataLoader(data, batch_size=1, collate_fn=collator, num_workers=workload.workers)
    yield from map(_pack, loader)


def _ids(tokenizer: Any, messages: list[dict[str, Any]]) -> list[int]:
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)


def _pack(batch: dict[str, torch.Tensor]) -> PackedBatch:
    ids, positions = batch["input_ids"][0], batch["position_ids"][0]
    starts = torch.cat([(positions == 0).nonzero().squeeze(1), torch.tensor([len(ids)])])
    return PackedBatch(
        input_ids=ids,
        targets=batch["labels"][0],
        cu_seqlens=starts.int(),
        pixel_values=torch.zeros(0, 3, 14, 14, dtype=torch.uint8),
        image_grid_hws=torch.zeros(0, 2, dtype=torch.int64),
        step_targets=len(ids),
    )


def prepare(data: RealisticSet) -> Path:
    """The texts of the set as an Arrow dataset, made at the first call."""
    folder = data.folder / "arrow"
    if not folder.is_dir():
        datasets.disable_progress_bars()
        cache = data.folder / "arrow-cache"
        made = datasets.Dataset.from_generator(_rows, gen_kwargs={"shards": data.shards}, cache_dir=str(cache))
        made.save_to_disk(folder)
    return folder


def _rows(shards: str) -> Iterator[dict[str, Any]]:
    storage = Storage()
    for shard in expand(shards):
        for record in scan_shard(storage, shard, lambda fault: None):
            yield {"messages": _texts(read_sample(storage, shard, record.offset, record.size))}


def _texts(sample: Sample) -> list[dict[str, str]]:
    return [
        {
            "role": message["role"],
            "content": "".join(part["text"] for part in message["content"] if part["type"] == "text"),
        }
        for message in sample.messages
    ]
