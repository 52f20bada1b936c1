from __future__ import annotations

import json
import math
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, DeepseekV3ForCausalLM

from kimivl.model import KimiVLConfig, KimiVLForConditionalGeneration


@pytest.fixture(scope="module")
def model(golden):
    return KimiVLForConditionalGeneration.from_pretrained(golden)


@pytest.fixture(scope="module")
def bf16(golden, tmp_path_factory):
    """The golden checkpoint in bf16, except for one routing bias, one norm and the inv_freq."""
    folder = tmp_path_factory.mktemp("bf16") / "model"
    shutil.copytree(golden, folder)
    tensors = load_file(golden / "model.safetensors")
    for name in tensors:
        if not name.endswith(("1.mlp.gate.e_score_correction_bias", "inv_freq", "model.norm.weight")):
            tensors[name] = tensors[name].to(torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def read(folder):
    """All tensors in a folder's files."""
    return {name: tensor for file in folder.glob("model*.safetensors") for name, tensor in load_file(file).items()}


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
@pytest.mark.parametrize(("source", "memory"), [("golden", "float32"), ("bf16", "float32"), ("bf16", "bfloat16")])
def test_saved_is_bit_equal(request, source, memory, max_shard_size, tmp_path):
    """Whatever the precision it is trained in, an untouched checkpoint is written as it was read."""
    folder = request.getfixturevalue(source)
    model = KimiVLForConditionalGeneration.from_pretrained(folder, dtype=memory)
    assert model.dtype == getattr(torch, memory)
    for name, buffer in model.named_buffers():
        assert buffer.dtype == torch.float32, name
    if memory == "float32":  # the norm that is float32 in the files does not survive a bf16 memory
        model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
        assert_same_tensors(read(tmp_path), read(folder))
    model.to(torch.float32).to(torch.bfloat16).to(torch.float32)  # as Lightning does for bf16-true
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    saved, wanted = read(tmp_path), read(folder)
    assert {name: t.dtype for name, t in saved.items()} == {name: t.dtype for name, t in wanted.items()}
    if source == "bf16":
        rounded = "language_model.model.norm.weight"
        assert_same_tensors(saved | {rounded: wanted[rounded]}, wanted)  # routing biases and inv_freq too
    assert_same_tensors(
        KimiVLForConditionalGeneration.from_pretrained(tmp_path, dtype="float32").official_tensors(),
        {name: tensor.float() for name, tensor in saved.items()},
    )


def test_fresh_models_are_written_in_the_dtype_of_their_config(tiny_config, tmp_path):
    for dtype in (None, "bfloat16"):
        config = KimiVLConfig(**tiny_config.to_dict() | {"dtype": dtype})
        model = KimiVLForConditionalGeneration(config)
        assert model.dtype == torch.float32
        model.save_pretrained(tmp_path)
        wanted = torch.bfloat16 if dtype else torch.float32
        for name, tensor in read(tmp_path).items():
            kept = name.endswith(("inv_freq", "e_score_correction_bias"))
            assert tensor.dtype == (torch.float32 if kept else wanted), name
        written = json.loads((tmp_path / "config.json").read_text())
        assert written["torch_dtype"] == written["text_config"]["torch_dtype"] == str(wanted).removeprefix("torch.")


def test_config_json_says_what_the_files_are_in(bf16, tmp_path):
    source = json.loads((bf16 / "config.json").read_text())
    shutil.copytree(bf16, tmp_path / "silent")
    (tmp_path / "silent/config.json").write_text(json.dumps({k: v for k, v in source.items() if k != "torch_dtype"}))
    model = KimiVLForConditionalGeneration.from_pretrained(tmp_path / "silent")
    model.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved/config.json").read_text())["torch_dtype"] == "bfloat16"


def test_config_json_keeps_its_official_shape(model, golden, tmp_path):
    model.save_pretrained(tmp_path)
    source, saved = (json.loads((folder / "config.json").read_text()) for folder in (golden, tmp_path))
    for config in (source, saved):
        config.pop("transformers_version")
    source.pop("auto_map")  # names files of the hub's own code
    assert saved == source


def test_auto_class_loads_it(golden):
    assert isinstance(AutoModelForImageTextToText.from_pretrained(golden), KimiVLForConditionalGeneration)


def test_folder_without_config_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no config.json"):
        KimiVLForConditionalGeneration.from_pretrained(tmp_path)


def test_the_device_is_the_default_one(golden):
    """Lightning says where to by a context; a checkpoint on the meta device would be lost silently."""
    with torch.device("meta"):
        model = KimiVLForConditionalGeneration.from_pretrained(golden, device="cpu")
        for device in (None, "meta"):
            with pytest.raises(ValueError, match="meta device"):
                KimiVLForConditionalGeneration.from_pretrained(golden, device=device)
    assert_same_tensors(model.official_tensors(), load_file(golden / "model.safetensors"))
    assert model.language_model.model.rotary_emb.inv_freq.device.type == "cpu"
    with pytest.raises(ValueError, match="device_map='auto'"):
        KimiVLForConditionalGeneration.from_pretrained(golden, device_map="auto")


@pytest.mark.gpu
def test_onto_a_gpu_and_back(bf16, tmp_path):
    with torch.device("cuda"):
        model = KimiVLForConditionalGeneration.from_pretrained(bf16, dtype="float32")
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"cuda"}
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert_same_tensors(read(tmp_path), read(bf16))


A3B_SHAPES = {
    "language_model.lm_head.weight": (163840, 2048),
    "language_model.model.embed_tokens.weight": (163840, 2048),
    "language_model.model.norm.weight": (2048,),
    "language_model.model.layers.26.input_layernorm.weight": (2048,),
    "language_model.model.layers.26.post_attention_layernorm.weight": (2048,),
    "language_model.model.layers.26.self_attn.q_proj.weight": (3072, 2048),
    "language_model.model.layers.26.self_attn.kv_a_proj_with_mqa.weight": (576, 2048),
    "language_model.model.layers.26.self_attn.kv_a_layernorm.weight": (512,),
    "language_model.model.layers.26.self_attn.kv_b_proj.weight": (4096, 512),
    "language_model.model.layers.26.self_attn.o_proj.weight": (2048, 2048),
    "language_model.model.layers.26.self_attn.rotary_emb.inv_freq": (32,),
    "language_model.model.layers.0.mlp.gate_proj.weight": (11264, 2048),
    "language_model.model.layers.0.mlp.up_proj.weight": (11264, 2048),
    "language_model.model.layers.0.mlp.down_proj.weight": (2048, 11264),
    "language_model.model.layers.26.mlp.gate.weight": (64, 2048),
    "language_model.model.layers.26.mlp.gate.e_score_correction_bias": (64,),
    "language_model.model.layers.26.mlp.shared_experts.gate_proj.weight": (2816, 2048),
    "language_model.model.layers.26.mlp.shared_experts.up_proj.weight": (2816, 2048),
    "language_model.model.layers.26.mlp.shared_experts.down_proj.weight": (2048, 2816),
    "language_model.model.layers.26.mlp.experts.63.gate_proj.weight": (1408, 2048),
    "language_model.model.layers.26.mlp.experts.63.up_proj.weight": (1408, 2048),
    "language_model.model.layers.26.mlp.experts.63.down_proj.weight": (2048, 1408),
    "vision_tower.encoder.blocks.26.norm0.weight": (1152,),
    "vision_tower.encoder.blocks.26.norm0.bias": (1152,),
    "vision_tower.encoder.blocks.26.norm1.weight": (1152,),
    "vision_tower.encoder.blocks.26.norm1.bias": (1152,),
    "vision_tower.encoder.blocks.26.wqkv.weight": (3456, 1152),
    "vision_tower.encoder.blocks.26.wqkv.bias": (3456,),
    "vision_tower.encoder.blocks.26.wo.weight": (1152, 1152),
    "vision_tower.encoder.blocks.26.wo.bias": (1152,),
    "vision_tower.encoder.blocks.26.mlp.fc0.weight": (4304, 1152),
    "vision_tower.encoder.blocks.26.mlp.fc0.bias": (4304,),
    "vision_tower.encoder.blocks.26.mlp.fc1.weight": (1152, 4304),
    "vision_tower.encoder.blocks.26.mlp.fc1.bias": (1152,),
    "vision_tower.encoder.final_layernorm.weight": (1152,),
    "vision_tower.encoder.final_layernorm.bias": (1152,),
    "vision_tower.patch_embed.pos_emb.weight": (64, 64, 1152),
    "vision_tower.patch_embed.proj.weight": (1152, 3, 14, 14),
    "vision_tower.patch_embed.proj.bias": (1152,),
    "multi_modal_projector.pre_norm.weight": (1152,),
    "multi_modal_projector.pre_norm.bias": (1152,),
    "multi_modal_projector.linear_1.weight": (4608, 4608),
    "multi_modal_projector.linear_1.bias": (4608,),
    "multi_modal_projector.linear_2.weight": (2048, 4608),
    "multi_modal_projector.linear_2.bias": (2048,),
}
"""One tensor of each kind of the official checkpoint, of the last layer and expert that has it."""


def test_full_model_has_the_official_names_and_size(recipe):
    with torch.device("meta"):
        model = KimiVLForConditionalGeneration(KimiVLConfig(**recipe("kimi_vl_a3b")))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.official_tensors().items()}
    assert {name: shapes[name] for name in A3B_SHAPES} == A3B_SHAPES

    def kind(name):
        return re.sub(r"(?<=\.)\d+(?=\.)", "*", name.replace("layers.0.mlp", "dense"))

    by_kind = {kind(name): shape for name, shape in A3B_SHAPES.items()}
    assert {kind(name) for name in shapes} == by_kind.keys()  # every tensor is of one of these kinds, and has its shape
    assert all(by_kind[kind(name)] == shape for name, shape in shapes.items())
    assert len(shapes) == 5679
    sized = {name: math.prod(shape) for name, shape in shapes.items() if not name.endswith("inv_freq")}
    assert len(sized) == 5679 - 27 and sum(name.endswith("correction_bias") for name in sized) == 26
    assert sum(sized.values()) == 16_407_656_048


@torch.no_grad()
def test_the_language_model_loads_into_plain_transformers(model, golden, tmp_path):
    """Its part of the files, without the prefix, is a checkpoint of DeepSeek-V3 with the same logits."""
    model.save_pretrained(tmp_path / "saved", max_shard_size="200KB")
    prefix = "language_model."
    part = {n.removeprefix(prefix): t for n, t in read(tmp_path / "saved").items() if n.startswith(prefix)}
    plain = tmp_path / "plain"
    model.config.text_config.save_pretrained(plain)
    save_file(
        {n: t for n, t in part.items() if not n.endswith("inv_freq")}, plain / "model.safetensors", {"format": "pt"}
    )
    theirs, report = DeepseekV3ForCausalLM.from_pretrained(
        plain, attn_implementation="eager", experts_implementation="eager", output_loading_info=True
    )
    assert not any(report[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    ids = torch.randint(6, 512, (2, 24), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(theirs(ids, use_cache=False).logits, model(ids).logits, atol=1e-5, rtol=1e-5)
