"""Stage 3 with its objectives: the step does not depend on its packs, figures are those of the whole step, the engine's
experts are trained through, the mismatch is corrected where asked to."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers.logger import DummyLogger
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from kimivl.config import CONF
from kimivl.rl.experience import TrajectoryBatch
from kimivl.stages.rl.module import StepFigures

METHODS = sorted(path.stem for path in (CONF / "objective").glob("*.yaml"))
RL = [
    "reward._target_=even_reward.EvenReward",
    "data.problems=4",
    "data.responses=3",
    "data.max_new_tokens=6",
    "data.rollouts=null",
    "model.text_config.num_hidden_layers=2",
    "model.vision_config.num_hidden_layers=1",
]
TWO_STEPS = ["data.phases=[{epochs: 1, lr: [0.1, 0.1]}]", "data.updates=2"]


class Steps(Callback):
    """The figures of each optimiser step, the experts that its packs were routed to, and what was recorded."""

    def __init__(self) -> None:
        self.figures: list[dict[str, float]] = []
        self.routed: list[torch.Tensor] = []
        self.recorded: list[torch.Tensor | None] = []
        self.batches: list[TrajectoryBatch] = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        gates = [m for m in module.model.modules() if isinstance(m, DeepseekV3TopkRouter)]
        self._seen: list[torch.Tensor] = []
        self._hooks = [gate.register_forward_hook(lambda *call: self._seen.append(call[2][2])) for gate in gates]

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        for hook in self._hooks:
            hook.remove()
        self.routed.append(torch.stack(self._seen, 1))
        self.recorded.append(batch.experts)
        self.batches.append(batch)
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.figures.append({name: float(value) for name, value in trainer.callback_metrics.items()})


class Record(DummyLogger):
    """Every logged figure, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, list[float]] = defaultdict(list)
        self.steps: list[int | None] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.steps.append(step)
        for name, value in metrics.items():
            self.values[name].append(float(value))


def weights(module) -> torch.Tensor:
    return torch.cat([weight.detach().flatten() for weight in module.parameters()])


@pytest.mark.parametrize("name", METHODS)
def test_the_update_and_its_figures_do_not_depend_on_the_packs(fit, name):
    """One pack a step or three: the same weights after two steps, of which the second is off-policy."""
    runs: list[tuple[Any, Steps]] = []
    for accumulate in (1, 3):
        steps = Steps()
        module, _ = fit("rl", *RL, *TWO_STEPS, f"objective={name}", accumulate=accumulate, callbacks=[steps])
        runs.append((module, steps))
    (whole, at_once), (cut, in_parts) = runs
    torch.testing.assert_close(weights(cut), weights(whole), atol=2e-5, rtol=1e-4)
    for one, three in zip(at_once.figures, in_parts.figures, strict=True):
        for figure in ("train/loss", "policy/kl", "policy/nll_per_token", "policy/ratio_max"):
            assert three[figure] == pytest.approx(one[figure], abs=1e-4, rel=1e-3), figure
    first, second = at_once.figures
    assert first["policy/kl"] == pytest.approx(0, abs=1e-9) and first["policy/ratio_max"] == pytest.approx(1, abs=1e-4)
    assert second["policy/kl"] > 1e-7


def test_training_is_timed_once_an_iteration(fit):
    logger = Record()
    two = ["data.phases=[{epochs: 2, lr: [0.1, 0.1]}]", "data.updates=2"]
    fit("rl", *RL, *two, accumulate=2, logger=logger, log_every_n_steps=1)
    for phase in ("generate", "reference", "train"):
        assert len(logger.values[f"perf/{phase}_s"]) == 2 and min(logger.values[f"perf/{phase}_s"]) > 0
    assert logger.steps == sorted(logger.steps), "figures of a step do not come together"


def test_tau_follows_its_schedule(fit):
    steps = Steps()
    two = ["data.phases=[{epochs: 2, lr: [0.1, 0.1]}]", "data.updates=1"]
    fit("rl", *RL, *two, "objective.tau=0.4", "objective.tau_end=0.0", callbacks=[steps])
    assert [figures["policy/tau"] for figures in steps.figures] == pytest.approx([0.4, 0.2])


REPLAY = ["rollout.return_experts=true", "model.text_config.num_hidden_layers=3"]


def test_training_goes_through_the_experts_of_the_engine(fit):
    """Also in the second step, whose routers have moved since; a replayed reference is that of the first step."""
    steps = Steps()
    fit("rl", *RL, *TWO_STEPS, *REPLAY, accumulate=2, callbacks=[steps])
    assert len(steps.routed) == 4
    for routed, recorded in zip(steps.routed, steps.recorded, strict=True):
        assert recorded is not None and recorded.shape == routed.shape
        known = recorded[:, 0, 0] >= 0
        assert torch.equal(routed[known].sort(-1).values, recorded[known].long().sort(-1).values)
        assert 0 < (~known).sum() <= 12
    assert steps.figures[0]["policy/ratio_max"] == pytest.approx(1, abs=1e-4)


def test_replay_can_be_switched_off(fit):
    """Then a pack's record is not looked at, even where it is of another routing."""
    steps = Steps()
    module, _ = fit("rl", *RL, *TWO_STEPS, *REPLAY, callbacks=[steps])
    batch = steps.batches[-1]
    assert batch.experts is not None
    free, other = (TrajectoryBatch(batch.pack, batch.trajectories, e) for e in (None, (batch.experts + 1) % 8))
    with torch.no_grad():
        wanted = module.log_probs(free)
        replayed = module.log_probs(other)
        module.router_replay = False
        ignored = module.log_probs(other)
    assert torch.equal(ignored, wanted) and not torch.allclose(replayed, wanted, atol=1e-4)


def test_mismatch_is_measured_and_corrected(fit):
    """An engine whose log-probabilities are 1 too low: every token's weight is capped, or every sequence masked."""
    engine = "rollout._target_=other_engine.OtherEngine"
    for change, weight, counts in (
        ([], 1.0, {"policy/truncated_tokens": 0, "policy/masked_sequences": 0}),
        (["module.mismatch.importance=token"], 2.0, {"policy/masked_sequences": 0}),
        (["module.mismatch.mask=geometric_mean"], 0.0, {"policy/masked_sequences": 12}),
    ):
        module, trainer = fit("rl", *RL, *TWO_STEPS, engine, *change)
        data = trainer.datamodule
        assert data.figures["policy/mismatch_p50"] == pytest.approx(1, abs=1e-3)
        assert data.figures["policy/mismatch_max"] == pytest.approx(1, abs=1e-2)
        assert data.figures["policy/mismatch_kl"] == pytest.approx(2.71828 - 2, abs=1e-2)
        assert counts.items() <= data.figures.items()
        torch.testing.assert_close(data.experience.weight, torch.full_like(data.experience.weight, weight))
        assert weights(module).isfinite().all()


def test_figures_of_a_step_are_those_of_its_tokens():
    figures = StepFigures()
    for pack, (tokens, kl) in enumerate([(10, 1.0), (30, 2.0), (0, 7.0)]):
        values = {"policy/kl": kl, "policy/ratio_max": kl, "train/loss": kl, "policy/nonfinite_tokens": 1.0}
        for _ in range(2):  # an optimiser may run a pack twice
            figures.add(pack, {name: torch.tensor(value) for name, value in values.items()}, torch.tensor(tokens))
    found = {name: float(value) for name, value in figures.take().items()}
    assert found == {"policy/kl": 1.75, "policy/ratio_max": 7.0, "train/loss": 10.0, "policy/nonfinite_tokens": 3.0}
    figures.add(0, {"policy/kl": torch.tensor(3.0)}, torch.tensor(5))
    assert float(figures.take()["policy/kl"]) == 3.0
