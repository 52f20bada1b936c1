"""Commands as a user types them, in processes of their own."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def train(*overrides: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    """``python train.py OVERRIDES``; with ``check`` a failure shows what the command printed."""
    command = [sys.executable, "train.py", *overrides]
    path = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory() as folder:  # a run that is killed leaves files behind
        env = (
            os.environ | {"PYTHONPATH": path, "WANDB_MODE": "offline", "COLUMNS": "200", "TMPDIR": folder} | environment
        )
        # In a session of its own: a signal to its whole group reaches the run and its workers, not the tests.
        done = subprocess.run(
            command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600, start_new_session=True
        )
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


def history(run: Path, name: str) -> dict[int, float]:
    """A figure of a run by step; a step that was run twice counts as it was run last."""
    rows = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    return {row["step"]: row[name] for row in rows if name in row}
