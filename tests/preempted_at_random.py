"""Preempts runs at random moments on a real SLURM, and compares each with one that nothing stopped.

    python tests/preempted_at_random.py --runs 20 --tasks 1 --seed 1

The moments fall evenly on the parts of a run, from its imports to its end (`parts_of_a_run.PARTS`). Each run has a node
of its own, is preempted once in ``--times`` parts, and made to start again at once. The runs log to W&B, whose threads
take signals as well. Exit code 1 when a run has not ended or is not equal.
"""

import argparse
import json
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from command import ROOT, history, train
from parts_of_a_run import PARTS
from slurm_cluster import ENDED, SETTLE_S, Cluster, short

Entered = tuple[str, float, float]
"""A part, when it began, and the CPU seconds that the process had taken by then."""


@dataclass
class Moment:
    """``share`` of the way through ``part``."""

    part: str
    share: float


@dataclass
class Run:
    """A job, its life since it was started last, and the moments at which it is still to be preempted."""

    folder: Path
    node: str
    moments: list[Moment]
    job: str = ""
    state: str = "NEW"
    restarts: int = 0
    began: float = 0.0
    waits_since: float = 0.0
    asked: bool = False
    met: list[str] = field(default_factory=list)
    starts: list[tuple[float, float]] = field(default_factory=list)

    def log(self) -> str:
        file = self.folder / "log"
        return file.read_text() if file.exists() else ""

    def follow(self, nodes: Cluster, lengths: dict[str, float]) -> None:
        """Look at the job; preempt it when its moment has come; send it on when it waits."""
        known = nodes.job(self.job)
        state, restarts = known["JobState"], int(known["Restarts"])
        if state == "PENDING" and restarts > self.restarts:
            self.restarts, self.waits_since = restarts, time.time()
        if state == "PENDING" and self.waits_since and time.time() > self.waits_since + SETTLE_S:
            nodes.run("scontrol", "update", f"jobid={self.job}", "StartTime=now")
            self.waits_since = 0.0
        if state == "RUNNING" and self.state != "RUNNING":
            self.began, self.asked = time.time(), False
        self.state = state
        if state == "RUNNING" and self.moments and not self.asked and self._has_come(self.moments[0], lengths):
            nodes.preempt(0.1, self.node)
            self.met.append(self.moments.pop(0).part)
            self.asked = True

    def life(self) -> list[Entered]:
        """The parts that the job has come to since it was started last."""
        return [entered for entered in entered_in(self.folder / "parts") if entered[1] >= self.began]

    def _has_come(self, moment: Moment, lengths: dict[str, float]) -> bool:
        begins = [self.began] if moment.part == "import" else [at for part, at, _ in self.life() if part == moment.part]
        return bool(begins) and time.time() >= begins[0] + moment.share * lengths[moment.part]


def entered_in(file: Path) -> list[Entered]:
    rows = [line.split() for line in file.read_text().splitlines()] if file.exists() else []
    return [(part, float(at), float(cpu)) for part, at, cpu in rows]


def words(root: Path, folder: Path, given: argparse.Namespace) -> list[str]:
    parts = [
        "+callbacks.parts._target_=parts_of_a_run.Parts",
        f"+callbacks.parts.file={folder}/parts",
        f"+callbacks.parts.seconds={given.seconds}",
    ]
    own = ["test=true", f"logger={given.logger}", f"trainer.devices={given.tasks}", f"paths.output_dir={folder}/run"]
    return [*short(root), *own, *parts]


def submit(nodes: Cluster, run: Run, root: Path, given: argparse.Namespace) -> None:
    run.folder.mkdir()
    typed = " ".join(f"'{word}'" for word in words(root, run.folder, given))
    script = run.folder / "job.sh"
    script.write_text(f"#!/bin/bash\nsrun --kill-on-bad-exit=1 {sys.executable} train.py {typed}\n")
    own = [f"--output={run.folder}/log", "--open-mode=append", "--requeue", "--signal=USR2@30", f"--chdir={ROOT}"]
    environment = {"PYTHONPATH": str(ROOT / "tests"), "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
    where = [f"--nodelist={run.node}", "--nodes=1", f"--ntasks-per-node={given.tasks}"]
    run.job = nodes.run("sbatch", "--parsable", *where, *own, str(script), **environment)


def differences(run: Path, whole: Path) -> list[str]:
    """Which figures of training, validation and test, and which files of the model, are not the same to the bit."""
    ends = [json.loads((folder / "metrics.json").read_text()) for folder in (run, whole)]
    found = {name for end in ends for name in end if name.startswith(("val/", "test/"))}
    names = sorted(name for name in found if ends[0].get(name) != ends[1].get(name))
    for name in ("train/loss", "train/grad_norm", "val/accuracy"):
        if not history(run, name) or history(run, name) != history(whole, name):
            names.append(f"history of {name}")
    for file in sorted((whole / "model").glob("*.safetensors")):
        if (run / "model" / file.name).read_bytes() != file.read_bytes():
            names.append(file.name)
    return names


def moments(draw: random.Random, parts: list[str], times: int) -> Iterator[list[Moment]]:
    """``times`` moments in the order in which a run comes to them; over all runs, each part equally often."""
    left: list[str] = []
    while True:
        chosen: list[str] = []
        while len(chosen) < times:
            left = left or draw.sample(parts, len(parts))
            chosen.append(left.pop())
        yield [Moment(part, draw.random()) for part in sorted(chosen, key=PARTS.index)]


def preempt_at_random(nodes: Cluster, root: Path, lengths: dict[str, float], given: argparse.Namespace) -> list[Run]:
    """The runs, one at a time on each node; ends after ``given.limit`` seconds whatever has become of them."""
    drawn = moments(random.Random(given.seed), given.parts, given.times)
    runs: list[Run] = []
    end = time.monotonic() + given.limit
    while time.monotonic() < end:
        busy = [run for run in runs if run.state not in ENDED]
        for node in sorted(set(nodes.nodes) - {run.node for run in busy}):
            if len(runs) < given.runs:
                runs.append(Run(root / f"run-{len(runs)}", node, next(drawn)))
                submit(nodes, runs[-1], root, given)
        for run in busy:
            life = run.life()
            run.follow(nodes, lengths)
            if run.restarts and len(run.starts) < run.restarts and any(part == "steps" for part, _, _ in life):
                _, at, cpu = next(entered for entered in life if entered[0] == "steps")
                run.starts.append((at - run.began, cpu))
        if len(runs) == given.runs and all(run.state in ENDED for run in runs):
            break
        time.sleep(0.2)
    return runs


def measure(root: Path, given: argparse.Namespace) -> dict[str, float]:
    """How long each part of an uninterrupted run lasts, whose folder is ``root/whole/run``."""
    began = time.time()
    (root / "whole").mkdir()
    train(*words(root, root / "whole", given))
    entered = [("import", began, 0.0), *entered_in(root / "whole/parts"), ("over", time.time(), 0.0)]
    lengths = dict.fromkeys(PARTS, 0.0)
    for (part, at, _), (_, until, _) in zip(entered, entered[1:], strict=False):
        lengths[part] += until - at
    return lengths | dict.fromkeys(("saving", "export", "test"), given.seconds)  # which are followed by other things


def report(runs: list[Run], whole: Path, complaints: str) -> int:
    """Say what became of each run; the number of those that have not ended or are not equal."""
    unequal = 0
    for run in runs:
        unlike = differences(run.folder / "run", whole) if run.state == "COMPLETED" else ["no end"]
        unequal += bool(unlike)
        where = f"preempted in {' and '.join(run.met) or 'nothing'}, requeued {run.restarts} times"
        print(f"{run.job}: {run.state}, {where}:", "NOT EQUAL: " + ", ".join(unlike) if unlike else "equal")
        if run.state != "COMPLETED":
            print(run.log()[-3000:], complaints, sep="\n")
    said = Counter(place for run in runs for place in re.findall(r"stopped: (.*?)(?:; |\n)", run.log()))
    print(f"{len(runs)} runs, {sum(run.restarts for run in runs)} preemptions, {unequal} unequal")
    print("stopped: " + ", ".join(f"{count}x {place}" for place, count in sorted(said.items())))
    for unit, number in (("s", 0), ("s of CPU time", 1)):
        if taken := sorted(start[number] for run in runs for start in run.starts):
            print(f"start to first step: median {taken[len(taken) // 2]:.1f}, most {taken[-1]:.1f} {unit}")
    return unequal


def preempt_and_compare(nodes: Cluster, root: Path, given: argparse.Namespace) -> tuple[int, int]:
    """How many of the runs that were asked for are not the same as an uninterrupted one, and all preemptions."""
    lengths = measure(root, given)
    print("an uninterrupted run: " + ", ".join(f"{part} {second:.1f} s" for part, second in lengths.items()))
    runs = preempt_at_random(nodes, root, lengths, given)
    unequal = report(runs, root / "whole/run", nodes.complaints())
    return unequal + given.runs - len(runs), sum(run.restarts for run in runs)


def arguments(typed: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--times", type=int, default=1, help="how often each run is preempted")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--tasks", type=int, default=1)
    parser.add_argument("--logger", default="wandb", help="of the runs, as on their command line")
    parser.add_argument("--nodes", type=int, default=2, help="runs at the same time")
    parser.add_argument("--seconds", type=float, default=2.0, help="how long each part of a run is made to last")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--limit", type=float, default=3600, help="seconds after which to give up")
    return parser.parse_args(typed)


def main() -> int:
    given = arguments(sys.argv[1:])
    with tempfile.TemporaryDirectory() as folder, Cluster(given.nodes) as nodes:
        unequal, _ = preempt_and_compare(nodes, Path(folder), given)
    return int(unequal > 0)


if __name__ == "__main__":
    sys.exit(main())
