"""From merged MoonViT patches to embeddings of the language model.

Legend: M image tokens (merged patches), D vision width, H language width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from kimivl.model.configuration import KimiVLConfig


class MultiModalProjector(nn.Module):
    """LayerNorm on each patch, then a two-layer perceptron on the four patches of a token together."""

    def __init__(self, config: KimiVLConfig) -> None:
        super().__init__()
        vision = config.vision_config
        height, width = vision.merge_kernel_size
        self.hidden_size = vision.hidden_size * height * width
        self.pre_norm = nn.LayerNorm(vision.hidden_size, eps=1e-5)
        self.linear_1 = nn.Linear(self.hidden_size, self.hidden_size)
        self.linear_2 = nn.Linear(self.hidden_size, config.text_config.hidden_size)

    def forward(self, patches: Tensor) -> Tensor:
        """(M, 4, D) merged patches -> (M, H) embeddings."""
        hidden = self.pre_norm(patches).reshape(-1, self.hidden_size)
        return self.linear_2(F.gelu(self.linear_1(hidden)))
