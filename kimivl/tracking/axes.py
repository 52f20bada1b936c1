"""What the curves of a W&B run are drawn over."""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Iterable, Mapping
from typing import Any

from kimivl.tracking import names


class Axes:
    """The axis of each namespace of a run; and a row's tokens, for it to be drawn over those as well.

    W&B draws a metric over any other that stands in the same rows, and a metric has one axis that it begins with. The
    tokens trained on are figures of the training's log steps, so the rows of a validation would have none.

    Args:
        run: of W&B. tokens: what earlier processes of the run had trained on, by step.
    """

    def __init__(self, run: Any, tokens: Mapping[int, float]) -> None:
        self._run = run
        self._tokens = dict(tokens)
        self._steps = sorted(self._tokens)
        self._defined: set[str] = set()
        for axis in names.AXES:
            run.define_metric(axis)
        self._define(name for name in names.METRICS if not name.startswith("*"))
        for name, metric in names.METRICS.items():
            if metric.best and "*" not in name:
                run.define_metric(name, names.axis(name), step_sync=True, summary=f"{metric.best},last")

    def log(self, row: Mapping[str, Any], step: int | None) -> None:
        """Log a row of one step, with its place on the axes."""
        self._define(row)
        place: dict[str, Any] = {} if step is None else {names.STEP: step}
        if names.TOKENS not in row:
            place |= self._tokens_before(step)
        elif step is not None:
            if step not in self._tokens:
                insort(self._steps, step)
            self._tokens[step] = row[names.TOKENS]
        self._run.log({**row, **place})

    def _tokens_before(self, step: int | None) -> dict[str, float]:
        """The tokens of the last row up to that step which has them; empty where there is none."""
        until = len(self._steps) if step is None else bisect_right(self._steps, step)
        return {names.TOKENS: self._tokens[self._steps[until - 1]]} if until else {}

    def _define(self, logged: Iterable[str]) -> None:
        """A pattern for each namespace: where two fit a metric, as ``*`` and ``rollout/*`` do, W&B takes either."""
        patterns = {names.pattern(name) for name in logged if name not in names.AXES}
        for pattern in sorted(patterns - self._defined):
            self._run.define_metric(pattern, names.axis(pattern), step_sync=True)
            self._defined.add(pattern)
