"""The audit as a callback of real trainers: interrupted anywhere, resumed, and proven from its files."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from audited_run import Data, Module, make_trainer
from command import ROOT
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from kimivl.callbacks.audit import Audit
from kimivl.data.audit.verify import verify

ACCUMULATE, STEPS = 2, 8


class Break(Callback):
    """Dies like a killed process, at a hook of a global step; saves before it where it is told to."""

    def __init__(self, step: int, hook: str, save: Path | None = None) -> None:
        self.step, self.save, self.fired = step, save, False
        setattr(self, hook, self._die)

    def _die(self, trainer, *args):
        if trainer.global_step == self.step and not trainer.fit_loop._should_accumulate():
            if self.save is not None:
                trainer.save_checkpoint(self.save)
            self.fired = True
            raise KeyboardInterrupt


@pytest.fixture
def fit(tmp_path):
    """(callbacks, before the audit or after it) -> one process start of the run in ``tmp_path``."""
    saved = tmp_path / "last.ckpt"

    def start(before=(), after=()):
        trainer = make_trainer(tmp_path, ACCUMULATE, before, after, devices=1)
        try:
            trainer.fit(Module(), Data(), ckpt_path=saved if saved.exists() else None)
        except SystemExit:  # Lightning's answer to an interruption
            return trainer
        return trainer

    start.saved = saved
    return start


def test_a_run_is_proven_from_its_files(fit, tmp_path):
    fit()
    report = verify(tmp_path)
    assert report.verified, report.all_problems
    assert [(epoch.steps, epoch.packs_per_step) for epoch in report.epochs] == [(STEPS, ACCUMULATE)] * 2
    assert [epoch.figures.quarantined for epoch in report.epochs] == [{"bad_image": 1}] * 2
    assert sorted(path.name for path in (tmp_path / "audit").glob("epoch-*")) == [
        "epoch-000.parquet",
        "epoch-001.parquet",
    ]


# (hook, global step there, whether a checkpoint is saved there); no checkpoint is saved in the middle of a step
PLACES = [
    *(("on_train_batch_end", step, saves) for step in (3, 8, 13, 16) for saves in (True, False)),
    *(("on_train_epoch_end", step, saves) for step in (8, 16) for saves in (True, False)),
    *(("on_before_optimizer_step", step, False) for step in (3, 8, 13)),
]


@pytest.mark.parametrize("first", ["audit", "break"])
@pytest.mark.parametrize("hook, step, saves", PLACES)
def test_an_interruption_anywhere_leaves_a_whole_audit(fit, tmp_path, hook, step, saves, first):
    broken = Break(step, hook, fit.saved if saves else None)
    fit(**{"before" if first == "break" else "after": [broken]})
    fit()
    report = verify(tmp_path)
    assert report.verified, report.all_problems
    assert broken.fired
    assert [epoch.figures is not None for epoch in report.epochs] == [True, True]


def test_an_epoch_that_was_interrupted_has_no_file(fit, tmp_path):
    fit(after=[Break(11, "on_train_batch_end", fit.saved)])
    report = verify(tmp_path)
    assert report.verified and [epoch.figures is not None for epoch in report.epochs] == [True, False]
    assert report.epochs[1].steps == 3


def test_a_resume_into_a_finished_epoch_takes_its_file_back(fit, tmp_path):
    fit(after=[ModelCheckpoint(tmp_path, "last", every_n_train_steps=6), Break(10, "on_train_batch_end")])
    assert (tmp_path / "audit" / "epoch-000.parquet").exists()
    fit(after=[Break(7, "on_train_batch_end")])  # it went on from step 6
    assert not (tmp_path / "audit" / "epoch-000.parquet").exists()
    assert verify(tmp_path).verified
    fit()
    report = verify(tmp_path)
    assert report.verified and report.attempts == 3, report.all_problems


def test_a_file_lost_by_a_kill_at_the_very_end_is_made_by_the_next_start(fit, tmp_path):
    fit().save_checkpoint(fit.saved)
    (tmp_path / "audit" / "epoch-001.parquet").unlink()
    fit()
    assert (tmp_path / "audit" / "epoch-001.parquet").exists() and verify(tmp_path).verified


def test_a_stage_without_planned_epochs_leaves_nothing(tmp_path):
    trainer = SimpleNamespace(datamodule=SimpleNamespace(), is_global_zero=True, global_step=0)
    audit = Audit(str(tmp_path / "audit"))
    audit.on_train_start(trainer, None)
    audit.on_train_batch_start(trainer, None, object(), 0)
    audit.on_train_batch_end(trainer, None, None, object(), 0)
    audit.on_save_checkpoint(trainer, None, {})
    audit.on_fit_end(trainer, None)
    assert not (tmp_path / "audit").exists()


@pytest.mark.slow
@pytest.mark.parametrize("killed", [(1, 3), (0, 7)])
def test_two_ranks_killed_and_resumed_by_one(tmp_path, killed):
    """Two processes with gloo make 4 packs a step; the one that goes on makes as many by accumulation."""
    script = [str(ROOT / "tests" / "audited_run.py"), str(tmp_path)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    died = subprocess.run([*torchrun, *script, "2", *map(str, killed)], capture_output=True, cwd=ROOT / "tests")
    assert died.returncode != 0
    assert verify(tmp_path).verified, verify(tmp_path).all_problems
    done = subprocess.run([sys.executable, *script, "4"], capture_output=True, text=True, cwd=ROOT / "tests")
    assert done.returncode == 0, done.stderr
    report = verify(tmp_path)
    assert report.verified and report.attempts == 2, report.all_problems
    assert [epoch.figures.trained for epoch in report.epochs] == [31, 31]  # and one hole
