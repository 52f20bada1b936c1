"""What the long-CoT stage takes and what it reports."""

import pytest

from kimivl.data.sample import Sample, SampleError
from kimivl.rl.types import Response
from kimivl.stages.long_cot import LongCoTModule
from kimivl.stages.long_cot.datamodule import check_chain


def chain(text: str, answer: str | None = "7") -> Sample:
    return Sample("chain-1", [{"role": "assistant", "content": [{"type": "text", "text": text}]}], answer=answer)


@pytest.mark.parametrize("text", ["◁think▷3+4=7◁/think▷\\boxed{7}", "◁think▷◁/think▷So \\boxed{7}."])
def test_a_whole_verified_chain_is_kept(text):
    check_chain(chain(text))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("\\boxed{7}", "think_marks"),
        ("◁think▷3+4=7", "think_marks"),
        ("◁think▷a◁/think▷b◁/think▷\\boxed{7}", "think_marks"),
        ("◁think▷◁think▷a◁/think▷\\boxed{7}", "think_marks"),
        ("First ◁think▷a◁/think▷\\boxed{7}", "think_marks"),
        ("◁think▷\\boxed{7}◁/think▷\\boxed{8}", "wrong_answer"),
        ("◁think▷\\boxed{7}◁/think▷", "wrong_answer"),
    ],
)
def test_anything_else_is_refused_with_its_reason(text, reason):
    with pytest.raises(SampleError, match="chain-1") as error:
        check_chain(chain(text))
    assert error.value.reason == reason


def test_behaviours_are_looked_for_in_the_thinking():
    text = "◁think▷Plan: add. Wait, look again. Another way: 4+3. Check: the same.◁/think▷\\boxed{7}"
    described = LongCoTModule.describe(None, Response((1,), text, True))
    assert described == dict.fromkeys(["thinking_closed", "planning", "evaluation", "reflection", "exploration"], 1.0)
    after = LongCoTModule.describe(None, Response((1,), "◁think▷◁/think▷Wait, check the plan another way", True))
    assert sum(after.values()) == 1
