"""Checkpoint files: whole or not there, written while training goes on, and their failures said."""

import threading
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from kimivl.callbacks import Checkpoint, CheckpointFiles
from kimivl.callbacks.checkpoint import snapshot, tensor_bytes
from kimivl.runtime.faults import MachineFault

STATUS = Path("/proc/self/status")
GB = 1e9


def megabytes(field: str) -> int:
    return int(STATUS.read_text().split(f"{field}:")[1].split()[0]) // 1024


@pytest.mark.skipif(not STATUS.exists(), reason="the system does not say how much memory a process has")
def test_a_checkpoint_is_not_put_together_in_memory(tmp_path):
    checkpoint = {"state_dict": {f"layer.{n}": torch.zeros(4 * 2**20) for n in range(12)}}  # 192 MB
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = megabytes("VmRSS")
    CheckpointFiles().save_checkpoint(checkpoint, tmp_path / "new" / "last.ckpt")
    assert megabytes("VmHWM") - before < 100
    assert len(torch.load(tmp_path / "new" / "last.ckpt")["state_dict"]) == 12


class Unsavable:
    def __reduce__(self):
        raise OSError("no space left on device")


@pytest.fixture
def files(tmp_path):  # whose folder stays until the last file is complete
    made = CheckpointFiles()
    yield made
    made.teardown()


@pytest.fixture
def disk(monkeypatch):
    """A disk that stands still until it is told to go on."""
    save, goes_on = torch.save, threading.Event()

    def slow(*args):
        assert goes_on.wait(30)
        save(*args)

    monkeypatch.setattr(torch, "save", slow)
    return goes_on


def test_a_checkpoint_that_breaks_off_leaves_the_one_before(files, tmp_path):
    path = tmp_path / "last.ckpt"
    files.save_checkpoint({"step": 1}, path)
    with pytest.raises(MachineFault, match="no space"):
        files.save_checkpoint({"step": 2, "rest": Unsavable()}, path)
    assert torch.load(path) == {"step": 1} and [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_in_the_background_it_is_saved_as_it_was(files, disk, tmp_path):
    path, weight, progress = tmp_path / "last.ckpt", torch.ones(3), {"step": 1, "losses": [1.0]}
    with files.in_background(GB):
        files.save_checkpoint({"weight": weight, "progress": progress}, path)
    assert not path.exists()
    weight.zero_()
    progress["step"] = 2
    progress["losses"].append(0.5)
    disk.set()
    files.teardown()
    saved = torch.load(path)
    assert saved["weight"].tolist() == [1, 1, 1] and saved["progress"] == {"step": 1, "losses": [1.0]}


def test_a_save_outside_is_on_the_disk_and_comes_after_the_one_before(files, disk, tmp_path):
    path = tmp_path / "last.ckpt"
    with files.in_background(GB):
        files.save_checkpoint({"step": 1}, path)
    threading.Timer(0.2, disk.set).start()
    files.save_checkpoint({"step": 2}, path)
    assert torch.load(path) == {"step": 2}
    assert not any(thread.name == "checkpoint" for thread in threading.enumerate())


def test_one_copy_at_a_time(files, disk, tmp_path):
    with files.in_background(GB):
        files.save_checkpoint({"step": 1}, tmp_path / "a.ckpt")
        threading.Timer(0.2, disk.set).start()
        files.save_checkpoint({"step": 2}, tmp_path / "b.ckpt")
        assert (tmp_path / "a.ckpt").exists()


def test_what_is_too_large_to_copy_is_written_at_once(files, tmp_path):
    with files.in_background(999):
        files.save_checkpoint({"weight": torch.zeros(250)}, tmp_path / "last.ckpt")
        assert (tmp_path / "last.ckpt").exists()


def test_a_failure_is_raised_once(files, tmp_path):
    with files.in_background(GB):
        files.save_checkpoint({"rest": Unsavable()}, tmp_path / "last.ckpt")
    files._wait()
    with pytest.raises(MachineFault, match="no space"):
        files.raise_failure()
    files.raise_failure()
    assert not list(tmp_path.iterdir())


def test_a_save_that_works_makes_up_for_one_that_did_not(files, tmp_path, caplog):
    with files.in_background(GB):
        files.save_checkpoint({"rest": Unsavable()}, tmp_path / "last.ckpt")
    files.save_checkpoint({"step": 2}, tmp_path / "last.ckpt")
    assert torch.load(tmp_path / "last.ckpt") == {"step": 2} and "no space" in caplog.text
    files.raise_failure()


def test_the_end_of_a_fit_says_what_went_wrong(files, tmp_path, caplog):
    with files.in_background(GB):
        files.save_checkpoint({"rest": Unsavable()}, tmp_path / "last.ckpt")
        with pytest.raises(MachineFault, match="no space"):
            files.teardown()
        files.save_checkpoint({"rest": Unsavable()}, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match="the loss is not a number"):
        try:
            raise ValueError("the loss is not a number")
        except ValueError:
            files.teardown()  # as Lightning does it
            raise
    assert "no space" in caplog.text


def test_a_snapshot():
    weight = torch.arange(4.0, requires_grad=True)
    state = OrderedDict(a=weight, tied=weight, part=weight.detach()[:2])
    state._metadata = {"": {"version": 1}}
    copied = snapshot({"state": state, "list": [weight.detach(), (1, "a")], "none": None})
    assert copied["state"]["a"] is copied["state"]["tied"] and not copied["state"]["a"].requires_grad
    assert copied["state"]._metadata == state._metadata and list(copied["state"]) == list(state)
    assert copied["state"]["part"].untyped_storage().nbytes() == 8  # not the whole that it is a view of
    assert copied["list"][1] == (1, "a") and copied["none"] is None
    with torch.no_grad():
        weight.zero_()
    assert copied["list"][0].tolist() == [0, 1, 2, 3]
    assert tensor_bytes({"a": [torch.zeros(3), (torch.zeros(2, dtype=torch.int8), 5)]}) == 14


@pytest.fixture
def trainer(files, monkeypatch, tmp_path):
    def save(self, trainer, *args):
        files.save_checkpoint(trainer.state, tmp_path / "last.ckpt")

    monkeypatch.setattr(ModelCheckpoint, "on_train_batch_end", save)
    monkeypatch.setattr(ModelCheckpoint, "on_train_epoch_end", lambda *args: None)
    return SimpleNamespace(strategy=SimpleNamespace(checkpoint_io=files), state={"step": 1}, is_last_batch=False)


def test_saves_between_steps_are_in_the_background(trainer, files, disk, tmp_path):
    callback = Checkpoint(dirpath=str(tmp_path), every_n_train_steps=1)
    callback.on_train_batch_end(trainer, None)
    assert not (tmp_path / "last.ckpt").exists()
    disk.set()
    files.teardown()
    assert torch.load(tmp_path / "last.ckpt") == {"step": 1}


def test_none_where_that_is_off(trainer, tmp_path):
    trainer.state["weight"] = torch.zeros(3)
    Checkpoint(background_gb=0, dirpath=str(tmp_path)).on_train_batch_end(trainer, None)
    assert (tmp_path / "last.ckpt").exists()


def test_the_last_step_of_an_epoch_is_saved_with_its_validation(trainer, tmp_path):
    callback = Checkpoint(background_gb=0, dirpath=str(tmp_path))
    trainer.is_last_batch = True
    callback.on_train_batch_end(trainer, None)
    assert not (tmp_path / "last.ckpt").exists()
    callback.on_train_epoch_end(trainer, None)
    assert (tmp_path / "last.ckpt").exists()


def test_the_next_step_says_what_went_wrong(trainer, files, tmp_path):
    callback = Checkpoint(dirpath=str(tmp_path), every_n_train_steps=1)
    callback.on_train_batch_start(trainer)
    trainer.state = {"rest": Unsavable()}
    callback.on_train_batch_end(trainer, None)
    files._wait()
    with pytest.raises(MachineFault, match="no space"):
        callback.on_train_batch_start(trainer)


def test_a_limit_below_nothing():
    with pytest.raises(ValueError, match="background_gb=-1"):
        Checkpoint(background_gb=-1)
