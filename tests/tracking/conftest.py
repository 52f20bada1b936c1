"""W&B's client in the tests' own process, against no server or a local one."""

import io

import pytest
import wandb
import wandb_server
from PIL import Image


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    yield
    wandb.teardown()


@pytest.fixture
def server(monkeypatch, tmp_path):
    with wandb_server.serving() as serving:
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        monkeypatch.setenv("WANDB_BASE_URL", serving.url)
        monkeypatch.setenv("WANDB_API_KEY", wandb_server.KEY)
        monkeypatch.setenv("WANDB_MODE", "online")
        monkeypatch.setenv("WANDB__FILE_STREAM_TRANSMIT_INTERVAL", "0.5")
        monkeypatch.setenv("WANDB__STATS_SAMPLING_INTERVAL", "0.5")
        wandb.teardown()
        yield serving
        serving.mood = "well"
        wandb.teardown()


@pytest.fixture
def picture():
    """A PNG of 900 x 300 pixels."""
    file = io.BytesIO()
    Image.new("RGB", (900, 300), (200, 0, 0)).save(file, "PNG")
    return file.getvalue()
