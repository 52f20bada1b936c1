"""What a run puts around Lightning's trainer."""

from pathlib import Path

import pytest
import torch

from kimivl.run import CheckpointFiles

STATUS = Path("/proc/self/status")


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


def test_a_checkpoint_that_breaks_off_leaves_the_one_before(tmp_path):
    class Unsavable:
        def __reduce__(self):
            raise OSError("no space left on device")

    path = tmp_path / "last.ckpt"
    CheckpointFiles().save_checkpoint({"step": 1}, path)
    with pytest.raises(OSError, match="no space"):
        CheckpointFiles().save_checkpoint({"step": 2, "rest": Unsavable()}, path)
    assert torch.load(path) == {"step": 1} and [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]
