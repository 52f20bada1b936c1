"""Bytes of weights, gradients and optimiser states, exactly: the real model and optimiser on the meta device."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kimivl.memory.live import LiveBytes
from kimivl.memory.setup import Setup
from kimivl.memory.sharding import Groups
from kimivl.model import KimiVLForConditionalGeneration
from kimivl.optim.dealing import rows_of_ranks

_STATES = {"momentum_buffer": "momentum", "exp_avg": "moments", "exp_avg_sq": "moments", "remainder": "remainders"}
_OUR_OPTIMIZERS = "kimivl.optim"


@dataclass(frozen=True, slots=True)
class Parameters:
    """Bytes on one device; where the model is cut up, on the first, whose share is the largest.

    ``gradients`` of all parameters that train, ``part_gradients`` the same by child of the model, ``largest_gradient``
    of one parameter. ``in_backward``: gradients are used and freed one at a time. ``states`` by kind; ``update`` what
    a step of the optimiser takes beside all this. ``casts`` the half-precision copies that autocast keeps.
    ``groups``: what is gathered together where the model is cut up, else nothing.
    """

    numel: int
    trained: int
    weights: int
    gradients: int
    head_gradient: int
    part_gradients: dict[str, int]
    largest_gradient: int
    in_backward: bool
    states: dict[str, int]
    update: int
    casts: int
    expert_stack: int
    groups: Groups | None

    @property
    def certain(self) -> int:
        """What must be there at the same time, whatever the packs are."""
        return (
            self.weights + sum(self.states.values()) + (self.largest_gradient if self.in_backward else self.gradients)
        )


def measure(setup: Setup) -> Parameters:
    """Build the model and the optimiser without memory, and count."""
    model = _model(setup)
    named: list[tuple[str, Tensor]] = [
        (name, weight) for name, weight in model.named_parameters() if weight.requires_grad
    ]
    if not named:
        raise ValueError("module.freeze and lora leave no parameter to train")
    ranks = setup.devices if setup.sharded else 1
    parts = {
        part: _bytes((weight for name, weight in named if name.startswith(part)), ranks)
        for part, _ in model.named_children()
    }
    optimizer, in_backward = _optimizer(setup, named)
    states, peak = _stepped(optimizer, [weight for _, weight in named], in_backward, ranks)
    own = getattr(optimizer, "workspace", None)
    stacks = [weight for name, weight in model.named_parameters() if ".experts." in name and "lora_" not in name]
    return Parameters(
        numel=sum(weight.numel() for weight in model.parameters()),
        trained=sum(weight.numel() for _, weight in named),
        weights=_bytes(model.parameters(), ranks) + _bytes(model.buffers()),
        gradients=_bytes((weight for _, weight in named), ranks),
        head_gradient=_bytes(weight for name, weight in named if "lm_head" in name),
        part_gradients=parts,
        largest_gradient=max(_bytes([weight], ranks) for _, weight in named),
        in_backward=in_backward,
        states=states,
        update=own() if own else peak,
        casts=_casts(model, setup),
        expert_stack=_bytes(stacks) // max(1, len(stacks) // 2),
        groups=Groups.of(model) if setup.sharded else None,
    )


def _model(setup: Setup) -> nn.Module:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if setup.numbers.parameter == 2 else torch.float32)
    try:
        with torch.device("meta"):
            model = KimiVLForConditionalGeneration(setup.model)
            for part in setup.freeze:
                if not hasattr(model, part):
                    raise ValueError(f"module.freeze names {part!r}, which the model does not have")
                getattr(model, part).requires_grad_(False)
            if setup.lora is not None:
                from kimivl.model.lora import add_lora

                add_lora(model, **setup.lora)
    finally:
        torch.set_default_dtype(before)
    return model


def _optimizer(setup: Setup, named: list[tuple[str, Tensor]]) -> tuple[torch.optim.Optimizer, bool]:
    """The optimiser of the config, and whether it steps inside the backward pass."""
    target = setup.optimizer["_target_"]
    module, _, name = target.rpartition(".")
    make: Callable[..., torch.optim.Optimizer] = getattr(importlib.import_module(module), name)
    settings = {key: value for key, value in setup.optimizer.items() if key[0] != "_"}
    accepted = inspect.signature(make).parameters
    ours = target.startswith(_OUR_OPTIMIZERS)
    if ours and settings.get("rounding", "stochastic") == "stochastic":
        settings["rounding"] = "nearest"  # the same states, and no random numbers, which the meta device has not
    if not ours and not setup.on_cpu and "foreach" in accepted and not settings.get("fused"):
        settings.setdefault("foreach", True)  # torch's default on an accelerator
    return make(named, **settings), "InBackward" in name


def _stepped(
    optimizer: torch.optim.Optimizer, weights: list[Tensor], in_backward: bool, ranks: int
) -> tuple[dict[str, int], int]:
    """States by kind after a step, and the most that the step took besides them and the gradients, of a share."""

    def closure() -> Tensor:
        # a gradient for each parameter, and for each the hook that some optimisers hang on it
        for weight in weights:
            torch.autograd.backward(weight, torch.empty_like(weight))
        return torch.zeros(())

    peak = 0
    if in_backward:
        optimizer.step(closure)  # type: ignore[arg-type]
    else:
        closure()
        with LiveBytes(weights) as live:
            optimizer.step()
            states = sum(_bytes(_tensors(state)) for state in optimizer.state.values())
        peak = live.peak - states
    kinds: dict[str, int] = {}
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.ndim:
                kind = _STATES.get(name, name)
                kinds[kind] = kinds.get(kind, 0) + _bytes([value], ranks)
    return kinds, max(0, peak) // ranks


def _casts(model: nn.Module, setup: Setup) -> int:
    """Half-precision copies of the weights of products, kept by autocast from forward to backward."""
    if not setup.numbers.mixed:
        return 0
    once = setup.checkpointing == "none"
    numel = sum(
        weight.numel()
        for name, weight in model.named_parameters()
        if weight.ndim > 1 and "embed_tokens" not in name and (once or ".experts." not in name)
    )
    return numel * setup.numbers.compute


def _tensors(state: dict[str, Any]) -> list[Tensor]:
    return [value for value in state.values() if isinstance(value, Tensor)]


def _bytes(tensors: Iterable[Tensor], ranks: int = 1) -> int:
    """Of the first of ``ranks`` that tensors are cut up over, along their first dimension."""
    return sum(
        tensor.numel() // max(1, len(tensor)) * rows_of_ranks(len(tensor), ranks)[0] * tensor.element_size()
        if tensor.ndim
        else tensor.element_size()
        for tensor in tensors
    )
