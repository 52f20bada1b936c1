from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kimivl.model.attention import plan_segments, segment_attention

CPU = torch.device("cpu")
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
        segment_attention(q, k, v, plan_segments(lengths, causal, CPU), 0.3, causal),
        dense_attention(q, k, v, lengths, 0.3, causal),
    ):
        results.append([out, *torch.autograd.grad((out * weight).sum(), (q, k, v))])
    for ours, dense in zip(*results, strict=True):
        torch.testing.assert_close(ours, dense, atol=1e-5, rtol=1e-4)


def test_causal_batches_waste_little():
    lengths = torch.randint(20, 400, (100,), generator=torch.Generator().manual_seed(0)).tolist()
    plan = plan_segments(lengths, causal=True, device=CPU)
    assert len(plan.batches) < 20
    assert sum(rows * length for rows, length in plan.batches) < 1.25 * sum(lengths)


def test_bidirectional_batches_are_exact():
    plan = plan_segments([6, 8, 6], causal=False, device=CPU)
    assert plan.batches == ((2, 6), (1, 8))
    assert plan.gather is not None and plan.gather.tolist() == [*range(6), *range(14, 20), *range(6, 14)]


def test_equal_lengths_need_no_gather():
    plan = plan_segments([5, 5], causal=True, device=CPU)
    assert plan.batches == ((2, 5),) and plan.gather is None and plan.scatter is None
