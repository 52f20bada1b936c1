"""What cannot be gone on with is refused before anything is built, in one sentence that says what to type."""

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kimivl import tracking
from kimivl.checkpoint import LAST
from kimivl.checkpoint_folder import _Reader, write_folder
from kimivl.resume import begin, check_checkpoint
from kimivl.runtime.faults import MachineFault


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "sft" / "checkpoints" / "last.ckpt"
    path.parent.mkdir(parents=True)
    parts = {"optimizer_states": [], "loops": {}, "global_step": 3, "SFTDataModule": {}}
    torch.save({"state_dict": {"weight": torch.ones(100_000)}, **parts}, path)
    return path


def test_a_whole_checkpoint_of_the_stage_is_taken(checkpoint):
    check_checkpoint(checkpoint, own=True, stage="sft")


@pytest.mark.parametrize("kept", [0, 1, 1000, 200_000, -1])
def test_a_checkpoint_cut_short_is_refused(checkpoint, kept):
    checkpoint.write_bytes(checkpoint.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"last\.ckpt.*(is empty|cut short).*; remove .*last\.ckpt to start anew"):
        check_checkpoint(checkpoint, own=True, stage="sft")
    with pytest.raises(ValueError, match="name another with ckpt_path"):
        check_checkpoint(checkpoint, own=False, stage="sft")


def test_files_that_are_no_checkpoints_are_refused(checkpoint):
    save_file({"weight": torch.ones(3)}, checkpoint)
    with pytest.raises(ValueError, match="no checkpoint at all"):
        check_checkpoint(checkpoint, own=False, stage="sft")
    torch.save({"weight": torch.ones(3)}, checkpoint)
    with pytest.raises(ValueError, match=r"no checkpoint of a run \(global_step, loops"):
        check_checkpoint(checkpoint, own=False, stage="sft")
    torch.save({"state_dict": Path("x")}, checkpoint)  # an object that is not loaded without trust
    with pytest.raises(ValueError, match=r"cannot be read by torch \d"):
        check_checkpoint(checkpoint, own=False, stage="sft")


def test_a_checkpoint_of_another_stage_names_init_from(checkpoint):
    with pytest.raises(ValueError, match=r"a checkpoint of stage=sft, and this is stage=rl.*init_from=.*/sft/model"):
        check_checkpoint(checkpoint, own=False, stage="rl")


def test_a_folder_of_many_ranks_is_looked_at_too(checkpoint, tmp_path):
    folder = tmp_path / "last.ckpt"
    write_folder(torch.load(checkpoint, weights_only=True), folder)
    check_checkpoint(folder, own=True, stage="sft")
    with pytest.raises(ValueError, match="a checkpoint of stage=sft"):
        check_checkpoint(folder, own=True, stage="rl")
    largest = max(folder.iterdir(), key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"distcp is cut short \(.*; remove .*last\.ckpt to start anew"):
        check_checkpoint(folder, own=True, stage="sft")


def test_a_folder_that_was_moved_goes_on_but_not_with_other_settings(checkpoint, tmp_path):
    old = checkpoint.parents[1]

    def config(folder: Path, seed: int = 1) -> dict[str, object]:
        return {"stage": "sft", "seed": seed, "paths": {"output_dir": str(folder)}, "data": {"log": f"{folder}/log"}}

    tracking.write_run(old, "interrupted", config(old))
    new = old.rename(tmp_path / "elsewhere")
    assert begin(new, None, config(new)) == new / LAST
    with pytest.raises(ValueError, match="another seed"):
        begin(new, None, config(new, seed=2))


def test_a_finished_run_is_gone_on_from_with_its_own_settings_only(checkpoint, tmp_path, caplog):
    folder, config = checkpoint.parents[1], {"stage": "sft", "seed": 1, "data": {"phases": [1]}}
    tracking.write_run(folder, "finished", config)
    with pytest.raises(ValueError, match=r"a finished run with another data\.phases.*init_from=.*/sft/model name=NAME"):
        begin(folder, "last", config | {"data": {"phases": [1, 2]}})
    assert tracking.read_run(folder)["status"] == "finished"
    assert begin(folder, "last", config) == folder / LAST
    assert begin(tmp_path / "other", str(checkpoint), config | {"seed": 2}) == checkpoint
    assert "settings that this checkpoint was not made with: seed (1, now 2)" in caplog.text


def test_a_new_run_that_ends_at_once_leaves_no_checkpoint_of_the_one_before(checkpoint, monkeypatch):
    folder = checkpoint.parents[1]
    tracking.write_run(folder, "finished", {"stage": "sft", "seed": 1})
    begin_run = tracking.begin_run

    def interrupted(*arguments) -> None:
        begin_run(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(tracking, "begin_run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        begin(folder, None, {"stage": "sft", "seed": 2})
    assert tracking.read_run(folder)["status"] == "running" and not checkpoint.exists()


def test_a_folder_of_many_ranks_may_make_nothing_but_tensors(checkpoint, tmp_path):
    """``.metadata`` is a pickle, and could name whatever torch has imported."""
    folder, ran = tmp_path / "last.ckpt", tmp_path / "ran"
    write_folder(torch.load(checkpoint, weights_only=True), folder)
    read = _Reader(folder).read_metadata()
    assert read.state_dict_metadata
    module = "torch.distributed.checkpoint.filesystem"
    for name in ("os.system", "torch.utils.collect_env.subprocess.Popen"):
        called = pickle.SHORT_BINUNICODE + bytes([len(module)]) + module.encode()
        called += pickle.SHORT_BINUNICODE + bytes([len(name)]) + name.encode() + pickle.STACK_GLOBAL
        word = f"touch {ran}".encode()
        called += pickle.SHORT_BINUNICODE + bytes([len(word)]) + word + pickle.TUPLE1 + pickle.REDUCE + pickle.STOP
        (folder / ".metadata").write_bytes(pickle.PROTO + b"\x04" + called)
        with pytest.raises(MachineFault, match="which no checkpoint needs"):
            _Reader(folder).read_metadata()
    assert not ran.exists()
