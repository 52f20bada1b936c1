"""Who started this process, and what is refused."""

import os
import signal
import socket
import subprocess
import sys

import pytest

from kimivl.runtime import launch
from kimivl.runtime.launch import Place, check_launch, find_place, rank_overrides

SRUN = {
    "SLURM_JOB_ID": "17",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "4",
    "SLURM_NNODES": "2",
    "SLURM_JOB_NODELIST": "gpu-[03-04,9]",
}
TORCHRUN = {"RANK": "3", "LOCAL_RANK": "1", "GROUP_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
LOCAL = {"SUBMITIT_EXECUTOR": "local", "SUBMITIT_LOCAL_NTASKS": "2", "SUBMITIT_LOCAL_GLOBALID": "1",
         "SUBMITIT_LOCAL_LOCALID": "1", "SUBMITIT_LOCAL_JOB_ID": "4711"}  # fmt: skip
SBATCH = {"SLURM_JOB_ID": "17", "SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_NNODES": "1"}

PLACES = {
    "nobody": ({}, Place()),
    "torchrun": (TORCHRUN, Place("torchrun", 3, 4, 1, 2, 1)),
    "torchrun inside of srun": (SRUN | TORCHRUN, Place("torchrun", 3, 4, 1, 2, 1)),
    "a pod that names its rank, but not its device": ({"RANK": "0", "WORLD_SIZE": "2"}, Place()),
    "srun": (SRUN, Place("srun", 3, 4, 1, 2, 1)),
    "srun on a part of the job": (
        SRUN | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1", "SLURM_PROCID": "1", "SLURM_NODEID": "0"},
        Place("srun", 1, 2, 1, 1, 0),
    ),  # fmt: skip
    "srun --pty bash": (SRUN | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, Place()),
    "sbatch": (SBATCH, Place()),
    "the batch script's own step": (SBATCH | {"SLURM_STEP_ID": "4294967291"}, Place()),
    "salloc's shell": (SBATCH | {"SLURM_STEP_ID": "4294967290"}, Place()),
    "submitit here": (LOCAL, Place("submitit", 1, 2, 1)),
    "submitit's single task": ({"SUBMITIT_EXECUTOR": "local", "SUBMITIT_LOCAL_JOB_ID": "1"}, Place("submitit")),
    "submitit on slurm": (SRUN | {"SUBMITIT_EXECUTOR": "slurm"}, Place("submitit", 3, 4, 1, 2, 1)),
}


@pytest.mark.parametrize(("environ", "place"), PLACES.values(), ids=PLACES.keys())
def test_the_environment_says_who_started_this_process(environ, place):
    assert find_place(environ) == place


@pytest.fixture
def environ(monkeypatch):
    """The environment that a launcher leaves; a rank that would be started is noted instead."""
    for name in os.environ:
        if name.startswith(("SLURM", "SUBMITIT", "TORCHELASTIC")) or name in TORCHRUN:
            monkeypatch.delenv(name)

    def become(devices: int) -> None:
        raise SystemExit(f"{devices} ranks")

    monkeypatch.setattr(launch, "_become_ranks", become)
    return lambda **variables: [monkeypatch.setenv(name, value) for name, value in variables.items()]


def asks(devices, nodes=1, accelerator="cpu"):
    return {"accelerator": accelerator, "devices": devices, "num_nodes": nodes}


def test_one_process_runs_and_several_devices_become_ranks(environ):
    assert check_launch(asks(1), False) == check_launch(asks(1), True) == Place()
    with pytest.raises(SystemExit, match="2 ranks"):
        check_launch(asks(2), False)


def test_ranks_that_agree_with_the_config_run(environ):
    environ(**TORCHRUN)
    assert check_launch(asks(2, 2), False).rank == 3
    assert check_launch(asks("auto", 2), False).world_size == 4
    assert rank_overrides() == ["hydra.output_subdir=null"]


def test_a_process_in_a_slurm_job_without_srun_runs_alone_only(environ):
    environ(**SBATCH)
    assert check_launch(asks(1), False) == Place()
    with pytest.raises(ValueError, match="a SLURM job of 2 tasks, but this is a single process: start it with srun"):
        check_launch(asks(2), False)
    environ(SLURM_NTASKS="1")
    with pytest.raises(SystemExit, match="2 ranks"):  # one task with two devices
        check_launch(asks(2), False)


REFUSED = {
    "ranks in a multirun": ({}, asks(2), True, "add hydra/launcher=local, or hydra/launcher=slurm"),
    "nodes in a multirun": ({}, asks(1, 2), True, "add hydra/launcher=local, or hydra/launcher=slurm"),
    "other nodes": ({}, asks(2, 2), False, "type torchrun --nnodes=2 --nproc-per-node=2 .* srun python train.py"),
    "torchrun, multirun": (TORCHRUN, asks(2, 2), True, "each rank would run the whole sweep; .* python train.py -m"),
    "srun, multirun": (SRUN, asks(2, 2), True, "each rank would run the whole sweep"),
    "torchrun, other devices": (TORCHRUN, asks(4), False, "set trainer.devices=2 trainer.num_nodes=2"),
    "srun, other devices": (SRUN, asks(1), False, "srun started 2 on each of 2 nodes: set trainer.devices=2"),
    "srun, uneven": (SRUN | {"SLURM_NTASKS": "5"}, asks(2, 2), False, "the same number; use --ntasks-per-node"),
    "a sweep over devices": (LOCAL, asks(4), True, "type one sweep for each trainer.devices"),
    "a list": ({}, asks([0, 2]), False, r"CUDA_VISIBLE_DEVICES=0,2 python train.py trainer.devices=2"),
    "a list as text": ({}, asks("1,3"), False, r"CUDA_VISIBLE_DEVICES=1,3 python train.py trainer.devices=2"),
    "auto on a CPU": ({}, asks("auto"), False, "give the number of ranks, such as trainer.devices=2"),
    "all, on a CPU": ({}, asks(-1), False, "give the number of ranks"),
    "none": ({}, asks(0), False, "trainer.devices=0 must be a whole number of at least 1"),
    "half": ({}, asks(1.5), False, "trainer.devices=1.5 must be a whole number"),
    "no nodes": ({}, asks(1, 0), False, "trainer.num_nodes=0 must be a whole number"),
}


@pytest.mark.parametrize(("variables", "trainer", "multirun", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_would_corrupt_is_refused_with_what_works(environ, variables, trainer, multirun, message):
    environ(**variables)
    if "RANK" in variables or "SLURM_PROCID" in variables:
        with pytest.raises(SystemExit) as silent:  # rank 3 leaves the word to rank 0
            check_launch(trainer, multirun)
        assert silent.value.code == 0
        environ(**{name: "0" for name in ("RANK", "SLURM_PROCID") if name in variables})
    with pytest.raises(ValueError, match=message) as refused:
        check_launch(trainer, multirun)
    assert "\n" not in str(refused.value)


def test_gpus_are_counted(environ, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match="torch finds no CUDA device here; use trainer=cpu"):
        check_launch(asks(1, accelerator="gpu"), False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    with pytest.raises(SystemExit, match="4 ranks"):
        check_launch(asks("auto", accelerator="gpu"), False)
    with pytest.raises(ValueError, match="torch finds 4 GPUs here; use trainer.devices=4"):
        check_launch(asks(8, accelerator="gpu"), False)
    environ(**SRUN)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    rank = check_launch(asks(2, 2, "gpu"), False)  # the nodes may differ: the ranks tell each other when they meet
    assert "see all GPUs of its node; under SLURM ask for them with --gpus-per-node" in launch._lack_of_gpus(
        "gpu", rank
    )
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    rank = check_launch(asks(2, 2, "gpu"), False)
    lack = "trainer.accelerator=gpu: torch finds no CUDA device for rank 3 on "
    assert launch._lack_of_gpus("gpu", rank).startswith(lack) and launch._lack_of_gpus("cpu", rank) is None


def test_ranks_meet_where_their_launcher_lets_them(environ):
    environ(**SRUN)
    assert launch._torch_variables(find_place())["MASTER_ADDR"] == "gpu-03"
    first = launch._torch_variables(find_place())["MASTER_PORT"]
    environ(SLURM_JOB_ID="18")
    assert launch._torch_variables(find_place())["MASTER_PORT"] != first
    environ(MASTER_PORT="29501")
    assert launch._torch_variables(find_place())["MASTER_ADDR"] == "gpu-03"
    assert launch._torch_variables(find_place())["MASTER_PORT"] == "29501"
    environ(SLURM_NNODES="1", MASTER_ADDR="10.0.0.1")
    assert launch._torch_variables(find_place())["MASTER_ADDR"] == "10.0.0.1"
    environ(**LOCAL)
    assert launch._torch_variables(find_place())["MASTER_ADDR"] == "127.0.0.1"


def test_a_folder_that_cannot_be_made_is_refused_in_one_sentence(tmp_path, capsys):
    from omegaconf import OmegaConf

    from kimivl.runtime.beforehand import Beforehand

    (tmp_path / "file").touch()
    config = OmegaConf.create({"hydra": {"run": {"dir": str(tmp_path / "file/run")}, "sweep": {"dir": "unused"}}})
    with pytest.raises(SystemExit, match="2"):
        Beforehand().on_run_start(config)
    assert "/file/run cannot be made (Not a directory" in capsys.readouterr().err


def test_a_multirun_of_ranks_is_refused_before_its_first_job(environ, capsys):
    from kimivl.runtime.beforehand import Beforehand

    environ(**TORCHRUN | {"RANK": "0"})
    with pytest.raises(SystemExit, match="2"):
        Beforehand().on_multirun_start(None)
    assert capsys.readouterr().err.count("each rank would run the whole sweep") == 1
    environ(RANK="1")
    with pytest.raises(SystemExit, match="2"):
        Beforehand().on_multirun_start(None)
    assert capsys.readouterr().err == ""


ABANDONED = """
import sys, torch, torch.distributed as dist
from datetime import timedelta
from kimivl.runtime import launch

launch.ENDS_WITHIN = 2
with launch.joined(launch.find_place(), "cpu", timedelta(minutes=10)):
    dist.barrier()
    work = dist.broadcast(torch.ones(1), 1 - dist.get_rank(), async_op=True)
    raise RuntimeError("the camera is broken")
"""


def two_ranks(program):
    """Two processes of ``program`` as torchrun starts its ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        own = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    return [
        subprocess.Popen(
            [sys.executable, "-c", program],
            env=os.environ | own | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]


@pytest.mark.slow
def test_ranks_that_fail_while_each_waits_for_the_other_end_all_the_same():
    """Each is to receive from the other, in a thread that the end of a process waits for."""
    for rank in two_ranks(ABANDONED):
        assert "the camera is broken" in rank.communicate(timeout=120)[1]
        assert rank.returncode == -signal.SIGALRM


LEFT = """
from datetime import timedelta
from pathlib import Path
import torch.distributed as dist
from kimivl.runtime import launch

def threads():
    return [path.read_text() for path in Path("/proc/self/task").glob("*/comm") if "gloo" in path.read_text()]

def run():
    trainer = [dist.group.WORLD]
    trainer.append(trainer)
    print(len(threads()) > 0)

with launch.joined(launch.find_place(), "cpu", timedelta(minutes=10)):
    run()
print(threads())
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the threads of a process are looked up as Linux shows them")
def test_no_thread_of_gloo_outlives_the_run():
    """It would abort the process if it let go of a tensor while Python ends."""
    for rank in two_ranks(LEFT):
        stdout, stderr = rank.communicate(timeout=120)
        assert stdout.split("\n")[:2] == ["True", "[]"] and rank.returncode == 0, stderr
