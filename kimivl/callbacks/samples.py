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

    # At the end of its epoch, where callbacks come before the module, the ranks have yet to put theirs together.

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._log(trainer, pl_module, "val/transcripts", max(trainer.global_step - 1, 0))  # the row of its figures

    def on_test_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._log(trainer, pl_module, "test/transcripts", trainer.global_step)
        if trainer.is_global_zero:
            self._show(pl_module)

    def _log(self, trainer: Trainer, pl_module: Any, name: str, step: int) -> None:
        if tracking.shows_media(trainer.loggers):
            rows = [_row(transcript) for transcript in pl_module.transcripts]
            tracking.log_table(trainer.loggers, name, rows, step)

    def _show(self, pl_module: Any) -> None:
        console = Console()
        for transcript in pl_module.transcripts:
            mark = "[green]right[/]" if transcript.correct else f"[red]wrong[/], expected {transcript.problem.answer}"
            title = escape(transcript.problem.question)
            console.print(Panel(escape(transcript.response.text), title=title, subtitle=mark, title_align="left"))
        figures = pl_module.tally.metrics()
        levels = sorted(pl_module.tally.by_difficulty.items())
        sampled = f", sampled {figures['sampled_accuracy']:.3f}" if "sampled_accuracy" in figures else ""
        console.print(
            f"{figures['problems']:.0f} problems: accuracy {figures['accuracy']:.3f}{sampled}, "
            f"{figures['length']:.1f} tokens\n"
            f"by difficulty: {'  '.join(f'{level}: {right / count:.2f}' for level, (right, count) in levels)}",
            highlight=False,
        )


def _row(transcript: Any) -> dict[str, Any]:
    problem, response = transcript.problem, transcript.response
    images = problem.sample.images
    return {
        "key": problem.key,
        "image": tracking.Picture(images[0]) if images else None,
        "images": len(images),
        "question": problem.question,
        "difficulty": problem.difficulty,
        "expected": problem.answer,
        "response": response.text,
        "correct": transcript.correct,
        "tokens": len(response),
        "stop": response.stop,
    }
