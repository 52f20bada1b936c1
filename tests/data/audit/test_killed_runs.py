"""kill -9 at any moment, and on with another number of ranks and workers: nothing is lost, nothing comes twice."""

import json
import random
import signal
import subprocess
import sys
import time
import uuid

import pytest
from command import ROOT

from kimivl.data.audit.verify import verify

RANKS = (1, 2, 4)


def start(folder, digits, ranks, workers):
    meeting = folder / f"meeting-{uuid.uuid4().hex}"  # a port could be taken while the ranks import
    arguments = [[folder, digits, rank, ranks, workers, meeting] for rank in range(ranks)]
    return [
        subprocess.Popen(
            [sys.executable, "tests/planned_run.py", *map(str, those)],
            cwd=ROOT,
            env={"PYTHONPATH": f"{ROOT}", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        for those in arguments
    ]


def finish(processes):
    for process in processes:
        _, stderr = process.communicate(timeout=900)
        assert process.returncode == 0, stderr.decode()[-3000:]


def steps_of(folder):
    path = folder / "steps.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def kill_after(processes, folder, steps, delay):
    """SIGKILL all ranks once ``steps`` more steps are done, and some of the next one."""
    before = len(steps_of(folder))
    until = time.monotonic() + 600
    while len(steps_of(folder)) < before + steps and all(process.poll() is None for process in processes):
        assert time.monotonic() < until, f"no {steps} steps in ten minutes"
        time.sleep(0.005)
    time.sleep(delay)
    for process in processes:  # none may see another end, which would be its own error
        process.send_signal(signal.SIGSTOP)
    for process in processes:
        process.kill()
    codes = [process.wait() for process in processes]
    assert set(codes) <= {-signal.SIGKILL, 0}, codes


@pytest.fixture(scope="session")
def whole(digits, tmp_path_factory):
    """The steps of a run of one rank that nobody disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    finish(start(folder, digits, 1, 0))
    return steps_of(folder)


def check(folder, whole):
    digests = {step["step"]: step["packs"] for step in whole}
    seen = steps_of(folder)
    assert {step["step"] for step in seen} == set(digests)
    for step in seen:  # those that were done again after a kill, too
        assert step["packs"] == digests[step["step"]]
    report = verify(folder)
    assert report.verified, report


@pytest.mark.slow
def test_two_processes_share_each_step(digits, whole, tmp_path):
    finish(start(tmp_path, digits, 2, 1))
    assert [step["step"] for step in steps_of(tmp_path)] == list(range(1, len(whole) + 1))
    check(tmp_path, whole)


@pytest.mark.slow
@pytest.mark.parametrize("trial", range(20))
def test_killed_and_resumed_on_other_ranks_is_uninterrupted(digits, whole, tmp_path, trial):
    draw = random.Random(trial)
    for _ in range(2):
        processes = start(tmp_path, digits, draw.choice(RANKS), draw.randrange(3))
        kill_after(processes, tmp_path, draw.randrange(1, len(whole) // 2), draw.random() * 0.06)
    finish(start(tmp_path, digits, draw.choice(RANKS), draw.randrange(3)))
    check(tmp_path, whole)
