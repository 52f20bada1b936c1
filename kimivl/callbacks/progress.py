"""One bar for the whole run in a terminal; one line per log step where there is none."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from kimivl.callbacks.log_steps import ends_log_step

SHOWN = {
    "train/loss": "loss {:.3f}",
    "perf/tokens_per_s": "{:,.0f} tok/s",
    "perf/rollout_tokens_per_s": "rollout {:,.0f} tok/s",
    "rollout/accuracy": "acc {:.2f}",
    "rollout/length": "len {:.0f}",
    "val/accuracy": "val acc {:.2f}",
}
"""What the bar says, in this order, of the metrics that a module marks with ``prog_bar``."""

SAY_EVERY = 15.0
"""Seconds between two lines about rollouts, where no bar shows them."""


class Progress(ProgressBar):
    """Steps done of all steps, the main figures, the time gone and left.

    Args:
        label: what stands in front, the stage.
    """

    def __init__(self, label: str = "train") -> None:
        super().__init__()
        self.label = label
        self.console = Console()
        self._bar: RichProgress | None = None
        self._started = 0.0
        self._first_step = 0
        self._total = 1
        self._rollouts_since = self._said = time.perf_counter()

    def disable(self) -> None:
        self.console.quiet = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started, self._first_step = time.perf_counter(), trainer.global_step
        self._total = trainer.datamodule.total_steps  # type: ignore[attr-defined]
        if trainer.is_global_zero:
            self._announce(trainer, pl_module)
        if self.console.is_terminal and trainer.is_global_zero:
            columns = ("[bold]{task.description}", BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn())
            left = ("left", TimeRemainingColumn(elapsed_when_finished=False), TextColumn("{task.fields[figures]}"))
            self._bar = RichProgress(*columns, *left, console=self.console)
            self._bar.start()
            self._task = self._bar.add_task(self.label, total=self._total, completed=trainer.global_step, figures="")

    def _announce(self, trainer: Trainer, pl_module: LightningModule) -> None:
        sizes = [(weight.numel(), weight.requires_grad) for weight in pl_module.parameters()]
        trained, held = sum(n for n, on in sizes if on), sum(n for n, on in sizes if not on)
        frozen = f" ({held / 1e6:,.2f}M more are frozen)" if held else ""
        resumed = f" from step {self._first_step}" if self._first_step else ""
        self._print(f"{self.label}: {trained / 1e6:,.2f}M parameters train{frozen}, {self._total} steps{resumed}")

    def _print(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)

    def _describe(self, text: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, description=text)

    def rollouts(self, done: int, total: int) -> None:
        """Responses that are there, of those that the iteration has asked for; called by the RL datamodule."""
        if self._bar is not None:
            self._describe(f"{self.label} {done}/{total} responses" if done < total else self.label)
            return
        now = time.perf_counter()
        if done == 0:
            self._rollouts_since = self._said = now
        elif now - self._said >= SAY_EVERY:
            self._said = now
            self._print(f"{self.label} rollouts {done}/{total}  {now - self._rollouts_since:.0f} s")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._describe(f"{self.label} validating")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._describe(self.label)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            self._print(f"{self.label}: answering the test problems")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=trainer.global_step, figures=self._figures(trainer, pl_module))
        elif trainer.is_global_zero and ends_log_step(trainer):
            elapsed = time.perf_counter() - self._started
            left = elapsed / (trainer.global_step - self._first_step) * (self._total - trainer.global_step)
            figures = self._figures(trainer, pl_module)
            self._print(
                f"{self.label} {trainer.global_step}/{self._total}  {elapsed:.0f} s, {left:.0f} s left  {figures}"
            )

    def _figures(self, trainer: Trainer, pl_module: LightningModule) -> str:
        metrics = self.get_metrics(trainer, pl_module)
        return "  ".join(text.format(metrics[name]) for name, text in SHOWN.items() if name in metrics)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
