"""A small digits set with its encoder, made once, and what reads and plans it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kimivl.checkpoint import load_processor
from kimivl.data.chat import SampleEncoder
from kimivl.data.index import Index
from kimivl.data.plan import Plan, plan_epoch
from kimivl.data.scan import build_index
from kimivl.data.shards import expand
from kimivl.data.storage import Storage
from kimivl.model.tokenizer import text_encoder
from kimivl.tasks.digits import write


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("digits"), sft=120, long_cot=60, rl=32, val=16, test=16, vocab_size=340)


@pytest.fixture(scope="session")
def encoder(digits: Path) -> SampleEncoder:
    processor = load_processor(digits / "tokenizer")
    return SampleEncoder(processor.tokenizer, processor.image_processor, text_encoder(processor.tokenizer))


@pytest.fixture(scope="session")
def make_index(encoder: SampleEncoder) -> Callable[..., Index]:
    """(shards, options of ``build_index``) -> their index."""

    def make(shards: str | list[str], **options: Any) -> Index:
        storage = Storage(backoff=0.001)
        return build_index(expand(shards, storage), encoder, storage, **options)

    return make


@pytest.fixture(scope="session")
def index(digits: Path, make_index: Callable[..., Index]) -> Index:
    return make_index(str(digits / "sft-*.tar"))


@pytest.fixture(scope="session")
def plan_of() -> Callable[..., Plan]:
    """(index, options of ``plan_epoch``) -> the plan of an epoch, of short packs where nothing else is said."""

    def plan(index: Index, **options: Any) -> Plan:
        settings = {"max_length": 512, "max_patches": 2048, "packs_per_step": 2, "seed": 3, "epoch": 0} | options
        return plan_epoch(index.tokens, index.patches, index.targets, index.shard, index.images, **settings)

    return plan
