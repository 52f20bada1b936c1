"""Examples to read: transcripts of the evaluation, in the terminal at the end and as a table in W&B."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, Trainer
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel

from kimivl import tracking


class Samples(Callback):
    """Logs the evaluation's transcripts; those of the test are also shown."""

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._log(trainer, pl_module, "val/transcripts")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._log(trainer, pl_module, "test/transcripts")
        if trainer.is_global_zero:
            self._show(pl_module)

    def _log(self, trainer: Trainer, pl_module: Any, name: str) -> None:
        rows = [
            {
                "key": transcript.problem.key,
                "question": transcript.problem.question,
                "difficulty": transcript.problem.difficulty,
                "expected": transcript.problem.answer,
                "response": transcript.response,
                "correct": transcript.correct,
            }
            for transcript in pl_module.transcripts
        ]
        tracking.log_transcripts(trainer.loggers, name, rows)

    def _show(self, pl_module: Any) -> None:
        console = Console()
        for transcript in pl_module.transcripts:
            mark = "[green]right[/]" if transcript.correct else f"[red]wrong[/], expected {transcript.problem.answer}"
            title = escape(transcript.problem.question)
            console.print(Panel(escape(transcript.response), title=title, subtitle=mark, title_align="left"))
        figures = pl_module.tally.metrics()
        levels = sorted(pl_module.tally.by_difficulty.items())
        sampled = f", sampled {figures['sampled_accuracy']:.3f}" if "sampled_accuracy" in figures else ""
        console.print(
            f"{figures['problems']:.0f} problems: accuracy {figures['accuracy']:.3f}{sampled}, "
            f"{figures['length']:.1f} tokens\n"
            f"by difficulty: {'  '.join(f'{level}: {right / count:.2f}' for level, (right, count) in levels)}",
            highlight=False,
        )
