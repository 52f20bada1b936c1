"""Activation checkpointing: what a block of the model keeps from its forward pass for its backward pass.

    none       every tensor that the backward pass reads
    full       the block's input; the backward pass computes the block again
    selective  the block's input, and the results that cost much to compute again for the memory that they take

The measure of `selective` is FLOPs per element of a result. A product over an inner dimension K costs 2 K; attention
over c keys on average, with queries of width a and values of width b, costs 2 c (a + b) / b. Kept is what costs at
least as much as a product over the decoder's width D. With D = 2048 (Kimi-VL-A3B), bytes of a token in bfloat16:

    kept        q_proj 6,144   kv_a_proj 1,152   o_proj 4,096   router 256 (float32)   shared experts 15,360
                attention 4,160 where its segments have 1,640 tokens or more (a sixth of a block's FLOPs at 6,000)
    again       kv_b_proj (K 512), 8,192   norms, activations, rotations, gathers: no FLOPs worth keeping
    again       routed experts, 58,368: six rows a token, twice as much as all that is kept, for the same K

which with the block's input is 35 KB of a token and block, where full keeps 4 KB, and saves about a third of the second
forward pass of short segments, two thirds of it in segments of 32K. Results are the same in all modes, bit for bit
where the kernels are deterministic.

Legend: T packed tokens, S segments, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts

Mode = Literal["none", "full", "selective"]


def checkpoint_activations(model: PreTrainedModel, mode: Mode) -> None:
    """Choose what the decoder layers and the vision blocks of ``model`` keep; may be called again with another mode.

    It acts on training with gradients only: generation and log-probabilities without gradients run as they are.

    Raises:
        ValueError: for an unknown mode.
    """
    if mode not in get_args(Mode):
        raise ValueError(f"activation_checkpointing={mode}: choose one of {', '.join(get_args(Mode))}")
    for hook in vars(model).pop("_checkpointing_hooks", ()):
        hook.remove()
    run = _run_again
    if mode == "selective":
        policy = CostPolicy(threshold=2 * model.config.text_config.hidden_size)
        experts = [module for module in model.modules() if isinstance(module, DeepseekV3Experts)]
        vars(model)["_checkpointing_hooks"] = [hook for module in experts for hook in policy.watch(module)]
        run = partial(_run_again, context_fn=partial(create_selective_checkpoint_contexts, policy))
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module._gradient_checkpointing_func = run
            module.gradient_checkpointing = mode != "none"


def _run_again(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """``function(*args)``, run again in the backward pass."""
    if not torch.is_grad_enabled():
        return function(*args)
    # The model has no dropout: there is no random state to bring back.
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, **options)


class CostPolicy:
    """Says of each operation whether its result is kept: see the top of this file.

    Args:
        threshold: FLOPs per element from which on a result is kept.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self._inside_experts = False

    def __call__(self, context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        keep = not self._inside_experts and flops_per_element(op, args, kwargs) >= self.threshold
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    def watch(self, experts: nn.Module) -> tuple[Any, Any]:
        """Keep nothing inside of these routed experts; returns the hooks, for removal."""

        def enter(*_: Any) -> None:
            self._inside_experts = True

        def leave(*_: Any) -> None:
            self._inside_experts = False

        # always_call: recomputation stops by an exception as soon as it has what the backward pass needs.
        return experts.register_forward_pre_hook(enter), experts.register_forward_hook(leave, always_call=True)


def flops_per_element(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """What an element of the result of an ATen (or attention) operation costs to compute again; 0 for all others.

    Products and attention only. Of a pack's segments only the number is known without waiting for the device: their
    mean length T / S, which is the least that the mean number of keys can be.
    """
    cost = _COSTS.get(str(getattr(op, "_overloadpacket", op)))
    return 0.0 if cost is None else cost(args, kwargs)


def _product(args: tuple[Any, ...], kwargs: dict[str, Any], left: int = 0) -> float:
    return 2.0 * args[left].shape[-1]


def _batched_attention(args: tuple[Any, ...], kwargs: dict[str, Any], causal: int) -> float:
    """(B, N, L, D) queries, keys and values; the place of ``is_causal`` differs by kernel."""
    return _attention(args, kwargs, args[1].shape[-2], causal)


def _varlen_attention(args: tuple[Any, ...], kwargs: dict[str, Any], causal: int, bounds: int = 3) -> float:
    """(T, N, D) queries, keys and values, and further on the (S + 1,) bounds of the segments."""
    return _attention(args, kwargs, args[1].shape[-3] / max(1, len(args[bounds]) - 1), causal)


def _attention(args: tuple[Any, ...], kwargs: dict[str, Any], keys: float, causal: int) -> float:
    query, _, value = args[:3]
    is_causal = kwargs.get("is_causal", len(args) > causal and args[causal])
    mean = keys / 2 if is_causal else keys
    return 2.0 * mean * (query.shape[-1] + value.shape[-1]) / value.shape[-1]


# Names, not operations: a kernel that this build of torch (or this machine) lacks is then simply never met.
_COSTS: dict[str, Callable[[tuple[Any, ...], dict[str, Any]], float]] = {
    "aten.mm": _product,
    "aten.addmm": partial(_product, left=1),
    "aten.bmm": _product,
    "aten._scaled_dot_product_flash_attention_for_cpu": partial(_batched_attention, causal=4),
    "aten._scaled_dot_product_flash_attention": partial(_batched_attention, causal=4),
    "aten._scaled_dot_product_efficient_attention": partial(_batched_attention, causal=6),
    "aten._scaled_dot_product_cudnn_attention": partial(_batched_attention, causal=6),
    "aten._flash_attention_forward": partial(_varlen_attention, causal=8),
    "torch_attn._varlen_attn": partial(_varlen_attention, causal=7),
    "flash_attn._flash_attn_varlen_forward": partial(_varlen_attention, causal=9),
}
