"""Activation checkpointing changes what is kept, never what is computed."""

import copy

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kimivl.model import KimiVLForConditionalGeneration
from kimivl.model.checkpointing import CostPolicy, checkpoint_activations, flops_per_element

ATEN = torch.ops.aten


@pytest.fixture
def model(tiny) -> KimiVLForConditionalGeneration:
    return copy.deepcopy(tiny).train()


@pytest.fixture
def pack(make_sample) -> dict[str, Tensor]:
    """Five samples, three of them with images."""
    samples = [
        make_sample(40, (4, 6)),
        make_sample(17),
        make_sample(63, (2, 2), (6, 4)),
        make_sample(5),
        make_sample(99),
    ]
    ids = torch.cat([ids for ids, _, _ in samples])
    lengths = torch.tensor([0, *(len(ids) for ids, _, _ in samples)])
    return {
        "input_ids": ids,
        "targets": torch.where(torch.rand(len(ids), generator=torch.Generator().manual_seed(3)) < 0.5, ids, -100),
        "cu_seqlens": lengths.cumsum(0).to(torch.int32),
        "pixel_values": torch.cat([pixels for _, pixels, _ in samples]),
        "image_grid_hws": torch.tensor([grid for _, _, grids in samples for grid in grids]),
    }


def gradients(model: KimiVLForConditionalGeneration, pack: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    loss = -model.target_log_probs(**pack).sum()
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


class Storages(TorchDispatchMode):
    """Every storage that an operation makes, for `live` to tell which are still held; parameters are not counted."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self.own:
                self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def live(self) -> int:
        return sum(size for reference, size in self.made.values() if not reference.expired())


@pytest.mark.parametrize("mode", ["full", "selective"])
@pytest.mark.parametrize("images", [True, False])
def test_gradients_are_the_same_bit_for_bit(model, pack, mode, images):
    if not images:
        pack["input_ids"] = pack["input_ids"].clamp_max(399)
        pack |= {"pixel_values": pack["pixel_values"][:0], "image_grid_hws": pack["image_grid_hws"][:0]}
    wanted = gradients(model, pack)
    checkpoint_activations(model, mode)
    found = gradients(model, pack)
    assert found.keys() == wanted.keys()
    assert len(found) == 1 + len(list(model.parameters()))
    for name, gradient in found.items():
        assert torch.equal(gradient, wanted[name]), name


def decoder_bytes(model: KimiVLForConditionalGeneration, mode: str, length: int, tokens: int = 512) -> float:
    """Bytes that the decoder keeps for each token of a pack of segments of ``length``."""
    checkpoint_activations(model, mode)
    bounds = torch.arange(0, tokens + 1, length, dtype=torch.int32)
    embeds = model.get_input_embeddings()(torch.arange(tokens)[None] % 400)
    context = model._context(embeds, bounds, None, None, None, False)
    with Storages(model) as storages:
        hidden = model.language_model.model(inputs_embeds=embeds, **context)[0]
    kept = storages.live() / tokens
    del hidden
    return kept


def test_memory_falls_from_none_over_selective_to_full(model):
    """Of the tiny decoder, in float32, with segments too short for their attention to be kept."""
    none, selective, full = (decoder_bytes(model, mode, 64) for mode in ("none", "selective", "full"))
    text, layers = model.config.text_config, 4
    # Kept of an inner width of 128 and more: q, kv_a and o_proj; dense MLP; router, shared gate and up of each MoE.
    projections = layers * (4 * 32 + (64 + 16) + 128)
    mlp = (2 * 384 + 128) + (layers - 1) * (8 + 2 * 96)
    assert selective - full == 4 * (projections + mlp)
    inputs = 4 * text.hidden_size * layers
    assert inputs <= full < 2 * inputs  # and the last norm, and the rotations that all layers share
    assert none > 2 * selective


def test_attention_over_many_keys_is_kept(model):
    """Its cost per element, keys * (32 + 32) / 32, passes that of the width at 128 keys; values and log-sum-exps."""
    short, long = (decoder_bytes(model, "selective", length) for length in (64, 256))
    assert long - short == pytest.approx(4 * 4 * (4 * 32 + 4), abs=4)  # and fewer cu_seqlens


def test_a_frozen_tower_keeps_nothing(model, pack):
    """Where no gradient is wanted nothing is kept, whatever the mode."""
    model.vision_tower.requires_grad_(False)
    for mode in ("none", "full", "selective"):
        checkpoint_activations(model, mode)
        with Storages(model.vision_tower) as storages:
            features = model.vision_tower(pack["pixel_values"].float(), pack["image_grid_hws"])
        assert storages.live() <= features.untyped_storage().nbytes(), mode


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_nothing_changes_without_gradients(tiny, model, pack, mode):
    with torch.no_grad():
        wanted = tiny.target_log_probs(**pack)
        prompt = torch.arange(8)[None]
        tokens = tiny.generate(prompt, max_new_tokens=6, do_sample=False)
        checkpoint_activations(model, mode)
        assert torch.equal(model.target_log_probs(**pack), wanted)  # the references of RL, in training mode
        assert torch.equal(model.eval().generate(prompt, max_new_tokens=6, do_sample=False), tokens)


def number_of_hooks(model) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_a_mode_can_be_left_again(model, pack):
    wanted = gradients(model, pack)
    before, hooks = decoder_bytes(model, "none", 64), number_of_hooks(model)
    for mode in ("selective", "full", "selective", "none"):
        checkpoint_activations(model, mode)
    assert decoder_bytes(model, "none", 64) == before
    assert number_of_hooks(model) == hooks
    assert all(torch.equal(gradient, wanted[name]) for name, gradient in gradients(model, pack).items())


def test_an_unknown_mode_is_named(model):
    with pytest.raises(ValueError, match="activation_checkpointing=half: choose one of none, full, selective"):
        checkpoint_activations(model, "half")


def meta(*shape: int) -> Tensor:
    return torch.empty(*shape, device="meta")


ROWS = (meta(1, 2, 9, 24), meta(1, 2, 100, 24), meta(1, 2, 100, 8))
BOUNDS = torch.empty(5, dtype=torch.int32, device="meta")  # of four segments
PACK = (meta(400, 2, 24), meta(400, 2, 24), meta(400, 2, 8), BOUNDS, BOUNDS, 100, 100)
COSTS = [
    ("aten::mm", (meta(9, 64), meta(64, 32)), {}, 128),
    ("aten::addmm", (meta(32), meta(9, 64), meta(64, 32)), {}, 128),
    ("aten::mul.Tensor", (meta(9, 64), meta(9, 64)), {}, 0),
    # 100 keys of width 24, values of width 8: 2 * 100 * 32 / 8, half of it where causal
    ("aten::_scaled_dot_product_flash_attention_for_cpu", ROWS, {}, 800),
    ("aten::_scaled_dot_product_flash_attention", (*ROWS, 0.0, True), {}, 400),
    ("aten::_scaled_dot_product_efficient_attention", (*ROWS, None, True, 0.0, True), {}, 400),
    ("aten::_scaled_dot_product_cudnn_attention", (*ROWS, None, True, 0.0, False), {}, 800),
    # 400 tokens in four segments
    ("aten::_flash_attention_forward", (*PACK, 0.0, True, False), {}, 400),
    ("aten::_flash_attention_forward", (*PACK, 0.0, False, False), {}, 800),
    ("torch_attn::_varlen_attn", (*PACK, True), {}, 400),
    ("torch_attn::_varlen_attn", PACK, {"is_causal": True}, 400),
]


@pytest.mark.parametrize(("name", "args", "kwargs", "cost"), COSTS)
def test_costs_are_those_of_the_shapes(name, args, kwargs, cost):
    import torch.nn.attention.varlen  # noqa: F401  (makes its operation known)

    operation, _, overload = name.partition("::")[2].partition(".")
    found = getattr(getattr(getattr(torch.ops, name.partition("::")[0]), operation), overload or "default")
    assert flops_per_element(found, args, kwargs) == cost


def test_every_kernel_that_attention_can_be_made_of_is_known():
    """The places of `is_causal` in this build's schemas are those that the costs read."""
    import torch.nn.attention.varlen  # noqa: F401

    places = {
        "aten::_scaled_dot_product_flash_attention_for_cpu": 4,
        "aten::_scaled_dot_product_flash_attention": 4,
        "aten::_scaled_dot_product_efficient_attention": 6,
        "aten::_scaled_dot_product_cudnn_attention": 6,
        "aten::_flash_attention_forward": 8,
        "torch_attn::_varlen_attn": 7,
    }
    for name, place in places.items():
        arguments = torch._C._jit_get_schemas_for_operator(name)[0].arguments
        assert arguments[place].name == "is_causal", name


def test_nothing_of_the_routed_experts_is_kept(tiny_config):
    policy = CostPolicy(threshold=10)
    experts = torch.nn.Linear(4, 4)
    seen = []
    experts.register_forward_hook(lambda *_: seen.append(policy(None, ATEN.mm.default, meta(2, 64), meta(64, 2))))
    hooks = policy.watch(experts)
    experts(torch.ones(4))
    seen.append(policy(None, ATEN.mm.default, meta(2, 64), meta(64, 2)))
    with pytest.raises(RuntimeError):
        experts(torch.ones(3))  # as a recomputation ends that has all it needs
    seen.append(policy(None, ATEN.mm.default, meta(2, 64), meta(64, 2)))
    for hook in hooks:
        hook.remove()
    assert [choice.name for choice in seen] == ["PREFER_RECOMPUTE", "MUST_SAVE", "MUST_SAVE"]
