from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from kimivl.model import KimiVLConfig, KimiVLForConditionalGeneration
from kimivl.model.checkpointing import checkpoint_activations
from kimivl.model.router import Balancing, Router, _AuxLoss, _Segments, load_metrics

CU = torch.tensor([0, 5, 6, 14, 24], dtype=torch.int32)


@pytest.fixture
def model(tiny) -> KimiVLForConditionalGeneration:
    return copy.deepcopy(tiny).train()


def gates(model) -> list:
    return [layer.mlp.gate for layer in model.language_model.model.layers[1:]]


def biases(model) -> list[Tensor]:
    return [gate.e_score_correction_bias.clone() for gate in gates(model)]


def pack(seed: int = 0) -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, 400, (int(CU[-1]),), generator=torch.Generator().manual_seed(seed))
    targets = ids.roll(-1)
    targets[CU[1:].long() - 1] = -100
    return ids, targets


def forward(model, router: Router, seed: int = 0) -> Tensor:
    with router.record(CU):
        return -model.target_log_probs(*pack(seed), CU).mean()


def watch_gates(model) -> tuple[list[Tensor], list[Tensor]]:
    """(logits, indices) of each gate's calls from now on."""
    logits: list[Tensor] = []
    indices: list[Tensor] = []
    for gate in gates(model):
        gate.register_forward_hook(lambda gate, args, out: logits.append(out[0]))
        gate.register_forward_hook(lambda gate, args, out: indices.append(out[2]))
    return logits, indices


def plain_aux_loss(logits: Tensor, top_k: int, cu_seqlens: Tensor) -> Tensor:
    """Equations 17 to 20, segment by segment; a segment counts by its length."""
    experts, total = logits.shape[1], logits.new_zeros(())
    for start, end in zip(cu_seqlens.tolist(), cu_seqlens[1:].tolist(), strict=False):
        scores = torch.sigmoid(logits[start:end])
        length = end - start
        loss = logits.new_zeros(())
        for e in range(experts):
            used = sum(e in row.topk(top_k).indices.tolist() for row in scores)
            f = experts / (top_k * length) * used
            p = (scores[:, e] / scores.sum(1)).mean()
            loss = loss + f * p
        total = total + loss * length / len(logits)
    return total


# ---- routing ----------------------------------------------------------------------------------------------------


def test_training_and_inference_route_alike(model):
    hidden = torch.randn(50, 128)
    for gate in gates(model):
        gate.e_score_correction_bias.normal_(std=0.2)
        _, weights, chosen = gate.train()(hidden)
        _, weights_eval, chosen_eval = gate.eval()(hidden)
        assert torch.equal(weights, weights_eval) and torch.equal(chosen, chosen_eval)
        unbiased = torch.sigmoid(hidden @ gate.weight.T).topk(2).indices
        assert not torch.equal(chosen.sort(1).values, unbiased.sort(1).values)  # the bias matters here


@pytest.mark.parametrize("train", [False, True])
def test_routing_and_its_gradients_are_the_reference(model, train):
    """s = sigmoid(x W^T); the top K of s + bias; s / sum * scale has a gradient, and the bias has none."""
    gate = gates(model)[0].train(train)
    hidden = torch.randn(50, 128, requires_grad=True)
    _, weights, chosen = gate(hidden)
    scores = torch.sigmoid(hidden @ gate.weight.T)
    expected = (scores + gate.e_score_correction_bias).topk(2).indices
    picked = scores.gather(1, chosen)
    reference = picked / picked.sum(1, keepdim=True) * 2.446
    towards = torch.randn_like(weights)

    assert torch.equal(chosen.sort(1).values, expected.sort(1).values)
    inputs = (hidden, gate.weight)
    ours, theirs = (torch.autograd.grad(out, inputs, towards, retain_graph=True) for out in (weights, reference))
    for mine, reference_gradient in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, reference_gradient)
    assert not gate.e_score_correction_bias.requires_grad


def test_autocast_does_not_reach_the_gate(model):
    gate, hidden = gates(model)[0], torch.randn(50, 128)
    exact = gate(hidden)
    with torch.autocast("cpu", torch.bfloat16):
        under = gate(hidden)
    assert all(torch.equal(mine, other) for mine, other in zip(exact, under, strict=True))


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.bfloat16().float()])
def test_the_bias_keeps_its_bits_when_the_model_is_cast(model, cast):
    before = biases(model)
    holder = torch.nn.ModuleList([model])  # as Lightning casts: from the module above
    cast(holder)
    assert model.dtype == gates(model)[0].weight.dtype
    for bias, kept in zip(biases(model), before, strict=True):
        assert bias.dtype == torch.float32 and torch.equal(bias, kept)


def test_the_bias_moves_with_the_model(model):
    model.to("meta", torch.bfloat16)
    for gate in gates(model):
        assert gate.e_score_correction_bias.is_meta and gate.e_score_correction_bias.dtype == torch.float32


# ---- load -------------------------------------------------------------------------------------------------------


def test_load_counts_the_choices_of_recorded_packs_only(model):
    router = Router(model)
    _, indices = watch_gates(model)
    forward(model, router, 0)
    forward(model, router, 1)
    expected = torch.stack([torch.bincount(torch.cat((a, b)).flatten(), minlength=8) for a, b in _pairs(indices)])
    assert torch.equal(router.load, expected)
    assert router.load.sum(1).tolist() == [2 * 24 * 2] * 3

    with torch.no_grad():
        model.target_log_probs(*pack(), CU)  # a reference model's pass: not recorded
    assert torch.equal(router.load, expected)

    router.update_bias()
    assert torch.equal(router.step_load(), expected)
    assert not router.load.any()


def _pairs(calls: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    half = len(calls) // 2
    return list(zip(calls[:half], calls[half:], strict=True))


@pytest.mark.parametrize("mode", ["none", "full", "selective"])
@pytest.mark.parametrize("weight", [0.0, 0.1])
def test_checkpointing_counts_nothing_twice(model, mode, weight):
    checkpoint_activations(model, mode)
    router = Router(model, aux_loss_weight=weight)
    (forward(model, router) + router.aux_loss).backward()
    assert router.load.sum(1).tolist() == [24 * 2] * 3
    assert len(router._terms) == (3 if weight else 0)  # a term more would hold its layer's tensors


LOADS = {
    "even": ([5, 5, 5, 5], 1.0, 1.0, 0),
    "one does everything": ([0, 12, 0, 0], 4.0, 0.0, 3),
    "half of them": ([6, 6, 0, 0], 2.0, 0.5, 2),
    "no token": ([0, 0, 0, 0], 0.0, 0.0, 4),
}


@pytest.mark.parametrize(("load", "max_over_mean", "entropy", "dead"), LOADS.values(), ids=LOADS.keys())
def test_load_metrics(load, max_over_mean, entropy, dead):
    metrics = load_metrics(torch.tensor([load, [1, 1, 1, 1]]))
    assert metrics["max_over_mean"] == pytest.approx([max_over_mean, 1.0])
    assert metrics["entropy"] == pytest.approx([entropy, 1.0], abs=1e-6)
    assert metrics["dead"] == [dead, 0]


def test_load_metrics_do_not_depend_on_the_default_dtype():
    load = torch.tensor([[1000, 1001, 999, 7]])
    exact = load_metrics(load)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert load_metrics(load) == exact
    finally:
        torch.set_default_dtype(torch.float32)


# ---- bias -------------------------------------------------------------------------------------------------------


def test_the_bias_is_frozen_by_default(model):
    router, before = Router(model), biases(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        forward(model, router, step).backward()
        optimizer.step()
        router.update_bias()
    assert all(torch.equal(bias, kept) for bias, kept in zip(biases(model), before, strict=True))


def test_bias_update_is_the_formula(model):
    router, before = Router(model, bias_update_rate=0.01), biases(model)
    router.load[0] = torch.tensor([3, 3, 3, 3, 4, 2, 6, 0])  # mean 3
    router.load[1] = 5
    router.update_bias()
    change = [bias - kept for bias, kept in zip(biases(model), before, strict=True)]
    torch.testing.assert_close(change[0], 0.01 * torch.tensor([0.0, 0, 0, 0, -1, 1, -1, 1]), atol=1e-7, rtol=0)
    assert not change[1].any() and not change[2].any()


def test_bias_updates_even_the_load(model):
    for gate in gates(model):
        gate.e_score_correction_bias.normal_(std=0.2)
    router, spread = Router(model, bias_update_rate=0.01), []
    with torch.no_grad():
        for _ in range(80):
            forward(model, router)
            router.update_bias()
            spread.append(sum(load_metrics(router.step_load())["max_over_mean"]))
    assert spread[-1] < 0.7 * spread[0]


def test_the_updated_bias_is_in_the_state_dict(model, tiny):
    router = Router(model, bias_update_rate=0.01)
    forward(model, router)
    router.update_bias()
    fresh = copy.deepcopy(tiny)
    assert not torch.equal(biases(fresh)[0], biases(model)[0])
    fresh.load_state_dict(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(biases(fresh), biases(model), strict=True))


# ---- auxiliary loss ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cu_seqlens", [[0, 12], [0, 1, 12], [0, 4, 8, 12], [0, 5, 6, 7, 12]])
@pytest.mark.parametrize(("experts", "top_k"), [(2, 1), (8, 2), (5, 5)])
def test_aux_loss_is_the_formula_in_float64(cu_seqlens, experts, top_k):
    torch.manual_seed(experts)
    logits = torch.randn(12, experts, dtype=torch.float64, requires_grad=True)
    ends = torch.tensor(cu_seqlens, dtype=torch.int32)
    ours, plain = _AuxLoss.apply(logits, top_k, _Segments(ends, True)), plain_aux_loss(logits, top_k, ends)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(loss * 3, logits)[0] for loss in (ours, plain)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-14)


def test_aux_loss_of_the_model_is_the_sum_over_its_layers(model):
    router = Router(model, aux_loss_weight=0.01)
    logits, _ = watch_gates(model)
    forward(model, router)
    expected = 0.01 * sum(plain_aux_loss(layer.detach().double(), 2, CU) for layer in logits)
    assert router.aux_loss.dtype == torch.float32
    assert router.aux_loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_scores_not_biases_decide_what_counts_as_chosen(model):
    router = Router(model, aux_loss_weight=0.01)
    forward(model, router)
    before = router.aux_loss.item()
    gates(model)[-1].e_score_correction_bias[:2] += 5.0  # the last layer sends all to two experts
    forward(model, router)
    assert router.aux_loss.item() == pytest.approx(before, rel=1e-6)


@pytest.mark.parametrize("mode", ["none", "full", "selective"])
def test_gradients_with_checkpointing_are_those_of_the_formula(model, mode):
    """Also where a second pack is run before the first one's backward pass, and the loss is scaled."""

    def gradients(run_model, loss_of) -> list[Tensor]:
        parameters = list(run_model.language_model.parameters())
        return list(torch.autograd.grad(7 * loss_of(), parameters, allow_unused=True))

    reference = copy.deepcopy(model)
    logits, _ = watch_gates(reference)

    def plain() -> Tensor:
        total = torch.zeros(())
        for seed in (0, 1):
            logits.clear()
            loss = -reference.target_log_probs(*pack(seed), CU).mean()
            total = total + loss + 0.5 * sum(plain_aux_loss(layer, 2, CU) for layer in logits)
        return total

    router = Router(model, aux_loss_weight=0.5)
    checkpoint_activations(model, mode)
    ours = gradients(model, lambda: sum(forward(model, router, seed) + router.aux_loss for seed in (0, 1)))

    for mine, expected in zip(ours, gradients(reference, plain), strict=True):
        if expected is None:
            assert mine is None
        else:
            torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)


def test_reentrant_checkpointing_is_refused(model):
    model.gradient_checkpointing_enable({"use_reentrant": True})
    router = Router(model, aux_loss_weight=0.5)
    with pytest.raises(ValueError, match="use_reentrant=False"):
        forward(model, router)


def test_without_a_weight_nothing_is_computed(model, monkeypatch):
    monkeypatch.setattr("kimivl.model.router._AuxLoss", None)
    router = Router(model)
    forward(model, router).backward()
    assert router.aux_loss.item() == 0 and not router.aux_loss.requires_grad


def test_a_loss_of_the_last_pack_only(model):
    router = Router(model, aux_loss_weight=0.5)
    forward(model, router)
    first = router.aux_loss.item()
    forward(model, router)
    assert router.aux_loss.item() == pytest.approx(first)


@pytest.mark.parametrize("name", ["bias_update_rate", "aux_loss_weight"])
@pytest.mark.parametrize("value", [-0.1, 1.0, float("nan")])
def test_settings_are_checked(name, value):
    with pytest.raises(ValueError, match=f"router.{name}="):
        Balancing(**{name: value})


def test_a_model_without_experts(recipe):
    fields = recipe("tiny") | {"vocab_size": 410, "media_placeholder_token_id": 401}
    fields["text_config"] = fields["text_config"] | {"first_k_dense_replace": 4}
    model = KimiVLForConditionalGeneration(KimiVLConfig(**fields)).train()
    router = Router(model, 0.1, 0.1)
    forward(model, router).backward()
    router.update_bias()
    assert router.aux_loss.item() == 0 and router.layers == 0
