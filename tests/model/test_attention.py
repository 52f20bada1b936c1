"""Attention of the whole model: the golden case and packed = alone with every kernel, and decoding over latents."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from attention_reference import dense_attention
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

from kimivl.model import Kernels, KimiVLConfig, KimiVLForConditionalGeneration
from kimivl.model.attention import attention_forward, expand
from kimivl.model.segments import Segments

STAND_INS = ["varlen", "flash_2", "flash_3"]


@pytest.fixture(scope="module")
def golden_case(golden):
    model = KimiVLForConditionalGeneration.from_pretrained(golden).eval()
    return model, load_file(golden / "inputs.safetensors"), load_file(golden / "expected.safetensors")


@pytest.fixture(scope="module")
def small(recipe):
    """Two layers of each tower: enough for every kind of layer, and quick enough for 40 samples one by one."""
    fields = recipe("tiny")
    fields["vocab_size"], fields["media_placeholder_token_id"] = 410, 401
    fields["text_config"] |= {"num_hidden_layers": 2, "v_head_dim": 24}  # unequal widths, as the official model has
    fields["vision_config"] |= {"num_hidden_layers": 2}
    torch.manual_seed(0)
    return KimiVLForConditionalGeneration(KimiVLConfig(**fields))


@torch.no_grad()
def assert_golden(golden_case, kernel):
    model, inputs, expected = golden_case
    row = inputs["input_ids"]
    model.set_kernels(Kernels(attention=kernel))
    logits = model(
        row[None],
        inputs["pixel_values"],
        inputs["image_grid_hws"],
        cu_seqlens=torch.tensor([0, len(row)], dtype=torch.int32),
    ).logits[0]
    assert (logits - expected["logits"]).abs().max() < 1e-4


@pytest.mark.parametrize("kernel", ["auto", "sdpa", "flex"])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_golden_on_a_cpu(golden_case, kernel):
    assert_golden(golden_case, kernel)


@pytest.mark.parametrize("stand_in", STAND_INS, indirect=True)
def test_golden_with_gpu_kernels(golden_case, stand_in):
    assert_golden(golden_case, stand_in)


def targets_of(ids, cu_seqlens):
    targets = ids.roll(-1)
    targets[cu_seqlens[1:].long() - 1] = -100
    return targets


def log_probs_and_gradients(model, samples):
    """Of one pack of the samples."""
    model.zero_grad()
    ids = torch.cat([sample[0] for sample in samples])
    cu_seqlens = torch.tensor([0, *torch.tensor([len(sample[0]) for sample in samples]).cumsum(0)], dtype=torch.int32)
    pixels = torch.cat([sample[1] for sample in samples])
    grids = torch.tensor([grid for sample in samples for grid in sample[2]]).view(-1, 2)
    out = model.target_log_probs(ids, targets_of(ids, cu_seqlens), cu_seqlens, pixels, grids)
    out.sum().backward()
    return out.detach(), {name: weight.grad for name, weight in model.named_parameters()}


def assert_packed_equals_alone(model, samples):
    model.train()
    packed, gradients = log_probs_and_gradients(model, samples)
    alone, total = [], {}
    for sample in samples:
        out, parts = log_probs_and_gradients(model, [sample])
        alone.append(out)
        total = {name: total[name] + part if total else part.clone() for name, part in parts.items()}
    torch.testing.assert_close(packed, torch.cat(alone), atol=2e-5, rtol=1e-4)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, total[name], atol=2e-4, rtol=1e-3, msg=lambda text, name=name: name + text)


def mixed_samples(make_sample):
    return [
        make_sample(9, (4, 4)),
        make_sample(5),
        make_sample(30, (2, 8), (4, 4), (2, 8)),
        make_sample(30, (6, 2)),
        make_sample(3),
    ]


def test_packed_equals_alone(small, make_sample):
    small.set_kernels(Kernels())
    assert_packed_equals_alone(small, mixed_samples(make_sample))


@pytest.mark.parametrize("stand_in", STAND_INS, indirect=True)
def test_packed_equals_alone_with_gpu_kernels(small, make_sample, stand_in):
    """And all parameters have the gradients that the CPU's kernel gives them."""
    samples = mixed_samples(make_sample)
    small.set_kernels(Kernels(attention=stand_in))
    assert_packed_equals_alone(small, samples)
    one, gradients = log_probs_and_gradients(small, samples)
    small.set_kernels(Kernels(attention="sdpa"))
    other, expected = log_probs_and_gradients(small, samples)
    torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)
    for name, gradient in expected.items():
        assert gradient.any(), name
        torch.testing.assert_close(gradients[name], gradient, atol=2e-4, rtol=1e-3, msg=lambda text, name=name: name)


GRID = st.tuples(st.sampled_from([2, 4, 6]), st.sampled_from([2, 4, 6]))
SAMPLE = st.tuples(st.integers(2, 24), st.lists(GRID, max_size=2))


@settings(max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(shapes=st.lists(SAMPLE, min_size=1, max_size=40))
@example(shapes=[(2 + number, [(2, 4), (4, 2 + number % 3 * 2)][: number % 3]) for number in range(40)])
def test_packed_equals_alone_for_any_samples(small, make_sample, shapes):
    small.set_kernels(Kernels())
    samples = [make_sample(text + sum(h * w // 4 + 1 for h, w in grids), *grids) for text, grids in shapes]
    assert_packed_equals_alone(small, samples)


def test_kernels_are_chosen_at_the_call(small, make_sample):
    """A model's kernels can be changed, and one that cannot run here says so, in both towers."""
    small.set_kernels(Kernels(attention="varlen"))
    for samples in ([make_sample(5)], [make_sample(9, (4, 4))]):
        with pytest.raises(ValueError, match="kernels.attention=varlen needs a CUDA device"):
            log_probs_and_gradients(small, samples)
    small.set_kernels(Kernels())
    log_probs_and_gradients(small, samples)


def test_lengths_are_read_once_per_pack(small, make_sample, monkeypatch):
    """However many layers there are, and the towers have their own segments."""
    made = []
    original = Segments.__init__
    monkeypatch.setattr(Segments, "__init__", lambda self, *args: made.append(self) or original(self, *args))
    small.set_kernels(Kernels())
    log_probs_and_gradients(small, [make_sample(9, (4, 4)), make_sample(5)])
    assert [segments.lengths for segments in made] == [[16], [9, 5]]


def test_expanded_keys_are_those_of_transformers(small):
    """The order of memory differs, the numbers do not; values are not copied."""
    module = small.language_model.model.layers[1].self_attn
    torch.manual_seed(0)
    latent, key_rot = torch.randn(1, 1, 7, module.kv_lora_rank), torch.randn(1, 1, 7, module.qk_rope_head_dim)
    key, value = expand(module, latent[0, 0], key_rot[0, 0])
    for ours, theirs in zip((key, value), DeepseekV3Attention.expand_kv(module, latent, key_rot), strict=True):
        torch.testing.assert_close(ours, theirs[0].transpose(0, 1), atol=1e-6, rtol=1e-6)
    assert value._base is not None and key.is_contiguous()
    with torch.autocast("cpu", torch.bfloat16):  # keys in its dtype, although rotations are float32
        assert {x.dtype for x in expand(module, latent[0, 0], key_rot[0, 0])} == {torch.bfloat16}


def test_a_layer_equals_dense_attention(small):
    module = small.language_model.model.layers[1].self_attn
    torch.manual_seed(0)
    lengths = [3, 5, 5, 1]
    query = torch.randn(1, module.num_heads, 14, module.qk_head_dim)
    latent, key_rot = torch.randn(1, 1, 14, module.kv_lora_rank), torch.randn(1, 1, 14, module.qk_rope_head_dim)
    segments = Segments.of_lengths(lengths, "cpu")
    out, _ = attention_forward(module, query, latent, key_rot, None, module.scaling, segments=segments)
    key, value = DeepseekV3Attention.expand_kv(module, latent, key_rot)
    expected = dense_attention(*(x[0].transpose(0, 1) for x in (query, key, value)), lengths, module.scaling, True)
    torch.testing.assert_close(out[0], expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_decoding_over_latents_equals_expanded_keys(tiny, monkeypatch):
    """One query per row against 5 cached tokens, of which the first two of row 0 are padding; none is expanded."""
    module = tiny.language_model.model.layers[1].self_attn
    torch.manual_seed(0)
    query = torch.randn(2, module.num_heads, 1, module.qk_head_dim)
    latent, key_rot = torch.randn(2, 1, 5, module.kv_lora_rank), torch.randn(2, 1, 5, module.qk_rope_head_dim)
    mask = torch.ones(2, 1, 1, 5, dtype=torch.bool)
    mask[0, ..., :2] = False
    for attended in (mask, None):
        with monkeypatch.context() as patched:
            patched.setattr(DeepseekV3Attention, "expand_kv", None)
            out, _ = attention_forward(module, query, latent, key_rot, attended, scaling=module.scaling)
        key, value = DeepseekV3Attention.expand_kv(module, latent, key_rot)
        expected = F.scaled_dot_product_attention(query, key, value, attn_mask=attended, scale=module.scaling)
        torch.testing.assert_close(out, expected.transpose(1, 2), atol=1e-5, rtol=1e-4)
