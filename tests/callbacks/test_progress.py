"""One line per log step where there is no terminal, from the first rank alone."""

from types import SimpleNamespace

import pytest
import torch

from kimivl.callbacks import Progress


@pytest.fixture
def run(monkeypatch):
    """A run that goes on from step 4 of 10 and logs every third step."""
    trainer = SimpleNamespace(
        global_step=4,
        log_every_n_steps=3,
        is_global_zero=True,
        fit_loop=SimpleNamespace(_should_accumulate=lambda: trainer.accumulating),
        datamodule=SimpleNamespace(total_steps=10),
        accumulating=False,
    )
    module = SimpleNamespace(parameters=lambda: [torch.zeros(2_000_000, requires_grad=True)])
    monkeypatch.setattr(Progress, "get_metrics", lambda *_: {"train/loss": 1.25, "perf/tokens_per_s": 6170.4, "v": 1})
    return trainer, module


def train(trainer, module) -> None:
    progress = Progress("sft")
    progress.setup(trainer, module, "fit")
    progress.on_train_start(trainer, module)
    while trainer.global_step < 10:
        trainer.accumulating = True
        progress.on_train_batch_end(trainer, module)
        trainer.accumulating, trainer.global_step = False, trainer.global_step + 1
        progress.on_train_batch_end(trainer, module)
    progress.on_train_end(trainer, module)


def test_a_line_for_each_log_step(run, capsys):
    train(*run)
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == "sft: 2.00M parameters train, 10 steps from step 4"
    assert [line.split()[1] for line in lines] == ["6/10", "9/10"]
    assert all(line.endswith("loss 1.250  6,170 tok/s") for line in lines)


def test_other_ranks_say_nothing(run, capsys):
    run[0].is_global_zero = False
    train(*run)
    assert capsys.readouterr().out == ""
