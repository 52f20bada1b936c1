"""Checksums see every change of a tensor, and an engine's stacked parameters come apart into the official ones."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kimivl.model import KimiVLConfig, KimiVLForConditionalGeneration
from kimivl.rl.weights import check_digests, checksum, digests, expected, official_parts, policy_tensors


@given(st.lists(st.floats(width=32), min_size=1, max_size=40), st.data())
def test_a_checksum_changes_with_any_bit_and_with_the_order(values, data):
    tensor = torch.tensor(values, dtype=torch.float32)
    place, bit = data.draw(st.integers(0, len(values) - 1)), data.draw(st.integers(0, 30))
    flipped = tensor.clone()
    flipped.view(torch.int32)[place] ^= 1 << bit
    assert checksum(flipped) != checksum(tensor)
    turned = tensor.flip(0)
    same = torch.equal(turned.view(torch.int32), tensor.view(torch.int32))
    assert (checksum(turned) == checksum(tensor)) == same


def test_a_checksum_is_of_the_values_whatever_their_layout(monkeypatch):
    tensor = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    whole = checksum(tensor)
    assert checksum(tensor.t().contiguous().t()) == whole
    monkeypatch.setattr("kimivl.rl.weights._CHUNK", 77)
    assert checksum(tensor) == whole
    assert checksum(tensor[:-1]) != whole != checksum(tensor.bfloat16())
    assert checksum(torch.zeros(3)) != checksum(torch.zeros(4))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    text = {
        "vocab_size": 40,
        "hidden_size": 32,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
    }
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = KimiVLConfig(vocab_size=40, media_placeholder_token_id=5, text_config=text, vision_config=vision)
    return KimiVLForConditionalGeneration(config)


def fused(tensors):
    """The parameters as vLLM has them: experts stacked, gate and up in one, the vocabulary padded."""
    parameters = {}
    for name, tensor in tensors.items():
        head, _, leaf = name.rpartition(".")
        if ".mlp.experts." in name:
            layer, _, rest = name.partition(".experts.")
            if (stack := f"{layer}.experts.routed_experts.w13_weight") not in parameters:
                gates, ups, downs = (
                    torch.stack([tensors[f"{layer}.experts.{e}.{part}_proj.weight"] for e in range(4)])
                    for part in ("gate", "up", "down")
                )
                parameters[stack] = torch.cat([gates, ups], 1)
                parameters[f"{layer}.experts.routed_experts.w2_weight"] = downs
        elif head.endswith(".gate_proj"):
            up = tensors[name.replace("gate_proj", "up_proj")]
            parameters[name.replace("gate_proj", "gate_up_proj")] = torch.cat([tensor, up])
        elif not head.endswith(".up_proj"):
            padded = name.endswith(("embed_tokens.weight", "lm_head.weight"))
            parameters[name] = torch.cat([tensor, tensor.new_zeros(24, 32)]) if padded else tensor
    return parameters


def test_an_engines_parameters_are_the_official_tensors(model):
    tensors = policy_tensors(model)
    assert len(tensors) == len(model.official_tensors()) - 2  # one stale inv_freq a layer
    parameters = fused(tensors)
    assert len(parameters) < len(tensors)
    parts = {
        part: value
        for name, tensor in parameters.items()
        for part, value in official_parts(name, tensor, 40 if "embed_tokens" in name or "lm_head" in name else None)
    }
    assert parts.keys() == tensors.keys()
    assert all(torch.equal(parts[name], tensors[name]) for name in tensors)
    held = digests(parts)
    check_digests(held, expected(held, tensors), "vLLM")


def test_an_engine_in_another_dtype_is_compared_in_its_own(model):
    tensors = policy_tensors(model)
    held = digests({name: tensor.bfloat16() for name, tensor in tensors.items()})
    check_digests(held, expected(held, tensors), "vLLM")
    assert {dtype for dtype, _ in held.values()} == {"bfloat16"}


def test_a_wrong_tensor_is_named_with_the_remedy(model):
    tensors = policy_tensors(model)
    name = "language_model.model.layers.1.mlp.experts.2.up_proj.weight"
    held = digests(tensors)
    spoilt = held | {name: (held[name][0], held[name][1] ^ 1)}
    with pytest.raises(RuntimeError, match=rf"1 of \d+ tensors in vLLM differ.*{name}.*rollout=hf"):
        check_digests(spoilt, expected(spoilt, tensors), "vLLM")


def test_an_engine_of_another_model_is_refused(model):
    tensors = policy_tensors(model)
    held = digests(tensors)
    missing = {name: value for name, value in held.items() if "lm_head" not in name}
    with pytest.raises(ValueError, match=r"engine lacks the tensor language_model.lm_head.weight \(1 of"):
        expected(missing, tensors)
    with pytest.raises(ValueError, match="trainer lacks the tensor a.bias"):
        expected(held | {"a.bias": ("float32", 1)}, tensors)


def test_weights_that_are_cut_up_are_refused():
    class Cut(torch.Tensor):
        def full_tensor(self):
            return self

    model = SimpleNamespace(official_tensors=lambda: {"a.weight": torch.zeros(2).as_subclass(Cut)})
    with pytest.raises(ValueError, match="a.weight is cut up over ranks"):
        policy_tensors(model)
