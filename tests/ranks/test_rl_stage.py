"""RL on two ranks is RL of one process: problems, responses, packs, gradients, figures, and the state that is saved."""

from pathlib import Path

import pytest
import torch
from fake_rollouts import same
from in_ranks import in_ranks
from small_fit import Case, Fitted, small_fit

from kimivl.rl.experience import Experience
from kimivl.tasks.digits import write

SHORT = [
    "data.phases=[{epochs: 2, lr: [0.1, 0.1]}]",
    "data.problems=4",
    "data.responses=3",
    "data.max_new_tokens=10",
    "data.updates=2",
    "data.rollouts=null",
    "module.freeze=[]",
    "reward._target_=even_reward.EvenReward",
]
GIVEN = ["~rollout", "+rollout={_target_: fake_rollouts.concurrent_engine, _partial_: true}"]
AHEAD = ["data.max_behind=1", "data.off_policy=importance", "data.phases=[{epochs: 4, lr: [0.1, 0.1]}]"]
SHARDED = ["strategy=fsdp"]
PARTIAL = ["data.budget=4", "data.rounds=2", "data.max_length=80", "sampler.gates.zero_advantage=true"]

CASES = {
    "given responses": Case("rl", [*SHORT, *GIVEN]),
    "four packs a step": Case("rl", [*SHORT, *GIVEN], packs=4),
    "empty packs": Case("rl", [*SHORT, *GIVEN, "data.problems=2", "objective=grpo"], packs=8),
    "partial, in several packs": Case("rl", [*SHORT, *GIVEN, *PARTIAL]),
    "adapters": Case("rl", [*SHORT, *GIVEN, "lora=all", "objective=dapo"]),
    "balanced router": Case("rl", [*SHORT, *GIVEN, "router=balanced", "objective=gspo"]),
    "ahead of training": Case("rl", [*SHORT, *GIVEN, *AHEAD]),
    "drawn by the model": Case("rl", SHORT),
    "partial, by the model": Case("rl", [*SHORT, *PARTIAL]),
    "sharded": Case("rl", [*SHORT, *GIVEN, *SHARDED]),
    "sharded, empty packs": Case("rl", [*SHORT, *GIVEN, *SHARDED, "data.problems=2"], packs=8),
    "sharded, drawn by the model": Case("rl", [*SHORT, *SHARDED, "rollout.return_experts=true"]),
}
ALONE = {
    name: Case(case.stage, [o for o in case.overrides if o not in SHARDED], case.packs) for name, case in CASES.items()
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write(root / "digits", sft=4, long_cot=4, rl=24, val=4, test=4, vocab_size=340)
    return root


CHECKS = {
    "empty packs": lambda state: state["deal"][1] == 8 and any(not pack for pack in state["deal"][0]),
    "partial, in several packs": lambda state: state["deal"][1] >= 4 and state["deal"][1] % 2 == 0,
    "ahead of training": lambda state: bool((state["experience"]["version"] == 2).all()),
    "sharded, drawn by the model": lambda state: state["experience"]["experts"] is not None,
}
"""The cases are what they say, or the test proves nothing."""


@pytest.mark.parametrize("name", CASES)
def test_the_iterations_of_two_ranks_are_those_of_one(data: Path, tmp_path: Path, name: str):
    [alone] = in_ranks(small_fit, data, tmp_path, ALONE[name], ranks=1)
    shared: list[Fitted] = in_ranks(small_fit, data, tmp_path, CASES[name])
    assert CHECKS.get(name, bool)(alone.data)
    assert len(alone.gradients) == len(shared[0].gradients) == len(shared[1].gradients) >= 4
    for step, gradients in enumerate(alone.gradients):
        for rank in shared:
            assert gradients.keys() == rank.gradients[step].keys()
            for weight, gradient in gradients.items():
                error = (rank.gradients[step][weight] - gradient).norm() / gradient.norm().clamp_min(1e-30)
                # After the first step the weights themselves differ by their rounding.
                limit = 1e-4 if step else 1e-6
                assert error < limit or gradient.norm() < 1e-7, (step, weight, float(error), float(gradient.norm()))
        assert sum(len(rank.packs[step]) for rank in shared) == len(alone.packs[step])
        for figure, value in alone.figures[step].items():
            if not figure.startswith("perf/"):
                assert shared[0].figures[step][figure] == pytest.approx(value, rel=1e-4, abs=1e-6), (step, figure)
    for weight, value in alone.weights.items():
        assert torch.equal(shared[0].weights[weight], shared[1].weights[weight]), weight
        torch.testing.assert_close(shared[0].weights[weight], value, rtol=1e-5, atol=1e-6)
    for rank in shared:
        assert rank.data["deal"] == alone.data["deal"] and rank.dropped == alone.dropped
        assert repr(rank.data["collector"]["sampler"]) == repr(alone.data["collector"]["sampler"])
        assert rank.data["experience"]["tokens"].equal(alone.data["experience"]["tokens"])
        assert rank.data["experience"]["problem"].equal(alone.data["experience"]["problem"])
    assert same(*(Experience(**rank.data["experience"]) for rank in shared))  # to the bit
    torch.testing.assert_close(shared[0].data["experience"]["ref_logp"], alone.data["experience"]["ref_logp"])
