"""What the curves of a W&B run are drawn over."""

from __future__ import annotations

import math
from bisect import bisect_right, insort
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kimivl.tracking import names


class Axes:
    """The axis of each namespace of a run; and a row's tokens and RL iteration, for it to be drawn over those as well.

    W&B draws a metric over any other that stands in the same rows, and a metric has one axis that it begins with. The
    tokens trained on are figures of the training's log steps, the iteration of its first one, so the rows of a
    validation would have neither.

    Args:
        run: of W&B. earlier: (step, value) of tokens and iterations, from earlier processes of the run.
    """

    def __init__(self, run: Any, earlier: Mapping[str, Sequence[tuple[int, float]]]) -> None:
        self._run = run
        self._places = {axis: sorted(earlier[axis]) for axis in names.CARRIED}
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
        for axis, places in self._places.items():
            if axis not in row:  # that of the last row up to this step which has one
                if until := bisect_right(places, (math.inf if step is None else step, math.inf)):
                    place[axis] = places[until - 1][1]
            elif step is not None:
                insort(places, (step, row[axis]))
        self._run.log({**row, **place})

    def _define(self, logged: Iterable[str]) -> None:
        """A pattern for each namespace: where two fit a metric, as ``*`` and ``rollout/*`` do, W&B takes either."""
        patterns = {names.pattern(name) for name in logged if name not in names.AXES}
        for pattern in sorted(patterns - self._defined):
            self._run.define_metric(pattern, names.axis(pattern), step_sync=True)
            self._defined.add(pattern)
