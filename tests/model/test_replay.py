"""Router replay: one's own routing changes nothing, another one is that of a router which is made to choose it."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from kimivl.model import KimiVLForConditionalGeneration
from kimivl.model.checkpointing import checkpoint_activations
from kimivl.model.replay import FREE
from kimivl.model.router import Router

EXPERTS, LAYERS, TOP_K = 8, 3, 2


@pytest.fixture
def model(tiny):
    """A copy that a test may change, with gates that tell tokens apart."""
    model = copy.deepcopy(tiny).train()
    torch.manual_seed(3)
    for gate in gates(model):
        gate.weight.data.normal_()
    return model


def gates(model) -> list[DeepseekV3TopkRouter]:
    return [module for module in model.modules() if isinstance(module, DeepseekV3TopkRouter)]


@contextmanager
def watch(model):
    """The experts that each layer's tokens went to, a list of (T, K) for each forward pass of a gate."""
    seen: list[Tensor] = []
    hooks = [gate.register_forward_hook(lambda *call: seen.append(call[2][2])) for gate in gates(model)]
    yield seen
    for hook in hooks:
        hook.remove()


@pytest.fixture
def pack(make_sample):
    """Arguments of `target_log_probs`: two samples, one with an image."""
    first, pixels, grids = make_sample(20, (4, 4))
    second, _, _ = make_sample(13)
    ids = torch.cat([first, second])
    targets = torch.cat([ids[1:], torch.tensor([-100])])
    return {
        "input_ids": ids,
        "targets": torch.where(targets == 401, -100, targets),
        "cu_seqlens": torch.tensor([0, 20, 33], dtype=torch.int32),
        "pixel_values": pixels,
        "image_grid_hws": torch.tensor(grids),
    }


def run(model, pack, experts: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    logp = model.target_log_probs(**pack, experts=experts)
    (logp * torch.linspace(-1, 1, len(logp))).sum().backward()
    return logp.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def own_routing(model, pack) -> Tensor:
    with torch.no_grad(), watch(model) as seen:
        model.target_log_probs(**pack)
    return torch.stack(seen, 1)


def random_routing(tokens: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(tokens, LAYERS, EXPERTS, generator=generator).argsort(-1)
    return order[..., :TOP_K].to(torch.int16)


@pytest.mark.parametrize("mode", ["none", "full", "selective"])
def test_replaying_its_own_routing_changes_no_bit(model, pack, mode):
    checkpoint_activations(model, mode)
    logp, gradients = run(model, pack)
    routing = own_routing(model, pack)
    assert routing.shape == (33, LAYERS, TOP_K)
    again, of_replay = run(model, pack, routing.to(torch.int16))
    assert torch.equal(again, logp)
    assert of_replay.keys() == gradients.keys()
    assert all(torch.equal(of_replay[name], gradients[name]) for name in gradients)


def test_replaying_another_routing_is_a_model_that_chooses_it(model, pack):
    """The other model's routers are made to choose: the wanted experts' biases are beyond any score, token by token."""
    routing = random_routing(33)
    logp, gradients = run(model, pack, routing)
    forced = copy.deepcopy(model)
    for layer, gate in enumerate(gates(forced)):
        wanted = torch.zeros(33, EXPERTS).scatter(1, routing[:, layer].long(), 10.0)
        gate.e_score_correction_bias = wanted + gate.e_score_correction_bias
    expected, of_forced = run(forced, pack)
    torch.testing.assert_close(logp, expected, atol=1e-6, rtol=1e-6)
    for name, gradient in of_forced.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-5, rtol=1e-4)
    assert (logp - run(model, pack)[0]).abs().max() > 1e-3


def test_the_router_learns_through_its_own_scores(model, pack):
    _, gradients = run(model, pack, random_routing(33))
    assert all(gradients[name].abs().max() > 0 for name in gradients if name.endswith("mlp.gate.weight"))


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_a_layer_that_runs_again_is_routed_as_it_was(model, pack, mode):
    """In the backward pass too, with another pack run in between."""
    routing = random_routing(33)
    logp, gradients = run(model, pack, routing)
    checkpoint_activations(model, mode)
    with watch(model) as seen:
        again, checkpointed = run(model, pack, routing)
    assert len(seen) > LAYERS  # so they did run again
    assert torch.equal(again, logp)
    assert all(torch.equal(checkpointed[name], gradients[name]) for name in gradients)

    model.zero_grad()
    first = model.target_log_probs(**pack, experts=routing)
    model.target_log_probs(**pack, experts=random_routing(33, 1))
    model.target_log_probs(**pack)
    (first * torch.linspace(-1, 1, len(first))).sum().backward()
    late = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert all(torch.equal(late[name], gradients[name]) for name in gradients)


def test_where_nothing_was_recorded_the_router_decides(model, pack):
    routing = random_routing(33)
    routing[[19, 32]] = FREE
    with watch(model) as seen:
        run(model, pack, routing)
    chosen = torch.stack(seen, 1)
    known = routing[:, 0, 0] != FREE
    assert torch.equal(chosen[known], routing[known].long())
    assert (chosen >= 0).all()
    all_free = torch.full_like(routing, FREE)
    assert torch.equal(run(model, pack, all_free)[0], run(model, pack)[0])


def test_a_replay_ends_with_its_pass(model, pack):
    before = run(model, pack)[0]
    run(model, pack, random_routing(33))
    assert torch.equal(run(model, pack)[0], before)
    with pytest.raises(RuntimeError, match="stop here"):
        hook = model.language_model.model.layers[2].mlp.gate.register_forward_pre_hook(_stop)
        try:
            run(model, pack, random_routing(33))
        finally:
            hook.remove()
    assert torch.equal(run(model, pack)[0], before)


def _stop(*_: object) -> None:
    raise RuntimeError("stop here")


def test_loads_are_those_of_the_replay(model, pack):
    router = Router(model)
    routing = random_routing(33)
    with router.record(pack["cu_seqlens"]):
        model.target_log_probs(**pack, experts=routing)
    expected = torch.stack([torch.bincount(routing[:, layer].flatten().long(), minlength=8) for layer in range(LAYERS)])
    assert torch.equal(router.load, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda routing: routing[1:], r"take whole numbers \(33, 3, 2\)"),
        (lambda routing: routing[:, :2], r"\(33, 2, 2\)"),
        (lambda routing: routing[..., :1], r"\(33, 3, 1\)"),
        (lambda routing: routing.float(), "torch.float32"),
        (lambda routing: routing.index_fill(0, torch.tensor([4]), 8), "of token 4 in MoE layer 0 are .8, 8.*under 8"),
        (lambda routing: routing.scatter(2, torch.zeros(33, 3, 1).long(), FREE), "token 0 in MoE layer 0"),
    ],
)
def test_a_record_of_something_else_is_refused(model, pack, change, message):
    with pytest.raises(ValueError, match=message):
        model.target_log_probs(**pack, experts=change(random_routing(33)))


def test_a_dense_model_has_nothing_to_replay(tiny_config, pack):
    config = copy.deepcopy(tiny_config)
    config.text_config.first_k_dense_replace = config.text_config.num_hidden_layers
    torch.manual_seed(0)
    dense = KimiVLForConditionalGeneration(config)
    before = dense.target_log_probs(**pack)
    assert torch.equal(dense.target_log_probs(**pack, experts=torch.zeros(33, 0, 0, dtype=torch.int16)), before)
