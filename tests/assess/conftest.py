"""Problems in shards, their index, and an engine that answers as it is told."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from kimivl.checkpoint import load_processor
from kimivl.data.chat import SampleEncoder
from kimivl.data.index import Index
from kimivl.data.scan import build_index
from kimivl.data.shards import expand
from kimivl.data.storage import Storage
from kimivl.model.tokenizer import text_encoder
from kimivl.rl.rollout import RolloutEngine
from kimivl.rl.types import Problem, Request, Response, Sampling
from kimivl.tasks.digits import write


class Scripted(RolloutEngine):
    """Answers each request by a function of it: the text after its prefix, or None for an error."""

    def __init__(self, decode: Callable[[list[int]], str], answer: Callable[[Request], str | None]) -> None:
        self.decode, self.answer = decode, answer
        self.requests: list[Request] = []
        self.closed = False

    def stream(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[tuple[int, Response]]:
        for number, request in reversed(list(enumerate(requests))):
            self.requests.append(request)
            text = self.answer(request)
            if text is None:
                yield number, Response((), "", "error")
            else:
                yield number, Response((*request.prefix, 7, 7), self.decode(list(request.prefix)) + text, "stop")

    def close(self) -> None:
        self.closed = True


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("digits"), sft=16, long_cot=0, rl=24, val=0, test=0, vocab_size=300)


@pytest.fixture(scope="session")
def processor(digits: Path):
    return load_processor(digits / "tokenizer")


@pytest.fixture(scope="session")
def encoder(processor) -> SampleEncoder:
    return SampleEncoder(processor.tokenizer, processor.image_processor, text_encoder(processor.tokenizer))


@pytest.fixture
def index(digits: Path, encoder: SampleEncoder, tmp_path: Path) -> Index:
    for shard in digits.glob("rl-*.tar"):
        shutil.copy(shard, tmp_path)
    storage = Storage()
    return build_index(expand(str(tmp_path / "rl-*.tar"), storage), encoder, storage, prompts=True, workers=1)


@pytest.fixture
def read(index: Index, encoder: SampleEncoder) -> Callable[..., list[Problem]]:
    def problems(numbers) -> list[Problem]:
        samples = [(number, index.read(number)) for number in numbers]
        return [
            Problem(number, sample, encoder.encode_prompt(sample), int(index.difficulty[number]))
            for number, sample in samples
        ]

    return problems


@pytest.fixture
def inference_of(encoder: SampleEncoder, processor):
    """(what answers a request) -> an ``Inference`` with a scripted engine."""

    def make(answer: Callable[[Request], str | None]) -> SimpleNamespace:
        return SimpleNamespace(
            engine=Scripted(processor.tokenizer.decode, answer), encoder=encoder, processor=processor
        )

    return make
