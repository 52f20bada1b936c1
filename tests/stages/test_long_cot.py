"""What the long-CoT stage takes and what it reports."""

import logging
from types import SimpleNamespace

import pytest

from kimivl.data.sample import Sample, SampleError
from kimivl.data.shards import write_shards
from kimivl.rl.behaviours import Behaviours
from kimivl.rl.types import Response
from kimivl.stages.long_cot import LongCoTModule
from kimivl.stages.long_cot.datamodule import Retention, check_chain


def chain(text: str, answer: str | None = "7", key: str = "chain-1") -> Sample:
    question = {"role": "user", "content": [{"type": "text", "text": "3+4=?"}]}
    return Sample(key, [question, {"role": "assistant", "content": [{"type": "text", "text": text}]}], answer=answer)


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


def described(text: str) -> dict[str, float]:
    tokenizer = SimpleNamespace(encode=lambda text, add_special_tokens: text.split())
    module = SimpleNamespace(
        behaviours=Behaviours(), datamodule=SimpleNamespace(processor=SimpleNamespace(tokenizer=tokenizer))
    )
    module._count = lambda text: LongCoTModule._count(module, text)
    return LongCoTModule.describe(module, Response((1,), text, "stop"))


def test_the_thinking_is_described_and_the_answer_is_not():
    thinking = "Plan: add. 3+4=8. Wait, look again: 3+4=7. Check: 4+3=7, the same. Another way: count up to 7."
    shown = described(f"◁think▷{thinking}◁/think▷The answer is \\boxed{{7}}")
    four = dict.fromkeys(["planning", "evaluation", "reflection", "exploration"], 1.0)
    assert shown == {"thinking_closed": 1.0, "think_tokens": len(thinking.split()), "answer_tokens": 4.0} | four
    after = described(f"◁think▷◁/think▷{thinking}")
    assert sum(after[name] for name in four) == 0 and after["think_tokens"] == 0


def test_thinking_that_never_ends_is_all_thinking():
    shown = described("◁think▷3+4 is 7")
    assert (shown["thinking_closed"], shown["think_tokens"], shown["answer_tokens"]) == (0.0, 3.0, 0.0)


def test_retention_adds_up():
    retention = Retention(200, {"too_long": 3, "wrong_answer": 1})
    assert retention.kept == 196
    assert retention.figures == {
        "data/retention": 0.98,
        "data/left_out/too_long": 0.015,
        "data/left_out/wrong_answer": 0.005,
    }
    assert retention.sentence.startswith("196 of 200 chains (98.0%)")


def test_over_long_chains_are_left_out_whole_and_told(fit, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    short, long = "3+4=7. " * 3, "3+4=7. " * 60
    texts = [short] * 6 + [long] * 2
    samples = [chain(f"◁think▷{text}◁/think▷\\boxed{{7}}", key=f"c-{n}") for n, text in enumerate(texts)]
    samples.append(chain("no marks \\boxed{7}", key="c-none"))
    write_shards(samples, tmp_path / "set" / "chains")
    module, trainer = fit(
        "long_cot",
        f"data.shards={tmp_path}/set",
        "data.max_dropped=0.5",
        "data.phases=[{max_length: 128, epochs: 1, lr: [0.001, 0.001]}]",
    )
    retention = trainer.datamodule.retention
    assert (retention.chains, retention.kept) == (9, 6)
    assert retention.left_out == {"too_long": 2, "think_marks": 1}
    assert "6 of 9 chains (66.7%) are trained on; left out, never cut: 1 think_marks, 2 too_long" in caplog.text
    assert sorted(trainer.datamodule.plan(0).samples.tolist()) == list(range(6))
