"""A stand-in for train.py with the same configuration: runs in no time, and goes wrong where the test says so.

The metric is highest at ``data.lr_scale=1``. ``QUADRATIC`` is JSON: what becomes of a point whose folder's name begins
so; ``LAUNCHED`` a file that gets a line for each job.
"""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from kimivl.config import Interrupted, register, report_errors
from kimivl.runtime.lock import only_run_in

register()


@hydra.main(version_base="1.3", config_path="../conf", config_name="train")
def main(cfg: DictConfig) -> float | None:
    with report_errors():
        return run(cfg)


def run(cfg: DictConfig) -> float | None:
    folder = Path(HydraConfig.get().runtime.output_dir)
    cfg.paths.output_dir = str(folder)
    with Path(os.environ["LAUNCHED"]).open("a") as file:
        file.write(f"{folder.name}\n")
    events = json.loads(os.environ.get("QUADRATIC", "{}"))
    event = next((event for name, event in events.items() if folder.name.startswith(name)), "finish")
    if event == "refuse":
        raise ValueError("data.phases: a phase needs lr")
    config = OmegaConf.to_container(cfg, resolve=True)
    write(folder / "run.json", {"status": "running", "config": config})
    if event == "beside":  # the same command, typed while this job holds its folder as runs do
        with only_run_in(folder):
            again = [sys.executable, *sys.argv]
            beside = subprocess.run(again, env=os.environ | {"QUADRATIC": "{}"}, capture_output=True, text=True)
        (folder / "beside").write_text(beside.stderr)
    if event == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if event == "stop":
        write(folder / "run.json", {"status": "interrupted", "config": config})
        raise Interrupted("saved after step 3; the same command goes on")
    if event == "fail":
        write(folder / "run.json", {"status": "failed", "config": config, "error": "the disk is full"})
        raise RuntimeError("the disk is full")
    metric = 0.9 - 0.1 * math.log(cfg.data.lr_scale) ** 2 + 0.01 * cfg.seed
    metric = {"nan": math.nan, "unmeasured": None}.get(event, metric)
    write(folder / "run.json", {"status": "finished", "config": config})
    write(folder / "metrics.json", {"seconds": 1.0} | ({} if metric is None else {cfg.optimized_metric: metric}))
    return metric


def write(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content))


if __name__ == "__main__":
    main()
