"""Low-rank adapters (LoRA, arXiv 2106.09685), through peft: W + alpha / rank * B A, of which only A and B train.

B starts at zero, so a model with fresh adapters is the model itself, bit for bit. Adapters have the dtype of the
weight that they stand beside. The routed experts of a layer are two stacked parameters, which peft adapts as a whole:
the stack plus the product of the factors is made at each call (1.1 GB a layer of Kimi-VL-A3B in bfloat16; it is
alive in one layer at a time under activation checkpointing, in all 26 without).

Files know nothing of adapters: what is written is the merged model under its official names (`merged`).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_LAYER = r"language_model\.model\.layers\.\d+\."
_MLP = r"(gate_proj|up_proj|down_proj)"
TARGETS = {
    "attention": _LAYER + r"self_attn\.(q_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj)",
    "dense_mlp": _LAYER + r"mlp\." + _MLP,
    "shared_experts": _LAYER + r"mlp\.shared_experts\." + _MLP,
    "routed_experts": _LAYER + r"mlp\.experts\.(gate_up_proj|down_proj)",
    "projector": r"multi_modal_projector\.linear_\d",
    "vision": r"vision_tower\.encoder\.blocks\.\d+\.(wqkv|wo|mlp\.fc0|mlp\.fc1)",
}
"""What can be adapted, as patterns of module names (of parameter names for the routed experts)."""


def add_lora(model: nn.Module, rank: int, alpha: float, targets: Sequence[str]) -> None:
    """Put adapters beside the ``targets`` of ``model`` (names of `TARGETS`), and freeze everything else.

    Raises:
        ValueError: for a rank below 1, an unknown target, a target that the model does not have, or one in a part
            that was frozen before.
    """
    check_lora({"rank": rank, "alpha": alpha, "targets": targets})
    names = _names(model, targets)
    # Here, and not on top: a run without adapters does not wait for this import.
    from peft import LoraConfig, inject_adapter_in_model

    experts = names.get("routed_experts", [])
    modules = [name for target, found in names.items() if target != "routed_experts" for name in found]
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # any number does
        target_modules=modules,
        target_parameters=experts or None,
        bias="none",
    )
    inject_adapter_in_model(config, model)


def check_lora(settings: Mapping[str, Any]) -> None:
    """ValueError for what cannot be right of ``rank``, ``alpha`` and ``targets``, whatever the model is."""
    for key in settings.keys() ^ {"rank", "alpha", "targets"}:
        raise ValueError(f"lora.{key}: lora takes rank, alpha and targets, all three and nothing else")
    rank, alpha, targets = settings["rank"], settings["alpha"], settings["targets"]
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"lora.rank={rank}: give a whole number of 1 or more")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not alpha > 0:
        raise ValueError(f"lora.alpha={alpha}: give a number above 0 (the adapters count alpha / rank times)")
    if isinstance(targets, str) or not targets:
        raise ValueError(f"lora.targets={targets!r}: give a list of some of {', '.join(TARGETS)}")
    for target in targets:
        if target not in TARGETS:
            raise ValueError(f"lora.targets names {target!r}: choose from {', '.join(TARGETS)}")


def _names(model: nn.Module, targets: Sequence[str]) -> dict[str, list[str]]:
    """The names that each target stands for."""
    if has_lora(model):
        raise ValueError("this model has adapters already: merge them (kimivl.model.lora.merged) or load it anew")
    weights = dict(model.named_parameters())
    found: dict[str, list[str]] = {}
    for target in targets:
        owners = {name if target == "routed_experts" else name.removesuffix(".weight"): name for name in weights}
        found[target] = [owner for owner in owners if re.fullmatch(TARGETS[target], owner)]
        if not found[target]:
            raise ValueError(f"lora.targets names {target!r}, which this model does not have")
        for owner in found[target]:
            if not weights[owners[owner]].requires_grad:
                part = owner.split(".")[0]
                raise ValueError(
                    f"lora.targets names {target!r}, but module.freeze holds {part} still: leave one of the two out"
                )
    return found


def has_lora(model: nn.Module) -> bool:
    """Whether adapters stand beside some of the model's weights."""
    return next(_adapters(model), None) is not None


def _adapters(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, peft layer) of the adapted modules, outermost only: the wrappers of an expert stack are nested."""
    inside = "\n"
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and not name.startswith(inside):
            inside = f"{name}."
            yield name, module


@contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """Inside, ``model`` is the plain model with W + alpha / rank * B A, under its own names; for writing it.

    The merged weights are copies, on the CPU where the weights are on another device: the model itself is not
    touched, and is bit for bit what it was afterwards. Without adapters nothing happens.
    """
    adapted = list(_adapters(model))
    try:
        for name, layer in adapted:
            _set_submodule(model, name, _merged_module(layer))
        yield
    finally:
        for name, layer in adapted:
            _set_submodule(model, name, layer)


def _set_submodule(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


@torch.no_grad()
def _merged_module(layer: Any) -> nn.Module:
    """A module with the parameters of the adapted one, merged."""
    holder = nn.Module()
    for name, weight in layer.get_base_layer().named_parameters():
        holder.register_parameter(name, nn.Parameter(weight, requires_grad=False))
    while hasattr(layer, "lora_A"):
        name = getattr(layer, "parameter_name", "weight")
        setattr(holder, name, nn.Parameter(effective_weight(layer, name).cpu(), requires_grad=False))
        layer = layer.base_layer
    return holder


def effective_weight(layer: Any, name: str = "weight") -> Tensor:
    """A weight as it acts: with the adapter, where the layer has one, added in float32 and rounded once."""
    if not hasattr(layer, "lora_A"):
        return getattr(layer, name)
    weight: Tensor = getattr(layer.get_base_layer(), name)
    if layer.merged:
        return weight
    deltas = (layer.get_delta_weight(adapter).float() for adapter in layer.active_adapters)
    return sum(deltas, weight.float()).to(weight.dtype)


def frozen_names(model: nn.Module) -> set[str]:
    """Names of the parameters that do not train: under LoRA, the base."""
    return {name for name, weight in model.named_parameters() if not weight.requires_grad}


@torch.no_grad()
def fingerprint(model: nn.Module, samples: int = 512) -> str:
    """What tells one frozen base from another: names, shapes, and up to ``samples`` values of each weight, hashed."""
    digest = hashlib.sha256()
    frozen = frozen_names(model)
    values = []
    for name, weight in model.named_parameters():
        if name in frozen:
            digest.update(f"{name} {tuple(weight.shape)} {weight.dtype};".encode())
            flat = weight.detach().flatten()
            values.append(flat[:: max(1, len(flat) // samples)].float())
    digest.update(torch.cat(values).cpu().numpy().tobytes() if values else b"")
    return digest.hexdigest()[:16]
