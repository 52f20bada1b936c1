"""Train one stage of Kimi-VL: ``python train.py stage=sft|long_cot|rl [key=value ...]`` (README, conf/train.yaml)."""

import os
import sys
from pathlib import Path

from kimivl.runtime import signals

if __name__ == "__main__":
    signals.hold()  # what follows takes a second or two, in which a scheduler's signal would end this process

# ruff: noqa: E402
import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from kimivl.config import register, report_errors
from kimivl.runtime.interruption import listening
from kimivl.runtime.launch import check_launch, rank_overrides

register()


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg: DictConfig) -> float | None:
    # Packs differ in length: an allocator with segments of fixed size loses GBs of a nearly full device to gaps.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    with report_errors(), listening(Path(HydraConfig.get().runtime.output_dir)):
        check_launch(cfg.trainer, HydraConfig.get().mode == RunMode.MULTIRUN)  # may start ranks, and end here
        from kimivl.run import run  # torch and transformers take seconds to import: --help does not wait for them

        try:
            return run(cfg)
        finally:
            signals.hold()  # what comes while the program ends finds nothing left to save


if __name__ == "__main__":
    sys.argv += rank_overrides()
    main()
