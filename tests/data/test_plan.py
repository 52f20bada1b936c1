"""The plan: exact epochs, budgets kept, steps whole."""

from dataclasses import replace

import numpy as np
import pytest

from kimivl.data.plan import plan_epoch


def columns(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    tokens = generator.integers(10, 120, count)
    return tokens, generator.integers(0, 60, count), generator.integers(1, 9, count)


def make(count: int = 1000, *, seed: int = 0, epoch: int = 0, packs_per_step: int = 4, max_patches: int = 300):
    arrays = columns(count)
    plan = plan_epoch(
        *arrays, max_length=512, max_patches=max_patches, packs_per_step=packs_per_step, seed=seed, epoch=epoch
    )
    return arrays, plan


@pytest.mark.parametrize("packs_per_step", [1, 3, 8])
def test_every_sample_once_within_both_budgets(packs_per_step):
    (tokens, patches, targets), plan = make(packs_per_step=packs_per_step)
    assert sorted(plan.samples.tolist()) == list(range(1000))
    assert len(plan) % packs_per_step == 0
    for number in range(len(plan)):
        assert 0 < tokens[plan.pack(number)].sum() <= 512
        assert patches[plan.pack(number)].sum() <= 300


def test_step_targets_are_the_sums_of_the_step():
    (_, _, targets), plan = make(packs_per_step=4)
    assert plan.step_targets.sum() == targets.sum()
    for step in range(plan.num_steps):
        members = np.concatenate([plan.pack(4 * step + number) for number in range(4)])
        assert plan.step_targets[step] == targets[members].sum()


def test_best_fit_fills_the_packs():
    (tokens, _, _), plan = make(20_000, packs_per_step=1, max_patches=10**6)
    assert tokens.sum() / (len(plan) * 512) > 0.985


def test_the_plan_is_a_function_of_seed_and_epoch():
    assert make()[1].hash == make()[1].hash
    assert len({make()[1].hash, make(seed=1)[1].hash, make(epoch=1)[1].hash}) == 3


def test_what_fits_into_no_pack_is_left_out_and_counted():
    tokens, patches = np.array([600, 20, 30, 40]), np.array([0, 11, 4, 0])
    options = {"max_length": 512, "max_patches": 10, "packs_per_step": 1, "seed": 0, "epoch": 0}
    plan = plan_epoch(tokens, patches, tokens, **options)
    assert plan.dropped == {"too_long": 1, "too_many_patches": 1}
    assert sorted(plan.samples.tolist()) == [2, 3]
    with pytest.raises(ValueError, match="none of 4 samples fits.*data.phases"):
        plan_epoch(tokens, patches, tokens, **(options | {"max_length": 10}))


def test_packs_dealt_otherwise_are_another_plan():
    """The same packs in steps of one or of four: a checkpoint of one must not go on in the other."""
    plan = make(packs_per_step=4)[1]
    assert replace(plan, packs_per_step=1).hash != plan.hash


def test_too_few_samples_for_a_step_is_an_error():
    with pytest.raises(ValueError, match="3 samples cannot fill the 4 packs"):
        make(3)
