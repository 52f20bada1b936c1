"""The memory of the rank that takes most."""

from types import SimpleNamespace

import pytest
import torch

from kimivl.callbacks import Memory
from kimivl.callbacks.memory import memory
from kimivl.runtime import ranks


def test_the_rank_that_takes_most(monkeypatch):
    rows = []
    monkeypatch.setattr(ranks, "gather", lambda own: [own, dict.fromkeys(own, 1e6)])
    trainer = SimpleNamespace(
        global_step=4,
        log_every_n_steps=2,
        loggers=[SimpleNamespace(log_metrics=lambda metrics, step: rows.append((step, metrics)))],
        fit_loop=SimpleNamespace(_should_accumulate=lambda: False),
    )
    module = SimpleNamespace(device=torch.device("cpu"))
    Memory().on_train_batch_end(trainer, module)
    trainer.global_step = 5
    Memory().on_train_batch_end(trainer, module)
    assert rows == [(3, {"perf/memory_gb": 1e6})]


def test_a_process_has_its_peak():
    before = memory(torch.device("cpu"))["perf/memory_gb"]
    held = torch.ones(int((before + 0.2) * 1e9 / 4))
    assert memory(torch.device("cpu"))["perf/memory_gb"] > before + 0.1 and len(held)


@pytest.mark.gpu
def test_peaks_of_a_device_start_again():
    device = torch.device("cuda")
    memory(device)
    del (held := [torch.ones(2**26, device=device)])[:]
    first, second = memory(device), memory(device)
    assert first["perf/memory_gb"] > second["perf/memory_gb"] + 0.2 and not held
