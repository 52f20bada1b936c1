"""Chains of thought: a chain is kept only whole, well marked, and when its final answer verifies."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from kimivl.data.chat import THINK_CLOSE, THINK_OPEN
from kimivl.data.sample import Sample, SampleError
from kimivl.data.scan import Check
from kimivl.rl.rewards import Verifier, boxed, verifier_for
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
    if sample.answer is not None and not verifier_for(verifier, sample)(answer, sample.answer):
        raise SampleError(
            "wrong_answer", sample.key, None, f"the chain answers {answer!r}, but `answer` is {sample.answer!r}"
        )


@dataclass(frozen=True, slots=True)
class Retention:
    """How many chains of a set are trained on, and under which reasons the others are left out."""

    chains: int
    left_out: dict[str, int]

    @property
    def kept(self) -> int:
        return self.chains - sum(self.left_out.values())

    @property
    def figures(self) -> dict[str, float]:
        """``data/retention``, the share that is trained on, and ``data/left_out/<reason>``, the shares that are not."""
        lost = {f"data/left_out/{reason}": count / self.chains for reason, count in self.left_out.items()}
        return {"data/retention": self.kept / self.chains, **lost}

    @property
    def sentence(self) -> str:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(self.left_out.items()))
        said = f"{self.kept:,} of {self.chains:,} chains ({self.kept / self.chains:.1%}) are trained on"
        return f"{said}; left out, never cut: {reasons}" if reasons else said


class LongCoTDataModule(SFTDataModule):
    """The packs of stage 1 over chains that pass ``check_chain``; what fails is dropped and counted, never cut.

    Args:
        verifier: judges the text after the thinking against the sample's ``answer``.
    """

    def __init__(self, verifier: Verifier = boxed, **stage: Any) -> None:
        super().__init__(**stage)
        self.verifier = verifier

    @property
    def retention(self) -> Retention:
        """Of the whole run: a chain that fits into no pack of any phase is left out."""
        left_out = Counter(self.index.dropped)
        tokens, patches = self.index.tokens, self.index.patches
        limits = [self.limits_of(phase) for phase in self.phases]
        fits = np.any([(tokens <= limit.max_length) & (patches <= limit.max_patches) for limit in limits], axis=0)
        too_long = ~fits & (tokens > max(limit.max_length for limit in limits))
        left_out["too_long"] += int(too_long.sum())
        left_out["too_many_patches"] += int((~fits & ~too_long).sum())
        return Retention(len(self.index) + sum(self.index.dropped.values()), dict(+left_out))

    @property
    def sample_check(self) -> Check:
        return partial(check_chain, verifier=self.verifier)
