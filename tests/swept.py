"""Sweeps of the stand-in (quadratic.py), typed as a user types them."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SCRIPT = Path(__file__).with_name("quadratic.py")


def sweep(root: Path, *overrides: str, **events: str) -> subprocess.CompletedProcess[str]:
    """``python quadratic.py -m stage=sft OVERRIDES``; ``events`` say what becomes of points, by their values."""
    named = {name.replace("__", "_seed-").replace("lr_", "data.lr_scale-"): event for name, event in events.items()}
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    own = {"QUADRATIC": json.dumps(named), "LAUNCHED": str(root / "launched"), "PYTHONPATH": path, "COLUMNS": "200"}
    (root / "launched").write_text("")
    typed = ["stage=sft", f"paths.root={root}", *overrides]
    typed.sort(key=lambda word: not word.startswith("--"))  # no option may stand between overrides
    command = [sys.executable, str(SCRIPT), "-m", *typed]
    return subprocess.run(command, cwd=root, env=os.environ | own, capture_output=True, text=True, timeout=600)


def launched(root: Path) -> list[str]:
    """The folders of the jobs that the last sweep has started."""
    return (root / "launched").read_text().split()
