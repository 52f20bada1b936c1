"""Train one stage of Kimi-VL: ``python train.py stage=sft|long_cot|rl [key=value ...]`` (README, conf/train.yaml)."""

import os

import hydra
from omegaconf import DictConfig

from kimivl.config import register, report_errors

register()


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg: DictConfig) -> float | None:
    # Packs differ in length: an allocator with segments of fixed size loses GBs of a nearly full device to gaps.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    with report_errors():
        from kimivl.run import run  # torch and transformers take seconds to import: --help does not wait for them

        return run(cfg)


if __name__ == "__main__":
    main()
