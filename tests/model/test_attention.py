from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

from kimivl.model.attention import attention_forward, runs_of, segment_attention

LENGTHS = [3, 40, 1, 17, 17, 5, 90, 2]


def dense_attention(q, k, v, lengths, scale, causal):
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    mask = segment[:, None] == segment[None]
    if causal:
        mask = mask.tril()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [LENGTHS, [7, 7, 7], [11]])
@pytest.mark.parametrize("value_dim", [8, 6])
def test_equals_dense_block_diagonal(lengths, causal, value_dim):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, sum(lengths), dim, requires_grad=True) for dim in (8, 8, value_dim))
    weight = torch.randn(2, sum(lengths), value_dim)
    results = []
    for out in (
        segment_attention(q, k, v, runs_of(lengths), 0.3, causal),
        dense_attention(q, k, v, lengths, 0.3, causal),
    ):
        results.append([out, *torch.autograd.grad((out * weight).sum(), (q, k, v))])
    for ours, dense in zip(*results, strict=True):
        torch.testing.assert_close(ours, dense, atol=1e-5, rtol=1e-4)


def test_runs_of_equal_neighbours():
    assert runs_of([3, 5, 5, 4, 5]) == ((1, 3), (2, 5), (1, 4), (1, 5))
    assert runs_of([7] * 64) == ((64, 7),)


@torch.no_grad()
def test_decoding_over_latents_equals_expanded_keys(tiny):
    """One query per row against 5 cached tokens, of which the first two of row 0 are padding."""
    module = tiny.language_model.model.layers[1].self_attn
    torch.manual_seed(0)
    query = torch.randn(2, module.num_heads, 1, module.qk_head_dim)
    latent, key_rot = torch.randn(2, 1, 5, module.kv_lora_rank), torch.randn(2, 1, 5, module.qk_rope_head_dim)
    mask = torch.ones(2, 1, 1, 5, dtype=torch.bool)
    mask[0, ..., :2] = False
    for attended in (mask, None):
        out, _ = attention_forward(module, query, latent, key_rot, attended, scaling=module.scaling)
        key, value = DeepseekV3Attention.expand_kv(module, latent, key_rot)
        expected = F.scaled_dot_product_attention(query, key, value, attn_mask=attended, scale=module.scaling)
        torch.testing.assert_close(out, expected.transpose(1, 2), atol=1e-5, rtol=1e-4)
