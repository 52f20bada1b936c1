"""The schedule of the phases: its values at the joints, and what a scheduler makes of them."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from kimivl.optim import MuonAdamW, PhaseSchedule

KIMI_VL = [
    {"max_length": 32768, "steps": 1000, "lr": [2e-5, 2e-6]},
    {"max_length": 131072, "steps": 500, "lr": [1e-5, 1e-6]},
]


def optimizer(lr: float = 0.5, ratio: float = 0.25) -> MuonAdamW:
    model = nn.Linear(3, 2)
    return MuonAdamW(model.named_parameters(), lr=lr, adamw_lr_ratio=ratio)


def test_the_example_of_the_docstring():
    schedule = PhaseSchedule([{"steps": 4, "lr": [8, 2]}, {"steps": 4, "lr": [4, 1]}], warmup=0.5)
    values = [schedule.lr_at(step) for step in range(10)]
    assert values == pytest.approx([4, 8, 5, 2, 3, 4, 2.5, 1, 1, 1])


def test_the_joints_of_the_two_phases_of_kimi_vl():
    schedule = PhaseSchedule(KIMI_VL, warmup=0.02)
    assert schedule.lr_at(0) == pytest.approx(2e-5 / 20)
    assert schedule.lr_at(19) == pytest.approx(2e-5)
    assert schedule.lr_at(999) == pytest.approx(2e-6)
    assert schedule.lr_at(1000) == pytest.approx(2e-6 + (1e-5 - 2e-6) / 10)
    assert schedule.lr_at(1009) == pytest.approx(1e-5)
    assert schedule.lr_at(1499) == schedule.lr_at(10_000) == pytest.approx(1e-6)


def test_between_the_joints_the_rate_falls_along_a_cosine():
    schedule = PhaseSchedule(KIMI_VL)
    values = [schedule.lr_at(step) for step in range(19, 1000)]
    assert values == sorted(values, reverse=True)
    middle = 2e-6 + 1.8e-5 * 0.5 * (1 + math.cos(math.pi * 490 / 980))
    assert schedule.lr_at(19 + 490) == pytest.approx(middle)


def test_no_step_is_wasted_at_rate_zero_and_one_step_is_a_phase():
    schedule = PhaseSchedule([{"steps": 1, "lr": [3, 1]}, {"steps": 2, "lr": [2, 2]}], warmup=0)
    assert [schedule.lr_at(step) for step in range(3)] == [3, 2, 2]


def test_a_scheduler_gives_these_values_and_keeps_the_ratio_of_the_groups():
    schedule = PhaseSchedule([{"steps": 5, "lr": [8e-3, 2e-3]}, {"steps": 5, "lr": [4e-3, 1e-3]}])
    moved = optimizer(ratio=0.25)
    scheduler = schedule.scheduler(moved)
    for step in range(11):
        muon, adamw = moved.param_groups
        assert muon["lr"] == pytest.approx(schedule.lr_at(step), rel=1e-12)
        assert adamw["lr"] == pytest.approx(0.25 * muon["lr"], rel=1e-12)
        moved.step()
        scheduler.step()


def test_a_resumed_scheduler_goes_on_where_it_was():
    schedule = PhaseSchedule([{"steps": 5, "lr": [8e-3, 2e-3]}])
    first, second = optimizer(), optimizer()
    before, after = schedule.scheduler(first), schedule.scheduler(second)
    for _ in range(3):
        first.step()
        before.step()

    second.load_state_dict(first.state_dict())
    after.load_state_dict(before.state_dict())
    for moved, scheduler in ((first, before), (second, after)):
        moved.step()
        scheduler.step()

    assert [group["lr"] for group in second.param_groups] == [group["lr"] for group in first.param_groups]


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ([], "phases is empty"),
        ([{"lr": [1, 0]}], r"phases\[0\].steps is missing"),
        ([{"steps": 1, "lr": [1, 0]}, {"steps": 3}], r"phases\[1\].lr is missing"),
        ([{"steps": 0, "lr": [1, 0]}], r"phases\[0\].steps=0"),
        ([{"steps": 2.5, "lr": [1, 0]}], r"phases\[0\].steps=2.5"),
        ([{"steps": 2, "lr": 1e-3}], r"phases\[0\].lr=0.001: give \[start, end\]"),
        ([{"steps": 2, "lr": [1e-3, -1]}], "at least 0"),
        ([{"steps": 2, "lr": [1e-3, "1e-4"]}], "two numbers"),
    ],
)
def test_a_wrong_phase_is_named(phases: list[dict[str, Any]], message: str):
    with pytest.raises(ValueError, match=message):
        PhaseSchedule(phases)


def test_a_wrong_warmup_step_or_rate_is_named():
    schedule = PhaseSchedule(KIMI_VL)
    with pytest.raises(ValueError, match="warmup=1"):
        PhaseSchedule(KIMI_VL, warmup=1)
    with pytest.raises(ValueError, match="step=-1"):
        schedule.lr_at(-1)
    with pytest.raises(ValueError, match="optimizer.lr=0"):
        schedule.scheduler(torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.0))
