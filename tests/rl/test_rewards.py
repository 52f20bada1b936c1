"""The reward reads the final answer only, and shapes it by length as the paper does."""

import pytest
import torch

from kimivl.rl.rewards import LengthReward, Reward, answer_text, boxed
from kimivl.rl.types import Response


def response(text: str, length: int = 10, finished: bool = True) -> Response:
    return Response(tuple(range(length)), text, finished)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (r"\boxed{18}", True),
        (r"The sum is \boxed{ 18 }.", True),
        (r"\boxed{17} no, \boxed{18}", True),
        (r"\boxed{18} no, \boxed{17}", False),
        (r"\boxed{018}", False),
        ("18", False),
        (r"\boxed{}", False),
        (r"\boxed{18", False),
    ],
)
def test_boxed(text, right):
    assert boxed(text, "18") is right


def test_only_the_text_after_the_closing_mark_counts():
    assert answer_text(response("◁think▷\\boxed{1}◁/think▷\\boxed{2}"), thinking=True) == "\\boxed{2}"
    assert answer_text(response("\\boxed{2}"), thinking=True) is None
    assert answer_text(response("◁think▷◁/think▷x◁/think▷y"), thinking=True) == "y"
    assert answer_text(response("\\boxed{2}"), thinking=False) == "\\boxed{2}"
    assert answer_text(response("◁think▷◁/think▷\\boxed{2}", finished=False), thinking=True) is None


@pytest.mark.parametrize(
    ("lengths", "correct", "expected"),
    [
        ([100, 200, 300], [1, 1, 0], [0.5, 0.0, -0.5]),  # the paper's formula, worked out
        ([100, 200, 300], [0, 0, 1], [0.0, 0.0, -0.5]),
        ([50, 50, 50], [1, 0, 1], [0.0, 0.0, 0.0]),
    ],
)
def test_length_reward_examples(lengths, correct, expected):
    assert LengthReward()(torch.tensor(lengths), torch.tensor(correct)).tolist() == expected


def test_length_reward_floor_spares_small_differences():
    reward = LengthReward(floor=12)(torch.tensor([10, 13]), torch.tensor([1, 1]))
    assert reward.tolist() == [0.5, 0.25]


def test_the_length_reward_starts_late():
    length = LengthReward(weight=0.4, start=0.3)
    reward = Reward(length=length)
    responses = [response("◁/think▷\\boxed{1}", 10), response("◁/think▷\\boxed{1}", 30), response("no", 20)]
    assert reward.score(responses, "1", progress=0.29).total.tolist() == [1, 1, 0]
    assert reward.score(responses, "1", progress=0.3).total.tolist() == pytest.approx([1.2, 0.8, 0.0])


def test_bad_settings_name_the_key():
    with pytest.raises(ValueError, match="reward.length"):
        LengthReward(weight=-1)
