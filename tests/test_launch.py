"""Who may start ranks."""

import pytest

from kimivl.launch import check_launch


def test_one_device_is_welcome(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    check_launch(1, 1)


@pytest.mark.parametrize(("devices", "nodes"), [(2, 1), (1, 2), ("auto", 1), ([0, 1], 1)])
def test_more_would_corrupt_and_is_refused(devices, nodes):
    with pytest.raises(ValueError, match="set both to 1"):
        check_launch(devices, nodes)


def test_a_rank_of_a_group_is_refused_too(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="start train.py by itself"):
        check_launch(1, 1)


def test_a_missing_device_is_named(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match="torch finds no CUDA device here; use trainer=cpu"):
        check_launch(1, 1, "gpu")
    check_launch(1, 1, "cpu")
