"""A run that signals stop anywhere goes on to the figures and weights of one that nothing stops."""

import signal
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector

from kimivl.callbacks import Preemption
from kimivl.config import Interrupted
from kimivl.runtime import interruption

BATCHES, EPOCHS, ACCUMULATE = 6, 3, 2


class Loader:
    """Batches that are numbers; it starts where the run is, as ours do."""

    def __init__(self, first: int = 0, batches: int = BATCHES) -> None:
        self.first, self.batches = first, batches

    def __len__(self) -> int:
        return self.batches

    def __iter__(self):
        return iter(torch.arange(self.first, self.batches).float())


class Data(LightningDataModule):
    def train_dataloader(self):
        done = self.trainer.fit_loop.epoch_loop.batch_progress.current.processed
        return Loader(done % BATCHES)

    def val_dataloader(self):
        return Loader(batches=3)


class Module(LightningModule):
    """``figures``: what was measured, by name and step; what is measured twice counts as it was measured last."""

    def __init__(self, figures: dict) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.figures = figures
        self.answered = 0.0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)

    def training_step(self, batch, number):
        loss = (self.weight * (1 + batch)).square()
        self.figures["loss", self.current_epoch, number] = loss.item()
        return loss

    def on_validation_epoch_start(self):
        self.answered = 0.0

    def validation_step(self, batch, number):
        def answer():
            self.trainer.callbacks[0].here("answer", number)
            self.answered += float(self.weight * batch)

        interruption.until_asked(answer)

    def leave_evaluation(self):
        pass

    def on_validation_epoch_end(self):
        self.figures["val", self.trainer.state.fn, self.current_epoch] = self.answered


class Signals(Callback):
    """Raises ``number`` at the ``times``-th arrival at ``place``; places are hooks and ``answer``."""

    def __init__(self, place: str = "", times: int = 1, number: int = signal.SIGTERM) -> None:
        self.place, self.left, self.number = place, times, number

    def here(self, place: str, *_: object) -> None:
        if place == self.place:
            self.left -= 1
            if self.left == 0:
                signal.raise_signal(self.number)

    def on_train_batch_start(self, *args):
        self.here("on_train_batch_start")

    def on_train_batch_end(self, *args):
        self.here("on_train_batch_end")

    def on_validation_epoch_start(self, *args):
        self.here("on_validation_epoch_start")

    def on_validation_end(self, *args):
        self.here("on_validation_end")

    def on_train_epoch_end(self, *args):
        self.here("on_train_epoch_end")

    def on_save_checkpoint(self, *args):
        self.here("on_save_checkpoint")

    def on_train_end(self, *args):
        self.here("on_train_end")


def start(folder: Path, figures: dict, signals: Signals | None = None) -> torch.Tensor:
    """One start of the run in ``folder``, with what follows the training; the final weight."""
    last = folder / "last.ckpt"
    seed_everything(1, verbose=False)
    module, data = Module(figures), Data()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=EPOCHS,
        accumulate_grad_batches=ACCUMULATE,
        callbacks=[
            signals or Signals(),
            Preemption(str(last)),
            ModelCheckpoint(folder, "every", every_n_train_steps=2, enable_version_counter=False),
        ],
        logger=False,
        num_sanity_val_steps=0,
        reload_dataloaders_every_n_epochs=1,
        plugins=[LightningEnvironment()],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with interruption.listening(folder):
        trainer.fit(module, data, ckpt_path=last if last.exists() else None, weights_only=True)
        trainer.save_checkpoint(last)
        trainer.validate(module, data, verbose=False)
    return module.weight.detach()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    figures: dict = {}
    weight = start(tmp_path_factory.mktemp("whole"), figures)
    assert len(figures) == BATCHES * EPOCHS + EPOCHS + 1
    return figures, weight


PLACES = [
    *(("on_train_batch_start", times) for times in (1, 2, 6, 7, 18)),
    *(("on_train_batch_end", times) for times in (1, 2, 6, 12, 18)),
    *(("on_validation_epoch_start", times) for times in (1, 3, 4)),
    *(("answer", times) for times in (1, 2, 9, 11)),
    *(("on_validation_end", times) for times in (1, 3)),
    *(("on_train_epoch_end", times) for times in (1, 3)),
    *(("on_save_checkpoint", times) for times in (1, 3)),
    ("on_train_end", 1),
]


@pytest.mark.parametrize(("place", "times"), PLACES)
def test_stopped_anywhere_it_goes_on_to_the_same_end(tmp_path, whole, place, times):
    figures: dict = {}
    signals = Signals(place, times)
    with pytest.raises(Interrupted, match="same command goes on"):
        start(tmp_path, figures, signals)
    assert signals.left <= 0
    assert torch.equal(start(tmp_path, figures), whole[1]) and figures == whole[0]


def test_stopped_at_every_step_it_arrives(tmp_path, whole):
    figures: dict = {}
    starts = 0
    while True:
        starts += 1
        try:
            weight = start(tmp_path, figures, Signals("on_train_batch_start", 2, signal.SIGUSR1))
            break
        except Interrupted:
            assert starts < 50
    assert starts > EPOCHS * BATCHES // ACCUMULATE - EPOCHS
    assert torch.equal(weight, whole[1]) and figures == whole[0]


def test_a_second_ctrl_c_stops_at_once(tmp_path, capsys):
    class Impatient(Signals):
        def on_train_batch_start(self, *args):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted, match="at once, without saving"):
        start(tmp_path, {}, Impatient())
    assert "stopping when this step is done" in capsys.readouterr().err and not (tmp_path / "last.ckpt").exists()


def test_handlers_are_put_back(tmp_path):
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2]
    before = [signal.getsignal(number) for number in numbers]
    with pytest.raises(Interrupted):
        start(tmp_path, {}, Signals("on_train_batch_start", 2))
    assert [signal.getsignal(number) for number in numbers] == before


def test_what_is_switched_off_in_lightning_is_there():
    assert callable(_SignalConnector.register_signal_handlers) and callable(
        _TrainingEpochLoop._broadcast_sigterm_tensor
    )


def test_rollouts_are_left_at_once(tmp_path):
    preemption = Preemption("last.ckpt")
    with interruption.listening(tmp_path):
        preemption.on_answers_start()
        with pytest.raises(Interrupted, match="the rollouts so far are kept"):
            signal.raise_signal(signal.SIGUSR1)
        preemption.on_answers_end()
        signal.raise_signal(signal.SIGUSR1)  # after them it is only remembered
        assert interruption.agreed()
        with pytest.raises(Interrupted, match="the rollouts so far are kept"):
            preemption.on_answers_start()  # the next ones do not begin
