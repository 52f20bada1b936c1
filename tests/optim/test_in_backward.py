"""The step in the backward pass is clip_grad_norm_ and the ordinary step, and no two gradients live at once."""

import copy
import gc
import io
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kimivl.optim import MuonAdamW, MuonAdamWInBackward, PhaseSchedule, reset_state

LR = 1e-2


class Net(nn.Module):
    """Tied weights, stacked experts, a frozen layer, and one that only odd steps use."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter((torch.randn(shape, generator=generator) * 0.3).to(dtype))

        self.embed_tokens = nn.ParameterDict({"weight": weight(11, 8)})
        self.twice = weight(8, 8)
        self.experts = nn.ParameterDict({"gate_up_proj": weight(3, 12, 8), "down_proj": weight(3, 8, 6)})
        self.odd = weight(8, 8)
        self.norm = nn.Parameter(torch.ones(8, dtype=dtype))
        self.frozen = weight(8, 8).requires_grad_(False)

    def forward(self, step: int) -> Tensor:
        table = self.embed_tokens["weight"]
        ids = torch.randint(11, (20,), generator=torch.Generator().manual_seed(step))
        x = torch.tanh(table[ids] @ self.twice) @ self.twice @ self.frozen * self.norm
        gate, up = (x @ self.experts["gate_up_proj"].mT).chunk(2, dim=-1)
        x = x + ((gate.sigmoid() * up) @ self.experts["down_proj"].mT).sum(0)
        if step % 2:
            x = torch.tanh(x @ self.odd)
        return 30 * nn.functional.cross_entropy((x @ table.T).float(), ids.roll(1))


def trainable(net: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in net.named_parameters() if parameter.requires_grad]


def closure_of(net: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> Callable[[], Tensor]:
    """As Lightning's: the forward pass, zero_grad, the backward pass."""

    def closure() -> Tensor:
        loss = net(step)
        optimizer.zero_grad()
        loss.backward()
        return loss.detach()

    return closure


def train_in_backward(net: nn.Module, optimizer: MuonAdamWInBackward, steps: range, after: Any = None) -> list[float]:
    losses = []
    for step in steps:
        losses.append(float(optimizer.step(closure_of(net, optimizer, step))))
        assert all(parameter.grad is None for parameter in net.parameters())
        if after:
            after()
    return losses


def train_outside(net: nn.Module, optimizer: MuonAdamW, steps: range, clip: Any, after: Any = None) -> list[float]:
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = net(step)
        loss.backward()
        clip(net.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
        if after:
            after()
    return losses


def clip_globally(parameters: Any) -> Tensor:
    return nn.utils.clip_grad_norm_(parameters, 1.0)


def clip_each(parameters: Any) -> None:
    for parameter in parameters:
        nn.utils.clip_grad_norm_([parameter], 1.0)


def leave(parameters: Any) -> None:
    pass


def assert_close(first: nn.Module, second: nn.Module, **tolerance: float) -> None:
    for (name, ours), theirs in zip(first.named_parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


@pytest.mark.parametrize(("clip", "outside"), [("two_pass", clip_globally), ("per_tensor", clip_each), (None, leave)])
def test_clipping_and_stepping_in_backward_is_clipping_and_stepping_outside(clip: Any, outside: Any):
    """With a learning rate that changes between the steps, parameters that lack a gradient, and tied weights."""
    inside, ordinary, start = Net(), Net(), Net()
    ours = MuonAdamWInBackward(trainable(inside), lr=LR, clip=clip)
    theirs = MuonAdamW(trainable(ordinary), lr=LR)
    phases = [{"steps": 6, "lr": [LR, LR / 10]}]
    schedules = [PhaseSchedule(phases).scheduler(optimizer) for optimizer in (ours, theirs)]

    losses = train_in_backward(inside, ours, range(6), schedules[0].step)
    expected = train_outside(ordinary, theirs, range(6), outside, schedules[1].step)

    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    assert_close(inside, ordinary, rtol=1e-4, atol=1e-5)
    assert torch.equal(inside.frozen, start.frozen)
    assert not torch.equal(inside.odd, start.odd)
    assert ours.param_groups[0]["lr"] == theirs.param_groups[0]["lr"] < LR


def test_the_three_ways_to_clip_differ():
    nets = []
    for clip in ("two_pass", "per_tensor", None):
        nets.append(Net())
        train_in_backward(nets[-1], MuonAdamWInBackward(trainable(nets[-1]), lr=LR, clip=clip), range(3))
    # Muon does not see the scale of a single gradient, but that of one among several.
    for first, second in [(0, 1), (1, 2), (0, 2)]:
        assert not torch.allclose(nets[first].twice, nets[second].twice, atol=1e-6)


def test_the_global_norm_is_known_before_anything_moves():
    net, reference = Net(), Net()
    optimizer = MuonAdamWInBackward(trainable(net), lr=LR, clip="two_pass")
    reference(1).backward()
    norm = clip_globally(reference.parameters())
    train_in_backward(net, optimizer, range(1, 2))
    torch.testing.assert_close(optimizer.grad_norm, norm)
    assert norm > 1


@pytest.mark.parametrize("clip", ["two_pass", None])
def test_gradients_never_exist_all_at_once(clip: Any):
    net = Net()
    optimizer = MuonAdamWInBackward(trainable(net), lr=LR, clip=clip)
    alive = []
    for parameter in net.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(
                lambda _: alive.append(sum(other.grad is not None for other in net.parameters()))
            )
    train_in_backward(net, optimizer, range(1, 2))
    assert max(alive) == 0 and len(alive) == (2 if clip else 1) * len(trainable(net))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumed_is_uninterrupted_to_the_bit(dtype: torch.dtype):
    straight, resumed = Net(dtype), Net(dtype)
    losses = train_in_backward(straight, MuonAdamWInBackward(trainable(straight), lr=LR), range(6))
    first = MuonAdamWInBackward(trainable(resumed), lr=LR)
    train_in_backward(resumed, first, range(3))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    del first
    second = MuonAdamWInBackward(trainable(resumed), lr=0.5)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert train_in_backward(resumed, second, range(3, 6)) == losses[3:]
    for ours, theirs in zip(resumed.parameters(), straight.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_checkpoint_goes_on_with_the_ordinary_optimiser():
    inside, ordinary = Net(), Net()
    ours, theirs = MuonAdamWInBackward(trainable(inside), lr=LR), MuonAdamW(trainable(ordinary), lr=LR)
    train_outside(ordinary, theirs, range(2), clip_globally)
    inside.load_state_dict(ordinary.state_dict())
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    train_in_backward(inside, ours, range(2, 4))
    train_outside(ordinary, theirs, range(2, 4), clip_globally)
    assert_close(inside, ordinary, rtol=1e-4, atol=1e-5)


def test_a_reset_optimiser_goes_on_like_a_new_one():
    net, fresh = Net(), Net()
    optimizer = MuonAdamWInBackward(trainable(net), lr=LR)
    train_in_backward(net, optimizer, range(2))
    fresh.load_state_dict(net.state_dict())
    reset_state(optimizer)
    train_in_backward(net, optimizer, range(2, 4))
    train_in_backward(fresh, MuonAdamWInBackward(trainable(fresh), lr=LR), range(2, 4))
    assert_close(net, fresh, rtol=0, atol=0)


def test_a_backward_pass_outside_a_step_leaves_its_gradients():
    net, start = Net(), Net()
    optimizer = MuonAdamWInBackward(trainable(net), lr=LR)
    net(1).backward()
    assert all(parameter.grad is not None for _, parameter in trainable(net))
    assert torch.equal(net.twice, start.twice)
    with pytest.raises(ValueError, match="needs a closure"):
        optimizer.step()


def test_after_an_exception_the_next_step_is_whole():
    net = Net()
    optimizer = MuonAdamWInBackward(trainable(net), lr=LR)

    def broken() -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(broken)
    net(1).backward()
    assert net.twice.grad is not None  # the hooks are at rest
    train_in_backward(net, optimizer, range(1, 2))


def test_activation_checkpointing_sees_the_weights_before_they_move():
    """Blocks are computed anew in the backward pass, in which the parameters move."""

    class Checkpointed(Net):
        def forward(self, step: int) -> Tensor:
            return torch.utils.checkpoint.checkpoint(super().forward, step, use_reentrant=False)

    inside, ordinary = Checkpointed(), Net()
    train_in_backward(inside, MuonAdamWInBackward(trainable(inside), lr=LR), range(3))
    train_outside(ordinary, MuonAdamW(trainable(ordinary), lr=LR), range(3), clip_globally)
    assert_close(inside, ordinary, rtol=1e-4, atol=1e-5)


def test_parameters_do_not_keep_an_optimiser_alive():
    net = Net()
    gone = weakref.ref(MuonAdamWInBackward(trainable(net), lr=LR))
    gc.collect()
    assert gone() is None
    net(1).backward()


@pytest.mark.parametrize(
    ("setting", "message"),
    [({"clip": "three"}, "optimizer.clip=three: choose two_pass, per_tensor or null"), ({"clip_norm": 0}, "clip_norm")],
)
def test_a_setting_out_of_range_is_named(setting: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        MuonAdamWInBackward(trainable(Net()), lr=LR, **setting)
