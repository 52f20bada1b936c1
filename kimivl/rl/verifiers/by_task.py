"""Another verifier for each kind of problem."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class ByTask:
    """Chooses the verifier by what a sample says of itself.

    Args:
        verifiers: by the value of the sample's key.
        default: for all other values; without one they are an error.
        by: the key of the sample, ``task`` or ``source``.
    """

    verifiers: Mapping[str, Callable[[str, str], float]] = field(default_factory=dict)
    default: Callable[[str, str], float] | None = None
    by: Literal["task", "source"] = "task"

    def for_task(self, task: str) -> Callable[[str, str], float]:
        """Raises ValueError that names the task when there is no verifier for it."""
        verifier = self.verifiers.get(task, self.default)
        if verifier is None:
            raise ValueError(
                f"reward.verifier has none for problems whose {self.by} is {task!r}, only for "
                f"{', '.join(map(repr, self.verifiers)) or 'nothing'}: add it, or reward.verifier.default"
            )
        return verifier

    def task_of(self, sample: Any) -> str:
        return getattr(sample, self.by)

    def prepare(self) -> None:
        for verifier in (*self.verifiers.values(), self.default):
            prepare = getattr(verifier, "prepare", None)
            if prepare is not None:
                prepare()
