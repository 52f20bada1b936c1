"""One SLURM for the tests of a process, and runs to compare with."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import pytest
from command import ROOT, train
from slurm_cluster import Cluster, Missing, short
from without import without


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    with ExitStack() as stack:
        try:
            running = stack.enter_context(Cluster(nodes=2))
        except Missing as missing:
            without(f"SLURM: {missing}")
        yield running


@pytest.fixture
def nodes(cluster: Cluster) -> Iterator[Cluster]:
    """The cluster; what a test leaves in its queue is cancelled."""
    yield cluster
    cluster.cancel_all()


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where runs find their data."""
    return tmp_path_factory.mktemp("slurm")


@pytest.fixture(scope="session")
def uninterrupted(root: Path) -> Callable[..., Path]:
    """The folder of an uninterrupted run on so many ranks with a seed, made when it is asked for first."""

    @cache
    def run(ranks: int, seed: int = 1) -> Path:
        folder = root / f"whole-{ranks}-{seed}"
        train(*short(root), f"trainer.devices={ranks}", f"seed={seed}", f"paths.output_dir={folder}")
        return folder

    return run


@pytest.fixture(scope="session")
def whole(uninterrupted: Callable[..., Path]) -> Path:
    """The folder of an uninterrupted run on two ranks."""
    return uninterrupted(2)


@pytest.fixture
def sbatch(nodes: Cluster, root: Path, tmp_path: Path) -> Callable[..., str]:
    """Submit a script as a user writes it; returns the job's number."""

    def submit(*overrides: str, options: tuple[str, ...] = ("--signal=USR2@30", "--time=30"), tasks: int = 2) -> str:
        words = " ".join(f"'{override}'" for override in (*short(root), f"trainer.devices={tasks}", *overrides))
        script = tmp_path / "job.sh"
        script.write_text(
            "#!/bin/bash\n"
            f"srun --kill-on-bad-exit=1 {sys.executable} train.py {words} paths.output_dir={tmp_path}/run\n"
        )
        own = ["--requeue", "--open-mode=append", f"--output={tmp_path}/log", f"--chdir={ROOT}", "--export=ALL"]
        return nodes.run(
            "sbatch",
            "--parsable",
            f"--ntasks-per-node={tasks}",
            *own,
            *options,
            str(script),
            PYTHONPATH=str(ROOT / "tests"),
            WANDB_MODE="offline",
            OMP_NUM_THREADS="1",
        )

    return submit


@pytest.fixture
def sweep(nodes: Cluster, root: Path, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start ``python train.py -m hydra/launcher=slurm ...``, whose folder is ``tmp_path/sweep``."""
    started: list[subprocess.Popen[str]] = []
    yield lambda *overrides: started.append(_start(nodes, root, tmp_path, overrides)) or started[-1]
    for process in started:
        process.kill()
        process.wait()


def _start(nodes: Cluster, root: Path, tmp_path: Path, overrides: tuple[str, ...]) -> subprocess.Popen[str]:
    own = ["-m", "hydra/launcher=slurm", "hydra.launcher.timeout_min=30", f"hydra.sweep.dir={tmp_path}/sweep"]
    environment = {"PYTHONPATH": str(ROOT / "tests"), "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "train.py", *own, *short(root), *overrides],
        cwd=ROOT,
        env=os.environ | environment | nodes.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
