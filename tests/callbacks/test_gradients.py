"""The gradient by parts of the model: nothing left out, nothing twice, whole where it is cut up over ranks."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from in_ranks import in_ranks
from kept_rows import KeptRows
from small_fit import Case, small_fit

from kimivl.callbacks import Gradients
from kimivl.callbacks.gradients import PARTS, part_norms, part_of
from kimivl.model import KimiVLConfig, KimiVLForConditionalGeneration
from kimivl.model.lora import TARGETS, add_lora
from kimivl.tasks.digits import write

ONE_PHASE = "data.phases=[{max_length: 256, epochs: 1, lr: [1, 1]}]"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write(root / "digits", sft=8, long_cot=4, rl=4, val=4, test=4, vocab_size=340)
    return root


def model() -> KimiVLForConditionalGeneration:
    with torch.device("meta"):
        return KimiVLForConditionalGeneration(KimiVLConfig(vocab_size=64, media_placeholder_token_id=3))


def test_every_parameter_has_a_part():
    names = [name for name, _ in model().named_parameters()]
    assert {part_of(name) for name in names} == set(PARTS) - {"lora"}
    layer = "language_model.model.layers.3."
    assert part_of(layer + "mlp.experts.gate_up_proj") == "experts"
    assert part_of(layer + "mlp.shared_experts.gate_proj.weight") == part_of(layer + "mlp.up_proj.weight") == "mlp"
    assert part_of(layer + "self_attn.kv_a_layernorm.weight") == "attention"
    assert part_of("something.new") == "other"


def test_adapters_are_a_part():
    adapted = model()
    add_lora(adapted, rank=2, alpha=4, targets=[target for target in TARGETS if target != "routed_experts"])
    assert {part_of(name) for name, weight in adapted.named_parameters() if weight.requires_grad} == {"lora"}


def test_norms_of_parts():
    weights = {
        name: torch.zeros(2, requires_grad=True) for name in ("lm_head.weight", "vision_tower.a", "vision_tower.b")
    }
    for weight, gradient in zip(weights.values(), ([3.0, 4.0], [1.0, 2.0], [2.0, 4.0]), strict=True):
        weight.grad = torch.tensor(gradient)
    weights["embed_tokens.weight"] = torch.zeros(2, requires_grad=True)
    assert part_norms(weights) == {"head": 5.0, "vision_tower": 5.0}
    assert part_norms({}) == {}


@pytest.mark.parametrize("step, logged", [(8, False), (9, True), (10, False)])
def test_at_log_steps_only(step, logged, monkeypatch):
    weight = torch.zeros(2, requires_grad=True)
    weight.grad = torch.ones(2)
    module = SimpleNamespace(model=SimpleNamespace(named_parameters=lambda: [("lm_head.weight", weight)]))
    rows = []
    logger = SimpleNamespace(log_metrics=lambda metrics, step: rows.append((step, metrics)))
    trainer = SimpleNamespace(global_step=step, log_every_n_steps=10, loggers=[logger])
    Gradients().on_before_optimizer_step(trainer, module, None)
    assert rows == ([(9, {"train/grad_norm/head": pytest.approx(2**0.5)})] if logged else [])


def norms(data: Path, out: Path, *overrides: str) -> dict[str, float]:
    """Of the first step, with the norm of the whole gradient."""
    rows = KeptRows()
    small_fit(data, out, Case("sft", [ONE_PHASE, *overrides]), callbacks=[rows, Gradients()])
    return {name: value for name, value in rows.rows[0].items() if name.startswith("train/grad_norm")}


def both(data: Path, out: Path) -> list[dict[str, float]]:
    return [norms(data, out, f"strategy={strategy}") for strategy in ("auto", "fsdp")]


def test_the_parts_are_the_whole_also_where_it_is_cut_up(data, tmp_path):
    one = norms(data, tmp_path / "one")
    total = one.pop("train/grad_norm")
    assert len(one) == len(PARTS) - 1
    assert sum(norm**2 for norm in one.values()) == pytest.approx(total**2, rel=1e-5)
    for ranks in in_ranks(both, data, tmp_path / "two"):
        for found in ranks:
            assert found.pop("train/grad_norm") == pytest.approx(total, rel=1e-5)
            assert found == pytest.approx(one, rel=1e-5, abs=1e-7)
