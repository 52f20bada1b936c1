"""Train one stage of Kimi-VL: ``python train.py stage=sft|long_cot|rl [key=value ...]`` (README, conf/train.yaml)."""

import hydra
from omegaconf import DictConfig

from kimivl.config import register, report_errors

register()


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg: DictConfig) -> float | None:
    with report_errors():
        from kimivl.run import run  # torch and transformers take seconds to import: --help does not wait for them

        return run(cfg)


if __name__ == "__main__":
    main()
