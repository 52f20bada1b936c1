"""What a run does besides training: the cost of callbacks and loggers in a step, and how long a checkpoint blocks it.

``python -m benchmarks.overhead`` trains the demo's first stage with the default callbacks and W&B offline, as
``train.py`` does, and times every call of a callback and of a logger inside of the training loop. Overrides of
``train.py`` may follow. The time is that of the calling thread on the wall, and of that thread on a CPU; the second is
what other work on the machine cannot lengthen. Validation and rollouts are not steps and do not count.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer

STEP = 0.2
"""Seconds of the step that the figures are told against."""
WARM_UP = 5
"""Steps that do not count."""
HOOKS = (
    "on_train_batch_start",
    "on_train_batch_end",
    "on_before_optimizer_step",
    "on_before_backward",
    "on_after_backward",
    "on_before_zero_grad",
)


class Probe(Callback):
    """Times what the other callbacks, the loggers and checkpoints take between the steps of a fit, into a file.

    Args:
        path: JSON file of what was found, written at the end of the fit.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.steps: list[float] = []
        self.saves: list[dict[str, float]] = []
        self._spent: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        self._inside = False
        self._of_saves = [0.0, 0.0]
        self._begun = 0.0

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        if stage != "fit":
            return
        watched: Any = trainer
        for callback in watched.callbacks:
            if callback is not self:
                for hook in HOOKS:
                    setattr(callback, hook, self._timed(type(callback).__name__, getattr(callback, hook)))
        connector = watched._logger_connector
        connector.log_metrics = self._timed("Lightning's logging", connector.log_metrics)
        pl_module.log = self._timed("figures of the module", pl_module.log)
        watched.save_checkpoint = self._saved(watched.save_checkpoint)

    def _timed(self, owner: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The call, whose time counts for its owner; what it calls in turn counts with it."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return call(*args, **kwargs)
            self._inside = True
            wall, cpu = time.perf_counter(), time.thread_time()
            try:
                return call(*args, **kwargs)
            finally:
                self._inside = False
                spent = self._spent[owner]
                spent[0] += time.perf_counter() - wall - self._of_saves[0]  # which have figures of their own
                spent[1] += time.thread_time() - cpu - self._of_saves[1]
                self._of_saves = [0.0, 0.0]

        return timed

    def _saved(self, save: Callable[..., Any]) -> Callable[..., Any]:
        def saved(*args: Any, **kwargs: Any) -> Any:
            wall, cpu = time.perf_counter(), time.thread_time()
            result = save(*args, **kwargs)
            wall, cpu = time.perf_counter() - wall, time.thread_time() - cpu
            self.saves.append({"wall_s": wall, "cpu_s": cpu})
            self._of_saves[0] += wall
            self._of_saves[1] += cpu
            return result

        return saved

    def on_train_batch_start(self, *args: Any) -> None:
        self._begun = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        self.steps.append(time.perf_counter() - self._begun)
        if len(self.steps) == WARM_UP:
            self._spent.clear()

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        steps = len(self.steps) - WARM_UP
        owners = {
            owner: {"wall_ms": 1e3 * wall / steps, "cpu_ms": 1e3 * cpu / steps}
            for owner, (wall, cpu) in self._spent.items()
        }
        found = {"steps": steps, "step_s": statistics.median(self.steps[WARM_UP:]), "owners": owners}
        self.path.write_text(json.dumps(found | {"saves": self.saves}))


def measure(folder: Path, overrides: list[str]) -> dict[str, Any]:
    """Train with the probe, last of the callbacks."""
    command = [
        *(sys.executable, "train.py", "stage=sft", f"paths.root={folder}", "name=overhead", "test=false"),
        "trainer.check_val_every_n_epoch=1000",
        "evaluation.samples=0",
        "evaluation.max_new_tokens=1",
        "callbacks.checkpoint.every_n_train_steps=10",
        "data.prepare={sft: 2000, long_cot: 16, rl: 16, val: 16, test: 16}",
        "+callbacks.probe._target_=benchmarks.overhead.Probe",
        f"+callbacks.probe.path={folder / 'probe.json'}",
        *overrides,
    ]
    path = os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")])
    subprocess.run(command, env=os.environ | {"WANDB_MODE": "offline", "PYTHONPATH": path}, check=True)
    return json.loads((folder / "probe.json").read_text())


def report(found: dict[str, Any]) -> str:
    """The table: milliseconds a step of each owner, the sum as a share of the step, and the saves."""
    owners = sorted(found["owners"].items(), key=lambda owner: -owner[1]["wall_ms"])
    wall, cpu = (sum(spent[clock] for _, spent in owners) for clock in ("wall_ms", "cpu_ms"))
    rows = [f"{owner:26} {spent['wall_ms']:8.3f} {spent['cpu_ms']:8.3f}" for owner, spent in owners]
    saves = [1e3 * save["wall_s"] for save in found["saves"]]
    return "\n".join(
        [
            f"{found['steps']} steps, the median {1e3 * found['step_s']:.0f} ms",
            f"{'ms a step':26} {'wall':>8} {'cpu':>8}",
            *rows,
            f"{'all':26} {wall:8.3f} {cpu:8.3f}",
            f"of a step of {1e3 * STEP:.0f} ms: {wall / STEP / 10:.2f}% (cpu {cpu / STEP / 10:.2f}%)",
            f"{len(saves)} checkpoints block training for {statistics.median(saves):.0f} ms (most: {max(saves):.0f})",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    _, overrides = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        print(report(measure(Path(folder), overrides)))


if __name__ == "__main__":
    main()
