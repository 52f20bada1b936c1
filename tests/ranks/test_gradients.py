"""A step on two ranks is the step of one process: its gradients, samples, losses, loads."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from in_ranks import in_ranks
from small_fit import Case, Fits, on_one_and_on_two
from text_shards import without_images

from kimivl.stages.sft.datamodule import _share
from kimivl.tasks.digits import write

ONE_PHASE = "data.phases=[{max_length: 256, epochs: 1, lr: [1, 1]}]"

CASES = {
    "sft": Case("sft", [ONE_PHASE]),
    "four packs a step": Case("sft", [ONE_PHASE], packs=4),
    "long_cot": Case("long_cot", [ONE_PHASE]),
    "adapters": Case("sft", [ONE_PHASE, "lora=all"]),
    "frozen tower": Case("sft", [ONE_PHASE, "module.freeze=[vision_tower]"]),
    "balanced router": Case("long_cot", [ONE_PHASE, "router=balanced"]),
    "checkpointing": Case("sft", [ONE_PHASE, "activation_checkpointing=full"]),
    "a pack of holes": Case("sft", [ONE_PHASE, "data.max_dropped=0.9"], unreadable=[1]),
    "a step of holes": Case("sft", [ONE_PHASE, "data.max_dropped=0.9"], unreadable=[2, 3]),
    "no images on a rank": Case("sft", [ONE_PHASE, "data.shards=${paths.data}/mixed/*.tar"]),
    "no image in a step": Case("sft", [ONE_PHASE, "data.shards=${paths.data}/text/*.tar", "lora=all"]),
}
FAST = ("sft", "long_cot", "no images on a rank")
SLOW = tuple(name for name in CASES if name not in FAST)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write(root / "digits", sft=20, long_cot=12, rl=4, val=4, test=4, vocab_size=340)
    for name, of in (("mixed", 2), ("text", 1)):
        (root / name).mkdir()
        without_images(root / "digits/sft-000000.tar", root / name / "sft-000000.tar", of)
    return root


@pytest.fixture(scope="module")
def fits(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Fits, list[Fits]]]:
    return on_one_and_on_two(data, tmp_path_factory.mktemp("out"), CASES)


@pytest.mark.parametrize(
    ("names", "name"),
    [(FAST, name) for name in FAST] + [pytest.param(SLOW, name, marks=pytest.mark.slow) for name in SLOW],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_step_of_two_ranks_is_that_of_one(fits, names: Sequence[str], name: str):
    every = fits(*names)
    alone, shared = every[0][name], [rank[name] for rank in every[1]]
    assert len(alone.gradients) == len(shared[0].gradients) == len(shared[1].gradients) >= 1
    for step, gradients in enumerate(alone.gradients):
        for rank in shared:
            assert gradients.keys() == rank.gradients[step].keys()
            for weight, gradient in gradients.items():
                error = (rank.gradients[step][weight] - gradient).norm() / gradient.norm().clamp_min(1e-30)
                assert error < 1e-6, (step, weight, float(error))
        together = sorted(shared[0].packs[step] + shared[1].packs[step])
        assert together == sorted(alone.packs[step]) and len(together) == CASES[name].packs
        for figure, value in alone.figures[step].items():
            assert shared[0].figures[step][figure] == pytest.approx(value, rel=1e-6, abs=1e-9), (step, figure)
    for weight, value in alone.weights.items():
        assert torch.equal(shared[0].weights[weight], shared[1].weights[weight]), weight
        torch.testing.assert_close(shared[0].weights[weight], value, rtol=1e-5, atol=1e-6)
    assert shared[0].data | {"plan": 0} == shared[1].data | {"plan": 0} == alone.data | {"plan": 0}
    assert shared[0].dropped == shared[1].dropped == alone.dropped


def test_a_rank_without_images_is_one_of_the_cases(fits):
    alone, [first, second] = fits(*FAST)
    mixed = zip(first["no images on a rank"].packs.values(), second["no images on a rank"].packs.values(), strict=True)
    assert any((one[0][2] == 0) != (two[0][2] == 0) for one, two in mixed)
    losses = [figures["train/loss"] for figures in alone["sft"].figures]
    assert len(set(losses)) == len(losses) > 1


def _shares(holes: Counter[str]) -> Counter[str]:
    return _share(holes)


def test_the_holes_of_an_interrupted_run_are_dealt_to_the_ranks():
    holes = Counter(bad_image=5, truncated_shard=1, missing_member=2)
    assert sum(in_ranks(_shares, holes, ranks=3), Counter()) == holes


@pytest.mark.slow
def test_the_cases_are_what_they_say(fits):
    """Or the test above proves nothing."""
    alone, _ = fits(*SLOW)
    assert any("experts" in name for name in alone["adapters"].gradients[0])
    assert not any("vision_tower" in name for name in alone["frozen tower"].gradients[0])
    assert alone["a pack of holes"].dropped["bad_image"] > 1
    assert not any(bool(gradient.any()) for gradient in alone["a step of holes"].gradients[1].values())
    assert all(pack[2] == 0 for packs in alone["no image in a step"].packs.values() for pack in packs)
    biases = [name for name in alone["balanced router"].weights if "e_score_correction_bias" in name]
    assert any(bool(alone["balanced router"].weights[name].any()) for name in biases)
