"""The stages' balancing of the experts: off by default, exact over accumulated packs."""

import pytest
import torch
from lightning.pytorch import Callback

ONE = "data.phases=[{max_length: 100000, epochs: 1, lr: [0.5, 0.5]}]"
REWARDED = ["reward._target_=even_reward.EvenReward", "module.freeze=[]"]
RL = [
    "data.phases=[{epochs: 1, lr: [0.1, 0.1]}]",
    "data.problems=4",
    "data.responses=4",
    "data.max_new_tokens=8",
    "data.updates=2",
    *REWARDED,
]


class Loads(Callback):
    """The load of each optimiser step, and the tokens of its packs."""

    def __init__(self) -> None:
        self.loads: list[torch.Tensor] = []
        self.tokens: list[int] = []
        self._tokens = 0

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self._tokens += getattr(batch, "pack", batch).num_tokens
        if not trainer.fit_loop._should_accumulate():
            self.loads.append(module.router.step_load().clone())
            self.tokens.append(self._tokens)
            self._tokens = 0


def biases(module) -> list[torch.Tensor]:
    return [gate.e_score_correction_bias for gate in module.router.gates]


TWICE = ["optimizer=muon_in_backward", "optimizer.clip=two_pass"]


@pytest.mark.parametrize(("accumulate", "more"), [(1, []), (3, []), (1, TWICE)], ids=["one", "three", "twice"])
def test_a_steps_load_is_that_of_its_packs(fit, accumulate, more):
    """Also where the optimiser runs a pack twice, once for its norm."""
    loads = Loads()
    fit("sft", ONE, *more, accumulate=accumulate, momentum=None if more else 0.0, callbacks=[loads])
    assert loads.loads
    for load, tokens in zip(loads.loads, loads.tokens, strict=True):
        assert load.sum(1).tolist() == [2 * tokens] * 3


@pytest.mark.parametrize(("stage", "overrides"), [("sft", [ONE]), ("rl", RL)])
def test_the_bias_is_frozen_by_default_and_moves_with_the_rate(fit, stage, overrides):
    """In RL the reference's pass and the rollouts are not counted: the load is that of the steps' packs."""
    frozen, _ = fit(stage, *overrides)
    assert not any(bias.any() for bias in biases(frozen))  # a fresh model's are zero
    loads = Loads()
    moved, trainer = fit(stage, *overrides, "router.bias_update_rate=0.01", callbacks=[loads])
    assert len(loads.loads) == trainer.global_step
    for load, tokens in zip(loads.loads, loads.tokens, strict=True):
        assert load.sum(1).tolist() == [2 * tokens] * 3
    expected = sum(0.01 * torch.sign(load.double().mean(1, keepdim=True) - load) for load in loads.loads)
    torch.testing.assert_close(torch.stack(biases(moved)).double(), expected, atol=1e-6, rtol=0)


def test_the_auxiliary_loss_weighs_the_same_however_the_step_is_cut(fit):
    """Three packs of about equal length, or all in one: what the loss adds to the step is about the same."""
    added = []
    for accumulate in (1, 3):
        one = ONE if accumulate == 1 else "data.phases=[{max_length: 2000, epochs: 1, lr: [0.5, 0.5]}]"
        without, with_it = (
            torch.cat([gate.weight.detach() for gate in fit("sft", one, *more, accumulate=accumulate)[0].router.gates])
            for more in ([], ["router.aux_loss_weight=0.5"])
        )
        added.append(with_it - without)
    whole, cut = added
    assert whole.abs().max() > 1e-5
    assert (whole - cut).norm() < 0.2 * whole.norm()


def test_a_wrong_setting_is_refused_before_anything_is_built(fit):
    with pytest.raises(Exception, match=r"router.bias_update_rate=-1"):
        fit("sft", ONE, "router.bias_update_rate=-1")
