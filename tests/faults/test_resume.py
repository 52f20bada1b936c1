"""What cannot be gone on with is refused before anything is built, in one sentence that says what to type."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kimivl import tracking
from kimivl.checkpoint import LAST
from kimivl.checkpoint_folder import write_folder
from kimivl.resume import begin, check_checkpoint


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
