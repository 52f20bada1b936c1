"""Chains of thought: a chain is kept only whole, well marked, and when its final answer verifies."""

from __future__ import annotations

from functools import partial
from typing import Any

from kimivl.data.chat import THINK_CLOSE, THINK_OPEN
from kimivl.data.sample import Sample, SampleError
from kimivl.data.scan import Check
from kimivl.rl.rewards import Verifier, boxed
from kimivl.stages.sft.datamodule import SFTDataModule


def check_chain(sample: Sample, verifier: Verifier = boxed) -> None:
    """Refuse a chain that would teach something wrong.

    Raises:
        SampleError: ``think_marks`` where the last turn is not one ``◁think▷...◁/think▷`` block and then an answer;
            ``wrong_answer`` where that answer does not verify against the sample's ``answer``.
    """
    last = sample.messages[-1]
    text = "".join(part.get("text", "") for part in last["content"])
    thinking, _, answer = text.partition(THINK_CLOSE)
    if not thinking.startswith(THINK_OPEN) or text.count(THINK_OPEN) != 1 or text.count(THINK_CLOSE) != 1:
        raise SampleError(
            "think_marks", sample.key, None, f"the answer must be one {THINK_OPEN}...{THINK_CLOSE} and then the answer"
        )
    if sample.answer is not None and not verifier(answer, sample.answer):
        raise SampleError(
            "wrong_answer", sample.key, None, f"the chain answers {answer!r}, but `answer` is {sample.answer!r}"
        )


class LongCoTDataModule(SFTDataModule):
    """The packs of stage 1 over chains that pass ``check_chain``; what fails is dropped and counted, never cut.

    Args:
        verifier: judges the text after the thinking against the sample's ``answer``.
    """

    def __init__(self, verifier: Verifier = boxed, **stage: Any) -> None:
        super().__init__(**stage)
        self.verifier = verifier

    @property
    def sample_check(self) -> Check:
        return partial(check_chain, verifier=self.verifier)
