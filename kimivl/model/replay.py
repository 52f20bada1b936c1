"""Router replay: a pack goes through the experts that the rollout engine chose for it.

Engine and trainer round differently, so now and then a router's top K differ by an expert, and with them the
log-probabilities of a token by far more than rounding. With the engine's choice recorded, reference and training pass
use it: ``index`` is replaced, and the weights are made from the trainer's own scores of those experts, through which
the router learns as before ("Stabilizing MoE reinforcement learning by aligning training and inference routers",
arXiv 2510.11370).

The choice travels with the keyword arguments of the decoder layers: activation checkpointing keeps those, so a layer
that runs again in the backward pass is routed as it was the first time.

Legend: T tokens of a pack, B MoE layers, K experts per token, E experts.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Model,
    DeepseekV3MoE,
    DeepseekV3TopkRouter,
)

FREE = -1
"""Stands for an expert where nothing was recorded: the token is routed as ever."""


def install_replay(decoder: DeepseekV3Model) -> None:
    """Let the layers of ``decoder`` take ``routing`` (T, B, K) as a keyword argument of its forward pass.

    Register it before other hooks of the gates (``kimivl.model.router.Router``), which are to see what is replayed.
    """
    number = 0
    for layer in decoder.layers:
        gate = layer.mlp.gate if isinstance(layer.mlp, DeepseekV3MoE) else None
        # A hook of the attention, not of the layer: it runs inside of what is checkpointed, and before the experts.
        layer.self_attn.register_forward_pre_hook(partial(_hand_over, gate, number), with_kwargs=True)
        if gate is not None:
            gate.replayed = None
            gate.register_forward_hook(_replay)
            number += 1


def check_routing(routing: Tensor, tokens: int, decoder: DeepseekV3Model) -> None:
    """ValueError for a record that is not of this pack or model. Numbers are looked at on the CPU only: elsewhere that
    would wait for the device, and a wrong one fails an assertion there."""
    gates = [module for module in decoder.modules() if isinstance(module, DeepseekV3TopkRouter)]
    wanted = (tokens, len(gates), gates[0].top_k if gates else 0)
    if tuple(routing.shape) != wanted or routing.is_floating_point():
        raise ValueError(
            f"the recorded experts are {routing.dtype} {tuple(routing.shape)}, but this pack and model take whole "
            f"numbers {wanted} (tokens, MoE layers, experts per token): they were recorded with another model or prompt"
        )
    if not gates:
        return
    free = (routing == FREE).all(-1)
    wrong = ~free & ((routing < 0) | (routing >= gates[0].num_experts)).any(-1)
    if routing.device.type != "cpu":
        torch._assert_async(~wrong.any(), "a recorded expert is not one of the model's")
    elif bool(wrong.any()):
        token, layer = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"the recorded experts of token {token} in MoE layer {layer} are {routing[token, layer].tolist()}: give "
            f"numbers under {gates[0].num_experts}, or {FREE} for all of them where nothing was recorded"
        )


def _hand_over(gate: Any, number: int, attention: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Take ``routing`` out of the attention's arguments, and leave its layer ``number`` with the gate."""
    routing = kwargs.get("routing")
    if gate is not None:
        gate.replayed = None if routing is None else routing[:, number]
    return args, {name: value for name, value in kwargs.items() if name != "routing"}


def _replay(gate: Any, inputs: Any, outputs: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, weights and index of a gate, with the recorded experts in the place of its own."""
    recorded, gate.replayed = gate.replayed, None
    if recorded is None:
        return outputs
    logits, _, own = outputs
    index = torch.where(recorded[:, :1] == FREE, own, recorded.to(own.dtype))
    # As in DeepseekV3TopkRouter.forward, in float32, where the logits are.
    weights = logits.sigmoid().gather(1, index)
    if gate.norm_topk_prob:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return logits, weights * gate.routed_scaling_factor, index
