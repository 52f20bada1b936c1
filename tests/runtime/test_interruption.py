"""What a process makes of signals, and what it tells SLURM."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from command import ROOT

from kimivl.config import Interrupted
from kimivl.runtime import interruption, signals
from kimivl.runtime.interruption import NOT_BEGUN, REQUEUES, REQUEUES_WITHOUT_A_STEP, listening

RUNNING = "JobId=7 JobState=RUNNING PreemptTime=None"
PREEMPTED = "JobId=7 JobState=RUNNING PreemptTime=2026-01-01T00:00:00"
CANCELLED = "JobId=7 JobState=CANCELLED PreemptTime=None"


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A ``scontrol`` that knows job 7 and keeps what it is told; (what it shows, exit code) -> nothing."""
    for name in ("SLURM_ARRAY_JOB_ID", "SLURM_PROCID", "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    (tmp_path / "bin").mkdir()

    def shows(job: str, code: int = 0, error: str = "") -> None:
        program = tmp_path / "bin/scontrol"
        program.write_text(
            f'#!/bin/sh\necho "$@" >> {tmp_path}/told\ncase "$1" in requeue) echo "{error}" >&2; exit {code};; esac\n'
            f'echo "{job}"\n'
        )
        program.chmod(0o755)

    shows(RUNNING)
    return shows


def told(folder: Path) -> list[str]:
    file = folder / "told"
    return [line for line in (file.read_text().splitlines() if file.exists() else []) if line.startswith("requeue")]


def stopped(folder: Path, number: int, advanced: bool = False) -> Interrupted:
    with pytest.raises(Interrupted) as caught, listening(folder):
        if advanced:
            interruption.advanced()
        signal.raise_signal(number)
    return caught.value


@pytest.mark.parametrize(
    ("number", "job", "requeued"),
    [
        (signal.SIGUSR2, RUNNING, True),
        (signal.SIGUSR1, RUNNING, True),
        (signal.SIGTERM, RUNNING, False),
        (signal.SIGINT, RUNNING, False),
        (signal.SIGTERM, CANCELLED, False),
        (signal.SIGTERM, PREEMPTED, True),
    ],
)
def test_who_goes_back_into_the_queue(slurm, tmp_path, number, job, requeued):
    slurm(job)
    interrupted = stopped(tmp_path, number)
    assert (interrupted.requeued, told(tmp_path)) == (requeued, ["requeue 7"] * requeued)
    assert str(interrupted) == NOT_BEGUN and interrupted.code == 130


def test_a_task_of_an_array_requeues_itself_alone(slurm, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "5")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    stopped(tmp_path, signal.SIGUSR2)
    assert told(tmp_path) == ["requeue 5_3"]


def test_only_the_first_rank_requeues(slurm, tmp_path, monkeypatch):
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    interrupted = stopped(tmp_path, signal.SIGUSR2)
    # Another exit code would have srun end the first rank, which has to tell SLURM.
    assert interrupted.requeued and interrupted.code == 0 and told(tmp_path) == []


def test_a_job_that_never_makes_a_step_does_not_go_round_for_ever(slurm, tmp_path, capsys):
    for _ in range(REQUEUES_WITHOUT_A_STEP - 1):
        assert stopped(tmp_path, signal.SIGUSR2).requeued
    assert stopped(tmp_path, signal.SIGUSR2, advanced=True).requeued  # it has got on: the count begins anew
    for _ in range(REQUEUES_WITHOUT_A_STEP - 1):
        assert stopped(tmp_path, signal.SIGUSR2).requeued
    assert not stopped(tmp_path, signal.SIGUSR2).requeued
    assert f"interrupted {REQUEUES_WITHOUT_A_STEP} times in a row without making a step" in capsys.readouterr().err
    assert len(told(tmp_path)) == 2 * REQUEUES_WITHOUT_A_STEP - 1
    with listening(tmp_path):
        pass
    assert not (tmp_path / REQUEUES).exists()  # the run is done


def test_a_count_that_cannot_be_read_or_written_costs_no_place_in_the_queue(slurm, tmp_path, monkeypatch, capsys):
    (tmp_path / REQUEUES).write_text("")  # a full disk cut it short
    assert stopped(tmp_path, signal.SIGUSR2).requeued
    assert "cannot be read: starts without a step are counted anew" in capsys.readouterr().err

    def full(*arguments) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    assert stopped(tmp_path, signal.SIGUSR2).requeued
    assert "cannot be written (No space left on device)" in capsys.readouterr().err


def test_a_controller_that_refuses_is_reported(slurm, tmp_path, capsys):
    slurm(RUNNING, 1, "slurm_requeue error: Requested operation is presently disabled")
    assert not stopped(tmp_path, signal.SIGUSR2).requeued
    assert "SLURM did not requeue it: slurm_requeue error: Requested operation is" in capsys.readouterr().err
    slurm(RUNNING, 1, "Job is pending execution for job 7")  # SLURM was faster
    assert stopped(tmp_path, signal.SIGUSR2).requeued


def test_without_slurm_nobody_is_told(tmp_path, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    interrupted = stopped(tmp_path, signal.SIGUSR2)
    assert not interrupted.requeued and interrupted.code == 130 and list(tmp_path.iterdir()) == []


def test_work_that_a_signal_ends_is_left_alone(tmp_path):
    done = []

    def work() -> None:
        done.append("begun")
        signal.raise_signal(signal.SIGTERM)
        done.append("ended")

    with listening(tmp_path):
        interruption.wait_for_a_step()
        interruption.until_asked(work)
        interruption.until_asked(work)
        assert done == ["begun"] and interruption.agreed()


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)


def test_a_signal_before_the_run_listens(tmp_path):
    """It comes while Hydra is imported, and would end a process that has no handler yet."""
    code = (
        "import os, runpy, signal, sys\n"
        "def told(event, arguments):\n"
        "    if event == 'import' and arguments[0] == 'hydra':\n"
        "        os.kill(os.getpid(), signal.SIGUSR2)\n"
        "sys.addaudithook(told)\n"
        "runpy.run_path('train.py', run_name='__main__')\n"
    )
    done = python(code, "stage=sft", "debug=miniature", f"paths.root={tmp_path}")
    assert done.returncode == 130 and NOT_BEGUN in done.stderr, done.stderr


def test_a_signal_after_the_run_changes_nothing(tmp_path):
    """Interpreters take a while to end, and SLURM would run a job again, or call it failed, that is done.

    A thread such as W&B has them was started while signals were not on hold, and is there until the very end; from when
    the main thread has ended, signals come without a pause.
    """
    code = (
        "import os, runpy, signal, subprocess, sys, threading, time, types\n"
        "def pester():\n"
        "    threading.main_thread().join()\n"
        "    os.kill(os.getpid(), signal.SIGUSR2)\n"
        "    loop = f'while kill -USR2 {os.getpid()}; do :; done'\n"
        "    subprocess.Popen(['sh', '-c', loop], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)\n"
        "    time.sleep(0.2)\n"
        "def run(cfg):\n"
        "    threading.Thread(target=time.sleep, args=[60], daemon=True).start()\n"
        "    threading.Thread(target=pester).start()\n"
        "    return 0.5\n"
        "sys.modules['kimivl.run'] = types.SimpleNamespace(run=run)\n"
        "runpy.run_path('train.py', run_name='__main__')\n"
    )
    done = python(code, "stage=sft", "debug=miniature", f"paths.root={tmp_path}")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("number", signals.OF_SCHEDULERS)
def test_a_signal_between_two_jobs_of_a_process_waits_for_the_second(tmp_path, number):
    """Also when a thread takes it that an earlier job has left behind."""
    code = (
        "import os, sys, threading, time\n"
        "from pathlib import Path\n"
        "from kimivl.runtime import signals\n"
        "from kimivl.runtime.interruption import listening\n"
        "with listening(Path(sys.argv[1])):\n"
        "    threading.Thread(target=time.sleep, args=[60], daemon=True).start()\n"
        "    signals.hold()\n"
        "os.kill(os.getpid(), int(sys.argv[2]))\n"
        "time.sleep(0.1)\n"
        "print('still here', flush=True)\n"
        "with listening(Path(sys.argv[1])):\n"
        "    print('not to be seen')\n"
    )
    done = python(code, str(tmp_path), str(int(number)))
    assert done.stdout == "still here\n" and f"Interrupted: {NOT_BEGUN}" in done.stderr


def test_a_signal_while_torch_is_imported(tmp_path):
    """It comes when a job is barely there, and finds somebody who answers: at once, or, where the C++ of torch was
    importing numpy and went on without, where the run next gives way."""
    code = (
        "import os, signal, sys, threading, time\n"
        "from pathlib import Path\n"
        "from kimivl.runtime.interruption import NOT_BEGUN, give_way, listening\n"
        "with listening(Path(sys.argv[1])):\n"
        "    threading.Timer(0.3, os.kill, [os.getpid(), signal.SIGUSR2]).start()\n"
        "    import torch\n"
        "    time.sleep(1)\n"
        "    give_way(NOT_BEGUN)\n"
    )
    done = python(code, str(tmp_path))
    assert f"Interrupted: {NOT_BEGUN}" in done.stderr
