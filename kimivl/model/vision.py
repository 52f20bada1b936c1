"""MoonViT: the vision tower of Kimi-VL, at an image's native resolution.

All patches of all images of a batch run as one sequence; attention stays inside an image, so nothing is padded.
Legend: P patches of all images, D width, N heads, h w an image's grid in patches.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from kimivl.model.configuration import MoonViTConfig
from kimivl.model.kernels import Attention
from kimivl.model.processor import MAX_SIDE
from kimivl.model.segment_attention import segment_attention
from kimivl.model.segments import Segments

_NORM_EPS = 1e-5
_ROPE_THETA = 10000.0


class PositionTable(nn.Module):
    """Learned (H0, W0, D) positions, resampled to each image's grid by bicubic interpolation."""

    def __init__(self, height: int, width: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(height, width, dim))

    def forward(self, grids: list[tuple[int, int]]) -> Tensor:
        """(P, D) positions of all patches. Each distinct grid is resampled once."""
        resampled = {grid: self._resample(*grid) for grid in dict.fromkeys(grids)}
        if len(resampled) == 1:
            return resampled[grids[0]].repeat(len(grids), 1)
        return torch.cat([resampled[grid] for grid in grids])

    def _resample(self, height: int, width: int) -> Tensor:
        if (height, width) == self.weight.shape[:2]:
            return self.weight.flatten(0, 1)
        table = self.weight.permute(2, 0, 1).unsqueeze(0)
        resampled = F.interpolate(table.float(), size=(height, width), mode="bicubic", align_corners=False)
        return resampled.squeeze(0).permute(1, 2, 0).flatten(0, 1).to(self.weight.dtype)


class PatchEmbed(nn.Module):
    """Patches to tokens: the convolution of kernel = stride = patch is one linear map of 3 x 14 x 14 values."""

    def __init__(self, config: MoonViTConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, config.hidden_size, config.patch_size, stride=config.patch_size)
        self.pos_emb = PositionTable(config.init_pos_emb_height, config.init_pos_emb_width, config.hidden_size)

    def forward(self, pixels: Tensor, grids: list[tuple[int, int]]) -> Tensor:
        tokens = F.linear(pixels.flatten(1), self.proj.weight.flatten(1), self.proj.bias)
        return tokens + self.pos_emb(grids)


class MLP(nn.Module):
    """Two linear maps with the tanh form of GELU between."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc0 = nn.Linear(dim, hidden)
        self.fc1 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc1(F.gelu(self.fc0(x), approximate="tanh"))


class Block(GradientCheckpointingLayer):
    """Pre-norm transformer block; attention is bidirectional inside each image."""

    def __init__(self, config: MoonViTConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.norm0 = nn.LayerNorm(dim, eps=_NORM_EPS)
        self.norm1 = nn.LayerNorm(dim, eps=_NORM_EPS)
        self.wqkv = nn.Linear(dim, 3 * dim)
        self.wo = nn.Linear(dim, dim)
        self.mlp = MLP(dim, config.intermediate_size)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], segments: Segments, kernel: Attention) -> Tensor:
        x = x + self._attend(self.norm0(x), rope, segments, kernel)
        return x + self.mlp(self.norm1(x))

    def _attend(self, x: Tensor, rope: tuple[Tensor, Tensor], segments: Segments, kernel: Attention) -> Tensor:
        qkv = self.wqkv(x).view(x.shape[0], 3, self.num_heads, -1)
        q, k = rotate(qkv[:, :2], *rope).unbind(1)
        out = segment_attention(q, k, qkv[:, 2], segments, q.shape[-1] ** -0.5, False, kernel)
        return self.wo(out.flatten(1))


class Encoder(nn.Module):
    """All blocks, and the norm after the last."""

    def __init__(self, config: MoonViTConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=_NORM_EPS)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], segments: Segments, kernel: Attention) -> Tensor:
        for block in self.blocks:
            x = block(x, rope, segments, kernel)
        return self.final_layernorm(x)


class MoonViT(PreTrainedModel):
    """Patches of all images -> groups of 2x2 merged tokens."""

    config_class = MoonViTConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _no_split_modules = ["Block"]
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: MoonViTConfig) -> None:
        super().__init__(config)
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.merge = tuple(config.merge_kernel_size)
        self.patch_embed = PatchEmbed(config)
        self.encoder = Encoder(config)
        self.post_init()

    def forward(self, pixel_values: Tensor, image_grid_hws: Tensor, kernel: Attention = "auto") -> Tensor:
        """(P, 3, 14, 14) normalised pixels and (n_images, 2) grids -> (P / 4, 4, D) merged patches.

        `kernel`: who computes attention, see `kimivl.model.segment_attention`.
        """
        grids = self._grids(image_grid_hws, pixel_values.shape[0])
        segments = Segments.of_lengths([height * width for height, width in grids], pixel_values.device)
        x = self.patch_embed(pixel_values, grids)
        rope = rope_2d(grids, self.head_dim, pixel_values.device)
        x = self.encoder(x, rope, segments, kernel)
        return self._merge(x, grids)

    def _grids(self, image_grid_hws: Tensor, patches: int) -> list[tuple[int, int]]:
        grids = [(int(h), int(w)) for h, w in image_grid_hws.tolist()]
        for image, (height, width) in enumerate(grids):
            if (
                height % self.merge[0]
                or width % self.merge[1]
                or min(height, width) <= 0
                or max(height, width) >= MAX_SIDE
            ):
                raise ValueError(
                    f"image {image}: grid {height}x{width} must be even and under {MAX_SIDE} patches a side; "
                    "prepare images with KimiVLImageProcessor"
                )
        if not grids:
            raise ValueError("image_grid_hws names no images: pass pixel_values=None for a batch without any")
        if sum(h * w for h, w in grids) != patches:
            raise ValueError(
                f"image_grid_hws counts {sum(h * w for h, w in grids)} patches, pixel_values has {patches}"
            )
        return grids

    def _merge(self, x: Tensor, grids: list[tuple[int, int]]) -> Tensor:
        """Group each 2x2 square of patches, squares and patches in raster order."""
        mh, mw = self.merge
        if len(set(grids)) == 1:
            h, w = grids[0]
            square = x.view(len(grids), h // mh, mh, w // mw, mw, -1).transpose(2, 3)
            return square.reshape(-1, mh * mw, x.shape[-1])
        merged = []
        for image, (h, w) in zip(x.split([h * w for h, w in grids]), grids, strict=True):
            square = image.view(h // mh, mh, w // mw, mw, -1).transpose(1, 2)
            merged.append(square.reshape(-1, mh * mw, x.shape[-1]))
        return torch.cat(merged)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Linears truncated normal of std sqrt(2 / fan-in), positions normal(0, 1)."""
        super()._init_weights(module)
        if isinstance(module, PositionTable):
            nn.init.normal_(module.weight)
        elif isinstance(module, nn.Linear | nn.Conv2d):
            fan_in = module.weight[0].numel()
            nn.init.trunc_normal_(module.weight, std=math.sqrt(2 / fan_in))


def rope_2d(grids: list[tuple[int, int]], head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine (P, 1, 1, head_dim / 2) of the interleaved 2-D angles `[x f0, y f0, x f1, y f1, ...]`.

    `f_i = 10000^(-4 i / head_dim)`; a patch's x is its column, y its row.
    """
    exponent = torch.arange(0, head_dim, 4, device=device, dtype=torch.float32) / head_dim
    freqs = _ROPE_THETA**-exponent
    tables = {}
    for h, w in dict.fromkeys(grids):
        y, x = torch.meshgrid(
            torch.arange(h, device=device, dtype=torch.float32),
            torch.arange(w, device=device, dtype=torch.float32),
            indexing="ij",
        )
        xy = torch.stack((x, y), -1).flatten(0, 1)  # (h w, 2)
        tables[h, w] = (freqs[:, None] * xy[:, None, :]).flatten(1)
    angle = torch.cat([tables[grid] for grid in grids])[:, None, None]
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn adjacent channel pairs of (P, 2, N, D) in float32, as complex numbers are multiplied."""
    real, imag = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((real * cos - imag * sin, real * sin + imag * cos), -1)
    return turned.flatten(-2).to(x.dtype)
