"""Stage 1, joint SFT on text and images."""

from kimivl.stages.sft.datamodule import SFTDataModule
from kimivl.stages.sft.module import SFTModule

__all__ = ["SFTDataModule", "SFTModule"]
