"""Adapters: nothing at first, the merged model afterwards, and never seen in files."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kimivl.model import KimiVLForConditionalGeneration
from kimivl.model.checkpointing import checkpoint_activations
from kimivl.model.lora import (
    TARGETS,
    add_lora,
    check_lora,
    effective_weight,
    fingerprint,
    frozen_names,
    has_lora,
    merged,
)

EVERY = list(TARGETS)


@pytest.fixture
def pack(make_sample) -> dict[str, Tensor]:
    samples = [make_sample(30, (4, 6)), make_sample(17), make_sample(41, (2, 2))]
    return {
        "input_ids": torch.cat([ids for ids, _, _ in samples]),
        "targets": torch.cat([ids.where(torch.arange(len(ids)) > 9, -100) for ids, _, _ in samples]),
        "cu_seqlens": torch.tensor([0, 30, 47, 88], dtype=torch.int32),
        "pixel_values": torch.cat([pixels for _, pixels, _ in samples]),
        "image_grid_hws": torch.tensor([grid for _, _, grids in samples for grid in grids]),
    }


@pytest.fixture
def adapted(tiny):
    """adapted(targets, trained=True): the tiny model with adapters, which trained ones have moved off zero."""

    def make(*targets: str, trained: bool = True) -> KimiVLForConditionalGeneration:
        model = copy.deepcopy(tiny)
        torch.manual_seed(5)
        add_lora(model, rank=4, alpha=8, targets=targets)
        for name, weight in model.named_parameters():
            if trained and "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.05)
        return model

    return make


def written(model, folder) -> KimiVLForConditionalGeneration:
    """The model as the next stage reads it."""
    model.save_pretrained(folder)
    return KimiVLForConditionalGeneration.from_pretrained(folder)


@torch.no_grad()
def log_probs(model, pack) -> Tensor:
    return model.target_log_probs(**pack)


def test_fresh_adapters_change_nothing_and_alone_train(tiny, adapted, pack):
    model = adapted(*EVERY, trained=False)
    assert torch.equal(log_probs(model, pack), log_probs(tiny, pack))
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if "lora_" in name}
    assert frozen_names(model) == {name for name, _ in model.named_parameters()} - trained  # and no buffers


def test_a_weight_acts_as_the_formula_says(adapted):
    layer = adapted("attention").language_model.model.layers[1].self_attn.q_proj
    factors = [getattr(layer, name)["default"].weight for name in ("lora_B", "lora_A")]
    expected = layer.base_layer.weight + 8 / 4 * factors[0] @ factors[1]
    torch.testing.assert_close(effective_weight(layer), expected, atol=1e-6, rtol=1e-5)
    x = torch.randn(3, expected.shape[1])
    torch.testing.assert_close(layer(x), x @ expected.T, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("target", EVERY)
def test_each_target_has_gradients_and_acts(tiny, adapted, pack, target):
    model = adapted(target).train()
    logp = model.target_log_probs(**pack)
    assert (logp - log_probs(tiny, pack)).abs().max() > 1e-3
    logp.sum().backward()
    for name, weight in model.named_parameters():
        assert (weight.grad is not None and bool(weight.grad.any())) == ("lora_" in name), name


@pytest.mark.parametrize("targets", [["attention"], ["shared_experts", "dense_mlp"], ["routed_experts"], EVERY])
def test_files_hold_the_merged_model_and_the_model_stays_as_it_is(tiny, adapted, pack, tmp_path, targets):
    model = adapted(*targets)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = written(model, tmp_path / "adapted")
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert not has_lora(plain)
    assert plain.official_tensors().keys() == tiny.official_tensors().keys()
    torch.testing.assert_close(log_probs(plain, pack), log_probs(model, pack), atol=2e-5, rtol=1e-5)


def test_only_what_is_adapted_differs_in_files(tiny, adapted, tmp_path):
    adapted("routed_experts").save_pretrained(tmp_path / "adapted")
    tiny.save_pretrained(tmp_path / "base")
    new, old = (load_file(tmp_path / name / "model.safetensors") for name in ("adapted", "base"))
    assert new.keys() == old.keys()
    assert {name for name in new if not torch.equal(new[name], old[name])} == {n for n in old if ".mlp.experts." in n}


@pytest.mark.parametrize("targets", [["attention"], EVERY])
def test_generation_is_that_of_the_merged_model(tiny, adapted, tmp_path, targets):
    """Decoding reads the weights of the latents' expansion itself: it must not forget their adapter."""
    model = adapted(*targets)
    plain = written(model, tmp_path)
    prompt = torch.arange(24).view(2, 12)
    options = {"max_new_tokens": 12, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    found, wanted, base = (one.generate(prompt, **options, eos_token_id=None) for one in (model, plain, tiny))
    assert torch.equal(found.sequences, wanted.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(wanted.logits), atol=2e-5, rtol=1e-5)
    assert (torch.stack(found.logits) - torch.stack(base.logits)).abs().max() > 1e-3


def test_trainer_and_generation_agree_on_log_probabilities(adapted):
    model = adapted(*EVERY)
    prompt = torch.arange(12)[None]
    out = model.generate(
        prompt, max_new_tokens=9, do_sample=False, output_logits=True, return_dict_in_generate=True, eos_token_id=None
    )
    row = out.sequences[0]
    drawn = torch.cat(out.logits).log_softmax(-1).gather(1, row[12:, None]).squeeze(1)
    targets = torch.full_like(row, -100)
    targets[11:-1] = row[12:]
    bounds = torch.tensor([0, len(row)], dtype=torch.int32)
    with torch.no_grad():
        torch.testing.assert_close(model.target_log_probs(row, targets, bounds), drawn, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_adapters_and_activation_checkpointing_compose(adapted, pack, mode):
    model = adapted(*EVERY).train()
    gradients = []
    for setting in ("none", mode):
        checkpoint_activations(model, setting)
        model.zero_grad()
        model.target_log_probs(**pack).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})
    assert all(torch.equal(gradient, gradients[0][name]) for name, gradient in gradients[1].items())


def test_adapters_have_the_dtype_of_their_weights(tiny, tmp_path, adapted):
    model = copy.deepcopy(tiny).to(torch.bfloat16)
    add_lora(model, 2, 4, EVERY)
    assert {p.dtype for name, p in model.named_parameters() if "lora_" in name} == {torch.bfloat16}
    assert {p.dtype for name, p in adapted(*EVERY).named_parameters() if "lora_" in name} == {torch.float32}


def test_merging_leaves_the_model_whole_after_an_error(adapted):
    model = adapted("attention")
    names = list(model.state_dict())
    with pytest.raises(RuntimeError), merged(model):
        assert not has_lora(model)
        raise RuntimeError
    assert list(model.state_dict()) == names and has_lora(model)


def test_the_fingerprint_is_that_of_the_frozen_base(tiny, adapted):
    model = adapted("attention")
    first = fingerprint(model)
    assert fingerprint(adapted("attention", trained=False)) == first
    with torch.no_grad():
        model.language_model.model.norm.weight[5] += 1e-6
    assert fingerprint(model) != first
    rounded = model.bfloat16()
    assert fingerprint(rounded) != fingerprint(copy.deepcopy(rounded).float())  # the same numbers in another dtype


BAD = [
    ({"rank": 0}, "lora.rank=0"),
    ({"rank": True}, "lora.rank=True"),
    ({"alpha": -1}, "lora.alpha=-1"),
    ({"targets": []}, r"lora.targets=\[\]"),
    ({"targets": "attention"}, "lora.targets='attention'"),
    ({"targets": ["heads"]}, "names 'heads': choose from attention"),
    ({"dropout": 0.1}, "lora.dropout"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_wrong_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        check_lora({"rank": 4, "alpha": 8, "targets": ["attention"]} | change)


def test_a_frozen_part_is_not_adapted(tiny):
    model = copy.deepcopy(tiny)
    model.vision_tower.requires_grad_(False)
    with pytest.raises(ValueError, match="module.freeze holds vision_tower"):
        add_lora(model, 4, 8, ["vision"])
    assert not has_lora(model)
    add_lora(model, 4, 8, ["attention"])
    with pytest.raises(ValueError, match="adapters already"):
        add_lora(model, 4, 8, ["attention"])
