"""Who starts the ranks of a run: nobody (one process), torchrun, submitit, or srun; never Lightning.

Lightning's own launcher re-runs the command line in child processes. In a multirun those children would run the
whole sweep again, with other values in the same process group, and end with exit code 0.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

Launcher = Literal["process", "torchrun", "submitit", "srun"]


@dataclass(frozen=True, slots=True)
class Place:
    """This process among those of its run, and who started them."""

    launcher: Launcher = "process"
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    nodes: int = 1
    node: int = 0

    @property
    def tasks_per_node(self) -> int:
        return self.world_size // self.nodes


def find_place(environ: Mapping[str, str] = os.environ) -> Place:
    """What the variables that a launcher leaves in the environment say of this process."""

    def number(name: str, default: int = 0) -> int:
        return int(environ.get(name, default))

    if "TORCHELASTIC_RUN_ID" in environ:
        nodes = number("WORLD_SIZE", 1) // number("LOCAL_WORLD_SIZE", 1)
        return Place(
            "torchrun", number("RANK"), number("WORLD_SIZE", 1), number("LOCAL_RANK"), nodes, number("GROUP_RANK")
        )
    if environ.get("SUBMITIT_EXECUTOR") == "local":
        one = "SUBMITIT_LOCAL_"
        return Place("submitit", number(f"{one}GLOBALID"), number(f"{one}NTASKS", 1), number(f"{one}LOCALID"))
    if "SLURM_STEP_ID" in environ and "SLURM_PROCID" in environ:
        started: Launcher = "submitit" if environ.get("SUBMITIT_EXECUTOR") == "slurm" else "srun"
        own = [number("SLURM_PROCID"), number("SLURM_NTASKS", 1), number("SLURM_LOCALID")]
        return Place(started, *own, number("SLURM_NNODES", 1), number("SLURM_NODEID"))
    return Place()


def check_launch(trainer: Mapping[str, Any], multirun: bool) -> Place:
    """The place of this process, after a look at whether it is the one that the config asks for.

    A single run on several devices of one machine that was typed without a launcher goes on under torchrun: this
    process then becomes torchrun, and the call does not return.

    Raises:
        ValueError: with what works instead.
    """
    accelerator, devices, nodes = trainer.get("accelerator"), trainer["devices"], trainer["num_nodes"]
    if accelerator in ("gpu", "cuda"):
        import torch  # the launcher of a sweep imports this file, and needs no torch

        if not torch.cuda.is_available():
            raise ValueError(f"trainer.accelerator={accelerator}: torch finds no CUDA device here; use trainer=cpu")
    place = find_place()
    if place.launcher == "process" and (devices, nodes) != (1, 1):
        if multirun or nodes != 1:
            raise ValueError(
                f"trainer.devices={devices} trainer.num_nodes={nodes} in a multirun: its jobs need a launcher that "
                "starts their ranks; add hydra/launcher=local, or hydra/launcher=slurm on a cluster"
            )
        _become_torchrun(devices)
    if multirun and place.launcher in ("torchrun", "srun"):
        raise ValueError(
            f"a multirun under {place.launcher}: each rank would run the whole sweep; start it with python train.py -m "
            "hydra/launcher=local, or hydra/launcher=slurm on a cluster"
        )
    if (place.tasks_per_node, place.nodes) != (devices, nodes):
        raise ValueError(
            f"trainer.devices={devices} trainer.num_nodes={nodes}, but {place.launcher} started {place.tasks_per_node} "
            f"processes on each of {place.nodes} nodes: set trainer.devices={place.tasks_per_node} "
            f"trainer.num_nodes={place.nodes}"
        )
    return place


def _become_torchrun(devices: int) -> None:
    signals = "SIGTERM,SIGINT,SIGUSR1,SIGUSR2"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={devices}"]
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [*command, f"--signals-to-handle={signals}", *sys.argv])


@contextmanager
def joined(place: Place, accelerator: Any, timeout: timedelta) -> Iterator[None]:
    """The process group of the run, under torch's own variables, whoever started the ranks. One rank needs none."""
    if place.world_size == 1:
        yield
        return
    import torch.distributed as dist

    os.environ.update(_torch_variables(place))
    backend = "gloo" if accelerator == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=timeout)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _torch_variables(place: Place) -> dict[str, str]:
    own = {
        "RANK": place.rank,
        "WORLD_SIZE": place.world_size,
        "LOCAL_RANK": place.local_rank,
        "LOCAL_WORLD_SIZE": place.tasks_per_node,
        "GROUP_RANK": place.node,
    }
    variables = {name: str(value) for name, value in own.items()}
    if place.launcher == "torchrun" or "MASTER_PORT" in os.environ:
        return variables
    if "SLURM_JOB_ID" in os.environ and os.environ.get("SUBMITIT_EXECUTOR") != "local":
        job, step = int(os.environ["SLURM_JOB_ID"]), int(os.environ["SLURM_STEP_ID"])
        host = os.environ.get("MASTER_ADDR") or _first_host(os.environ["SLURM_JOB_NODELIST"])
        return variables | {"MASTER_ADDR": host, "MASTER_PORT": str(20_000 + (job * 7 + step) % 20_000)}
    job = int(re.sub(r"\D", "", os.environ["SUBMITIT_LOCAL_JOB_ID"]) or 0)
    return variables | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20_000 + job % 20_000)}


def _first_host(nodes: str) -> str:
    """``n[3-5,8]`` -> ``n3``."""
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", nodes).split(",")[0]
