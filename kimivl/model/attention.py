"""Exact attention: inside the segments of a packed row, and of one new token over a cache of latents.

A segment is a sample (decoder, causal) or an image (vision tower, bidirectional). The dense T x T mask is never
built: each run of neighbouring segments of equal length is one scaled-dot-product call.

    lengths 3 5 5 4  ->  runs (1, 3) (2, 5) (1, 4): three calls

Batching segments of similar length with padding was measured too: on a CPU the copies cost what the calls save
(even at 64 segments of 40 tokens), and more from about 100 tokens on.

The decoder's keys and values are low-rank (multi-head latent attention): all heads share one latent of R channels
per token, and the cache holds latents. For many queries they are expanded to keys and values of every head; for
the single query of a decoding step that would be a large product over the whole cache at every step, so the
expansion is moved to the query and the output instead (DeepSeek-V2, arXiv 2405.04434, section 2.1.2):
q . (W_k c) = (W_k^T q) . c, and sum_t p_t W_v c_t = W_v (sum_t p_t c_t).

Legend: B rows, L cached tokens, T packed tokens, N heads, D head width, R latent width, P rotary width.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3Model

SEGMENT_ATTENTION = "kimivl_segments"

Runs = tuple[tuple[int, int], ...]


def resolve(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """The attention kernel that ``name`` stands for on a device."""
    return "sdpa" if name == "auto" else name


def runs_of(lengths: list[int]) -> Runs:
    """(count, length) of each run of neighbouring segments of equal length."""
    return tuple((len(list(same)), length) for length, same in groupby(lengths))


def segment_attention(q: Tensor, k: Tensor, v: Tensor, runs: Runs, scale: float, causal: bool) -> Tensor:
    """Attention of (N, T, D) heads inside each segment; returns (N, T, D of v)."""
    sizes = [count * length for count, length in runs]
    outputs = []
    for (count, length), *qkv in zip(runs, q.split(sizes, 1), k.split(sizes, 1), v.split(sizes, 1), strict=True):
        # Heads stand in the place of the batch, segments in that of the heads: no transpose is needed.
        qs, ks, vs = (x.unflatten(1, (count, length)) for x in qkv)
        out = F.scaled_dot_product_attention(qs, ks, vs, scale=scale, is_causal=causal)
        outputs.append(out.flatten(1, 2))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)


def attention_forward(
    module: DeepseekV3Attention,
    query: Tensor,
    latent: Tensor,
    key_rot: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    runs: Runs | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The decoder's attention, called by transformers: (B, N, T, D) queries -> (B, T, N, D of v).

    `latent` (B, 1, L, R) and `key_rot` (B, 1, L, P) come from `keep_latents`. With `runs` the row is a pack.
    """
    if runs is None and query.shape[2] == 1:
        return _decode(module, query, latent, key_rot, attention_mask, scaling), None
    key, value = DeepseekV3Attention.expand_kv(module, latent, key_rot)
    if runs is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    out = segment_attention(query[0], key[0], value[0], runs, scaling, causal=True)
    return out.transpose(0, 1).unsqueeze(0), None


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
    weight_k, weight_v = module.kv_b_proj.weight.view(query.shape[1], -1, rank).split([nope, module.v_head_dim], dim=1)
    query_nope, query_rot = query.squeeze(2).split([nope, query.shape[-1] - nope], dim=-1)
    absorbed = torch.bmm(query_nope.transpose(0, 1), weight_k).transpose(0, 1)  # (B, N, R)
    latent, key_rot = latent.squeeze(1), key_rot.squeeze(1)
    # Written out: a fused kernel would want latents and rotary keys in one tensor, a copy of the cache.
    scores = torch.bmm(absorbed, latent.transpose(1, 2)) + torch.bmm(query_rot, key_rot.transpose(1, 2))
    scores = scores.float() * scaling  # (B, N, L)
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask[:, 0], float("-inf"))
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
