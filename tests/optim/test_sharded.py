"""The optimisers on several ranks: a model that is cut up, or dealt out, moves as that of one process does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from in_ranks import in_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from kimivl.optim import MuonAdamW, reset_state
from kimivl.optim.clipping import clip_gradients
from kimivl.optim.dealing import deal, rounds, rows_of_ranks

# Rows that divide by no number of ranks, fewer rows than ranks, wide and tall, five experts.
SHAPES = {
    "vision_tower.patch_embed.proj.weight": (7, 3, 2, 2),
    "vision_tower.encoder.blocks.0.wqkv.weight": (33, 11),
    "vision_tower.encoder.blocks.0.wqkv.bias": (33,),
    "layers.0.q_proj.weight": (12, 8),
    "layers.0.o_proj.weight": (8, 12),
    "layers.0.up_proj.weight": (19, 8),
    "layers.0.gate.weight": (2, 8),
    "layers.0.norm.weight": (8,),
    "layers.1.mlp.experts.gate_up_proj": (5, 12, 8),
    "layers.1.mlp.experts.down_proj": (5, 8, 6),
    "lm_head.weight": (13, 8),
    "scale": (1,),
}
SETTINGS = {"lr": 0.02, "weight_decay": 0.1}


def named(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for name, s in SHAPES.items()}


def gradient(step: int, number: int, like: Tensor) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(1000 * step + number)).to(like.dtype)


def train(parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, steps: range, place: Callable) -> list:
    """Clip and step; returns the gradient norms."""
    norms = []
    for step in steps:
        for number, parameter in enumerate(parameters.values()):
            parameter.grad = place(gradient(step, number, parameter))
        norms.append(clip_gradients(parameters.values(), 3.0))
        optimizer.step()
    return norms


def whole(value: Tensor) -> Tensor:
    return value.full_tensor().detach() if hasattr(value, "full_tensor") else value.detach()


def _sharded(folder: Path) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def cut(tensor: Tensor) -> Tensor:
        return distribute_tensor(tensor, mesh, [Shard(0)])

    for optimizer_of in (MuonAdamW, _adamw):
        parameters = {name: nn.Parameter(cut(value.detach())) for name, value in named().items()}
        optimizer = optimizer_of(parameters.items(), **SETTINGS)
        norms = train(parameters, optimizer, range(2), cut)
        saved = copy.deepcopy(optimizer.state_dict())
        other = {name: nn.Parameter(value.detach().clone()) for name, value in parameters.items()}
        resumed = optimizer_of(other.items(), **SETTINGS)
        resumed.load_state_dict(saved)
        train(other, resumed, range(2, 3), cut)
        norms += train(parameters, optimizer, range(2, 3), cut)
        for name, value in parameters.items():
            assert torch.equal(whole(value), whole(other[name])), f"{name}: resumed is not uninterrupted"
        state = {name: {k: whole(v).clone() for k, v in optimizer.state[p].items()} for name, p in parameters.items()}
        result = {name: whole(value) for name, value in parameters.items()}
        reset_state(optimizer)
        assert all(not whole(v).any() for values in optimizer.state.values() for v in values.values())
        if dist.get_rank() == 0:
            torch.save((result, state, torch.stack(norms)), folder / f"{optimizer_of.__name__}.pt")


def _adamw(items, **settings) -> torch.optim.Optimizer:
    return torch.optim.AdamW([parameter for _, parameter in items], **settings)


@pytest.mark.parametrize("ranks", [2, 3])
def test_cut_up_over_ranks_is_one_process(tmp_path, ranks):
    in_ranks(_sharded, tmp_path, ranks=ranks)
    for optimizer_of in (MuonAdamW, _adamw):
        parameters = named()
        optimizer = optimizer_of(parameters.items(), **SETTINGS)
        norms = train(parameters, optimizer, range(3), lambda tensor: tensor)
        result, state, norms_there = torch.load(tmp_path / f"{optimizer_of.__name__}.pt")
        torch.testing.assert_close(norms_there, torch.stack(norms), rtol=1e-6, atol=0)
        for name, parameter in parameters.items():
            torch.testing.assert_close(result[name], parameter.detach(), rtol=1e-5, atol=2e-6, msg=name)
            for key, value in optimizer.state[parameter].items():
                torch.testing.assert_close(state[name][key], value, rtol=1e-5, atol=1e-7, msg=f"{name} {key}")


def _dealt(folder: Path) -> None:
    parameters = named()
    optimizer = MuonAdamW(parameters.items(), **SETTINGS)
    optimizer.deal_over(dist.group.WORLD)
    train(parameters, optimizer, range(3), lambda tensor: tensor)
    torch.save({name: value.detach() for name, value in parameters.items()}, folder / f"{dist.get_rank()}.pt")


def test_work_dealt_out_over_replicas_is_bit_equal_to_one_process(tmp_path):
    in_ranks(_dealt, tmp_path, ranks=3)
    parameters = named()
    train(parameters, MuonAdamW(parameters.items(), **SETTINGS), range(3), lambda tensor: tensor)
    for rank in range(3):
        there = torch.load(tmp_path / f"{rank}.pt")
        assert all(torch.equal(there[name], value) for name, value in parameters.items())


def _rounded(folder: Path) -> None:
    """bf16, rounded at random: other bits on each rank, the same ones again after a resume."""
    mesh = init_device_mesh("cpu", (2,))

    def cut(tensor: Tensor) -> Tensor:
        return distribute_tensor(tensor, mesh, [Shard(0)])

    def steps(seed_steps: int) -> Tensor:
        # The same rows, and the same gradients, on both ranks: what differs are the random bits.
        parameters = {"embed_tokens.weight": nn.Parameter(cut(torch.ones(64, 32, dtype=torch.bfloat16)))}
        optimizer = MuonAdamW(parameters.items(), lr=1e-4, weight_decay=0.0)
        optimizer.param_groups[0]["steps"] = seed_steps
        for parameter in parameters.values():
            parameter.grad = cut(torch.ones(64, 32, dtype=torch.bfloat16))
        optimizer.step()
        return whole(parameters["embed_tokens.weight"])

    first, again, later = steps(0), steps(0), steps(1)
    assert torch.equal(first, again) and not torch.equal(first, later)
    upper, lower = first.chunk(2)
    assert not torch.equal(upper, lower)


def test_random_rounding_differs_by_rank_and_is_the_same_again(tmp_path):
    in_ranks(_rounded, tmp_path)


def test_work_is_dealt_evenly_and_in_bounded_rounds():
    costs = [7.0, 1, 1, 5, 3, 3, 2]
    owners = deal(costs, 3)
    loads = [sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(3)]
    assert max(loads) <= 8 and sum(loads) == sum(costs)
    sizes = [int(cost) for cost in costs]
    taken = list(rounds(owners, sizes, 5))
    assert sorted(number for numbers in taken for number in numbers) == list(range(7))
    for numbers in taken:
        for rank in range(3):
            mine = [sizes[number] for number in numbers if owners[number] == rank]
            assert sum(mine) <= 5 or len(mine) == 1


@pytest.mark.parametrize(("rows", "ranks"), [(5, 4), (8, 2), (3, 5), (1, 1), (33, 7)])
def test_rows_of_ranks_are_those_of_torch(rows, ranks):
    chunks = [len(chunk) for chunk in torch.arange(rows).chunk(ranks)]
    assert rows_of_ranks(rows, ranks) == chunks + [0] * (ranks - len(chunks))


def test_another_cut_is_refused(tmp_path):
    in_ranks(_columns, tmp_path, ranks=2)


def _columns(folder: Path) -> None:
    mesh = init_device_mesh("cpu", (2,))
    weight = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(1)]))
    with pytest.raises(ValueError, match="layers.0.weight lies on the ranks as .* first dimension"):
        MuonAdamW([("layers.0.weight", weight)], lr=0.1)
