"""Models as W&B artifacts: by reference to their folder, never copied, and the same for the run that made a model and
for the one that begins with it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import wandb

from kimivl.tracking.folder import read_run


def log_model(run: Any, folder: Path, metadata: dict[str, Any]) -> None:
    """The model that a run has made, as its output."""
    run._log_artifact(_artifact(folder, metadata), aliases=["latest"], type="model")


def used_model(run: Any, folder: Path) -> None:
    """The model that a run begins with, as its input; a folder on the Hugging Face hub has none to refer to.

    ``Run.use_artifact`` refuses to work offline and waits for the network online. An artifact with the content of one
    that W&B has is that one, so it can be logged as one to use: ``wandb sync`` then makes the link.
    """
    if folder.is_dir():
        run._log_artifact(_artifact(folder, {}), type="model", use_after_commit=True)


def _artifact(folder: Path, metadata: dict[str, Any]) -> wandb.Artifact:
    """What is sent is the place of the files, their sizes and times: another model there is another version."""
    made_by = read_run(folder.parent).get("id")
    name = re.sub(r"[^\w.-]+", "-", folder.name) if made_by is None else f"model-{made_by}"
    artifact = wandb.Artifact(name, type="model", metadata={"folder": str(folder.resolve())} | metadata)
    artifact.add_reference(folder.resolve().as_uri(), name="folder", checksum=False)
    files = {
        str(path.relative_to(folder)): [path.stat().st_size, path.stat().st_mtime_ns]
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    with artifact.new_file("model.json") as file:
        json.dump({"run": made_by, "folder": str(folder.resolve()), "bytes_and_time_of_files": files}, file, indent=2)
    return artifact
