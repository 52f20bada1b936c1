"""The learning rate of the two-phase SFT: each phase warms up to its start, then decays to its end."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


@dataclass(frozen=True, slots=True)
class Phase:
    """``steps`` updates that take the learning rate from ``start`` to ``end``, after ``warmup`` of them."""

    steps: int
    start: float
    end: float
    warmup: int

    def lr_at(self, step: int, previous: float) -> float:
        """The rate of the phase's own ``step``, coming from the rate ``previous``."""
        if step < self.warmup:
            return previous + (self.start - previous) * (step + 1) / self.warmup
        progress = (step + 1 - self.warmup) / (self.steps - self.warmup)
        return self.end + (self.start - self.end) * 0.5 * (1 + math.cos(math.pi * progress))


class PhaseSchedule:
    """A piecewise schedule: per phase a linear warm-up, then a cosine between the phase's end points.

    Kimi-VL's joint SFT (arXiv 2504.07491, section 2.4) has two phases: 2e-5 -> 2e-6 at 32K, then
    re-warmed to 1e-5 -> 1e-6 at 128K. A warm-up starts from where the phase before ended (from 0 at the
    very beginning) and reaches the start value on its last step; the end value is reached on the phase's
    last step. A constant rate is a phase whose two end points are equal.

    Example, ``PhaseSchedule([{"steps": 4, "lr": [8, 2]}, {"steps": 4, "lr": [4, 1]}], warmup=0.5)``::

        step    0    1    2    3  |  4    5    6    7  |  8 ...
        warm-up 4    8            |  3    4            |
        cosine            5    2  |            2.5  1  |
        lr_at   4    8    5    2  |  3    4    2.5  1  |  1 ...
        after the last step the last end value stays

    Args:
        phases: mappings with ``steps`` (updates, at least 1) and ``lr`` (``[start, end]``, both >= 0);
            other keys, such as a data phase's ``max_length``, are left to their own readers.
        warmup: fraction of each phase that warms up, in [0, 1); at least one step.

    Raises:
        ValueError: naming the phase and the key that is wrong.
    """

    def __init__(self, phases: Sequence[Mapping[str, Any]], warmup: float = 0.02) -> None:
        if not phases:
            raise ValueError("phases is empty: give at least one {steps: N, lr: [start, end]}")
        if not 0 <= warmup < 1:
            raise ValueError(f"warmup={warmup}: give a fraction of the phase, at least 0 and below 1")
        self.phases = [_phase(index, phase, warmup) for index, phase in enumerate(phases)]

    def lr_at(self, step: int) -> float:
        """The learning rate of update ``step`` (the first is 0)."""
        if step < 0:
            raise ValueError(f"step={step}: the first step is 0")
        previous = 0.0
        for phase in self.phases:
            if step < phase.steps:
                return phase.lr_at(step, previous)
            step -= phase.steps
            previous = phase.end
        return previous

    def scheduler(self, optimizer: Optimizer) -> LambdaLR:
        """This schedule for an optimiser, to be stepped after each update (Lightning: ``interval="step"``).

        The schedule's values are those of the first parameter group; the other groups keep their ratio to it.
        """
        leader = optimizer.param_groups[0]
        lr = leader.get("initial_lr", leader["lr"])
        if lr <= 0:
            raise ValueError(f"optimizer.lr={lr}: give a positive value, the groups' ratios are kept from it")
        return LambdaLR(optimizer, lambda step: self.lr_at(step) / lr)


def _phase(index: int, phase: Mapping[str, Any], warmup: float) -> Phase:
    for key in ("steps", "lr"):
        if key not in phase:
            raise ValueError(f"phases[{index}].{key} is missing: a phase is {{steps: N, lr: [start, end]}}")
    steps, lr = phase["steps"], phase["lr"]
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"phases[{index}].steps={steps!r}: give the number of updates, at least 1")
    if isinstance(lr, str) or not isinstance(lr, Sequence) or len(lr) != 2:
        raise ValueError(f"phases[{index}].lr={lr!r}: give [start, end]")
    if not all(isinstance(value, int | float) and 0 <= value < math.inf for value in lr):
        raise ValueError(f"phases[{index}].lr={lr!r}: give two numbers of at least 0 (2e-5 as 2.0e-5 in YAML)")
    return Phase(steps, float(lr[0]), float(lr[1]), max(1, round(warmup * steps)))
