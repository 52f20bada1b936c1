"""Checkpoints of a model that is cut up over ranks: whole or not there, and read by any number of ranks."""

from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from in_ranks import in_ranks
from lightning.pytorch import Callback
from small_fit import Case, Fitted, small_fit

from kimivl import checkpoint
from kimivl.checkpoint import put_back
from kimivl.checkpoint_folder import read_rest, read_whole, write_folder
from kimivl.optim import MuonAdamW
from kimivl.resume import check_checkpoint
from kimivl.runtime import ranks
from kimivl.tasks.digits import write

PHASES = "data.phases=[{max_length: 256, epochs: 2, lr: [1, 0.1]}]"
CASE = Case("sft", [PHASES])
SHARDED = Case("sft", [PHASES, "strategy=fsdp"])


class SaveAt(Callback):
    """Saves when a step is done, and remembers the model."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path
        self.model: dict[str, torch.Tensor] = {}

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        if trainer.global_step == self.step and not trainer.fit_loop._should_accumulate():
            trainer.save_checkpoint(self.path)
            state = module.state_dict()
            self.model = {n: (t.full_tensor() if hasattr(t, "full_tensor") else t).clone() for n, t in state.items()}


def _muon(module: Any) -> None:
    module.make_optimizer = partial(MuonAdamW, lr=0.01)


def shared(data: Path, out: Path, file: Path) -> dict[str, Any]:
    """On two ranks: to the end, and again from the checkpoint of step 2; then from what one process has saved."""
    path = out / "last.ckpt"
    save = SaveAt(2, path)
    whole = small_fit(data, out, SHARDED, _muon, [save])
    resumed = small_fit(data, out, SHARDED, _muon, ckpt_path=path)
    replicas = small_fit(data, out, CASE, _muon, ckpt_path=path)
    return {"whole": whole, "resumed": resumed, "replicas": replicas, "saved": save.model}


def alone(data: Path, out: Path, file: Path) -> dict[str, Any]:
    """One process goes on from the folder, and leaves a file in the place of a folder at step 3."""
    shutil.copytree(out / "last.ckpt", file)
    return {"alone": small_fit(data, out, CASE, _muon, [SaveAt(3, file)], ckpt_path=out / "last.ckpt")}


def back(data: Path, out: Path, file: Path) -> dict[str, Any]:
    """Two ranks go on from the file, and leave a folder in its place at step 4."""
    save = SaveAt(4, file)
    return {"back": small_fit(data, out, SHARDED, _muon, [save], ckpt_path=file), "saved": save.model}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("runs")
    data, out, file = root / "data", root / "out", root / "out/moved.ckpt"
    write(data / "digits", sft=40, long_cot=4, rl=4, val=4, test=4, vocab_size=340)
    found: dict[str, Any] = {"path": out / "last.ckpt", "file": file}
    first = in_ranks(shared, data, out, file)
    found |= first[0] | {"other": first[1]}
    found |= in_ranks(alone, data, out, file, ranks=1)[0]
    assert file.is_file() and not list(out.glob(".*"))
    found |= {"back": in_ranks(back, data, out, file)[0]}
    assert file.is_dir() and not list(out.glob(".*"))
    return found


def distance(one: Fitted, other: Fitted) -> float:
    """The largest difference of a weight, relative to the weight's norm."""
    return max(
        float((one.weights[name] - value).norm() / value.norm().clamp_min(1e-12))
        for name, value in other.weights.items()
    )


@pytest.mark.slow
def test_a_resumed_run_is_bit_equal_to_one_that_was_not_interrupted(runs):
    whole, resumed = runs["whole"], runs["resumed"]
    assert len(whole.gradients) - len(resumed.gradients) == 2
    for step, gradients in enumerate(resumed.gradients):
        assert all(torch.equal(gradient, whole.gradients[step + 2][name]) for name, gradient in gradients.items())
    assert distance(resumed, whole) == 0 == distance(runs["other"]["resumed"], whole)


@pytest.mark.slow
def test_a_run_goes_on_as_one_process_and_back(runs):
    whole = runs["whole"]
    assert len(whole.gradients) >= 4
    for name in ("alone", "replicas"):
        assert distance(runs[name], whole) < 1e-5
    assert len(runs["back"]["back"].gradients) == len(whole.gradients) - 3
    assert distance(runs["back"]["back"], whole) < 1e-5


@pytest.mark.slow
def test_the_folder_holds_the_model_and_loads_as_a_file_does(runs):
    found = read_whole(runs["path"])
    assert found["state_dict"].keys() == runs["saved"].keys()
    assert all(torch.equal(found["state_dict"][name], value) for name, value in runs["saved"].items())
    states = found["optimizer_states"][0]["state"]
    assert set(states) == {n for group in found["optimizer_states"][0]["param_groups"] for n in group["params"]}
    assert found["global_step"] == 2
    check_checkpoint(runs["path"], True, "sft")
    torch.load(runs["path"] / "rest.pt", weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("file", ["__1_0.distcp", ".metadata", "rest.pt"])
@pytest.mark.parametrize("how", ["missing", "cut"])
def test_a_folder_that_is_not_whole_is_refused_by_name(runs, tmp_path, file, how):
    path = shutil.copytree(runs["path"], tmp_path / "checkpoints/last.ckpt")
    if how == "missing":
        (path / file).unlink()
    else:
        os.truncate(path / file, (path / file).stat().st_size // 2)
    with pytest.raises(ValueError, match="last.ckpt.*remove .*last.ckpt to start anew"):
        check_checkpoint(path, True, "sft")


@pytest.mark.slow
def test_metadata_that_would_run_something_is_refused(runs, tmp_path):
    path = shutil.copytree(runs["path"], tmp_path / "last.ckpt")
    (path / ".metadata").write_bytes(b"cos\nsystem\n(S'echo harm'\ntR.")
    with pytest.raises(Exception, match="asks for (os|posix).system"):
        read_whole(path)


class Killed(BaseException):
    """Stands for SIGKILL: nothing after it runs."""


def tensors(value: float) -> dict[str, Any]:
    state = {"state": {0: {"momentum_buffer": torch.full((3, 2), value)}}, "param_groups": [{"params": [0], "lr": 1.0}]}
    return {"state_dict": {"a": torch.full((3, 2), value)}, "optimizer_states": [state], "loops": {}, "global_step": 1}


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_kill_at_any_moment_of_a_save_leaves_the_old_or_the_new(tmp_path, monkeypatch, exchanges):
    """Every call that changes the file system is the last one in turn."""
    if not exchanges:
        monkeypatch.setattr(checkpoint, "_exchange", lambda one, other: False)
    names = [(Path, name) for name in ("rename", "replace", "mkdir", "unlink")]
    names += [(shutil, "rmtree"), (torch, "save")]
    left, number = set(), 0
    while True:
        folder = tmp_path / str(number)
        in_one(folder, 1.0)
        with monkeypatch.context() as patch:
            count = 0

            def counted(call: Any, last: int = number) -> Any:
                def run(*args: Any, **options: Any) -> Any:
                    nonlocal count
                    count += 1
                    if count > last:
                        raise Killed
                    return call(*args, **options)

                return run

            for owner, name in names:
                patch.setattr(owner, name, counted(getattr(owner, name)))
            try:
                in_one(folder, 2.0)
                finished = True
            except Killed:
                finished = False
        put_back(folder / "last.ckpt")
        value = float(read_whole(folder / "last.ckpt")["state_dict"]["a"][0, 0])
        left.add(value)
        if finished:
            break
        in_one(folder, 3.0)  # and the next save clears up
        assert float(read_whole(folder / "last.ckpt")["state_dict"]["a"][0, 0]) == 3.0
        assert [path.name for path in folder.iterdir()] == ["last.ckpt"]
        number += 1
    assert left == {1.0, 2.0} and number >= 3 and value == 2.0


def in_one(folder: Path, value: float) -> None:
    write_folder(tensors(value), folder / "last.ckpt")


def test_read_rest_names_a_folder_without_a_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="is no checkpoint: rest.pt is missing"):
        read_rest(tmp_path)
    assert ranks.world_size() == 1
