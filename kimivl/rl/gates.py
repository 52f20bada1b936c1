"""Which problems are open to the draw, and which groups of responses are trained on.

Sources: Kimi-VL (arXiv 2504.07491) section 2.4 and Kimi k1.5 (arXiv 2501.12599) section 2.1: problems that are always
or never solved, or whose answer can be guessed, teach nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

ASSESSED = ("pass_rate", "easy_to_hack", "answer_kind")
"""Columns that ``kimivl assess`` writes beside the shards."""


@dataclass(frozen=True, slots=True)
class Gates:
    """Admission of scored groups, by the share of right responses; the shaped reward is never looked at.

    Args:
        pass_rate: ``[low, high]``, both inside: a group with a smaller or larger share of right responses is rejected
            as ``too_hard`` or ``too_easy``.
        zero_advantage: reject a group whose responses are all right or all wrong. Under a mean baseline it has no
            signal, whatever its length reward says.
        retire_after: a problem whose last so many visits were all perfect is no longer drawn; None retires none.
    """

    pass_rate: Sequence[float] = (0.0, 1.0)
    zero_advantage: bool = False
    retire_after: int | None = None

    def __post_init__(self) -> None:
        _check_range(self.pass_rate, "sampler.gates.pass_rate")
        if self.retire_after is not None and self.retire_after < 1:
            raise ValueError(f"sampler.gates.retire_after={self.retire_after}: give at least 1, or null")

    def admit(self, correct: np.ndarray) -> str | None:
        """Why a group is not trained on, or None.

        Args:
            correct: (G,) 0 to 1; NaN where the verifier failed, which says nothing about the response.
        """
        judged = np.asarray(correct, float)
        judged = judged[~np.isnan(judged)]
        if len(judged) == 0:
            return "unjudged"
        if self.zero_advantage and judged.min() == judged.max():
            return "zero_advantage"
        low, high = self.pass_rate
        rate = judged.mean()
        return "too_hard" if rate < low else "too_easy" if rate > high else None

    def retired(self, perfect: np.ndarray) -> np.ndarray:
        """(N,) perfect visits in a row -> (N,) whether a problem is no longer drawn."""
        return np.zeros(len(perfect), bool) if self.retire_after is None else perfect >= self.retire_after


def open_problems(columns: Mapping[str, np.ndarray], wanted: Mapping[str, Any]) -> tuple[np.ndarray, dict[str, int]]:
    """(N,) which problems have the ``wanted`` values, and how many have not, by the first column that closes them.

    Args:
        columns: (N,) each. NaN, and an empty text, is "not known".
        wanted: column -> ``[low, high]`` (both inside), one value, a list of texts, or None for any. A problem whose
            value is not known is closed, and counted as ``COLUMN unknown``.

    Raises:
        ValueError: for a column that there is not, or a condition that does not fit it.
    """
    count = len(next(iter(columns.values())))
    is_open, closed = np.ones(count, bool), {}
    for name, condition in wanted.items():
        if condition is None:
            continue
        values = np.asarray(_column(columns, name))
        unknown = np.isnan(values) if values.dtype.kind == "f" else values == "" if values.dtype.kind == "U" else None
        fits = _fits(values, condition, f"sampler.filter.{name}")
        for reason, out in ((f"{name} unknown", unknown), (name, ~fits)):
            if out is not None and (lost := int((is_open & out).sum())):
                closed[reason] = lost
                is_open &= ~out
    return is_open, closed


def _column(columns: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    if name in columns:
        return columns[name]
    if name in ASSESSED:
        raise ValueError(
            f"sampler.filter.{name}: the problems of data.shards have no {name} yet; make it with: kimivl assess SHARDS"
        )
    known = sorted({*columns, *ASSESSED})
    raise ValueError(f"sampler.filter.{name}: there is no such column; choose from {', '.join(known)}")


def _fits(values: np.ndarray, condition: Any, key: str) -> np.ndarray:
    """(N,) values -> (N,) whether they meet a condition."""
    if values.dtype.kind == "U":
        texts = [condition] if isinstance(condition, str) else condition
        if not isinstance(texts, Sequence) or not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{key}={condition!r}: give a text or a list of texts")
        return np.isin(values, list(texts))
    if isinstance(condition, bool | int | float):
        return values == float(condition)
    _check_range(condition, key, bounded=False)
    low, high = condition
    return (values >= low) & (values <= high)


def _check_range(span: Any, key: str, bounded: bool = True) -> None:
    numbers = isinstance(span, Sequence) and len(span) == 2 and all(isinstance(end, int | float) for end in span)
    if not numbers or not span[0] <= span[1] or (bounded and not (span[0] >= 0 and span[1] <= 1)):
        raise ValueError(f"{key}={span!r}: give [low, high]{' from 0 to 1' if bounded else ''}")
