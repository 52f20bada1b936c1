"""Log-probabilities of the targets of a pack, from the last hidden states.

Legend: K supervised positions, D width, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def resolve(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """The loss kernel that ``name`` stands for on a device."""
    return "chunked" if name == "auto" else name


def linear_log_probs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0, kernel: str = "auto"
) -> Tensor:
    """(K, D) hidden states, (V, D) head, (K,) targets -> (K,) float32 log-probabilities at ``temperature``."""
    logits = F.linear(hidden, weight).float() / temperature
    return -F.cross_entropy(logits, targets, reduction="none")
