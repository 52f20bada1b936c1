"""One optimiser step, measured: the loop that both sides of the comparison go through, and our side of it.

A side is a model, an optimiser and a way to cut the packs of a step into micro-batches. Both sides start from the same
weights, and the learning rate is zero in both: the work is the same, the weights stay, and so the loss and the gradient
norm of every step of every side must agree.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from torch import Tensor

from benchmarks.device import Clock, PeakMemory, Stopwatch, describe, peak_of
from benchmarks.packs import config_for, ready_packs, real_packs
from benchmarks.realistic_set import RealisticSet, realistic_set
from kimivl.config import compose_run
from kimivl.data.pack import PackedBatch
from kimivl.model import KimiVLConfig, KimiVLForConditionalGeneration
from kimivl.model.checkpointing import checkpoint_activations
from kimivl.model.flops import Flops, pack_flops
from kimivl.model.lora import add_lora
from kimivl.model.router import Balancing, Router
from kimivl.optim import MuonAdamW, MuonAdamWInBackward
from kimivl.optim.clipping import clip_gradients

VOCABULARY = 4096
"""Where the model's configuration leaves it to a tokenizer."""


@dataclass(frozen=True, slots=True)
class Window:
    """The packs of one step: how long, with pictures or not, how many."""

    length: int
    pictures: bool
    packs: int


@dataclass(frozen=True, slots=True)
class Step:
    """What one optimiser step gave and took.

    ``seconds`` on the device's clock (``benchmarks.device``) for the whole step, of which ``muon_s`` for Muon's update;
    ``wall_s`` on the wall, with the waiting for data before it (``wait_s``). ``flops`` are the model's, without Muon's.
    """

    loss: float
    grad_norm: float
    tokens: int
    flops: float
    seconds: float
    muon_s: float
    wall_s: float
    wait_s: float
    memory: dict[str, int]


class Settings:
    """What the command line says, as objects; ``data`` is the realistic set, where the real data path is measured."""

    def __init__(self, overrides: Sequence[str], data: tuple[str, int] | None = None) -> None:
        self.cfg = compose_run(*overrides)
        accelerator = self.cfg.trainer.accelerator
        found = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device({"auto": found, "gpu": "cuda"}.get(accelerator, accelerator))
        if self.device.type == "cuda" and found != "cuda":
            raise ValueError(f"trainer.accelerator={accelerator}: there is no CUDA device; take trainer=cpu")
        self.precision = str(self.cfg.trainer.precision)
        if self.precision not in ("32-true", "bf16-mixed", "bf16-true"):
            raise ValueError(f"trainer.precision={self.precision}: choose 32-true, bf16-mixed or bf16-true")
        self.data: RealisticSet | None = realistic_set(Path(data[0]), data[1]) if data else None

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        return torch.bfloat16 if self.precision == "bf16-true" else torch.float32

    @property
    def compute_dtype(self) -> torch.dtype:
        return torch.float32 if self.precision == "32-true" else torch.bfloat16

    def autocast(self) -> AbstractContextManager[Any]:
        mixed = self.precision == "bf16-mixed"
        return torch.autocast(self.device.type, torch.bfloat16) if mixed else nullcontext()

    @cached_property
    def config(self) -> KimiVLConfig:
        """The model's configuration with a vocabulary and special ids."""
        given = self.cfg.init_from
        config = instantiate(self.cfg.model) if given is None else KimiVLConfig.from_pretrained(given)
        if self.data is not None:
            return config_for(config, self.data)
        if config.vocab_size is None:
            config.vocab_size = config.text_config.vocab_size = VOCABULARY
        if config.media_placeholder_token_id is None:
            config.media_placeholder_token_id = config.vocab_size - 1
        return config

    def model(self) -> KimiVLForConditionalGeneration:
        """The model of ``init_from``, or one with random weights, made on the device in the training dtype."""
        torch.manual_seed(self.cfg.seed)
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            if self.cfg.init_from is not None:
                model = KimiVLForConditionalGeneration.from_pretrained(
                    self.cfg.init_from, dtype=self.dtype, device=self.device
                )
                return model.train()
            with self.device:
                return KimiVLForConditionalGeneration(self.config).train()
        finally:
            torch.set_default_dtype(before)


class Side(ABC):
    """A model and its optimiser, and the loop around them."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.device = settings.device
        self.muon = Stopwatch(settings.device)

    @abstractmethod
    def micro_batches(self, packs: list[PackedBatch], layout: str) -> Iterable[Callable[[], Tensor]]:
        """Functions that each compute one micro-batch's part of the loss of the step."""

    @abstractmethod
    def update(self) -> Tensor:
        """Clip, update, forget the gradients; returns their norm."""

    def step(self, packs: list[PackedBatch], layout: str) -> tuple[Tensor, Tensor]:
        """Loss and gradient norm of one optimiser step."""
        return self._backward(packs, layout), self.update()

    def _backward(self, packs: list[PackedBatch], layout: str) -> Tensor:
        loss = torch.zeros((), device=self.device)
        for part in self.micro_batches(packs, layout):
            with self.settings.autocast():
                value = part()
            value.backward()
            loss += value.detach()
            del value
        return loss

    def measure(self, window: Window, layout: str, seed: int = 0) -> Step:
        """One step on ready-made packs, which lie in memory before the clock starts."""
        return self._step(self._ready(window, seed), layout, time.perf_counter(), 0.0)

    def _ready(self, window: Window, seed: int) -> list[PackedBatch]:
        return ready_packs(self.settings.config, window.length, window.pictures, window.packs, seed)

    def _step(self, packs: list[PackedBatch], layout: str, begun: float, wait_s: float) -> Step:
        self.muon.read()  # forget what a step that broke off has left
        memory, clock = PeakMemory(self.device), Clock(self.device)
        loss, norm = self.step(packs, layout)
        seconds = clock.lap()
        return Step(
            loss=float(loss),
            grad_norm=float(norm),
            tokens=sum(pack.num_tokens for pack in packs),
            flops=sum(training_flops(self.settings.config, pack).total for pack in packs),
            seconds=seconds,
            muon_s=self.muon.read(),
            wall_s=time.perf_counter() - begun,
            wait_s=wait_s,
            memory=memory.read(),
        )


class Ours(Side):
    """The pieces of kimivl as a run has them: packs, kernels, checkpointing, the chunked loss, MuonAdamW."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        cfg = settings.cfg
        self.model = settings.model()
        self.model.set_kernels(instantiate(cfg.kernels))
        checkpoint_activations(self.model, cfg.activation_checkpointing)
        balancing: Balancing = instantiate(cfg.router)
        self.router = Router(self.model, balancing.bias_update_rate, balancing.aux_loss_weight)
        if cfg.lora is not None:
            add_lora(self.model, **instantiate(cfg.lora, _convert_="all"))
        named = [(name, weight) for name, weight in self.model.named_parameters() if weight.requires_grad]
        self.optimizer = instantiate(cfg.optimizer, lr=0.0)(named)
        self.clip = cfg.trainer.get("gradient_clip_val")
        if isinstance(self.optimizer, MuonAdamW):
            self.optimizer._step_muon = self.muon.timed(self.optimizer._step_muon)  # type: ignore[method-assign]

    def about(self) -> dict[str, Any]:
        """What was measured, on what."""
        peak, source = peak_of(self.device, self.settings.compute_dtype)
        return describe(self.device) | {
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "trained": sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad),
            "precision": self.settings.precision,
            "kernels": str(self.model.kernels.resolve(self.device, self.settings.compute_dtype)),
            "activation_checkpointing": self.settings.cfg.activation_checkpointing,
            "optimizer": self.settings.cfg.optimizer._target_,
            "newton_schulz_flops": getattr(self.optimizer, "newton_schulz_flops", lambda: 0)(),
            "peak_flops": peak,
            "peak_source": source,
        }

    def micro_batches(self, packs: list[PackedBatch], layout: str = "packed") -> Iterator[Callable[[], Tensor]]:
        for pack in packs:
            yield lambda pack=pack: self._loss(pack.to(self.device), len(packs))

    def _loss(self, pack: PackedBatch, packs: int) -> Tensor:
        with self.router.record(pack.cu_seqlens):
            logp = self.model.target_log_probs(**pack.model_inputs())
        return -logp.sum() / pack.step_targets + self.router.aux_loss / packs

    def step(self, packs: list[PackedBatch], layout: str) -> tuple[Tensor, Tensor]:
        if not isinstance(self.optimizer, MuonAdamWInBackward):
            return super().step(packs, layout)
        if len(packs) > 1:
            raise ValueError("an optimiser step in the backward pass has one pack: --packs 1, or optimizer=muon")
        loss = self.optimizer.step(lambda: self._backward(packs, layout))
        assert self.optimizer.grad_norm is not None
        return loss, self.optimizer.grad_norm

    def update(self) -> Tensor:
        norm = clip_gradients(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.router.update_bias()
        return norm

    def measure_real(self, window: Window, steps: int, workers: int) -> list[Step]:
        """Steps on packs of the real data path; the clock of a step starts with the waiting for its packs."""
        assert self.settings.data is not None
        packs = real_packs(self.settings.data, window.length, window.pictures, window.packs, workers)
        measured = []
        try:
            for _ in range(steps):
                begun = time.perf_counter()
                taken = [next(packs) for _ in range(window.packs)]
                measured.append(self._step(taken, "packed", begun, time.perf_counter() - begun))
        finally:
            packs.close()  # its workers would slow down what follows
        return measured


def training_flops(config: KimiVLConfig, pack: PackedBatch) -> Flops:
    """Model FLOPs of a pack, forward and backward."""
    targets = int((pack.targets != config.ignore_index).sum())
    return pack_flops(config, pack.cu_seqlens.diff().tolist(), targets, pack.image_grid_hws.tolist()).training()
