"""A small digits set with its encoder, made once."""

from pathlib import Path

import pytest

from kimivl.checkpoint import load_processor
from kimivl.data.chat import SampleEncoder
from kimivl.tasks.digits import write


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("digits"), sft=120, long_cot=60, rl=32, val=16, test=16, vocab_size=340)


@pytest.fixture(scope="session")
def encoder(digits: Path) -> SampleEncoder:
    processor = load_processor(digits / "tokenizer")
    return SampleEncoder(processor.tokenizer, processor.image_processor)
