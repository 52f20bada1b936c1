from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from kimivl.model import KimiVLConfig, KimiVLForConditionalGeneration
from kimivl.model.official import parse_size


@pytest.fixture(scope="module")
def model(golden):
    return KimiVLForConditionalGeneration.from_pretrained(golden)


@pytest.fixture
def broken(golden, tmp_path):
    """broken(change): the golden checkpoint with its tensors changed in place by `change`."""

    def make(change):
        shutil.copytree(golden, tmp_path / "broken")
        tensors = load_file(golden / "model.safetensors")
        change(tensors)
        save_file(tensors, tmp_path / "broken/model.safetensors")
        return tmp_path / "broken"

    return make


def assert_same_tensors(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


@torch.no_grad()
def test_golden_outputs(model, golden):
    inputs, expected = load_file(golden / "inputs.safetensors"), load_file(golden / "expected.safetensors")
    pixels, grids = inputs["pixel_values"], inputs["image_grid_hws"]
    features = model.image_features(pixels, grids)
    assert (features - expected["projector_output"]).abs().max() < 1e-4
    row = inputs["input_ids"][None]
    for cu_seqlens in (None, torch.tensor([0, row.shape[1]], dtype=torch.int32)):
        logits = model(row, pixels, grids, cu_seqlens=cu_seqlens).logits[0]
        assert (logits - expected["logits"]).abs().max() < 1e-4


@pytest.mark.parametrize("max_shard_size", ["5GB", "200KB"])
def test_saved_is_bit_equal(model, golden, tmp_path, max_shard_size):
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    files = sorted(tmp_path.glob("*.safetensors"))
    saved = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert_same_tensors(saved, load_file(golden / "model.safetensors"))
    if max_shard_size == "200KB":
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert len(files) > 2 and index["weight_map"].keys() == saved.keys()
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in saved.values())
    again = KimiVLForConditionalGeneration.from_pretrained(tmp_path)
    assert_same_tensors(again.official_tensors(), saved)


def test_second_save_leaves_no_stale_shard(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    model.save_pretrained(tmp_path)
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors"}


def test_config_json_keeps_its_official_shape(model, golden, tmp_path):
    model.save_pretrained(tmp_path)
    source, saved = (json.loads((folder / "config.json").read_text()) for folder in (golden, tmp_path))
    for config in (source, saved):
        config.pop("transformers_version")
    source.pop("auto_map")  # names files of the hub's own code
    assert saved == source


def test_auto_class_loads_it(golden):
    assert isinstance(AutoModelForImageTextToText.from_pretrained(golden), KimiVLForConditionalGeneration)


def test_mixed_dtypes_survive(broken, tmp_path):
    """bf16 weights beside float32 router biases, or the other way round: each keeps the dtype it had."""

    def to_bf16(tensors):
        for name in tensors:
            if not name.endswith(("1.mlp.gate.e_score_correction_bias", "inv_freq")):
                tensors[name] = tensors[name].to(torch.bfloat16)

    folder = broken(to_bf16)
    config = json.loads((folder / "config.json").read_text()) | {"torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    model = KimiVLForConditionalGeneration.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    for name, buffer in model.named_buffers():
        assert buffer.dtype == torch.float32, name
    model.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved/model.safetensors")
    assert_same_tensors(saved, load_file(folder / "model.safetensors"))


EXPERT = "language_model.model.layers.2.mlp.experts.5.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(EXPERT), f"{EXPERT} is missing"),
        (lambda t: t.update(stray=torch.zeros(2)), "tensor stray is not in this model"),
        (lambda t: t.update({EXPERT: torch.zeros(16, 31)}), rf"{EXPERT} has shape \(16, 31\), not \(16, 32\)"),
    ],
)
def test_wrong_tensors_are_named(broken, change, message):
    with pytest.raises(ValueError, match=message):
        KimiVLForConditionalGeneration.from_pretrained(broken(change))


def test_missing_shard_is_named(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    next(tmp_path.glob("model-00002-*")).unlink()
    with pytest.raises(ValueError, match="model-00002-.* does not exist"):
        KimiVLForConditionalGeneration.from_pretrained(tmp_path)


def test_folder_without_config_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no config.json"):
        KimiVLForConditionalGeneration.from_pretrained(tmp_path)


def test_full_model_has_the_official_names_and_size(recipe):
    with torch.device("meta"):
        model = KimiVLForConditionalGeneration(KimiVLConfig(**recipe("kimi_vl_a3b")))
    tensors = model.official_tensors()
    assert len(tensors) == 5679
    sized = {name: t.numel() for name, t in tensors.items() if not name.endswith("inv_freq")}
    assert len(sized) == 5679 - 27
    assert sum(sized.values()) == 16_407_656_048
    experts = "language_model.model.layers.26.mlp.experts.63"
    assert tensors[f"{experts}.gate_proj.weight"].shape == (1408, 2048)
    assert tensors[f"{experts}.down_proj.weight"].shape == (2048, 1408)
    assert tensors["vision_tower.patch_embed.pos_emb.weight"].shape == (64, 64, 1152)
    assert tensors["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"].shape == (32,)


def test_sizes():
    assert parse_size("5GB") == 5 * 10**9
    assert parse_size("1.5 MiB") == 3 * 2**19
    with pytest.raises(ValueError, match="max_shard_size"):
        parse_size("many")
