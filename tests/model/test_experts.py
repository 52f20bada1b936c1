from __future__ import annotations

import pytest
import torch

from kimivl.model.experts import SORTED_EXPERTS


@pytest.mark.parametrize("tokens", [1, 64])
def test_equals_transformers_loop(tiny, tokens):
    experts = tiny.language_model.model.layers[1].mlp.experts
    assert experts.config._experts_implementation == SORTED_EXPERTS
    torch.manual_seed(0)
    hidden = torch.randn(tokens, experts.hidden_dim, requires_grad=True)
    index = torch.stack([torch.randperm(5)[:2] for _ in range(tokens)])  # experts 5, 6, 7 get no token
    weight = torch.rand(tokens, 2, requires_grad=True)
    inputs = (hidden, weight, experts.gate_up_proj, experts.down_proj)
    loop = type(experts).forward.__wrapped__
    results = []
    for forward in (type(experts).forward, loop):
        out = forward(experts, hidden, index, weight)
        results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
