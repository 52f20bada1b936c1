"""RL on two ranks is RL of one process: problems, responses, packs, gradients, figures, and the state that is saved."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fake_rollouts import same
from small_fit import Case, Fits, on_one_and_on_two

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
    "drawn by the model": Case("rl", SHORT),
    "sharded": Case("rl", [*SHORT, *GIVEN, *SHARDED]),
    "sharded, drawn by the model": Case("rl", [*SHORT, *SHARDED, "rollout.return_experts=true"]),
    "four packs a step": Case("rl", [*SHORT, *GIVEN], packs=4, double=True),
    "empty packs": Case("rl", [*SHORT, *GIVEN, "data.problems=2", "objective=grpo"], packs=8, double=True),
    "partial, in several packs": Case("rl", [*SHORT, *GIVEN, *PARTIAL], double=True),
    "partial, by the model": Case("rl", [*SHORT, *PARTIAL], double=True),
    "adapters": Case("rl", [*SHORT, *GIVEN, "lora=all", "objective=dapo"]),
    "balanced router": Case("rl", [*SHORT, *GIVEN, "router=balanced", "objective=gspo"]),
    "ahead of training": Case("rl", [*SHORT, *GIVEN, *AHEAD]),
    "sharded, four packs a step": Case("rl", [*SHORT, *GIVEN, *SHARDED], packs=4, double=True),
    "sharded, empty packs": Case("rl", [*SHORT, *GIVEN, *SHARDED, "data.problems=2"], packs=8, double=True),
    "sharded, partial": Case("rl", [*SHORT, *SHARDED, *PARTIAL], packs=4, double=True),
}
"""In float64 where a step has more than two packs: the order of their sum differs, and the weights after it."""
FAST = ("given responses", "sharded, drawn by the model")
SLOW = tuple(name for name in CASES if name not in FAST)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write(root / "digits", sft=4, long_cot=4, rl=24, val=4, test=4, vocab_size=340)
    return root


def on_one(case: Case) -> Case:
    return replace(case, overrides=[override for override in case.overrides if override not in SHARDED])


@pytest.fixture(scope="module")
def fits(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Fits, list[Fits]]]:
    return on_one_and_on_two(data, tmp_path_factory.mktemp("out"), CASES, on_one)


BY_NAME = pytest.mark.parametrize(
    ("names", "name"),
    [(FAST, name) for name in FAST] + [pytest.param(SLOW, name, marks=pytest.mark.slow) for name in SLOW],
    ids=lambda value: value if isinstance(value, str) else "",
)


@BY_NAME
def test_gradients_and_figures_of_each_step_are_those_of_one_process(fits, names: Sequence[str], name: str):
    every = fits(*names)
    alone, shared = every[0][name], [rank[name] for rank in every[1]]
    assert len(alone.gradients) == len(shared[0].gradients) == len(shared[1].gradients) >= 4
    limit = 1e-12 if CASES[name].double else 1e-6
    for step, gradients in enumerate(alone.gradients):
        assert sum(gradient.norm() > 0 for gradient in gradients.values()) >= len(gradients) / 2
        for rank in shared:
            assert gradients.keys() == rank.gradients[step].keys()
            for weight, gradient in gradients.items():
                error = (rank.gradients[step][weight] - gradient).norm() / gradient.norm().clamp_min(1e-30)
                assert error < limit, (step, weight, float(error), float(gradient.norm()))
        assert sum(len(rank.packs[step]) for rank in shared) == len(alone.packs[step])
        for figure, value in alone.figures[step].items():
            of_rounding = figure.startswith("policy/mismatch")  # between engine and trainer, itself of about 1e-6
            if not figure.startswith("perf/"):
                found = pytest.approx(value, rel=1e-6, abs=1e-5 if of_rounding else 1e-9)
                assert shared[0].figures[step][figure] == found, (step, figure)
    for weight, value in alone.weights.items():
        assert torch.equal(shared[0].weights[weight], shared[1].weights[weight]), weight
        torch.testing.assert_close(shared[0].weights[weight], value, rtol=limit, atol=limit)


@BY_NAME
def test_what_is_trained_on_and_saved_is_that_of_one_process(fits, names: Sequence[str], name: str):
    every = fits(*names)
    alone, shared = every[0][name], [rank[name] for rank in every[1]]
    assert alone.data["experience"]["advantage"].unique().numel() > 1
    for rank in shared:
        assert rank.data["deal"] == alone.data["deal"] and rank.dropped == alone.dropped
        assert repr(rank.data["collector"]["sampler"]) == repr(alone.data["collector"]["sampler"])
        for of in ("problem", "tokens", "starts", "correct", "version", "weight"):
            torch.testing.assert_close(rank.data["experience"][of], alone.data["experience"][of])
    assert same(*(Experience(**rank.data["experience"]) for rank in shared))  # to the bit
    torch.testing.assert_close(shared[0].data["experience"]["ref_logp"], alone.data["experience"]["ref_logp"])


CHECKS = {
    "empty packs": lambda state: state["deal"][1] == 8 and any(not pack for pack in state["deal"][0]),
    "partial, in several packs": lambda state: state["deal"][1] >= 4 and state["deal"][1] % 2 == 0,
    "ahead of training": lambda state: bool((state["experience"]["version"] == 2).all()),
    "sharded, drawn by the model": lambda state: state["experience"]["experts"] is not None,
}


@pytest.mark.slow
def test_the_cases_are_what_they_say(fits):
    """Or the tests above prove nothing."""
    alone = fits(*FAST)[0] | fits(*SLOW)[0]
    assert all(check(alone[name].data) for name, check in CHECKS.items())
