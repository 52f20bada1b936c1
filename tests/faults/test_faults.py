"""What the machine cannot do is said in one sentence that names the remedy; what is on the disk stays whole."""

import errno
import gc
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from in_ranks import in_ranks
from safetensors import SafetensorError
from safetensors.torch import save_file
from without import without

from kimivl.callbacks import CheckpointFiles
from kimivl.checkpoint_folder import read_own, read_whole, write_folder
from kimivl.runtime import ranks
from kimivl.runtime.faults import MachineFault, explained, reading, writing
from kimivl.tracking import History

MB = 2**20
SFT = {"stage": "sft", "activation_checkpointing": "none"}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 3 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)], capture_output=True, text=True
    )
    if mounted.returncode:
        without(f"no small disk can be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def state(megabytes: float) -> dict[str, torch.Tensor]:
    return {"weight": torch.zeros(int(megabytes * MB / 4))}


def test_a_checkpoint_that_does_not_fit_leaves_the_one_before_and_says_so(small_disk):
    files, path = CheckpointFiles(), small_disk / "checkpoints" / "last.ckpt"
    files.save_checkpoint(state(1), path)
    with pytest.raises(MachineFault, match=r"last\.ckpt could not be written: the disk is full \(0\.003 GB needed"):
        files.save_checkpoint(state(2.8), path)
    assert torch.load(path)["weight"].nbytes == MB
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]
    (small_disk / "checkpoints/last.ckpt").unlink()
    gc.collect()  # torch 2.11 holds the file that could not be written open by the traceback of its error
    files.save_checkpoint(state(2.8), path)  # room was made


def test_a_full_disk_cuts_no_line_of_the_history(small_disk):
    history = History(small_disk)
    history.log_metrics({"train/loss": 1.0}, step=0)
    (small_disk / "ballast").write_bytes(bytes(3 * MB - 3 * 4096))
    with pytest.raises(OSError, match="No space left"):
        for step in range(1, 10_000):
            history.log_metrics({"train/loss": 1.0}, step=step)
    assert history.path.read_text().endswith("}\n")
    (small_disk / "ballast").unlink()
    history.log_metrics({"train/loss": 1.0}, step=step)
    assert len(history.path.read_text().splitlines()) == step + 1


def test_a_model_folder_that_does_not_fit_is_a_full_disk_too(small_disk):
    with pytest.raises((SafetensorError, OSError)) as caught:
        save_file(state(4), small_disk / "model.safetensors")
    error = explained(caught.value, "ending", {}, [], small_disk)
    assert isinstance(error, MachineFault) and "the disk is full" in str(error) and str(small_disk) in str(error)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), "a"),
            r"the disk quota is used up \(.*\. Make room, and type",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied"),
            r"did not take it \(.*Permission denied\).* Mend that, and",
        ),
        (OSError(errno.EIO, "Input/output error"), r"did not take it \(.*Input/output error\).* Mend that, and"),
        (
            RuntimeError("[enforce fail at inline_container.cc:747] . open file failed with strerror: Read-only file"),
            r"did not take it \(open file failed with strerror: Read-only file\)",
        ),
        (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), r"\(PytorchStreamWriter"),
    ],
)
def test_what_keeps_a_file_from_being_written_is_said(tmp_path, error, said):
    with pytest.raises(MachineFault, match=rf"/a could not be written: .*{said}"), writing(tmp_path / "a", 10):
        raise error


def test_errors_that_are_not_of_the_machine_are_left_as_they_are(tmp_path):
    bug = RuntimeError("shapes do not fit")
    with pytest.raises(RuntimeError, match="^shapes do not fit"), writing(tmp_path / "a", 10):
        raise bug
    assert explained(bug, "training", {}, [], tmp_path) is bug
    with pytest.raises(torch.OutOfMemoryError), reading(tmp_path / "a"):  # the checkpoint is whole
        raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.EROFS])
def test_what_the_system_does_not_give_names_the_file(tmp_path, number):
    error = explained(OSError(number, os.strerror(number), "/data/a"), "training, step 7", {}, [], tmp_path)
    assert isinstance(error, MachineFault) and os.strerror(number) in str(error)
    assert str(error).startswith("/data/a could not be read or written while training, step 7")


def test_out_of_memory_says_where_how_much_and_what_to_type(tmp_path):
    doing, overrides = "training, step 7, on a pack of 2,048 tokens", ["stage=sft", "model=small"]
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    for error in (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB"), caught.value):
        text = str(explained(error, doing, SFT, overrides, tmp_path))
        assert text.startswith("out of memory while training, step 7, on a pack of 2,048 tokens")
        assert "activation_checkpointing=full" in text and "kimivl memory stage=sft model=small" in text
        assert "peak was" in text
        for answering in ("validating", "testing", "drawing responses (3 of 16 are there)"):
            text = str(explained(error, answering, SFT, overrides, tmp_path))
            assert f"while {answering}" in text and "rollout.max_rows" in text and "activation" not in text


@pytest.mark.parametrize(
    ("stage", "mode", "said"),
    [
        ("sft", "none", "activation_checkpointing=full (or selective) takes less, and goes on"),
        ("sft", "selective", "activation_checkpointing=full takes less, and goes on"),
        ("sft", "full", "A shorter max_length in data.phases takes less, but begins anew"),
        ("rl", "full", "A shorter data.max_length takes less, but begins anew"),
    ],
)
def test_out_of_memory_advises_only_what_the_run_has_not(tmp_path, stage, mode, said):
    config = {"stage": stage, "activation_checkpointing": mode}
    text = str(explained(torch.OutOfMemoryError(), "training, step 7", config, [], tmp_path))
    assert said in text and f"activation_checkpointing={mode}" not in text
    assert ("data.phases" in text) == (stage == "sft")


@pytest.mark.parametrize(
    "text",
    [
        "DataLoader worker (pid 12) is killed by signal: Killed. ",
        "DataLoader worker (pid(s) 12, 13) exited unexpectedly",
        "DataLoader worker (pid 12) is killed by signal: Bus error. It is possible that dataloader's workers are out "
        "of shared memory. Please try to raise your shared memory limit.",
    ],
)
def test_a_lost_worker_is_named(text, tmp_path):
    error = explained(RuntimeError(text), "training, step 7", {}, [], tmp_path)
    assert isinstance(error, MachineFault) and "data.num_workers" in str(error) and "step 7" in str(error)


def test_a_checkpoint_of_another_model_or_optimizer_names_the_keys(tmp_path):
    small, large = torch.nn.Linear(2, 2), torch.nn.Linear(3, 2)
    with pytest.raises(RuntimeError) as of_model:
        small.load_state_dict(large.state_dict())
    with pytest.raises(ValueError, match="loaded state dict") as of_optimizer:
        torch.optim.SGD(small.parameters()).load_state_dict(torch.optim.SGD([small.weight]).state_dict())
    for caught, detail in ((of_model, "size mismatch for weight"), (of_optimizer, "parameter group")):
        error = explained(caught.value, "starting", {}, [], tmp_path)
        assert isinstance(error, ValueError) and detail in str(error) and "with the model=, lora=" in str(error)


def test_a_damaged_checkpoint_is_named_with_what_to_do(tmp_path):
    """Nothing is missing of it: only what reads the tensors finds it."""
    path = tmp_path / "best.ckpt"
    torch.save(state(1), path)
    header = path.read_bytes().index(b"best/data/0") - 30
    damage(path, header, header + 4)
    torch.load(path, weights_only=True, mmap=True)
    with pytest.raises(MachineFault, match=r"best\.ckpt cannot be read \(.*\): where it is damaged, remove it, and go"):
        CheckpointFiles().load_checkpoint(path, weights_only=True)


def damage(path: Path, start: int, end: int) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:start] + b"\xaa" * (end - start) + content[end:])


def _read_what_is_damaged(folder: Path) -> list[str]:
    """On two ranks: their parts of a checkpoint, of which one is damaged; then its metadata is; and as one process."""
    checkpoint, said = {"state_dict": {}, "optimizer_states": []}, []
    models = [torch.nn.Module() for _ in range(ranks.world_size())]
    for number, model in enumerate(models):
        model.register_buffer(f"of_rank_{number}", torch.ones(1000))
    own = models[ranks.rank()]
    path = folder / "last.ckpt"
    write_folder(checkpoint | {"state_dict": own.state_dict()}, path)
    whole = torch.nn.Module()
    for number in range(ranks.world_size()):
        whole.register_buffer(f"of_rank_{number}", torch.zeros(1000))
    for file in ("__1_0.distcp", ".metadata"):
        with ranks.first():
            if ranks.is_first():
                damage(path / file, 0, 40)
        for read in (lambda: read_own(path, whole, []), lambda: read_whole(path)):
            with pytest.raises(ValueError) as caught:  # noqa: PT011
                read()
            said.append(f"{type(caught.value).__name__}: {caught.value}")
    return said


def test_a_damaged_part_of_a_checkpoint_is_said_on_all_ranks(tmp_path):
    for said in in_ranks(_read_what_is_damaged, tmp_path):
        assert all("last.ckpt cannot be read (" in one for one in said), said


def _save_where_one_has_no_room(disk: Path) -> str:
    """Each rank has a tensor of its own; that of rank 1 is larger than the disk."""
    number = ranks.rank()
    checkpoint = {"state_dict": {f"of_rank_{number}": torch.ones(10 if number == 0 else MB)}, "optimizer_states": []}
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        write_folder(checkpoint, disk / "checkpoints" / "last.ckpt")
    return f"{type(caught.value).__name__}: {caught.value}"


def test_a_rank_without_room_for_its_part_of_a_checkpoint_says_so_on_all(small_disk):
    first, second = in_ranks(_save_where_one_has_no_room, small_disk)
    full = "last.ckpt could not be written: the disk is full (0.004 GB needed"
    assert second.startswith("MachineFault: ") and full in second
    assert first.startswith("PeerFailed: rank 1: ") and full in first
    assert not list((small_disk / "checkpoints").iterdir())
