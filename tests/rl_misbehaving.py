"""Verifiers that do everything wrong, by what the answer says."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def misbehave(text: str, expected: str) -> float:
    """``text`` is what to do; anything else is judged literally."""
    if text == "sleep":
        time.sleep(3600)
    if text == "loop":
        while True:
            pass
    if text == "hang in C":  # holds the interpreter: neither signals nor threads of Python run
        return float(9**9**8 == 0)
    if text == "swallow":
        while True:
            with contextlib.suppress(BaseException):
                time.sleep(3600)
    if text == "segfault":
        ctypes.string_at(0)
    if text == "exit":
        os._exit(3)
    if text == "sys.exit":
        sys.exit(3)
    if text == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if text == "memory":
        return float(len(bytearray(64 * 2**30)))
    if text == "raise":
        raise KeyError("no such thing")
    if text == "nonsense":
        return 17.0
    if text == "nan":
        return float("nan")
    if text == "print":
        print("some noise")
        os.write(1, b"more noise")
    if text.startswith("child "):  # leaves a process behind, and its number
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
        Path(text.removeprefix("child ")).write_text(str(child.pid))
        time.sleep(3600)
    if text == "slow":
        time.sleep(0.5)
    if text.startswith("count "):  # leaves a line for each call
        with Path(text.removeprefix("count ")).open("a") as file:
            file.write("called\n")
        time.sleep(3600)
    return text == expected


class UnableToStart:
    def __call__(self, text: str, expected: str) -> bool:
        return True

    def prepare(self) -> None:
        raise ImportError("some package is missing")


class HangsWhileStarting(UnableToStart):
    def prepare(self) -> None:
        time.sleep(3600)
