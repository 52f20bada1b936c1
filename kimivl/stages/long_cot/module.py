"""Stage 2: the warm-up on chains that plan, evaluate, reflect and explore (Kimi-VL, arXiv 2504.07491, section 2.4)."""

from __future__ import annotations

import re

from kimivl.data.chat import THINK_CLOSE
from kimivl.rl.types import Response
from kimivl.stages.sft.module import SFTModule

BEHAVIOURS = {
    "planning": re.compile(r"\b(plan|first|step by step|let me)\b", re.IGNORECASE),
    "evaluation": re.compile(r"\b(check|verify|confirm)", re.IGNORECASE),
    "reflection": re.compile(r"\b(wait|mistake|look again)\b", re.IGNORECASE),
    "exploration": re.compile(r"\b(another way|alternatively|other way)\b", re.IGNORECASE),
}
"""Words that mark each behaviour in a chain of thought."""


class LongCoTModule(SFTModule):
    """The loss of stage 1; the evaluation also reports the thinking: its length and its behaviours."""

    def describe(self, response: Response) -> dict[str, float]:
        thinking, closed, _ = response.text.partition(THINK_CLOSE)
        shown = {name: float(bool(marker.search(thinking))) for name, marker in BEHAVIOURS.items()}
        return {"thinking_closed": float(bool(closed)), **shown}
