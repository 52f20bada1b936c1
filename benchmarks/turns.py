"""Sides of a comparison in processes of their own: each one's memory is its own, and one that dies takes none along.

On a CPU, whose load others share, all sides stay and take turns step by step. On a GPU two sides would not fit beside
each other, so one is there at a time.
"""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks.device import is_out_of_memory, limit_memory, release

MEMORY_SHARE = 0.85
"""Of the free memory of a machine without a GPU, for each side."""


class OutOfMemory(Exception):
    """A side had not the memory for what it was asked."""


class Remote:
    """An object that lives in a process of its own; ``call`` runs one of its methods there.

    Args:
        make: builds the object; a function or class of a module, called with ``arguments``.
    """

    def __init__(self, make: Callable[..., Any], *arguments: Any) -> None:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as in train.py
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, arguments))
        self._process.start()
        theirs.close()
        try:
            self._answer()
        except BaseException:
            self.close()
            raise

    def call(self, method: str, *arguments: Any) -> Any:
        """What the method returns.

        Raises:
            OutOfMemory: where memory ran out; the object is still there.
            RuntimeError: with the traceback of any other error.
        """
        self._connection.send((method, arguments))
        return self._answer()

    def _answer(self) -> Any:
        try:
            kind, value = self._connection.recv()
        except EOFError:
            self._process.join()
            raise OutOfMemory(f"its process ended with exit code {self._process.exitcode}") from None
        if kind == "memory":
            raise OutOfMemory(value)
        if kind == "wrong":
            raise ValueError(value)
        if kind == "error":
            raise RuntimeError(value)
        return value

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.join(10)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()


def _serve(connection: Connection, make: Callable[..., Any], arguments: Sequence[Any]) -> None:
    """Build the object and run its methods until the other end of the connection is closed."""
    limit_memory(MEMORY_SHARE)
    thing: Any = None
    answer = _attempt(lambda: make(*arguments))
    if answer[0] == "result":
        thing, answer = answer[1], ("result", None)
    connection.send(answer)
    while thing is not None:
        try:
            method, given = connection.recv()
        except EOFError:
            return
        connection.send(_attempt(lambda method=method, given=given: getattr(thing, method)(*given)))


def _attempt(work: Callable[[], Any]) -> tuple[str, Any]:
    """("result", what came of it), or the kind of error and its text; nothing of a failed attempt stays in memory."""
    try:
        return "result", work()
    except ValueError as error:
        return "wrong", str(error)
    except Exception as error:
        found = ("memory", str(error).splitlines()[0]) if is_out_of_memory(error) else ("error", traceback.format_exc())
        traceback.clear_frames(error.__traceback__)
    release()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    return found
