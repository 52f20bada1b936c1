"""The decoder's attention: multi-head latent attention over packs, padded rows and the cache of generation.

Keys and values are low-rank: all heads share one latent of R channels per token, and the cache holds latents. For many
queries they are expanded to keys and values of every head; for the single query of a decoding step that would be a
large product over the whole cache at every step, so the expansion is moved to the query and the output instead
(DeepSeek-V2, arXiv 2405.04434, section 2.1.2):
q . (W_k c) = (W_k^T q) . c, and sum_t p_t W_v c_t = W_v (sum_t p_t c_t).

Legend: B rows, L cached tokens, T packed tokens, N heads, D head width, R latent width, P rotary width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3Model

from kimivl.model.cache import joined
from kimivl.model.kernels import Attention
from kimivl.model.lora import effective_weight
from kimivl.model.segment_attention import compute_dtype, segment_attention
from kimivl.model.segments import Segments

SEGMENT_ATTENTION = "kimivl_segments"


def attention_forward(
    module: DeepseekV3Attention,
    query: Tensor,
    latent: Tensor,
    key_rot: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    segments: Segments | None = None,
    kernel: Attention = "auto",
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The decoder's attention, called by transformers: (B, N, T, D) queries -> (B, T, N, D of v).

    `latent` (B, 1, L, R) and `key_rot` (B, 1, L, P) come from `keep_latents`. With `segments` the row is a pack, and
    `kernel` says who computes it.
    """
    if segments is not None:
        key, value = expand(module, latent[0, 0], key_rot[0, 0])
        return segment_attention(query[0].transpose(0, 1), key, value, segments, scaling, True, kernel)[None], None
    if query.shape[2] == 1:
        return _decode(module, query, latent, key_rot, attention_mask, scaling), None
    key, value = DeepseekV3Attention.expand_kv(module, latent, key_rot)
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


def expand(module: DeepseekV3Attention, latent: Tensor, key_rot: Tensor) -> tuple[Tensor, Tensor]:
    """(T, R) latents and (T, P) rotary keys -> (T, N, D) keys and (T, N, D of v) values, a view.

    Keys are written once, in the order of memory that the kernels on packs read.
    """
    nope, heads = module.qk_nope_head_dim, module.num_heads
    both = module.kv_b_proj(latent).unflatten(-1, (heads, -1))
    key_nope, value = both.split([nope, module.v_head_dim], dim=-1)
    rotary = key_rot.to(compute_dtype(key_rot))[:, None].expand(-1, heads, -1)
    return torch.cat((key_nope, rotary), -1), value


def _decode(
    module: DeepseekV3Attention,
    query: Tensor,
    latent: Tensor,
    key_rot: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
) -> Tensor:
    """One query per row and head, over the latents: (B, N, 1, D) -> (B, 1, N, D of v)."""
    nope, rank = module.qk_nope_head_dim, latent.shape[-1]
    weight_k, weight_v = (
        effective_weight(module.kv_b_proj).view(query.shape[1], -1, rank).split([nope, module.v_head_dim], dim=1)
    )
    query_nope, query_rot = query.squeeze(2).split([nope, query.shape[-1] - nope], dim=-1)
    absorbed = torch.bmm(query_nope.transpose(0, 1), weight_k).transpose(0, 1)  # (B, N, R)
    latent, key_rot = latent.squeeze(1), key_rot.squeeze(1)
    # Written out: fused kernels are made for heads of up to 256 channels, and are no faster on a CPU.
    keys = joined(latent, key_rot)
    scores = torch.bmm(torch.cat((absorbed, query_rot.to(absorbed.dtype)), -1), keys.transpose(1, 2))
    scores = scores.float() * scaling  # (B, N, L)
    if attention_mask is not None:
        scores = torch.where(attention_mask[:, 0], scores, float("-inf"))
    mixed = torch.bmm(scores.softmax(-1).to(latent.dtype), latent).transpose(0, 1)  # (N, B, R)
    return torch.bmm(mixed, weight_v.transpose(1, 2)).transpose(0, 1).unsqueeze(1)


def keep_latents(latent: Tensor, key_rot: Tensor) -> tuple[Tensor, Tensor]:
    """In the place of `DeepseekV3Attention.expand_kv`: leave the choice to `attention_forward`."""
    return latent, key_rot


def install(decoder: DeepseekV3Model) -> None:
    """Hand latents instead of keys and values to the attention function of each layer of a DeepseekV3Model."""
    for layer in decoder.layers:
        layer.self_attn.expand_kv = keep_latents


def register() -> None:
    """Make `SEGMENT_ATTENTION` known to transformers (attention and mask creation)."""
    ALL_ATTENTION_FUNCTIONS.register(SEGMENT_ATTENTION, attention_forward)
    ALL_MASK_ATTENTION_FUNCTIONS.register(SEGMENT_ATTENTION, sdpa_mask)
