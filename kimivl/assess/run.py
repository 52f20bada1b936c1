"""``kimivl assess``: the assessment with its progress bar, and its report at the end."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from kimivl.assess.assessment import Assessment, Read
from kimivl.assess.report import draw_assessment, print_assessment
from kimivl.data.index import Index
from kimivl.inference import Inference, weights_digest
from kimivl.rl.rewards import Reward


def run_assess(
    index: Index,
    read: Read,
    inference: Inference,
    reward: Reward,
    make: Callable[..., Assessment],
    model: str,
    console: Console,
) -> None:
    """Assess the problems of ``index`` that are not yet assessed, and report on all of them.

    Args:
        make: ``conf/assess``, waiting for what it works with. model: the folder that ``inference`` was loaded from.
    """
    assessment = make(index, read, inference, reward, {"model": model, "weights": weights_digest(model)})
    try:
        _assess(assessment, console)
    finally:
        assessment.ledger.close()
        inference.engine.close()
    path = assessment.ledger.path
    assessed = [row for row in map(assessment.row_of, assessment.numbers.tolist()) if row is not None]
    say = partial(console.print, highlight=False, soft_wrap=True, markup=False)
    if missing := len(assessment.numbers) - len(assessed):
        say(
            f"not assessed: {missing:,} problems (unreadable, or the engine failed); type the command again to try them"
        )
    if assessed:
        print_assessment(assessed, assessment.ledger.about, console)
        draw_assessment(assessed, assessment.ledger.about, path.with_suffix(".png"))
        say(f"columns: {path}   picture: {path.with_suffix('.png')}")


def _assess(assessment: Assessment, console: Console) -> None:
    left, total = len(assessment.left), len(assessment.numbers)
    earlier = f" ({total - left:,} were before)" if left < total else ""
    console.print(f"assessing {left:,} problems{earlier}: {assessment.ledger.path}", highlight=False, soft_wrap=True)
    figures = TextColumn("{task.fields[figures]}")
    columns = (TextColumn("assess"), BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"))
    with Progress(*columns, TimeRemainingColumn(), figures, console=console) as progress:
        task = progress.add_task("assess", total=total, completed=total - left, figures="")
        for count, rows in assessment.run():
            rates = [row["pass_rate"] for row in rows if row["pass_rate"] is not None]
            said = f"pass rate {sum(rates) / len(rates):.2f}  " if rates else ""
            speed = f"{assessment.inference.engine.tokens_per_second:,.0f} tok/s"
            progress.update(task, advance=count, figures=said + speed)
