"""Balancing the routed experts while training: their load, the selection bias, the sequence-wise auxiliary loss.

The routing itself is transformers' ``DeepseekV3TopkRouter``, the same in training and in inference: scores
s = sigmoid(x W^T) in float32, the top K of s + bias are chosen. The bias is no parameter. By default it stays as it was
loaded, as in the published post-training; ``Router`` can go on with what DeepSeek-V3 did in pre-training.

- Bias update (arXiv 2408.15664; DeepSeek-V3, arXiv 2412.19437, section 2.1.2): after each optimiser step,
  bias_e += rate * sign(mean load - load_e), with the load of all packs and ranks of the step.
- Sequence-wise auxiliary loss (DeepSeek-V3, equations 17 to 20), of one sequence of T tokens:

      loss = weight * sum_e f_e P_e,    f_e = E / (K T) * #{t : s_te among the top K of s_t},    P_e = mean_t s'_te

  with s' = s / sum_e s. The top K are those of the scores alone, without the bias. It is 1 * weight where the experts
  are used evenly.

Legend: T tokens of a pack, S segments (sequences) of it, E experts, K experts per token, B MoE layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter


@dataclass(frozen=True, slots=True)
class Balancing:
    """What the run's ``router`` says; both 0 leave the routing as it is.

    Args:
        bias_update_rate: step of the selection bias (DeepSeek-V3: 0.001).
        aux_loss_weight: weight of the sequence-wise auxiliary loss (DeepSeek-V3: 0.0001).
    """

    bias_update_rate: float = 0.0
    aux_loss_weight: float = 0.0

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise ValueError(f"router.{name}={value}: give 0 (off) or a small positive number, under 1")


class Router:
    """Watches the MoE layers of a model while it trains, and balances them where asked to.

    Worked example of a step of two packs::

        for pack in packs:
            with router.record(pack.cu_seqlens):
                logp = model.target_log_probs(**pack.model_inputs())
            (loss(logp) + router.aux_loss).backward()
        optimizer.step()
        router.update_bias()

    Activation checkpointing (``use_reentrant=False``) runs layers again in the backward pass, outside of ``record``:
    nothing is counted twice, and the auxiliary loss has the gradient it would have without.
    """

    def __init__(self, model: nn.Module, bias_update_rate: float = 0.0, aux_loss_weight: float = 0.0) -> None:
        self.balancing = Balancing(bias_update_rate, aux_loss_weight)
        self.gates = [module for module in model.modules() if isinstance(module, DeepseekV3TopkRouter)]
        self.load = self._no_load()
        self._step_load, self._reduced = self.load, True
        self._segments: _Segments | None = None
        self._terms: list[Tensor] = []
        self._hooks = [gate.register_forward_hook(partial(self._after_gate, n)) for n, gate in enumerate(self.gates)]

    @property
    def layers(self) -> int:
        return len(self.gates)

    @contextmanager
    def record(self, cu_seqlens: Tensor) -> Iterator[Router]:
        """Count the loads of the forward pass inside, and collect its auxiliary loss; ``cu_seqlens`` (S + 1,)."""
        self._terms = []
        if self.gates and self.load.device != self.gates[0].weight.device:  # the model was moved since
            self.load = self.load.to(self.gates[0].weight.device)
        self._segments = _Segments(cu_seqlens, torch.is_grad_enabled())
        try:
            yield self
        finally:
            self._segments = None

    @property
    def aux_loss(self) -> Tensor:
        """The weighted auxiliary loss of the last recorded pack: a float32 scalar, 0 where the loss is off.

        Mean over the pack's tokens (each segment counts by its length), sum over the layers. Packs of a step are
        equally full, so its mean over packs and ranks is the step's mean over tokens: add it to a loss that is
        averaged.
        """
        if not self._terms:
            return torch.zeros((), dtype=torch.float32, device=self.load.device)
        return torch.stack(self._terms).sum() * self.balancing.aux_loss_weight

    @torch.no_grad()
    def update_bias(self, move: bool = True) -> None:
        """End an optimiser step: ``move`` the biases against its load where that is on; the next load starts at 0."""
        self._step_load, self._reduced = self.load, False
        self.load = self._no_load()
        if not (move and self.balancing.bias_update_rate):
            return
        load = self.step_load()
        room = (load.sum(1, keepdim=True) - load * load.shape[1]).sign()  # in whole numbers: exact
        for gate, direction in zip(self.gates, room, strict=True):
            bias = gate.e_score_correction_bias
            bias.add_(direction.to(bias), alpha=self.balancing.bias_update_rate)

    def forget(self) -> None:
        """Leave out what was counted since the last step: its packs run through the model once more."""
        self.load = self._no_load()

    def step_load(self) -> Tensor:
        """(B, E) tokens that each expert got in the last whole optimiser step, of all ranks (all must call this)."""
        if not self._reduced and dist.is_available() and dist.is_initialized():
            dist.all_reduce(self._step_load)
        self._reduced = True
        return self._step_load

    def _no_load(self) -> Tensor:
        gate = self.gates[0] if self.gates else None
        device = None if gate is None else gate.weight.device
        return torch.zeros(self.layers, gate.num_experts if gate else 0, dtype=torch.int64, device=device)

    def _after_gate(self, layer: int, gate: DeepseekV3TopkRouter, inputs: Any, outputs: tuple[Tensor, ...]) -> None:
        logits, _, index = outputs
        if self._segments is not None:
            self.load[layer] += count(index, gate.num_experts)
        if not self.balancing.aux_loss_weight:
            return
        if logits.requires_grad:
            # Without a record this may be a layer that runs again in the backward pass: it must save the tensors that
            # it saved the first time. The gradient flows through the first run's node, so the value is of no use.
            term = _AuxLoss.apply(logits, gate.top_k, self._segments)
            if self._segments is not None:
                self._terms.append(term)
        elif self._segments is not None and self._segments.with_gradients and not torch.is_grad_enabled():
            raise ValueError(
                "router.aux_loss_weight needs non-reentrant activation checkpointing: call "
                "gradient_checkpointing_enable with use_reentrant=False"
            )


class _Segments:
    """Which segment each token of a pack belongs to, made once for all layers."""

    def __init__(self, cu_seqlens: Tensor, with_gradients: bool) -> None:
        self.cu_seqlens, self.with_gradients = cu_seqlens, with_gradients
        self._of_token: Tensor | None = None

    @property
    def count(self) -> int:
        return len(self.cu_seqlens) - 1

    def of_token(self, tokens: int) -> Tensor:
        """(T,) number of each token's segment."""
        if self._of_token is None or len(self._of_token) != tokens:
            places = torch.arange(tokens, device=self.cu_seqlens.device, dtype=self.cu_seqlens.dtype)
            self._of_token = torch.searchsorted(self.cu_seqlens, places, right=True) - 1
        return self._of_token


class _AuxLoss(torch.autograd.Function):
    """(T, E) logits -> sum over segments of (length / T) * sum_e f_e P_e, a scalar.

    f is a count and has no gradient, so the loss is linear in s': sum_te c_te s'_te, where c is f of the token's
    segment / T.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, top_k: int, segments: _Segments | None) -> Tensor:
        ctx.save_for_backward(logits)
        if segments is None:
            return logits.new_zeros(())
        tokens, experts = logits.shape
        # Not saved for the backward pass, but kept: tiny, and under checkpointing it would be asked for again.
        ctx.of_token = segments.of_token(tokens)
        ctx.factor = _frequencies(logits, top_k, ctx.of_token, segments) / tokens  # (S, E)
        scores = logits.sigmoid()
        share = scores / scores.sum(1, keepdim=True)
        sums = share.new_zeros(segments.count, experts).index_add_(0, ctx.of_token, share)
        return (sums * ctx.factor).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (logits,) = ctx.saved_tensors
        scores = logits.sigmoid()
        total = scores.sum(1, keepdim=True)
        factor = ctx.factor[ctx.of_token]
        mean = (factor * scores).sum(1, keepdim=True) / total
        return (factor - mean) / total * scores * (1 - scores) * grad, None, None


def _frequencies(logits: Tensor, top_k: int, of_token: Tensor, segments: _Segments) -> Tensor:
    """(S, E) f: E / K times the share of a segment's tokens that have the expert among the top K of their scores."""
    experts = logits.shape[1]
    chosen = logits.topk(top_k, sorted=False).indices  # the sigmoid keeps the order
    places = of_token.unsqueeze(1) * experts + chosen
    counts = count(places, segments.count * experts).view(segments.count, experts)
    return counts.to(logits.dtype) * (experts / top_k) / segments.cu_seqlens.diff().unsqueeze(1)


def count(index: Tensor, size: int) -> Tensor:
    """(size,) int64: how often each number stands in ``index``. Nothing waits for the device."""
    flat = index.flatten()
    if flat.device.type == "cpu":
        return torch.bincount(flat, minlength=size)
    return flat.new_zeros(size, dtype=torch.int64).scatter_add_(0, flat, torch.ones_like(flat))


def load_metrics(load: Tensor) -> dict[str, list[float]]:
    """Figures of each layer from the (B, E) tokens that its experts got.

    ``max_over_mean``: 1 when all are used evenly, E when one does everything. ``entropy`` of the loads, as a share of
    that of an even load: 1 even, 0 when one does everything. ``dead``: experts without a token.
    """
    experts = load.shape[1]
    share = load.to(torch.float32) / load.sum(1, keepdim=True).clamp_min(1)
    entropy = -torch.xlogy(share, share).sum(1) / math.log(experts)
    figures = torch.stack((share.amax(1) * experts, entropy, (load == 0).sum(1).to(share.dtype)))
    return dict(zip(("max_over_mean", "entropy", "dead"), figures.tolist(), strict=True))


def route_in_float32(model: nn.Module) -> None:
    """Keep autocast out of the gates of ``model``: it would compute their logits in bfloat16, and choose others."""
    for module in model.modules():
        if isinstance(module, DeepseekV3TopkRouter):
            module.forward = MethodType(_forward_in_float32, module)


def _forward_in_float32(gate: DeepseekV3TopkRouter, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(hidden.device.type, enabled=False):
        return DeepseekV3TopkRouter.forward(gate, hidden)
