"""Who starts the ranks of a run: nobody (one process), torchrun, submitit, or srun; never Lightning.

Lightning's own launcher re-runs the command line in child processes. In a multirun those children would run the
whole sweep again, with other values in the same process group, and end with exit code 0. A single run on several
devices of one machine starts its ranks by `kimivl.runtime.spawn`, which leaves them torchrun's variables.
"""

from __future__ import annotations

import gc
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from socket import gethostname
from typing import Any, Literal

from kimivl.runtime import signals

Launcher = Literal["process", "torchrun", "submitit", "srun"]

_SPECIAL_STEPS = 0xFFFFFFF0
"""From here on the numbers of SLURM's own steps: batch script, interactive shell."""


ENDS_WITHIN, STOPS_WITHIN = 50, 180
"""Seconds that a process of several has to end, once it has failed; and once it was stopped, when it may have to wait
for SLURM to put it back into the queue."""


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
    """What the variables that a launcher leaves in the environment say of this process.

    One task of SLURM alone (``srun --pty bash``, ``sbatch`` without ``srun``) is a process like any other.
    """

    def number(name: str, default: int = 0) -> int:
        return int(environ.get(name, default))

    if {"RANK", "LOCAL_RANK", "WORLD_SIZE"} <= environ.keys():
        world = number("WORLD_SIZE")
        nodes = max(1, world // number("LOCAL_WORLD_SIZE", world))
        return Place("torchrun", number("RANK"), world, number("LOCAL_RANK"), nodes, number("GROUP_RANK"))
    if environ.get("SUBMITIT_EXECUTOR") == "local":
        one = "SUBMITIT_LOCAL_"
        return Place("submitit", number(f"{one}GLOBALID"), number(f"{one}NTASKS", 1), number(f"{one}LOCALID"))
    if "SLURM_PROCID" in environ and number("SLURM_STEP_ID", _SPECIAL_STEPS) < _SPECIAL_STEPS:
        started: Launcher = "submitit" if environ.get("SUBMITIT_EXECUTOR") == "slurm" else "srun"
        world = number("SLURM_STEP_NUM_TASKS", number("SLURM_NTASKS", 1))
        if world > 1 or started == "submitit":
            nodes = number("SLURM_STEP_NUM_NODES", number("SLURM_NNODES", 1))
            own = (number("SLURM_PROCID"), world, number("SLURM_LOCALID"), nodes, number("SLURM_NODEID"))
            return Place(started, *own)
    return Place()


def rank_overrides() -> list[str]:
    """What Hydra is told besides what the user typed: rank 0 alone writes ``.hydra``."""
    return ["hydra.output_subdir=null"] if find_place().rank else []


def check_launch(trainer: Mapping[str, Any], multirun: bool) -> Place:
    """The place of this process, after a look at whether it is the one that the config asks for.

    A single run on several devices of one machine that was typed without a launcher goes on in ranks of its own: this
    process then becomes the one that starts them, and the call does not return.

    Raises:
        ValueError: with what works instead.
    """
    place = find_place()
    accelerator = trainer.get("accelerator")
    if place.world_size == 1 and (lack := _lack_of_gpus(accelerator, place)):  # several look when they meet
        raise ValueError(lack)
    with _said_by_the_first(place, ValueError):
        _check_asked(place, trainer, _visible_gpus(accelerator), multirun)
    return place


@contextmanager
def _said_by_the_first(place: Place, error: type[ValueError]) -> Iterator[None]:
    """Rank 0 says for all what all ranks fail of. The tasks of submitit have a log each."""
    try:
        yield
    except error:
        if place.rank and place.launcher != "submitit":
            raise SystemExit(0) from None  # another code might have rank 0 ended before it speaks
        raise


def _check_asked(place: Place, trainer: Mapping[str, Any], gpus: int | None, multirun: bool) -> None:
    """What comes out alike on all ranks."""
    devices, nodes = count_devices(trainer["devices"], gpus, place, multirun), trainer["num_nodes"]
    if not isinstance(nodes, int) or nodes < 1:
        raise ValueError(f"trainer.num_nodes={nodes} must be a whole number of at least 1")
    if place.launcher == "process" and (devices, nodes) != (1, 1):
        _check_spawn(devices, nodes, multirun)
        _become_ranks(devices)
    if multirun:
        check_multirun()
    _check_tasks(place, devices, nodes)


def check_multirun() -> None:
    """Refuse a multirun that is not started by one process: every rank would run all of it."""
    if (launcher := find_place().launcher) in ("torchrun", "srun"):
        raise ValueError(
            f"a multirun under {launcher}: each rank would run the whole sweep; start it with python train.py -m "
            "hydra/launcher=local, or hydra/launcher=slurm on a cluster"
        )


def count_devices(devices: Any, gpus: int | None, place: Place, multirun: bool) -> int:
    """``trainer.devices`` as a number; "auto" and -1 are what the launcher has started, or all GPUs.

    Raises:
        ValueError: for a list, and where there is nothing to count.
    """
    if devices in ("auto", -1, "-1"):
        if place.launcher != "process":
            return place.tasks_per_node
        if gpus is None or multirun:
            raise ValueError(
                f"trainer.devices={devices} needs GPUs to count, and a launcher or a single run: give the number of "
                "ranks, such as trainer.devices=2"
            )
        return gpus
    if isinstance(devices, int) and not isinstance(devices, bool) and devices >= 1:
        if gpus is not None and devices > gpus and place.launcher == "process" and not multirun:
            raise ValueError(f"trainer.devices={devices}, but torch finds {gpus} GPUs here; use trainer.devices={gpus}")
        return devices
    if isinstance(devices, str) or hasattr(devices, "__len__"):
        chosen = [part for part in re.split(r"[^0-9]+", str(devices)) if part]
        if chosen:
            raise ValueError(
                f"trainer.devices={devices} is a list: give their number, and choose them in the environment, as in "
                f"CUDA_VISIBLE_DEVICES={','.join(chosen)} python train.py trainer.devices={len(chosen)}"
            )
    raise ValueError(f"trainer.devices={devices} must be a whole number of at least 1, or auto")


def _visible_gpus(accelerator: Any) -> int | None:
    """GPUs that a run on ``accelerator`` can use here; None where it uses none."""
    if accelerator == "cpu":
        return None
    import torch  # the launcher of a sweep imports this file, and needs no torch

    if torch.cuda.is_available():
        return torch.cuda.device_count()
    return 0 if accelerator in ("gpu", "cuda") else None


def _lack_of_gpus(accelerator: Any, place: Place) -> str | None:
    """Why there is no GPU for this rank, where it is to have one. The nodes of a run may differ in it."""
    gpus = _visible_gpus(accelerator)
    if gpus == 0:
        here = "here" if place.world_size == 1 else f"for rank {place.rank} on {gethostname()}"
        return f"trainer.accelerator={accelerator}: torch finds no CUDA device {here}; use trainer=cpu"
    if gpus is not None and place.local_rank >= gpus:
        return (
            f"rank {place.rank} is number {place.local_rank} of its node but sees {gpus} GPUs: every task must see "
            "all GPUs of its node; under SLURM ask for them with --gpus-per-node, not --gpus-per-task"
        )
    return None


def _check_spawn(devices: int, nodes: int, multirun: bool) -> None:
    """Whether this process may start the ranks itself: not in a multirun, nor on other nodes, nor beside a SLURM job's
    own tasks."""
    asked = f"trainer.devices={devices} trainer.num_nodes={nodes}"
    if multirun:
        raise ValueError(
            f"{asked} in a multirun: its jobs need a launcher that starts their ranks; add hydra/launcher=local, or "
            "hydra/launcher=slurm on a cluster"
        )
    if int(os.environ.get("SLURM_NTASKS", 1)) > 1:
        raise ValueError(
            f"{asked} in a SLURM job of {os.environ['SLURM_NTASKS']} tasks, but this is a single process: start it "
            "with srun python train.py ..."
        )
    if nodes > 1:
        raise ValueError(
            f"{asked}: one process cannot start ranks on other nodes; on each node type torchrun --nnodes={nodes} "
            f"--nproc-per-node={devices} --rdzv-backend=c10d --rdzv-endpoint=FIRST_NODE:29500 train.py ..., or under "
            "SLURM srun python train.py ..."
        )


def _check_tasks(place: Place, devices: int, nodes: int) -> None:
    if place.world_size % place.nodes:
        raise ValueError(
            f"{place.launcher} put {place.world_size} processes on {place.nodes} nodes: every node needs the same "
            "number; use --ntasks-per-node"
        )
    if (place.tasks_per_node, place.nodes) == (devices, nodes):
        return
    if place.launcher == "submitit":
        raise ValueError(
            f"trainer.devices={devices} trainer.num_nodes={nodes} in a sweep whose jobs have {place.tasks_per_node} "
            f"tasks on each of {place.nodes} nodes: a sweep has one number of tasks; type one sweep for each "
            "trainer.devices"
        )
    raise ValueError(
        f"trainer.devices={devices} trainer.num_nodes={nodes}, but {place.launcher} started {place.tasks_per_node} "
        f"on each of {place.nodes} nodes: set trainer.devices={place.tasks_per_node} trainer.num_nodes={place.nodes}"
    )


def _become_ranks(devices: int) -> None:
    spawn = str(Path(__file__).with_name("spawn.py"))
    signals.hold()  # the new program has no handlers at first
    sys.stdout.flush()
    sys.stderr.flush()
    # -P: the folder of this file must not come before the standard library.
    os.execv(sys.executable, [sys.executable, "-P", spawn, str(devices), *sys.argv])


@contextmanager
def joined(place: Place, accelerator: Any, timeout: timedelta) -> Iterator[None]:
    """The process group of the run, under torch's own variables, whoever started the ranks. One rank needs none.

    Objects always go over gloo, on the CPU; tensors over the backend of their device.

    Raises:
        ValueError: with who has not come, or cannot take part.
    """
    if place.world_size == 1:
        yield
        return
    import torch
    import torch.distributed as dist

    from kimivl.runtime.meeting import meet
    from kimivl.runtime.ranks import PeerFailed

    variables = _torch_variables(place)
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        with _said_by_the_first(place, PeerFailed):
            store = meet(place.rank, place.world_size, _lack_of_gpus(accelerator, place))
        store.set_timeout(timeout)
        backend = "gloo"
        if accelerator != "cpu" and torch.cuda.is_available():
            torch.cuda.set_device(place.local_rank)
            backend = "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, timeout=timeout, store=store, rank=place.rank, world_size=place.world_size)
        yield
        dist.destroy_process_group()
        # What the run leaves behind in cycles keeps gloo's threads alive; one of them that lets go of a tensor while
        # Python ends aborts the process.
        gc.collect()
    except BaseException as error:
        _abandon(ENDS_WITHIN if isinstance(error, Exception) else STOPS_WITHIN)
        raise
    finally:
        for name, value in before.items():  # a later run in this process is not of this group
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _abandon(seconds: int) -> None:
    """Leave a process group whose collectives may never end: the other ranks may be gone, or wait in others.

    To destroy it would wait for them, and so does the end of the process: the threads of gloo and the kernels of NCCL
    are joined there, where no code of Python runs any more. NCCL's can be aborted. For the rest an alarm is set, which
    ends a process that has not ended in ``seconds``, whatever it waits for.
    """
    import torch
    import torch.distributed as dist

    signal.alarm(seconds)

    def abort() -> None:
        for group in list(dist.distributed_c10d._world.pg_map):
            if "nccl" in dist.get_backend_config(group):
                group._get_backend(torch.device("cuda")).abort()

    thread = threading.Thread(target=abort, name="abort", daemon=True)
    thread.start()
    thread.join(10)


def _torch_variables(place: Place) -> dict[str, str]:
    own = {
        "RANK": place.rank,
        "WORLD_SIZE": place.world_size,
        "LOCAL_RANK": place.local_rank,
        "LOCAL_WORLD_SIZE": place.tasks_per_node,
        "GROUP_RANK": place.node,
    }
    variables = {name: str(value) for name, value in own.items()}
    if place.launcher == "torchrun":
        return {"MASTER_ADDR": "127.0.0.1", **_given("MASTER_ADDR"), **variables}
    if place.launcher == "submitit" and os.environ.get("SUBMITIT_EXECUTOR") == "local":
        job = re.sub(r"\D", "", os.environ["SUBMITIT_LOCAL_JOB_ID"])
        return variables | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _port(int(job or 0)), **_given("MASTER_PORT")}
    number = _port(int(os.environ["SLURM_JOB_ID"]) * 7 + int(os.environ["SLURM_STEP_ID"]))
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ["SLURM_JOB_NODELIST"]
    host = "127.0.0.1" if place.nodes == 1 else _first_host(nodes)
    return variables | {"MASTER_ADDR": host, "MASTER_PORT": number, **_given("MASTER_ADDR"), **_given("MASTER_PORT")}


def _given(name: str) -> dict[str, str]:
    return {name: os.environ[name]} if name in os.environ else {}


def _port(job: int) -> str:
    """Another for each job, the same on all its ranks, and below those that systems give out by themselves."""
    return str(20_000 + job % 12_000)


def _first_host(nodes: str) -> str:
    """``n[3-5,8]`` -> ``n3``."""
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", nodes).split(",")[0]
