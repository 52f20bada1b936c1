"""The step is exact: it does not depend on how its samples are cut into packs and accumulated batches."""

import pytest
import torch
from lightning.pytorch import Callback

# A fresh model answers nothing right; something must give a signal.
REWARDED = ["reward._target_=even_reward.EvenReward", "module.freeze=[]"]


def weights(module) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in module.model.named_parameters()}


def moved(module, start) -> float:
    return max(float((weight - start[name]).abs().max()) for name, weight in weights(module).items())


@pytest.mark.parametrize("accumulate", [2, 3, 7])
def test_sft_step_is_the_same_however_it_is_cut(fit, accumulate):
    """60 samples in one pack, or in 2, 3, 7 packs of unequal supervised tokens: one step of SGD, the same weights."""
    one = "data.phases=[{max_length: 100000, epochs: 1, lr: [0.5, 0.5]}]"
    untouched, _ = fit("sft", "data.phases=[{max_length: 100000, epochs: 1, lr: [0.0, 0.0]}]")
    whole, trainer = fit("sft", one)
    cut, _ = fit("sft", one, accumulate=accumulate)
    assert trainer.global_step == 1
    assert moved(whole, weights(untouched)) > 1e-3
    for name, weight in weights(cut).items():
        torch.testing.assert_close(weight, weights(whole)[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("accumulate", [2, 5])
def test_rl_step_is_the_same_however_it_is_cut(fit, accumulate):
    """Eight problems of four responses."""
    overrides = [
        "data.phases=[{epochs: 1, lr: [0.5, 0.5]}]",
        "data.problems=8",
        "data.responses=4",
        "data.max_new_tokens=12",
        *REWARDED,
    ]
    whole, trainer = fit("rl", *overrides, "data.updates=1")
    cut, _ = fit("rl", *overrides, "data.updates=1", accumulate=accumulate)
    short, trainer_of_short = fit("rl", *overrides, "data.updates=1", "data.max_length=900")
    assert trainer.global_step == trainer_of_short.global_step == 1
    assert trainer_of_short.accumulate_grad_batches > 1 == trainer.accumulate_grad_batches
    assert trainer.datamodule.experience.advantage.abs().max() > 0
    for name, weight in [*weights(cut).items(), *weights(short).items()]:
        torch.testing.assert_close(weight, weights(whole)[name], rtol=1e-5, atol=1e-6, msg=name)


RESET = [
    "data.phases=[{epochs: 2, lr: [0.1, 0.1]}]",
    "data.problems=4",
    "data.responses=4",
    "data.max_new_tokens=8",
    "data.updates=2",
    *REWARDED,
]


@pytest.mark.parametrize(("reset", "fresh"), [(True, [True, False, True, False]), (False, [True, False, False, False])])
def test_the_optimiser_is_reset_each_rl_iteration(fit, reset, fresh):
    """Seen before each update of two iterations: have the momenta been forgotten?"""
    seen: list[bool] = []

    class Look(Callback):
        def on_after_backward(self, trainer, *args) -> None:
            states = trainer.optimizers[0].state.values()
            momenta = [state["momentum_buffer"] for state in states if state.get("momentum_buffer") is not None]
            seen.append(not any(bool(momentum.any()) for momentum in momenta))

    fit("rl", *RESET, f"module.reset_optimizer={reset}", momentum=0.9, callbacks=[Look()])
    assert seen == fresh


@pytest.mark.parametrize("stage", ["sft", "rl"])
def test_mixed_precision_keeps_weights_and_references_in_float32(fit, stage):
    short = ["data.problems=2", "data.responses=2", "data.max_new_tokens=4", "data.updates=1", *REWARDED]
    short += ["data.phases=[{epochs: 1, lr: [0.1, 0.1]}]"]
    long = ["data.phases=[{max_length: 4096, epochs: 1, lr: [0.1, 0.1]}]"]
    module, trainer = fit(stage, *(short if stage == "rl" else long), precision="bf16-mixed")
    assert trainer.global_step == 1
    assert all(weight.dtype == torch.float32 and weight.isfinite().all() for weight in weights(module).values())
    if stage == "rl":
        assert trainer.datamodule.experience.ref_logp.dtype == torch.float32
