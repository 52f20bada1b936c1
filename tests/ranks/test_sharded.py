"""FSDP2: a step on two ranks that share a model is the step of one process, with each optimiser and in each stage."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from in_ranks import in_ranks
from small_fit import Case, Fitted, small_fit
from text_shards import without_images

from kimivl.config import compose_run, validate
from kimivl.optim import MuonAdamW
from kimivl.tasks.digits import write

ONE_PHASE = "data.phases=[{max_length: 256, epochs: 1, lr: [1, 1]}]"
TWO_EPOCHS = ONE_PHASE.replace("epochs: 1", "epochs: 2")
SHARDED = ["strategy=fsdp"]
MUON = partial(MuonAdamW, lr=0.01)
ADAMW = partial(torch.optim.AdamW, lr=0.001)
CASES = {
    "four packs a step, full checkpointing": (
        # In float64: the order of the sum differs, and the weights after it.
        Case("sft", [TWO_EPOCHS, "activation_checkpointing=full"], packs=4, double=True),
        None,
    ),
    "long_cot, balanced router, muon": (Case("long_cot", [ONE_PHASE, "router=balanced"]), MUON),
    "a rank without images, adamw": (Case("sft", [ONE_PHASE, "data.shards=${paths.data}/mixed/*.tar"]), ADAMW),
    "adapters, selective checkpointing, muon": (
        Case("sft", [ONE_PHASE, "lora=all", "activation_checkpointing=selective"]),
        MUON,
    ),
    "bf16-mixed, muon": (Case("sft", [ONE_PHASE, "trainer.precision=bf16-mixed"]), MUON),
    # Without a master copy its parameters are rounded by other random bits on each number of ranks.
    "bf16-true, muon": (Case("sft", [ONE_PHASE, "trainer.precision=bf16-true"]), partial(MUON, rounding="master")),
    "frozen tower, muon": (Case("sft", [ONE_PHASE, "module.freeze=[vision_tower]"]), MUON),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write(root / "digits", sft=20, long_cot=12, rl=4, val=4, test=4, vocab_size=340)
    (root / "mixed").mkdir()
    without_images(root / "digits/sft-000000.tar", root / "mixed" / "sft-000000.tar", 2)
    return root


def fit_all(data: Path, out: Path, sharded: bool) -> dict[str, Fitted]:
    found = {}
    for name, (case, optimizer) in CASES.items():
        case = replace(case, overrides=[*case.overrides, *(SHARDED if sharded else [])])

        def prepare(module: Any, optimizer: Any = optimizer) -> None:
            module.make_optimizer = optimizer or module.make_optimizer

        found[name] = small_fit(data, out, case, prepare)
    return found


@pytest.fixture(scope="module")
def fits(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Fitted], list[dict[str, Fitted]]]:
    out = tmp_path_factory.mktemp("out")
    [alone] = in_ranks(fit_all, data, out, False, ranks=1)
    return alone, in_ranks(fit_all, data, out, True)


@pytest.mark.parametrize("name", CASES)
def test_the_step_of_a_shared_model_is_that_of_one_process(fits, name: str):
    alone, shared = fits[0][name], [rank[name] for rank in fits[1]]
    assert len(alone.gradients) == len(shared[0].gradients) == len(shared[1].gradients) >= 2
    for step, gradients in enumerate(alone.gradients):
        for rank in shared:
            assert gradients.keys() == rank.gradients[step].keys()
            errors = {name: distance(rank.gradients[step][name], gradient) for name, gradient in gradients.items()}
            worst = max(errors, key=errors.__getitem__)
            assert errors[worst] < 1e-6, (step, worst, errors[worst])
        for figure, value in alone.figures[step].items():
            assert shared[0].figures[step][figure] == pytest.approx(value, rel=1e-6, abs=1e-9), (step, figure)
    for weight, value in alone.weights.items():
        assert torch.equal(shared[0].weights[weight], shared[1].weights[weight]), weight
        assert distance(shared[0].weights[weight], value) < 1e-6, weight


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Of two tensors, relative to the norm of the second."""
    return float((one - other).norm() / other.norm().clamp_min(1e-30))


def test_an_optimiser_that_steps_in_the_backward_pass_is_refused_on_several_devices():
    cfg = compose_run("stage=sft", "optimizer=muon_in_backward", "trainer.gradient_clip_val=null", "trainer.devices=2")
    with pytest.raises(ValueError, match=r"trainer.devices=2: .* needs trainer.devices=1; .* strategy=fsdp"):
        validate(cfg)
