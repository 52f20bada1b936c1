"""An RL run that was interrupted goes on bit for bit: between and inside iterations, and while it collects."""

import logging
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kimivl.callbacks import Checkpoint, Preemption
from kimivl.config import Interrupted
from kimivl.rl.collect import Collector
from kimivl.rl.hf import HFRolloutEngine
from kimivl.runtime.interruption import listening

SHORT = [
    "data.phases=[{epochs: 3, lr: [0.1, 0.1]}]",
    "data.problems=4",
    "data.responses=3",
    "data.max_new_tokens=10",
    "data.updates=2",
    "module.freeze=[]",
    "reward._target_=even_reward.EvenReward",
]
PARTIAL = [*SHORT, "data.budget=4", "data.rounds=2", "data.max_length=80", "sampler.gates.zero_advantage=true"]
CONCURRENT = ["~rollout", "+rollout={_target_: fake_rollouts.concurrent_engine, _partial_: true}"]


def every_step(folder: Path) -> dict:
    """A checkpoint after every step, named by it."""
    keep = Checkpoint(dirpath=folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    return {"enable_checkpointing": True, "callbacks": [keep]}


def weights(module) -> list[torch.Tensor]:
    return [weight.detach().clone() for weight in module.model.parameters()]


def equal(a, b) -> bool:
    return all(torch.equal(left, right) for left, right in zip(weights(a), weights(b), strict=True))


def records(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in (folder / "rollouts").glob("*.jsonl")}


@pytest.fixture
def whole(fit, tmp_path):
    module, trainer = fit("rl", *PARTIAL, **every_step(tmp_path / "steps"))
    return module, trainer, records(tmp_path)


def test_resumed_anywhere_with_partial_rollouts_and_several_packs(fit, whole, tmp_path):
    module, trainer, lines = whole
    assert trainer.global_step == 6 and sorted(lines) == [f"{n:06d}.jsonl" for n in range(3)]
    assert trainer.datamodule.figures["perf/packs_per_step"] > 1
    for step in (1, 4, 5):  # inside, at the end of, and inside an iteration
        [checkpoint] = (tmp_path / "steps").glob(f"*step={step}.ckpt")
        torch.load(checkpoint, weights_only=True)
        resumed, again = fit("rl", *PARTIAL, ckpt_path=checkpoint)
        assert again.global_step == 6 and equal(resumed, module), step
        assert records(tmp_path) == lines
    with pytest.raises(ValueError, match="inside iteration 0, whose responses were dealt into other packs: go on"):
        fit("rl", *PARTIAL, "data.max_length=160", ckpt_path=tmp_path / "steps/step=1.ckpt")
    trainer.save_checkpoint(tmp_path / "finished.ckpt")
    finished, again = fit("rl", *PARTIAL, ckpt_path=tmp_path / "finished.ckpt")
    assert equal(finished, module) and records(tmp_path) == lines  # and no rollouts for an iteration that never comes
    assert again.datamodule.experience.iteration == 2


def test_responses_to_other_problems_are_not_used_again(whole):
    _, trainer, _ = whole
    data = trainer.datamodule
    before = data._policy()
    assert data._policy() == before
    data.sampler.digest = "of other shards"
    assert data._policy() != before


def test_an_evaluation_waits_for_the_rollouts_ahead(whole):
    module, trainer, _ = whole
    events = []
    trainer.datamodule._ahead = SimpleNamespace(settle=lambda: events.append("settled"))
    module.engine.sync = lambda: events.append("synced")
    module.on_validation_epoch_start()
    module.on_test_epoch_start()
    assert events == ["settled", "synced"] * 2


def test_an_engine_that_dies_loses_nothing(fit, tmp_path, monkeypatch):
    """It dies in the second iteration: the run goes on with what was there, and comes out the same."""
    module, _ = fit("rl", *SHORT)
    lines = records(tmp_path)
    shutil.rmtree(tmp_path / "rollouts")
    stream, asked = HFRolloutEngine.stream, []

    def dying(self, requests, sampling):
        for count, (number, response) in enumerate(stream(self, requests, sampling)):
            if len(asked) == 17 and count == 5:
                raise RuntimeError("out of memory")
            asked.append(requests[number].seed)
            yield number, response

    monkeypatch.setattr(HFRolloutEngine, "stream", dying)
    keep = every_step(tmp_path / "steps")
    with pytest.raises(ValueError, match="failed in iteration 1 after 5 of 12 responses: out of memory; they are kept"):
        fit("rl", *SHORT, **keep)
    assert len(list((tmp_path / "rollouts/000001.partial").iterdir())) == 1
    asked.append(None)
    resumed, _ = fit("rl", *SHORT, ckpt_path=tmp_path / "steps/step=2.ckpt")
    assert len(set(asked)) == len(asked) == 12 * 3 + 1  # each was drawn once
    assert equal(resumed, module) and records(tmp_path) == lines
    assert (tmp_path / "rollouts/000002.partial").is_dir()  # until a checkpoint has its experience
    resumed.trainer.save_checkpoint(tmp_path / "steps/end.ckpt")
    assert not list((tmp_path / "rollouts").glob("*.partial"))


@pytest.mark.parametrize("iteration", [0, 1, 2])
@pytest.mark.parametrize("fault", [signal.SIGTERM, RuntimeError("out of memory")], ids=["signal", "engine"])
def test_stopped_in_the_rollouts(fit, tmp_path, monkeypatch, iteration, fault):
    """No checkpoint but the one that the stop leaves: the run goes on from there, with the responses so far."""
    module, _ = fit("rl", *PARTIAL)
    lines = records(tmp_path)
    shutil.rmtree(tmp_path / "rollouts")
    stream, begun = HFRolloutEngine.stream, []

    def stopping(self, requests, sampling):
        begun.append(len(requests))
        for count, found in enumerate(stream(self, requests, sampling)):
            if count == 3 and not fault_seen and trainer_iteration(self) == iteration:
                fault_seen.append(True)
                if isinstance(fault, Exception):
                    raise fault
                signal.raise_signal(fault)
            yield found

    fault_seen: list[bool] = []
    engines: dict[int, int] = {}

    def trainer_iteration(engine) -> int:
        return engines.get(id(engine), -1)

    def counting(collector, engine, *args, **kwargs):
        engines[id(engine)] = args[1]
        return collect(collector, engine, *args, **kwargs)

    collect = Collector.collect
    monkeypatch.setattr(Collector, "collect", counting)
    monkeypatch.setattr(HFRolloutEngine, "stream", stopping)
    checkpoint = tmp_path / "last.ckpt"
    expected = ValueError if isinstance(fault, Exception) else Interrupted
    with listening(tmp_path), pytest.raises(expected, match="are kept"):
        fit("rl", *PARTIAL, callbacks=[Preemption(str(checkpoint))])
    assert fault_seen and checkpoint.exists() == (iteration > 0)
    assert list((tmp_path / f"rollouts/{iteration:06d}.partial").iterdir())
    resumed, again = fit("rl", *PARTIAL, ckpt_path=checkpoint if iteration else None)
    assert again.global_step == 6 and equal(resumed, module) and records(tmp_path) == lines


def test_rollouts_ahead_of_training(fit, tmp_path, caplog):
    ahead = [*SHORT, *CONCURRENT, "data.max_behind=1", "data.off_policy=importance"]
    _, trainer = fit("rl", *ahead, **every_step(tmp_path / "steps"))
    data = trainer.datamodule
    assert data.figures["rollout/age"] == 1 and data.experience.iteration == 2
    assert (data.experience.version == 1).all() and "perf/waited_s" in data.figures
    assert len(data.experience.weight.unique()) > 1 and data.experience.weight.max() <= 2  # cut at mismatch.cap
    with caplog.at_level(logging.WARNING):
        _, again = fit("rl", *ahead, ckpt_path=tmp_path / "steps/step=3.ckpt")
    assert "the rollouts of 1 iterations ran ahead when the checkpoint was saved" in caplog.text
    assert again.global_step == 6 and again.datamodule.figures["rollout/age"] == 0  # drawn again, by a fresh policy


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.max_behind=1"], "data.max_behind=1: all that an earlier policy wrote would be left out"),
        (["data.max_behind=1", "data.off_policy=importance"], "HFRolloutEngine cannot generate while the model trains"),
        (["data.off_policy=keep"], "data.off_policy=keep: choose drop or importance"),
        (["data.max_length=50"], "data.max_length=50: the longest prompt and a response of data.max_new_tokens=10"),
        (["data.responses=1"], "data.responses=1: the advantage of a response compares it with others"),
        (["data.updates=5"], "data.updates=5 must be from 1 to data.problems=4"),
        (["data.budget=0"], "data.budget=0 must be at least 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(fit, overrides, message):
    with pytest.raises(Exception, match=message):
        fit("rl", *SHORT, *overrides)
