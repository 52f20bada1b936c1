"""Two ranks against two threads: the demo's first stage under DDP on two cores, and in one process, at equal batches.

``python -m benchmarks.ranks`` starts ``train.py`` twice, with two packs to a step in both: one process with two threads
that accumulates two packs, and two ranks of one thread each. Both stay, and train in turns of some steps each, so that
what else the machine does meets both alike; the ratio of a round is that of two turns that lie side by side. Overrides
of ``train.py`` for both sides may follow. Where the time goes: ``cpu`` seconds of all threads of a side,
``muon`` those of the slowest rank in Muon's update (each rank makes all of it, or its share), ``waits`` the share of
the time that a rank of one thread does nothing, for the other.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer

from kimivl.tasks.digits import write

PACKS = 2
"""Of a step, on both sides."""
SIDES = {"process": (1, 2), "ranks": (2, 1)}
"""Side -> processes, threads of each."""


@dataclass(frozen=True, slots=True)
class Turn:
    """What one process did in its turn."""

    tokens: int
    wall_s: float
    cpu_s: float
    muon_s: float


class Turns(Callback):
    """Trains some steps, says what they took, and waits for the next turn.

    Args:
        address: where the benchmark listens. side: whose process this is. steps: of a turn.
    """

    def __init__(self, address: str, side: str, steps: int) -> None:
        self.address, self.side, self.steps = address, side, steps
        self._tokens, self._muon_s, self._until = 0, 0.0, 0

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._connection = Client(self.address)
        self._connection.send((self.side, trainer.global_rank))
        optimizer: Any = trainer.optimizers[0]
        update = optimizer._step_muon

        def timed(parameters: Any) -> None:
            begun = time.perf_counter()
            update(parameters)
            self._muon_s += time.perf_counter() - begun

        optimizer._step_muon = timed
        self._take_turn(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self._until:
            wall, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
            self._connection.send(Turn(self._tokens, wall, cpu, self._muon_s))
            self._take_turn(trainer)
        self._tokens += batch.num_tokens

    def _take_turn(self, trainer: Trainer) -> None:
        self._connection.recv()
        self._tokens, self._muon_s, self._until = 0, 0.0, trainer.global_step + self.steps
        self._wall, self._cpu = time.perf_counter(), time.process_time()


class Side:
    """The processes of one side."""

    def __init__(self, name: str, folder: Path, address: str, steps: int, overrides: Sequence[str]) -> None:
        self.processes, threads = SIDES[name]
        command = [
            *(sys.executable, "train.py", "stage=sft", f"paths.root={folder}", f"name={name}", "logger=none"),
            *("data.prepare=null", "data.phases=[{max_length: 4096, epochs: 60, lr: [0.001, 0.001]}]"),
            *(f"trainer.devices={self.processes}", f"trainer.accumulate_grad_batches={PACKS // self.processes}"),
            *("data.val_shards=null", "data.test_shards=null", "callbacks.audit=null"),
            "+callbacks.turns._target_=benchmarks.ranks.Turns",
            *(f"+callbacks.turns.address={address}", f"+callbacks.turns.side={name}"),
            f"+callbacks.turns.steps={steps}",
            *overrides,
        ]
        path = os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")])
        env = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": path}
        self.log = folder / f"{name}.log"
        with self.log.open("w") as file:
            self.process = subprocess.Popen(command, env=env, stdout=file, stderr=file, start_new_session=True)
        self.connections: list[Connection] = []

    def turn(self) -> list[Turn]:
        """What each process did in one turn."""
        for connection in self.connections:
            connection.send(None)
        return [connection.recv() for connection in self.connections]

    def close(self) -> None:
        """End the processes, which train for longer than anyone waits."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def measure(folder: Path, rounds: int, steps: int, overrides: Sequence[str]) -> list[dict[str, list[Turn]]]:
    """The turns of both sides, round by round; a round before them warms up."""
    write(folder / "data/digits", sft=4000, long_cot=16, rl=16, val=16, test=16, vocab_size=400)
    address = str(folder / "turns")
    sides: dict[str, Side] = {}
    with Listener(address) as listener:
        try:
            for name in SIDES:  # one after the other: both make the index of the data
                side = sides[name] = Side(name, folder, address, steps, overrides)
                while len(side.connections) < side.processes:
                    listener._listener._socket.settimeout(300)  # type: ignore[attr-defined]
                    connection = listener.accept()
                    assert connection.recv()[0] == name
                    side.connections.append(connection)
            measured = []
            for number in range(rounds + 1):
                order = list(SIDES) if number % 2 else list(SIDES)[::-1]
                measured.append({name: sides[name].turn() for name in order})
                print(f"round {number} of {rounds}", file=sys.stderr, flush=True)
            return measured[1:]
        except (TimeoutError, EOFError):
            tails = [f"{name}:\n{side.log.read_text()[-2000:]}" for name, side in sides.items()]
            raise RuntimeError("a side did not get to its turn\n" + "\n".join(tails)) from None
        finally:
            for side in sides.values():
                side.close()


def speed(turns: Sequence[Turn]) -> float:
    """Tokens a second of all processes, by the slowest."""
    return sum(turn.tokens for turn in turns) / max(turn.wall_s for turn in turns)


def report(measured: Sequence[dict[str, list[Turn]]], steps: int) -> str:
    """Medians over the rounds, and the ratio with its quartiles."""
    lines = [f"{'':10} {'tokens/s':>9} {'ms a step':>10} {'cpu ms':>8} {'muon ms':>8} {'waits':>6}"]
    for name, (processes, threads) in SIDES.items():
        rounds = [turns[name] for turns in measured]
        wall = statistics.median(max(turn.wall_s for turn in turns) for turns in rounds)
        cpu = statistics.median(sum(turn.cpu_s for turn in turns) for turns in rounds)
        muon = statistics.median(max(turn.muon_s for turn in turns) for turns in rounds)
        waits = 1 - cpu / wall / (processes * threads)
        figures = f"{1e3 * wall / steps:10.0f} {1e3 * cpu / steps:8.0f} {1e3 * muon / steps:8.0f} {waits:6.0%}"
        lines.append(f"{name:10} {statistics.median(map(speed, rounds)):9,.0f} {figures}")
    ratios = [speed(turns["ranks"]) / speed(turns["process"]) for turns in measured]
    low, middle, high = statistics.quantiles(ratios, n=4)
    lines.append(f"ranks / process: {middle:.2f} (quartiles {low:.2f} to {high:.2f} of {len(ratios)} rounds)")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=4, help="optimiser steps of a turn")
    arguments, overrides = parser.parse_known_args()
    if arguments.rounds < 2 or arguments.steps < 1:
        parser.error("give at least two rounds of one step")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of the `finally` that ends the sides
    with tempfile.TemporaryDirectory() as folder:
        print(report(measure(Path(folder), arguments.rounds, arguments.steps, overrides), arguments.steps))


if __name__ == "__main__":
    main()
