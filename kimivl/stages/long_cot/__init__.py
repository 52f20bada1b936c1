"""Stage 2, SFT on long chains of thought."""

from kimivl.stages.long_cot.datamodule import LongCoTDataModule
from kimivl.stages.long_cot.module import LongCoTModule

__all__ = ["LongCoTDataModule", "LongCoTModule"]
