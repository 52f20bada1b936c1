"""Routed experts: tokens sorted by expert, one pair of matrix products per expert.

On a CPU transformers' own choices cost more: its loop differentiates through indexing of the stacked weights (each
step of the backward fills a gradient of the whole stack), grouped_mm and batched_mm are slow there. Accelerators
keep grouped_mm. The sum computed is the same everywhere.
Legend: T tokens, K experts per token, E experts, D width, I expert width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts

SORTED_EXPERTS = "kimivl_sorted"


def resolve(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """The experts kernel that ``name`` stands for on a device."""
    if name == "auto":
        return "sorted" if device.type == "cpu" else "grouped_mm"
    return name


def sorted_experts_forward(module: DeepseekV3Experts, hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """(T, D) tokens through the (T, K) chosen experts of `module`, summed with the (T, K) weights."""
    if hidden.device.type != "cpu":
        return grouped_mm_experts_forward(module, hidden, index, weight)
    top_k = index.shape[-1]
    order = index.flatten().argsort(stable=True)
    counts = torch.bincount(index.flatten(), minlength=module.num_experts).tolist()
    outputs = [
        F.linear(module._apply_gate(F.linear(tokens, gate_up)), down)
        for tokens, gate_up, down in zip(
            hidden.index_select(0, order // top_k).split(counts),
            module.gate_up_proj.unbind(0),
            module.down_proj.unbind(0),
            strict=True,
        )
    ]
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    chosen = torch.cat(outputs).index_select(0, back).view(*index.shape, -1)
    return (chosen * weight.unsqueeze(-1)).sum(1).to(hidden.dtype)


def register() -> None:
    """Make `SORTED_EXPERTS` known to transformers."""
    ALL_EXPERTS_FUNCTIONS.register(SORTED_EXPERTS, sorted_experts_forward)
