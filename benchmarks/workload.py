"""What all sides of the comparison are given: the set, the length of a pack, and encoders that do equal work."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from benchmarks.realistic_set import RealisticSet
from kimivl.data.chat import Grid, SampleEncoder
from kimivl.data.index import Index
from kimivl.data.plan import Plan, plan_epoch
from kimivl.data.sample import Sample
from kimivl.data.scan import build_index
from kimivl.data.shards import expand
from kimivl.data.storage import Storage
from kimivl.model.processor import KimiVLImageProcessor
from kimivl.model.tokenizer import load_tokenizer, text_encoder

Tokens = Literal["tiktoken", "transformers"]


@dataclass(frozen=True)
class Workload:
    """One epoch over ``data`` in packs of ``max_length`` tokens by ``workers`` processes.

    Without ``decode`` the pictures are read and their headers parsed, for the number of their tokens, but no pixel is
    decoded. ``tokens`` says which library turns text into ids; both give the same ids.
    """

    data: RealisticSet
    decode: bool
    tokens: Tokens = "tiktoken"
    max_length: int = 32_768
    workers: int = 1

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.data.tokenizer)

    @cached_property
    def encoder(self) -> SampleEncoder:
        """Turns samples into tensors: with uint8 patches, or with none where nothing is to be decoded."""
        return self.encoder_of(SampleEncoder if self.decode else HeadersOnly, KimiVLImageProcessor())

    @cached_property
    def indexer(self) -> SampleEncoder:
        """The encoder that the index is made with, whatever is decoded later."""
        return self.encoder_of(SampleEncoder, KimiVLImageProcessor())

    def encoder_of(self, kind: type[SampleEncoder], processor: KimiVLImageProcessor) -> SampleEncoder:
        """An encoder of another kind for the same texts."""
        return kind(self.tokenizer, processor, text_encoder(self.tokenizer) if self.tokens == "tiktoken" else None)


class HeadersOnly(SampleEncoder):
    """Makes the ids and labels of a sample with images, but leaves its pixels undecoded."""

    def _pixel_values(self, sample: Sample, shard: str | None, grids: list[Grid], out: Tensor | None) -> Tensor:
        return torch.empty(0, 3, 14, 14, dtype=torch.uint8)


class TransformersImages(SampleEncoder):
    """Makes pixels as the processors of transformers do: decoded and resized by PIL, normalised to float32."""

    def _pixel_values(self, sample: Sample, shard: str | None, grids: list[Grid], out: Tensor | None) -> Tensor:
        if not sample.images:
            return torch.empty(0, 3, 14, 14)
        pictures = [Image.open(io.BytesIO(image)).convert("RGB") for image in sample.images]
        return self.image_processor.preprocess(pictures)["pixel_values"]  # type: ignore[attr-defined]


def open_index(workload: Workload) -> tuple[Index, Plan]:
    """The index of the set, made where there is none, and the plan of its first epoch."""
    storage = Storage()
    index = build_index(expand(workload.data.shards, storage), workload.indexer, storage)
    plan = plan_epoch(
        index.tokens,
        index.patches,
        index.targets,
        index.shard,
        index.images,
        max_length=workload.max_length,
        max_patches=4 * workload.max_length,
        packs_per_step=1,
        seed=0,
        epoch=0,
    )
    if not workload.decode:
        index.patches = index.patches * 0  # no room is made for pixels that nobody writes
    return index, plan
