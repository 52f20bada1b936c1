"""Faults of whole runs, as a user meets them: a sentence, an end in good time, and the same curve afterwards."""

import json
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from command import history, train
from without import without

pytestmark = pytest.mark.slow

PHASES = "data.phases=[{max_length: 1024, epochs: 1, lr: [1e-3, 1e-4]}]"
COMMON = ["stage=sft", "debug=miniature", "logger=none", "test=false", PHASES]
EACH_STEP = "callbacks.checkpoint.every_n_train_steps=1"
TWO = ["trainer.devices=2", "trainer.accumulate_grad_batches=1"]
LOSS, NORM = "train/loss", "train/grad_norm"


def fault(what: str, step: int, rank: int = 0) -> list[str]:
    settings = {"_target_": "fault_at.FaultAt", "what": what, "step": step, "rank": rank}
    return [f"+callbacks.fault_{what}.{name}={value}" for name, value in settings.items()]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def alone(root: Path) -> dict[int, float]:
    """The loss of an uninterrupted run of one process."""
    train(*COMMON, f"paths.root={root}", "name=one")
    return history(root / "one" / "sft", LOSS)


class Run:
    """A run that is typed again after each fault."""

    def __init__(self, root: Path, name: str, *settings: str) -> None:
        self.folder = root / name / "sft"
        self.command = [*COMMON, f"paths.root={root}", f"name={name}", EACH_STEP, *settings]

    def fails(self, *overrides: str, within: float = 60) -> str:
        """What it says; it ends within so many seconds of its fault, a minute if a rank fails or dies."""
        done = train(*self.command, *overrides, check=False)
        assert done.returncode, done.stdout
        assert all(time.time() - float(struck) < within for struck in re.findall(r"struck at (\S+)", done.stderr))
        self.code = done.returncode
        return done.stderr

    def ends(self, *overrides: str) -> None:
        train(*self.command, *overrides)

    @property
    def said(self) -> dict:
        return json.loads((self.folder / "run.json").read_text())


def test_two_ranks_go_on_after_each_fault_with_the_curve_of_an_uninterrupted_run(root):
    run = Run(root, "struck", *TWO)
    assert "rank 1" in run.fails(*fault("kill", 2, rank=1))
    assert "rank 1 (pid" in run.said["error"]
    told = "+callbacks.stop={_target_: stop_at.StopAt, step: 2, signal_name: SIGUSR2}"  # what fails after it, fails
    assert "the camera is broken" in run.fails(told, *fault("raise", 3, rank=1))
    assert (run.said["status"], run.said["error"]) == ("failed", "rank 1: the camera is broken")
    assert "rank 0" in run.fails(*fault("kill", 3, rank=0))
    hung = run.fails(*fault("sleep", 4, rank=1), "callbacks.watchdog.step_minutes=0.2", within=240)
    assert "rank 1: in fault_at.py" in hung and "nothing got on for" in run.said["error"]
    assert "_strike" in (run.folder / "stacks/rank-1.txt").read_text()
    assert (run.folder / "stacks/rank-0.txt").is_file()
    run.ends()
    train(*COMMON, *TWO, f"paths.root={root}", "name=two")
    whole = root / "two" / "sft"
    assert len(history(whole, LOSS)) == 4
    assert history(run.folder, LOSS) == history(whole, LOSS) and history(run.folder, NORM) == history(whole, NORM)


def test_one_process_goes_on_after_each_fault_with_the_curve_of_an_uninterrupted_run(root, alone):
    run = Run(root, "alone")
    run.fails(*fault("kill", 2))  # what the system does when the host's memory is used up
    assert run.code == -signal.SIGKILL
    stopped = run.fails(*fault("not_a_number", 3), "callbacks.nonfinite.policy=stop")
    assert "step 3: the loss is not finite" in stopped and "Traceback" not in stopped
    assert (run.folder / "nonfinite/step-000003-rank0.pt").is_file() and "step 3" in run.said["error"]
    full = run.fails(*fault("memory", 4))
    assert "out of memory while training, step 4, on a pack of" in full and "Traceback" not in full
    assert "kimivl memory stage=sft" in full
    last = run.folder / "checkpoints/last.ckpt"
    whole = last.read_bytes()
    last.write_bytes(whole[:-1000])
    assert f"remove {last} to start anew" in run.fails() and run.said["status"] == "failed"
    last.write_bytes(whole)
    assert "another seed (1, now 2)" in run.fails("seed=2")
    run.ends()
    assert history(run.folder, LOSS) == alone
    refused = run.fails("stage=long_cot", f"ckpt_path={last}", f"init_from={run.folder / 'model'}")
    assert "is a checkpoint of stage=sft, and this is stage=long_cot" in refused
    other = run.fails("model.vision_config.hidden_size=32", f"ckpt_path={last}", "name=another")
    assert "Traceback" not in other


def test_a_finished_run_is_gone_on_from_only_as_it_was(root, alone):
    """More epochs are another run, which begins from its model."""
    run, longer = Run(root, "done"), PHASES.replace("epochs: 1", "epochs: 2")
    run.ends()
    said = (run.folder / "run.json").read_bytes()
    for change in (longer, "seed=2", "optimizer.momentum=0.5"):
        refused = run.fails("ckpt_path=last", change)
        assert "holds a finished run with another" in refused and "init_from=" in refused and "Traceback" not in refused
    assert (run.folder / "run.json").read_bytes() == said and (run.folder / "metrics.json").is_file()
    run.ends("ckpt_path=last")
    assert history(run.folder, LOSS) == alone and run.said["id"] == json.loads(said)["id"]
    last = f"ckpt_path={run.folder / 'checkpoints/last.ckpt'}"
    used_up = run.fails(last, longer, "name=longer")
    assert "ended after 1 epochs, and data.phases has 2" in used_up and "init_from=" in used_up


def test_a_logger_that_cannot_begin_is_the_error_of_the_run(root):
    words = [word for word in COMMON if word != "logger=none"]
    done = train(*words, "logger=wandb", f"paths.root={root}", "name=unknown", check=False, WANDB_MODE="unknown")
    said = json.loads((root / "unknown/sft/run.json").read_text())
    assert done.returncode and said["status"] == "failed" and said["error"]


def test_memory_that_ran_out_is_got_on_with_by_checkpointed_activations(root, alone):
    run = Run(root, "tight")
    run.fails(*fault("memory", 3))
    run.ends("activation_checkpointing=full")
    assert history(run.folder, LOSS) == pytest.approx(alone, rel=1e-5)


def test_a_bad_loss_on_one_rank_is_left_out_on_both(root):
    run = Run(root, "bad", *TWO)
    run.ends(*fault("not_a_number", 2, rank=1))
    assert history(run.folder, "train/nonfinite_steps") == {1: 1.0, 2: 1.0, 3: 1.0}
    assert [file.name for file in (run.folder / "nonfinite").iterdir()] == ["step-000002-rank1.pt"]
    norms = history(run.folder, NORM)
    assert not torch.isfinite(torch.tensor(norms.pop(1))) and torch.isfinite(torch.tensor([*norms.values()])).all()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk on which one checkpoint of the run fits, and not the next beside it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)]
    if (done := subprocess.run(mount, capture_output=True, text=True)).returncode:
        without(f"no small disk can be mounted here: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def resize(disk: Path, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)


@pytest.mark.parametrize("loggers", ["none", "[csv,tensorboard,wandb]"])
def test_a_full_disk_stops_the_run_and_it_goes_on_when_there_is_room(root, alone, small_disk, loggers):
    where = [f"paths.output_dir={small_disk}/run", f"hydra.run.dir={small_disk}/run"]
    run = Run(root, "one", *where, f"logger={loggers}")
    run.folder = small_disk / "run"
    said = run.fails()
    assert "last.ckpt could not be written: the disk is full" in said and "Traceback" not in said
    assert [file.name for file in (run.folder / "checkpoints").iterdir()] == ["last.ckpt"]
    resize(small_disk, "64m")
    run.ends()
    assert history(run.folder, LOSS) == alone


def test_a_shared_model_goes_on_after_each_fault_with_the_curve_of_an_uninterrupted_run(root, small_disk):
    """A step that is left out, on both ranks; a rank that dies; a disk on which the ranks' files have no room."""
    bad, shared = fault("not_a_number", 2, rank=1), [*TWO, "strategy=fsdp"]
    whole = Run(root, "shared", *shared)
    whole.ends(*bad)
    assert history(whole.folder, "train/nonfinite_steps") == {1: 1.0, 2: 1.0, 3: 1.0}
    run = Run(root, "struck", *shared, f"paths.output_dir={small_disk}/run", f"hydra.run.dir={small_disk}/run")
    run.folder = small_disk / "run"
    resize(small_disk, "64m")
    assert "rank 1" in run.fails(*bad, *fault("kill", 3, rank=1))
    assert (run.folder / "nonfinite/step-000002-rank1.pt").is_file() and "rank 1 (pid" in run.said["error"]
    resize(small_disk, "24m")
    said = run.fails()
    assert "last.ckpt could not be written: the disk is full" in said and "Traceback" not in said
    assert "last.ckpt could not be written" in run.said["error"]
    assert [file.name for file in (run.folder / "checkpoints").iterdir()] == ["last.ckpt"]
    resize(small_disk, "64m")
    run.ends()
    losses = history(whole.folder, LOSS)
    assert len(losses) == 4 and history(run.folder, LOSS) == losses
