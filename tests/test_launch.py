"""Who may start ranks."""

import pytest

from kimivl.launch import check_launch


@pytest.fixture(autouse=True)
def no_ranks(monkeypatch):
    for name in ("LOCAL_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)


def test_one_device_needs_nobody():
    check_launch("sft", 1, 1, multirun=True)


@pytest.mark.parametrize(
    ("stage", "devices", "multirun", "remedy"),
    [
        ("sft", 2, False, "torchrun --nproc_per_node=2 train.py stage=sft"),
        ("sft", 2, True, "hydra/launcher=local"),
        ("rl", 2, False, "trainer.devices=1"),
        ("sft", "auto", False, "give the number of devices"),
    ],
)
def test_what_would_corrupt_is_refused_with_what_works(stage, devices, multirun, remedy):
    with pytest.raises(ValueError, match=remedy):
        check_launch(stage, devices, 1, multirun)


def test_ranks_started_outside_are_welcome(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    check_launch("sft", 2, 1, multirun=False)
