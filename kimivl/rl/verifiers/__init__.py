"""Verifiers: is this answer the expected one? Plain Python without torch, so that a worker process starts fast.

A verifier is called with the text of the answer (what stands after the thinking) and the expected answer, and gives
true, false, or a mark from 0 to 1. It raises where it cannot judge, which is counted and is no wrong answer. It may
have two methods more: ``settle(text, expected) -> bool | None``, what can be said at once, asked before a worker is;
and ``prepare()``, called once in a worker before its first answer, for slow imports.
"""

from collections.abc import Callable

from kimivl.rl.verifiers.boxes import Boxes
from kimivl.rl.verifiers.by_task import ByTask
from kimivl.rl.verifiers.choice import Choice
from kimivl.rl.verifiers.exact import Exact, boxed
from kimivl.rl.verifiers.items import Items
from kimivl.rl.verifiers.mathematics import Mathematics
from kimivl.rl.verifiers.numeric import Numeric
from kimivl.rl.verifiers.pattern import Pattern

Verifier = Callable[[str, str], float]
"""(text of the answer, expected answer) -> right or wrong, or a mark from 0 to 1."""

__all__ = [
    "Boxes",
    "ByTask",
    "Choice",
    "Exact",
    "Items",
    "Mathematics",
    "Numeric",
    "Pattern",
    "Verifier",
    "boxed",
]
