from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from attention_reference import flash_ops_on_cpu, flash_package
from torch import Tensor

from kimivl.model import KimiVLConfig, KimiVLForConditionalGeneration, segment_attention

ROOT = Path(__file__).parents[2]
MEDIA = 401


@pytest.fixture(scope="session")
def golden() -> Path:
    """An official-format checkpoint with inputs and the outputs of an independent float64 reference."""
    return ROOT / "tests/fixtures/golden/kimi_vl_tiny"


@pytest.fixture(scope="session")
def recipe() -> Callable[[str], dict]:
    """conf/model/NAME.yaml as keyword arguments of KimiVLConfig."""

    def read(name: str) -> dict:
        fields = yaml.safe_load((ROOT / f"conf/model/{name}.yaml").read_text())
        assert fields.pop("_target_") == "kimivl.model.KimiVLConfig"
        return fields

    return read


@pytest.fixture(scope="session")
def tiny_config(recipe) -> KimiVLConfig:
    return KimiVLConfig(**recipe("tiny") | {"vocab_size": 410, "media_placeholder_token_id": MEDIA})


@pytest.fixture(scope="session")
def tiny(tiny_config) -> KimiVLForConditionalGeneration:
    """A tiny model of random weights, with router biases as uneven as a trained model's. Tests do not change it."""
    torch.manual_seed(0)
    model = KimiVLForConditionalGeneration(tiny_config).eval()
    for name, bias in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            bias.normal_(std=0.05)
    return model


@pytest.fixture
def make_sample() -> Callable[..., tuple[Tensor, Tensor, list[tuple[int, int]]]]:
    """make_sample(length, grids): ids with the images' placeholders, pixels, grids."""
    generator = torch.Generator().manual_seed(1)

    def make(length: int, *grids: tuple[int, int]) -> tuple[Tensor, Tensor, list[tuple[int, int]]]:
        ids = torch.randint(0, 400, (length,), generator=generator)
        place = 1
        for h, w in grids:
            ids[place : place + h * w // 4] = MEDIA
            place += h * w // 4 + 1
        patches = sum(h * w for h, w in grids)
        pixels = torch.randint(0, 256, (patches, 3, 14, 14), generator=generator).to(torch.uint8)
        return ids, pixels, list(grids)

    return make


@pytest.fixture
def stand_in(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Parametrised indirectly by varlen, flash_2 or flash_3: that kernel on a CPU, computed by a plain reference.

    Gives its name for `kernels.attention`. Only what a GPU computes is replaced, and what asks for a GPU.
    """
    name, _, version = request.param.partition("_")
    monkeypatch.setattr(segment_attention, "resolve", lambda name, device, dtype: name)
    monkeypatch.setattr(segment_attention, "_capability", lambda device: (9, 0))
    if name == "varlen":
        with flash_ops_on_cpu() as calls:
            yield name
    else:
        package = flash_package(int(version))
        monkeypatch.setitem(sys.modules, package.__name__, package)
        yield name
        calls = package.calls
    assert calls, "the kernel was never called"
