"""Muon with AdamW: the rule of single matrices, how parameters are read, and resumed = uninterrupted."""

import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kimivl.optim import MuonAdamW, muon, reset_state
from kimivl.optim.matrices import SPLITS, Matrices, matrices_of
from kimivl.optim.newton_schulz import orthogonalise

SHAPES = {
    "vision_tower.patch_embed.proj.weight": (12, 3, 2, 2),
    "vision_tower.patch_embed.proj.bias": (12,),
    "vision_tower.patch_embed.pos_emb.weight": (4, 4, 12),
    "vision_tower.encoder.blocks.0.norm0.weight": (12,),
    "vision_tower.encoder.blocks.0.wqkv.weight": (36, 12),
    "vision_tower.encoder.blocks.0.wqkv.bias": (36,),
    "vision_tower.encoder.blocks.0.mlp.fc0.weight": (24, 12),
    "vision_tower.encoder.blocks.0.mlp.fc1.weight": (12, 24),
    "language_model.model.embed_tokens.weight": (32, 16),
    "language_model.model.layers.1.self_attn.kv_a_proj_with_mqa.weight": (10, 16),
    "language_model.model.layers.1.mlp.gate.weight": (4, 16),
    "language_model.model.layers.1.mlp.experts.gate_up_proj": (4, 16, 16),
    "language_model.model.layers.1.mlp.experts.down_proj": (4, 16, 8),
    "language_model.lm_head.weight": (32, 16),
}
Named = dict[str, nn.Parameter]


def parameters() -> Named:
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}


def set_gradients(named: Named, step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in named.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def train(optimizer: torch.optim.Optimizer, named: Named, steps: range) -> None:
    for step in steps:
        set_gradients(named, step)
        optimizer.step()


def single_matrices(name: str, tensor: Tensor) -> Iterator[Tensor]:
    """The matrices of a parameter, spelled out independently of the code under test."""
    if "wqkv.weight" in name:
        yield from tensor.chunk(3)
    elif "gate_up_proj" in name:
        for expert in tensor:
            yield from expert.chunk(2)
    elif "down_proj" in name:
        yield from tensor
    elif "patch_embed.proj.weight" in name:
        yield tensor.flatten(1)
    elif tensor.ndim == 2 and "embed_tokens" not in name and "lm_head" not in name:
        yield tensor


def equal(first: Named, second: Named) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("name", SHAPES)
def test_each_parameter_moves_as_under_the_optimisers_of_torch(name: str):
    named = parameters()
    ours = MuonAdamW(named.items(), lr=0.02, weight_decay=0.1, ns_dtype="bfloat16")
    start = parameters()[name].detach()
    pieces = [nn.Parameter(piece.clone()) for piece in single_matrices(name, start)]
    if pieces:
        theirs = torch.optim.Muon(pieces, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    else:
        pieces = [nn.Parameter(start.clone())]
        theirs = torch.optim.AdamW(pieces, lr=0.02, weight_decay=0.1, betas=(0.9, 0.95))

    for step in range(3):
        set_gradients(named, step)
        gradients = list(single_matrices(name, named[name].grad)) or [named[name].grad]
        for piece, gradient in zip(pieces, gradients, strict=True):
            piece.grad = gradient.clone()
        ours.step()
        theirs.step()

    moved = list(single_matrices(name, named[name].detach())) or [named[name].detach()]
    for piece, expected in zip(moved, pieces, strict=True):
        torch.testing.assert_close(piece, expected.detach(), rtol=1e-5, atol=1e-5)
    assert not torch.equal(named[name], start)


def test_the_update_is_the_formula_of_the_facts_page_in_double_precision():
    name, lr = "a.weight", 0.02
    parameter = nn.Parameter(torch.randn(6, 10, generator=torch.Generator().manual_seed(0)))
    optimizer = MuonAdamW([(name, parameter)], lr=lr, weight_decay=0.1)
    weight, momentum = parameter.detach().double(), torch.zeros(6, 10, dtype=torch.float64)
    for step in range(4):
        set_gradients({name: parameter}, step)
        gradient = parameter.grad.double()
        momentum = 0.95 * momentum + gradient
        update = gradient + 0.95 * momentum
        x = update / update.norm()
        for _ in range(5):
            gram = x @ x.T
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        weight = (1 - lr * 0.1) * weight - lr * 0.2 * 10**0.5 * x
        optimizer.step()

    torch.testing.assert_close(parameter.detach().double(), weight, rtol=0, atol=1e-5)


def test_matrices_of_one_shape_together_are_the_matrices_one_by_one():
    together, alone = parameters(), parameters()
    one = MuonAdamW(together.items(), lr=0.02)
    many = [MuonAdamW([item], lr=0.02) for item in alone.items()]

    for step in range(3):
        set_gradients(together, step)
        set_gradients(alone, step)
        one.step()
        for optimizer in many:
            optimizer.step()

    for name in together:
        torch.testing.assert_close(together[name], alone[name], rtol=1e-5, atol=1e-6)


def test_a_batch_cut_to_bound_memory_gives_the_same(monkeypatch: pytest.MonkeyPatch):
    whole, cut = parameters(), parameters()
    train(MuonAdamW(whole.items(), lr=0.02), whole, range(2))
    monkeypatch.setattr(muon, "MAX_BATCH_NUMEL", 1)
    train(MuonAdamW(cut.items(), lr=0.02), cut, range(2))

    for name in whole:
        torch.testing.assert_close(whole[name], cut[name], rtol=1e-5, atol=1e-6)


def test_singular_values_end_near_one_whatever_they_were():
    generator = torch.Generator().manual_seed(0)
    left, _ = torch.linalg.qr(torch.randn(8, 8, generator=generator))
    right, _ = torch.linalg.qr(torch.randn(24, 8, generator=generator))
    matrix = left @ torch.logspace(0, -2, 8).diag() @ right.T

    values = torch.linalg.svdvals(orthogonalise(matrix[None].clone())[0])

    assert values.min() > 0.3
    assert values.max() < 1.3


def test_a_zero_gradient_moves_a_matrix_by_its_weight_decay_only():
    parameter = nn.Parameter(torch.ones(4, 6))
    parameter.grad = torch.zeros(4, 6)
    MuonAdamW([("a.weight", parameter)], lr=0.1, weight_decay=0.5).step()
    torch.testing.assert_close(parameter.detach(), torch.full((4, 6), 0.95))


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("vision_tower.encoder.blocks.0.wqkv.weight", (3456, 1152), Matrices(3, 1152, 1152)),
        ("vision_tower.patch_embed.proj.weight", (1152, 3, 14, 14), Matrices(1, 1152, 588)),
        (
            "language_model.model.layers.1.mlp.experts.gate_up_proj",
            (64, 2816, 2048),
            Matrices(128, 1408, 2048),
        ),
        ("language_model.model.layers.1.mlp.experts.down_proj", (64, 2048, 1408), Matrices(64, 2048, 1408)),
        ("language_model.model.layers.1.self_attn.kv_b_proj.weight", (4096, 512), Matrices(1, 4096, 512)),
        ("language_model.model.layers.1.mlp.gate.weight", (64, 2048), Matrices(1, 64, 2048)),
        ("language_model.model.embed_tokens.weight", (163840, 2048), None),
        ("language_model.lm_head.weight", (163840, 2048), None),
        ("vision_tower.patch_embed.pos_emb.weight", (64, 64, 1152), None),
        ("vision_tower.encoder.blocks.0.wqkv.bias", (3456,), None),
        ("language_model.model.norm.weight", (2048,), None),
    ],
)
def test_the_official_parameters_are_read_as_the_facts_page_says(
    name: str, shape: tuple[int, ...], expected: Matrices | None
):
    assert matrices_of(name, torch.empty(shape, device="meta"), SPLITS) == expected


def test_a_parameter_without_a_gradient_stays():
    named = parameters()
    set_gradients(named, 0)
    frozen = [name for name in named if name.startswith("vision_tower")]
    for name in frozen:
        named[name].grad = None
    optimizer = MuonAdamW(named.items(), lr=0.02)

    optimizer.step()

    start = parameters()
    for name in named:
        assert torch.equal(named[name], start[name]) == (name in frozen), name
    assert not any(named[name] in optimizer.state for name in frozen)


def saved_and_loaded(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_resumed_is_uninterrupted_to_the_bit_and_the_state_is_tensors_and_primitives():
    straight = parameters()
    train(MuonAdamW(straight.items(), lr=0.02), straight, range(6))

    resumed = parameters()
    first = MuonAdamW(resumed.items(), lr=0.02)
    train(first, resumed, range(3))
    second = MuonAdamW(resumed.items(), lr=0.5)
    second.load_state_dict(saved_and_loaded(first.state_dict()))
    train(second, resumed, range(3, 6))

    assert equal(straight, resumed)


@pytest.mark.parametrize("optimizer_type", [MuonAdamW, torch.optim.AdamW])
def test_a_reset_optimiser_goes_on_like_a_new_one(optimizer_type: type[torch.optim.Optimizer]):
    named, fresh = parameters(), parameters()
    optimizer = optimizer_type(named.items(), lr=0.02)
    train(optimizer, named, range(3))
    buffers = [value for state in optimizer.state.values() for value in state.values()]
    with torch.no_grad():
        for name in fresh:
            fresh[name].copy_(named[name])

    reset_state(optimizer)
    train(optimizer, named, range(3, 6))
    train(optimizer_type(fresh.items(), lr=0.02), fresh, range(3, 6))

    assert equal(named, fresh)
    now = [value for state in optimizer.state.values() for value in state.values()]
    assert all(before is after for before, after in zip(buffers, now, strict=True))


def test_the_two_groups_have_their_own_learning_rates():
    muon_group, adamw_group = MuonAdamW(parameters().items(), lr=0.02, adamw_lr_ratio=0.5).param_groups
    assert (muon_group["lr"], adamw_group["lr"]) == (0.02, 0.01)
    assert len(muon_group["params"]) + len(adamw_group["params"]) == len(SHAPES)


def test_the_closure_runs_with_gradients():
    parameter = nn.Parameter(torch.ones(2, 3))
    optimizer = MuonAdamW([("a.weight", parameter)], lr=0.1)

    def closure() -> Tensor:
        loss = parameter.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 6
    assert not torch.equal(parameter.detach(), torch.ones(2, 3))


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("blocks.0.wqkv.weight", torch.ones(10, 4), "wqkv.weight.*10 rows do not divide into 3"),
        ("odd.weight", torch.ones(2, 3, 4), "odd.weight.*only stacked experts"),
        ("tall.weight", torch.ones(4, 6).T, "tall.weight is not contiguous"),
    ],
)
def test_a_parameter_that_cannot_be_read_is_named(name: str, tensor: Tensor, message: str):
    with pytest.raises(ValueError, match=message):
        MuonAdamW([(name, nn.Parameter(tensor))], lr=0.1)


@pytest.mark.parametrize(
    "setting",
    [
        {"lr": -1.0},
        {"weight_decay": -0.1},
        {"momentum": 1.0},
        {"adamw_betas": (0.9, 1.0)},
        {"ns_dtype": "int8"},
    ],
)
def test_a_setting_out_of_range_is_named(setting: dict[str, Any]):
    [key] = setting
    with pytest.raises(ValueError, match="beta2" if key == "adamw_betas" else key):
        MuonAdamW(parameters().items(), **{"lr": 0.1, **setting})


@pytest.mark.gpu
def test_on_a_gpu_the_update_is_that_of_the_cpu():
    cpu, gpu = (
        parameters(),
        {name: nn.Parameter(value.detach().cuda()) for name, value in parameters().items()},
    )
    train(MuonAdamW(cpu.items(), lr=0.02), cpu, range(3))
    optimizer = MuonAdamW(gpu.items(), lr=0.02, ns_dtype="float32")
    for step in range(3):
        set_gradients(cpu, step)
        for name, parameter in gpu.items():
            parameter.grad = cpu[name].grad.cuda()
        optimizer.step()

    for name, parameter in gpu.items():
        torch.testing.assert_close(parameter.detach().cpu(), cpu[name].detach(), rtol=1e-3, atol=1e-4)
