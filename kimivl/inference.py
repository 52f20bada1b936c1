"""A trained model behind a rollout engine, without a trainer: for the verbs that only ask it for responses."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from kimivl.checkpoint import build_model, load_processor, policy_of
from kimivl.data.chat import SampleEncoder
from kimivl.model import Kernels, KimiVLConfig, KimiVLProcessor
from kimivl.model.tokenizer import text_encoder
from kimivl.rl.rollout import RolloutEngine
from kimivl.rl.types import Policy

_PROBES, _PROBE_BYTES = 1024, 4096


@dataclass(frozen=True, slots=True)
class Inference:
    """Who answers: the engine, the encoder that makes prompts for it, and the processor of its model folder."""

    engine: RolloutEngine
    encoder: SampleEncoder
    processor: KimiVLProcessor


def load_inference(
    init_from: str,
    rollout: Callable[[Policy], RolloutEngine],
    kernels: Kernels | None = None,
    precision: str | None = None,
    accelerator: str | None = None,
) -> Inference:
    """Load the model folder ``init_from`` and put it behind the engine that ``rollout`` makes.

    Args:
        kernels: as a run's. precision, accelerator: as the trainer's; anything with ``bf16`` in it loads bf16 weights.

    Raises:
        ValueError: when there is no model in the folder.
    """
    if not (Path(init_from) / "config.json").is_file():
        raise ValueError(f"init_from={init_from}: no model there (config.json is missing)")
    processor = load_processor(init_from)
    tokenizer = processor.tokenizer
    encoder = SampleEncoder(tokenizer, processor.image_processor, text_encoder(tokenizer))
    dtype = torch.bfloat16 if "bf16" in str(precision) else torch.float32
    with torch.device(_device(accelerator)), _default_dtype(dtype):
        model = build_model(KimiVLConfig.from_pretrained(init_from), init_from, processor)
    model.requires_grad_(False).eval()
    model.set_kernels(kernels or Kernels())
    policy = policy_of(model, processor, encoder.stop_id)
    return Inference(rollout(policy), encoder, processor)


def weights_digest(folder: str | Path) -> str:
    """What tells the weights of a model folder from others: sizes, and up to 1,024 probes of 4 KB in each file."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for start in range(0, size, max(size // _PROBES, _PROBE_BYTES)):
                file.seek(start)
                digest.update(file.read(_PROBE_BYTES))
    return digest.hexdigest()[:16]


def _device(accelerator: str | None) -> str:
    return "cpu" if accelerator == "cpu" or not torch.cuda.is_available() else "cuda"


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
