"""Stage 2: the warm-up on chains that plan, evaluate, reflect and explore (Kimi-VL, arXiv 2504.07491, section 2.4)."""

from __future__ import annotations

import logging
from typing import Any

from kimivl.data.chat import THINK_CLOSE, THINK_OPEN
from kimivl.rl.behaviours import Behaviours
from kimivl.rl.types import Response
from kimivl.stages.long_cot.datamodule import LongCoTDataModule
from kimivl.stages.sft.module import SFTModule

log = logging.getLogger(__name__)


class LongCoTModule(SFTModule):
    """The loss of stage 1; the evaluation also reports the thinking: its length and its behaviours.

    Args:
        behaviours: finds them in the thinking of greedy responses.
    """

    def __init__(self, behaviours: Behaviours | None = None, **stage: Any) -> None:
        super().__init__(**stage)
        self.behaviours = behaviours or Behaviours()

    def on_train_start(self) -> None:
        super().on_train_start()
        if not isinstance(self.datamodule, LongCoTDataModule):
            return  # RL goes on from here with data of its own
        retention = self.datamodule.retention
        log.info(retention.sentence)
        for logger in self.loggers:
            logger.log_metrics(retention.figures, step=self.global_step)

    def describe(self, response: Response) -> dict[str, float]:
        """``thinking_closed``, lengths in tokens (what is not closed is all thinking), and 0 or 1 per behaviour."""
        thinking, closed, answer = response.text.partition(THINK_CLOSE)
        thinking = thinking.removeprefix(THINK_OPEN)
        shown = self.behaviours(thinking)
        lengths = {"think_tokens": self._count(thinking), "answer_tokens": self._count(answer)}
        return {"thinking_closed": float(bool(closed)), **lengths, **{name: float(on) for name, on in shown.items()}}

    def _count(self, text: str) -> float:
        tokenizer = self.datamodule.processor.tokenizer
        return float(len(tokenizer.encode(text, add_special_tokens=False)))
