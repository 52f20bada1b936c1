"""Of several right traces to one problem: leave out the ones that say the same, and choose among the rest."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Literal

_PIECE = re.compile(r"\d+|[㐀-鿿぀-ヿ가-힣]|[^\W\d_]+|[^\w\s]")
SHINGLE = 3


def shingles(text: str) -> frozenset[tuple[str, ...]]:
    """All runs of three words, numbers or signs, in lower case: what a text is made of, spaces left out."""
    pieces = _PIECE.findall(text.lower())
    return frozenset(tuple(pieces[start : start + SHINGLE]) for start in range(max(1, len(pieces) - SHINGLE + 1)))


def normalised(text: str) -> str:
    """Two texts that differ in spaces and case only are the same."""
    return " ".join(text.lower().split())


def jaccard(one: frozenset[tuple[str, ...]], other: frozenset[tuple[str, ...]]) -> float:
    """Common shingles out of all: 1 for equal sets, 0 for disjoint ones."""
    union = len(one | other)
    return len(one & other) / union if union else 1.0


class Selection:
    """Which of the right traces to one problem are kept.

    They are few (one problem's), so their Jaccard similarities are computed exactly; min-hashing would only
    approximate them.

    Args:
        keep: ``shortest``; ``diverse``: the shortest, then always the one that is least like those chosen before; or
            ``all``.
        per_problem: how many ``shortest`` and ``diverse`` keep.
        near: Jaccard similarity from which two traces count as the same, of which the shorter stays; above 1 only
            exact duplicates do.
    """

    def __init__(
        self, keep: Literal["shortest", "diverse", "all"] = "diverse", per_problem: int = 2, near: float = 0.8
    ) -> None:
        if keep not in ("shortest", "diverse", "all"):
            raise ValueError(f"synthesize.selection.keep={keep} must be shortest, diverse or all")
        if per_problem < 1 or near <= 0:
            raise ValueError("synthesize.selection needs per_problem >= 1 and near > 0")
        self.keep = keep
        self.per_problem = per_problem
        self.near = near

    def __call__(self, texts: Sequence[str], lengths: Sequence[int]) -> list[str | None]:
        """For each trace the reason it is left out under, or None: ``duplicate``, ``near_duplicate``, ``surplus``.

        ``lengths`` in tokens; of equally long ones the first comes first.
        """
        order = sorted(range(len(texts)), key=lambda number: (lengths[number], number))
        reasons: list[str | None] = [None] * len(texts)
        seen: set[str] = set()
        made_of = [shingles(text) for text in texts]
        kept: list[int] = []
        for number in order:
            if (plain := normalised(texts[number])) in seen:
                reasons[number] = "duplicate"
            elif any(jaccard(made_of[number], made_of[other]) >= self.near for other in kept):
                reasons[number] = "near_duplicate"
            else:
                kept.append(number)
            seen.add(plain)
        for number in set(kept) - set(self._chosen(kept, lambda one, other: jaccard(made_of[one], made_of[other]))):
            reasons[number] = "surplus"
        return reasons

    def _chosen(self, kept: Sequence[int], alike: Callable[[int, int], float]) -> Sequence[int]:
        """``kept`` is in the order of length."""
        if self.keep == "all":
            return kept
        if self.keep == "shortest" or not kept:
            return kept[: self.per_problem]
        chosen, left = [kept[0]], list(kept[1:])
        while left and len(chosen) < self.per_problem:
            # max-min: the distance to what is chosen is that to its nearest
            furthest = min(left, key=lambda number: max(alike(number, other) for other in chosen))
            chosen.append(furthest)
            left.remove(furthest)
        return chosen
