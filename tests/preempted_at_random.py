"""Preempts runs at random moments on a real SLURM, and compares each with one that nothing stopped.

    python tests/preempted_at_random.py --runs 20 --tasks 1 --seed 1

All runs at work are preempted together, wherever they are then: in imports, in a step, a save or an evaluation.
"""

import argparse
import random
import re
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from command import ROOT, history, train
from slurm_cluster import CPUS, SETTLE_S, Cluster, short

ENDED = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL")


@dataclass
class Run:
    folder: Path
    job: str = ""
    state: str = "NEW"
    restarts: int = 0
    started: float = 0.0
    waits_since: float = 0.0
    lines: int = 0
    to_first_step: list[float] = field(default_factory=list)

    def log(self) -> str:
        file = self.folder / "log"
        return file.read_text() if file.exists() else ""

    def steps(self) -> int:
        file = self.folder / "run/history.jsonl"
        return file.read_text().count("train/loss") if file.exists() else 0

    def follow(self, nodes: Cluster) -> None:
        """Look at the job; send it on when it waits; note when it makes its first step again."""
        known = nodes.job(self.job)
        state, restarts = known["JobState"], int(known["Restarts"])
        if state == "PENDING" and restarts > self.restarts:
            self.restarts, self.lines, self.waits_since = restarts, self.steps(), time.monotonic()
        if state == "PENDING" and self.waits_since and time.monotonic() > self.waits_since + SETTLE_S:
            nodes.run("scontrol", "update", f"jobid={self.job}", "StartTime=now")
            self.waits_since = 0.0
        if state == "RUNNING" and self.state != "RUNNING":
            self.started = time.monotonic()
        if state == "RUNNING" and self.started and self.restarts and self.steps() > self.lines:
            self.to_first_step.append(time.monotonic() - self.started)
            self.started = 0.0
        self.state = state


def submit(nodes: Cluster, root: Path, folder: Path, tasks: int) -> Run:
    folder.mkdir()
    words = " ".join(
        f"'{word}'" for word in (*short(root), f"trainer.devices={tasks}", f"paths.output_dir={folder}/run")
    )
    script = folder / "job.sh"
    script.write_text(f"#!/bin/bash\nsrun --kill-on-bad-exit=1 {sys.executable} train.py {words}\n")
    own = [f"--output={folder}/log", "--open-mode=append", "--requeue", "--signal=USR2@30", f"--chdir={ROOT}"]
    environment = {"PYTHONPATH": str(ROOT / "tests"), "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
    job = nodes.run("sbatch", "--parsable", f"--ntasks-per-node={tasks}", *own, str(script), **environment)
    return Run(folder, job)


def equal(run: Path, whole: Path) -> bool:
    """Whether every figure of training and validation, and the model, are the same to the bit."""
    names = ("train/loss", "train/grad_norm", "val/accuracy")
    curves = all(history(run, name) == history(whole, name) != {} for name in names)
    files = sorted((whole / "model").glob("*.safetensors"))
    return curves and all((run / "model" / file.name).read_bytes() == file.read_bytes() for file in files)


def preempt_at_random(
    nodes: Cluster, root: Path, count: int, tasks: int, seed: int, span: float, limit: float
) -> list[Run]:
    """``count`` runs, as many at a time as there is room for, preempted within ``span`` seconds of each other; ends
    after ``limit`` seconds whatever has become of them.

    It goes on until each run was preempted, or has ended.
    """
    draw = random.Random(seed)
    waiting = [root / f"run-{number}" for number in range(count)]
    runs: list[Run] = []
    end, following = time.monotonic() + limit, time.monotonic() + draw.uniform(1, span)
    while time.monotonic() < end:
        open_runs = [run for run in runs if run.state not in ENDED]
        if not open_runs and not waiting:
            break
        if waiting and (len(open_runs) + 1) * tasks <= CPUS:
            runs.append(submit(nodes, root, waiting.pop(0), tasks))
        for run in open_runs:
            run.follow(nodes)
        if time.monotonic() > following and any(not run.restarts for run in open_runs):
            nodes.preempt(0.1)
            following = time.monotonic() + draw.uniform(5, span)
        time.sleep(0.2)
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--tasks", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--limit", type=float, default=3600, help="seconds after which to give up")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, Cluster() as nodes:
        root = Path(folder)
        began = time.monotonic()
        train(*short(root), f"trainer.devices={given.tasks}", f"paths.output_dir={root}/whole")
        span = 0.8 * (time.monotonic() - began)
        began = time.monotonic()
        runs = preempt_at_random(nodes, root, given.runs, given.tasks, given.seed, span, given.limit)
        places = [place for run in runs for place in re.findall(r"stopped: (.*?);", run.log())]
        for run in runs:
            same = run.state == "COMPLETED" and equal(run.folder / "run", root / "whole")
            print(f"{run.job}: {run.state}, preempted {run.restarts} times, {'equal' if same else 'NOT EQUAL'}")
            if not same:
                print(run.log()[-3000:], nodes.complaints(), sep="\n")
        seconds = sorted(second for run in runs for second in run.to_first_step)
        print(f"{len(runs)} runs, {sum(run.restarts for run in runs)} preemptions, {time.monotonic() - began:.0f} s")
        print("stopped: " + ", ".join(f"{places.count(place)}x {place}" for place in sorted(set(places))))
        if seconds:
            print(f"start to first step: median {seconds[len(seconds) // 2]:.1f} s, most {seconds[-1]:.1f} s")


if __name__ == "__main__":
    main()
