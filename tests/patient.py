"""A stand-in for train.py with the same configuration, which waits as long as PATIENCE says, or until it is asked to
stop; it keeps account in the file ACCOUNT."""

import os
import signal
import time
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from kimivl.config import Interrupted, register, report_errors
from kimivl.runtime import interruption

register()
# What runs in the background of a shell is born deaf to Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)


@hydra.main(version_base="1.3", config_path="../conf", config_name="train")
def main(cfg: DictConfig) -> float:
    with report_errors(), interruption.listening(Path(HydraConfig.get().runtime.output_dir)):
        interruption.wait_for_a_step()
        account("begun", cfg.seed)
        end = time.monotonic() + float(os.environ["PATIENCE"])
        while time.monotonic() < end and not interruption.asked():
            time.sleep(0.05)
        if interruption.asked():
            time.sleep(0.5)
            account("saved", cfg.seed)
            raise Interrupted("saved after step 1; the same command goes on")
        account("ended", cfg.seed)
        return cfg.seed


def account(what: str, seed: int) -> None:
    with Path(os.environ["ACCOUNT"]).open("a") as file:
        file.write(f"{what} {seed}\n")


if __name__ == "__main__":
    main()
