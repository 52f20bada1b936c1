"""bf16 parameters: the mean of random rounding is the float32 step, and master weights are float32 to the bit."""

import io
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kimivl.optim import MuonAdamW, muon, reset_state
from kimivl.optim.rounding import Wide, master_of

SHAPES = {
    "blocks.0.wqkv.weight": (36, 12),
    "layers.1.mlp.experts.gate_up_proj": (4, 16, 24),
    "layers.1.mlp.experts.down_proj": (4, 24, 8),
    "norm.weight": (24,),
    "embed_tokens.weight": (50, 24),
}
BF16, FLOAT = torch.bfloat16, torch.float32
SPECIAL = [float("inf"), float("-inf"), float("nan"), 0.0, -0.0, 1.0, -1.5, 3.3895e38, 1e-40, 2.0**-126]
Named = dict[str, nn.Parameter]


def parameters(dtype: torch.dtype = BF16) -> Named:
    """The same numbers, all of which bf16 can show, in either dtype."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator).to(BF16).to(dtype)) for name, shape in SHAPES.items()
    }


def train(optimizer: torch.optim.Optimizer, named: Named, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        for parameter in named.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(BF16).to(parameter.dtype)
        optimizer.step()


def equal(first: Named, second: Named) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def saved_and_loaded(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def rounded(values: Tensor, seed: int) -> Tensor:
    kept = torch.zeros_like(values, dtype=BF16)
    wide = Wide([kept])
    wide.values[0].copy_(values)
    wide.store(torch.Generator().manual_seed(seed))
    return kept


def test_random_rounding_is_one_of_the_two_neighbours_and_exact_in_the_mean():
    value = torch.tensor([1.0 + 2**-7 * 0.3, -(1.0 + 2**-7 * 0.3), 1e-20, 255.9])
    below = (value.view(torch.int32) & -(2**16)).view(FLOAT)
    above = ((value.view(torch.int32) & -(2**16)) + 2**16).view(FLOAT)

    draws = torch.cat([rounded(value.expand(10_000, 4), seed).float() for seed in range(4)])

    assert torch.all((draws == below) | (draws == above))
    share = (draws == above).float().mean(0)
    expected = (value - below) / (above - below)
    assert (share - expected).abs().max() < 4 * 0.5 / 200  # four standard errors of 40,000 draws


@pytest.mark.parametrize("seed", range(8))
def test_what_bf16_can_show_and_what_is_no_number_stay(seed: int):
    values = torch.tensor(SPECIAL).to(BF16).float().repeat(500)
    nans = torch.tensor([0x7FFFFFFF, 0x7F800001, -1], dtype=torch.int32).view(FLOAT)
    assert torch.equal(rounded(values, seed).float().nan_to_num(7), values.nan_to_num(7))
    assert rounded(nans, seed).isnan().all()


def test_a_master_weight_is_its_nearest_bf16_and_a_remainder_to_the_bit():
    bits = torch.randint(-(2**31), 2**31, (100_000,), generator=torch.Generator().manual_seed(0), dtype=torch.int64)
    ties = torch.tensor([0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x00000001], dtype=torch.int64)
    values = torch.cat([bits, ties, ties - 2**31]).to(torch.int32).view(FLOAT)
    kept, remainder = torch.zeros_like(values, dtype=BF16), torch.zeros_like(values, dtype=torch.int16)

    wide = Wide([kept], [remainder])
    wide.values[0].copy_(values)
    wide.store()

    number = ~values.isnan()
    assert torch.equal(master_of(kept, remainder)[number].view(torch.int32), values[number].view(torch.int32))
    assert master_of(kept, remainder)[~number].isnan().all() and kept[~number].isnan().all()
    no_tie = number & (values.view(torch.int32) & 0xFFFF).ne(0x8000)
    assert torch.equal(kept[no_tie], values.to(BF16)[no_tie])


def test_master_weights_are_float32_training_to_the_bit():
    exact, kept = parameters(FLOAT), parameters()
    train(MuonAdamW(exact.items(), lr=1e-4), exact, range(50))
    optimizer = MuonAdamW(kept.items(), lr=1e-4, rounding="master", state_dtype="float32")
    train(optimizer, kept, range(50))

    for name in SHAPES:
        assert torch.equal(master_of(kept[name], optimizer.state[kept[name]]["remainder"]), exact[name]), name
        assert kept[name].dtype == BF16
    assert sum(value.numel() for value in kept.values()) == sum(
        state["remainder"].numel() for state in optimizer.state.values()
    )


@pytest.mark.parametrize("name", ["layers.1.mlp.experts.down_proj", "embed_tokens.weight"])
def test_small_updates_move_bf16_weights_as_far_as_float32_ones_on_average(name: str):
    """Updates of 2e-5 to weights of size 1, far below what bf16 shows."""
    shape = (64, 32, 16) if "experts" in name else (1024, 32)
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(0)).sign()
    moved = {}
    for dtype, rounding in ((FLOAT, "nearest"), (BF16, "nearest"), (BF16, "stochastic")):
        parameter = nn.Parameter(torch.full(shape, 1.5).to(dtype))
        optimizer = MuonAdamW([(name, parameter)], lr=2e-5, weight_decay=0, rounding=rounding, state_dtype="float32")
        for _ in range(20):
            parameter.grad = gradient.to(dtype)
            optimizer.step()
        # along the direction that float32 takes
        moved[dtype, rounding] = (parameter.detach().float() - 1.5).flatten()

    exact = moved[FLOAT, "nearest"]
    assert exact.abs().mean() > 5e-5
    assert not moved[BF16, "nearest"].any()
    slope = (moved[BF16, "stochastic"] @ exact) / (exact @ exact)
    error = (2**-7 * exact.abs().mean()).sqrt() / exact.norm()  # of a sum of independent roundings, at most
    assert abs(slope - 1) < 4 * error < 0.5


def test_the_mean_of_many_random_steps_is_the_float32_step():
    exact = parameters(FLOAT)
    train(MuonAdamW(exact.items(), lr=1e-3), exact, range(1))
    draws: list[Named] = []
    for draw in range(300):
        named = parameters()
        optimizer = MuonAdamW(named.items(), lr=1e-3)
        optimizer.param_groups[0]["steps"] = 1000 * draw
        train(optimizer, named, range(1))
        draws.append(named)

    for name in SHAPES:
        mean = torch.stack([draw[name].detach().double() for draw in draws]).mean(0)
        spacing = exact[name].abs() * 2**-7
        error = ((mean - exact[name]) / spacing).detach()
        assert error.abs().max() < 5 * 0.5 / 300**0.5, name
        assert abs(error.mean()) < 5 * 0.5 / (300 * error.numel()) ** 0.5, name


@pytest.mark.parametrize("state_dtype", [None, "float32", "bfloat16"])
@pytest.mark.parametrize("rounding", ["stochastic", "nearest", "master"])
def test_resumed_is_uninterrupted_to_the_bit(rounding: str, state_dtype: str | None):
    settings: dict[str, Any] = {"lr": 1e-3, "rounding": rounding, "state_dtype": state_dtype}
    straight, resumed = parameters(), parameters()
    whole = MuonAdamW(straight.items(), **settings)
    train(whole, straight, range(6))
    first = MuonAdamW(resumed.items(), **settings)
    train(first, resumed, range(3))
    second = MuonAdamW(resumed.items(), **settings)
    second.load_state_dict(saved_and_loaded(first.state_dict()))
    train(second, resumed, range(3, 6))

    assert equal(straight, resumed)
    for name in SHAPES:
        ours, theirs = second.state[resumed[name]], whole.state[straight[name]]
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in ours)
        assert ours["step" if "step" in ours else "momentum_buffer"].dtype == (
            FLOAT if "step" in ours or state_dtype == "float32" else BF16
        )
        assert ("remainder" in ours) == (rounding == "master")


def test_two_runs_are_equal_and_two_steps_draw_other_bits():
    first, second = parameters(), parameters()
    train(MuonAdamW(first.items(), lr=1e-3), first, range(3))
    train(MuonAdamW(second.items(), lr=1e-3), second, range(3))
    assert equal(first, second)

    other = parameters()
    optimizer = MuonAdamW(other.items(), lr=1e-3)
    optimizer.param_groups[0]["steps"] = 7
    train(optimizer, other, range(3))
    assert not equal(first, other)


def test_each_step_draws_bits_of_its_own():
    """With the same bits the same weights would move at every step, and the others never."""
    weight = nn.Parameter(torch.ones(4096, dtype=BF16))
    optimizer = MuonAdamW([("norm.weight", weight)], lr=2.0**-11, weight_decay=0.0)
    moved = []
    for _ in range(2):
        weight.data.fill_(1)
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        moved.append(weight != 1)
    shares = [float(each.float().mean()) for each in (*moved, moved[0] & moved[1])]
    assert shares == pytest.approx([1 / 8, 1 / 8, 1 / 64], abs=0.03)


def test_float32_parameters_do_not_know_the_rounding():
    results = []
    for rounding in ("stochastic", "nearest", "master"):
        named = parameters(FLOAT)
        optimizer = MuonAdamW(named.items(), lr=1e-3, rounding=rounding)
        train(optimizer, named, range(2))
        results.append(named)
        assert not any("remainder" in state for state in optimizer.state.values())
    assert equal(results[0], results[1]) and equal(results[0], results[2])


def test_a_reset_keeps_the_lower_half_of_the_weights():
    named = parameters()
    optimizer = MuonAdamW(named.items(), lr=1e-3, rounding="master")
    train(optimizer, named, range(2))
    before = {name: optimizer.state[named[name]]["remainder"].clone() for name in SHAPES}
    reset_state(optimizer)
    for name in SHAPES:
        state = optimizer.state[named[name]]
        assert before[name].any() and torch.equal(state["remainder"], before[name])
        assert not any(value.any() for key, value in state.items() if key != "remainder")


@pytest.mark.parametrize("rounding", ["nearest", "master"])
def test_batches_cut_inside_a_parameter_give_the_same(rounding: str, monkeypatch: pytest.MonkeyPatch):
    whole, pieces = parameters(), parameters()
    whole["embed_tokens.weight"] = nn.Parameter(torch.ones(3000, 3, dtype=BF16))
    pieces["embed_tokens.weight"] = nn.Parameter(torch.ones(3000, 3, dtype=BF16))
    train(MuonAdamW(whole.items(), lr=1e-3, rounding=rounding), whole, range(3))
    monkeypatch.setattr(muon, "MAX_BATCH_NUMEL", 8192)  # two blocks for AdamW, at most 42 matrices
    monkeypatch.setattr(muon, "BLOCK", 512)
    optimizer = MuonAdamW(pieces.items(), lr=1e-3, rounding=rounding)
    train(optimizer, pieces, range(3))

    assert equal(whole, pieces)
    assert optimizer.state[pieces["embed_tokens.weight"]]["step"] == 3


class Allocations(TorchDispatchMode):
    """Bytes of the tensors that were made inside, now and at the peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage(), given)
        return result

    def _count(self, storage: Any, given: set[int]) -> None:
        address, size = storage.data_ptr(), storage.nbytes()
        if address in given or address in self._alive:
            return
        self._alive.add(address)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, address, size)

    def _free(self, address: int, size: int) -> None:
        self._alive.discard(address)
        self.now -= size


@pytest.mark.parametrize("name", ["experts.down_proj", "embed_tokens.weight"])
@pytest.mark.parametrize(
    ("dtype", "settings"),
    [
        (FLOAT, {}),
        (BF16, {}),
        (BF16, {"rounding": "master", "state_dtype": "float32"}),
        (BF16, {"rounding": "nearest"}),
        (BF16, {"ns_dtype": "bfloat16"}),
    ],
)
def test_a_step_takes_the_workspace_that_it_names_and_no_more(
    name: str, dtype: torch.dtype, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(muon, "MAX_BATCH_NUMEL", 2**15)
    shape = (160, 32, 64) if "experts" in name else (5120, 64)
    parameter = nn.Parameter(torch.ones(shape, dtype=dtype))
    optimizer = MuonAdamW([(name, parameter)], lr=1e-3, **settings)
    for _ in range(2):  # the first makes the states
        parameter.grad = torch.ones_like(parameter)
        with Allocations() as allocations:
            optimizer.step()

    assert allocations.peak <= 1.1 * optimizer.workspace() + 4096
    assert allocations.peak >= 0.75 * optimizer.workspace()
    assert optimizer.workspace() < 20 * 2**15  # of 10 batches


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"rounding": "up"}, "optimizer.rounding=up: choose one of stochastic, nearest, master"),
        ({"state_dtype": "int8"}, "optimizer.state_dtype=int8"),
    ],
)
def test_a_setting_that_is_not_known_is_named(setting: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        MuonAdamW(parameters().items(), lr=1e-3, **setting)
