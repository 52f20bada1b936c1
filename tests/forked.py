"""Commands in processes that find everything imported: a run starts in a second instead of eight.

The process is a fork of one that has imported torch, transformers and Lightning, and has done nothing else; from there
it goes the way of ``python train.py``. What is about starting (imports, launchers, ``--help``) takes ``command.train``.
"""

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from command import ROOT
from fork_server import SERVER

LEFT_S = 60.0
"""Seconds that the processes of a run (workers of loaders and verifiers) may outlive it."""


def train(*overrides: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    """``python train.py OVERRIDES``; with ``check`` a failure shows what the command printed."""
    with tempfile.TemporaryDirectory() as folder:
        env = os.environ | {"WANDB_MODE": "offline", "COLUMNS": "200", "TMPDIR": folder} | environment
        printed = [Path(folder) / name for name in ("stdout", "stderr")]
        for path in printed:
            path.touch()
        process = SERVER.Process(target=_train, args=(overrides, env, *printed))
        process.start()
        process.join(600)
        late = process.is_alive()
        left = _end_group(process.pid or 0, 0 if late else LEFT_S)
        process.join()
        out, err = (path.read_text() for path in printed)
    done = subprocess.CompletedProcess(["train.py", *overrides], process.exitcode or 0, out, err)
    assert not late, f"it hangs:\n{out}{err}"
    assert not left, f"processes outlived the run:\n{out}{err}"
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


def _end_group(group: int, patience: float) -> bool:
    """Whether processes of a group were there for longer than ``patience`` seconds; they are ended."""
    end = time.monotonic() + patience
    with suppress(ProcessLookupError):
        while time.monotonic() < end:
            os.killpg(group, 0)
            time.sleep(0.01)
        os.killpg(group, signal.SIGKILL)
        return True
    return False


def _train(overrides: tuple[str, ...], environment: dict[str, str], out: Path, err: Path) -> None:
    os.setsid()  # a signal to its whole group reaches the run and its workers, not the tests
    for path, stream in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    multiprocessing.set_start_method(None, force=True)  # the system's own again, as in a process that is typed
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # found anew
    sys.argv = ["train.py", *overrides]
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    try:
        runpy.run_path("train.py", run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # which a fork leaves out
