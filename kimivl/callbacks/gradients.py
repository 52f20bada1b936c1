"""Which part of the model the gradient is in."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from kimivl.callbacks.log_steps import is_log_step, log_figures
from kimivl.optim.clipping import gradient_norms, total_norm

PARTS = {
    "lora": ("lora_A", "lora_B"),
    "vision_tower": ("vision_tower",),
    "projector": ("multi_modal_projector",),
    "embedding": ("embed_tokens",),
    "head": ("lm_head",),
    "attention": ("self_attn",),
    "router": ("gate",),
    "experts": ("experts",),
    "mlp": ("mlp",),
    "norms": ("input_layernorm", "post_attention_layernorm", "norm"),
}
"""Part -> what the name of a parameter of it holds, one of these; the first part that fits. ``mlp``: dense and shared
experts. Norms inside of another part belong to that."""


class Gradients(Callback):
    """Logs ``train/grad_norm/<part>`` at log steps: the norm of the step's gradient in each part of the model, before
    clipping. Their squares sum to that of ``train/grad_norm``.

    With an optimiser that frees gradients in the backward pass there is nothing to measure, and nothing is logged.
    """

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        step = trainer.global_step + 1  # the one that is about to be made
        if is_log_step(trainer, step) and (norms := part_norms(dict(pl_module.model.named_parameters()))):
            log_figures(trainer, {f"train/grad_norm/{part}": norm for part, norm in norms.items()}, step)


def part_of(name: str) -> str:
    """The part of the model that a parameter belongs to, by its name; ``other`` where no part knows it."""
    words = set(name.split("."))
    return next((part for part, signs in PARTS.items() if words.intersection(signs)), "other")


@torch.no_grad()
def part_norms(parameters: Mapping[str, Tensor]) -> dict[str, float]:
    """Part -> norm of its gradients, taken in float32; the device is waited for once.

    Where gradients are cut up over ranks it is the norm of the whole ones, and all ranks must call this.
    """
    gradients = {name: weight.grad for name, weight in parameters.items() if weight.grad is not None}
    if not gradients:
        return {}
    parts: dict[str, list[Tensor]] = defaultdict(list)
    for name, norm in zip(gradients, gradient_norms(list(gradients.values())), strict=True):
        parts[part_of(name)].append(norm)
    norms = torch.stack([total_norm(norms) for _, norms in sorted(parts.items())])
    return dict(zip(sorted(parts), norms.tolist(), strict=True))
