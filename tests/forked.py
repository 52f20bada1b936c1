"""Commands in processes that find everything imported: a run starts in a second instead of eight.

The process is a fork of one that has imported torch, transformers and Lightning, and has done nothing else; from there
it goes the way of ``python train.py``. What is about starting (imports, launchers, ``--help``) takes ``command.train``.
"""

import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

from command import ROOT
from in_ranks import _server


def train(*overrides: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    """``python train.py OVERRIDES``; with ``check`` a failure shows what the command printed."""
    env = os.environ | {"WANDB_MODE": "offline", "COLUMNS": "200"} | environment
    with tempfile.TemporaryDirectory() as folder:
        printed = [Path(folder) / name for name in ("stdout", "stderr")]
        process = _server.Process(target=_train, args=(overrides, env, *printed))
        process.start()
        process.join(600)
        if process.is_alive():
            process.kill()
            process.join()
        out, err = (path.read_text() for path in printed)
    done = subprocess.CompletedProcess(["train.py", *overrides], process.exitcode, out, err)
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


def _train(overrides: tuple[str, ...], environment: dict[str, str], out: Path, err: Path) -> None:
    os.setsid()  # a signal to its whole group reaches the run and its workers, not the tests
    for path, stream in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["train.py", *overrides]
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    runpy.run_path("train.py", run_name="__main__")
