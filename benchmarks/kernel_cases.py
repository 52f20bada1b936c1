"""What the benchmark of the kernels computes: each costly part of the model, plainly and by each kernel there is.

A version is a function that runs forward and backward once and returns the result and all gradients; those of the
plain version are what the others are compared with.

Legend: T tokens, N heads, D width, V width of values, E experts, K experts per token, I expert width, S positions of
the loss, W words of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import _muon
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts

from benchmarks.plain import newton_schulz_float32
from kimivl.model.experts import experts_forward
from kimivl.model.kernels import Kernels
from kimivl.model.loss import linear_log_probs
from kimivl.model.segment_attention import segment_attention
from kimivl.model.segments import Segments
from kimivl.optim import MuonAdamW

Version = Callable[[], list[Tensor]]


@dataclass
class Case:
    """A computation at one size; the first version is the plain one. ``missing``: why a kernel is not there."""

    name: str
    size: str
    versions: dict[str, Version]
    missing: dict[str, str] = field(default_factory=dict)


def attention(device: torch.device, dtype: torch.dtype, full: bool, vision: bool) -> Case:
    """Attention inside segments: samples of the decoder (causal), or images of the vision tower."""
    tokens, heads, width, value = (32_768, 16, 192, 128) if full else (4096, 8, 96, 64)
    if vision:
        tokens, width, value = (65_536, 72, 72) if full else (4096, 40, 40)
    lengths = _lengths(tokens, 4000 if vision and full else 1000 if vision else 200)
    shapes = [(tokens, heads, width), (tokens, heads, width), (tokens, heads, value)]
    inputs = [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for shape in shapes]
    segments, scale = Segments.of_lengths(lengths, device), width**-0.5

    def dense() -> Tensor:
        number = torch.repeat_interleave(torch.tensor(lengths)).to(device)
        mask = number[:, None] == number
        mask = mask if vision else mask.tril()
        q, k, v = (x.transpose(0, 1)[None] for x in inputs)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)[0].transpose(0, 1)

    def ours(kernel: str) -> Callable[[], Tensor]:
        return lambda: segment_attention(*inputs, segments, scale, not vision, kernel)

    case = Case(
        "attention, vision" if vision else "attention",
        f"{len(lengths)} segments, T={tokens} N={heads} D={width} V={value}",
        {"dense mask": _with_gradients(dense, inputs)},
    )
    for kernel in ("sdpa", "flex", "varlen", "flash"):
        if kernel == "flex" and device.type == "cpu":
            case.missing[kernel] = "it has no gradients on a CPU"
        elif _there(case, "attention", kernel, device, dtype):
            case.versions[kernel] = _with_gradients(ours(kernel), inputs)
    return case


def experts(device: torch.device, dtype: torch.dtype, full: bool) -> Case:
    """The routed experts of one layer."""
    tokens, width, count, inner, top = (32_768, 2048, 64, 1408, 6) if full else (4096, 512, 16, 128, 4)
    config = DeepseekV3Config(
        hidden_size=width, n_routed_experts=count, moe_intermediate_size=inner, num_experts_per_tok=top
    )
    with torch.device(device):
        module = DeepseekV3Experts(config).to(dtype)
    for stack in module.parameters():
        nn.init.normal_(stack, std=0.02)
    hidden = torch.randn(tokens, width, device=device, dtype=dtype, requires_grad=True)
    index = torch.rand(tokens, count, device=device).topk(top).indices
    weight = torch.rand(tokens, top, device=device, requires_grad=True)
    inputs = [hidden, weight, module.gate_up_proj, module.down_proj]

    def theirs(implementation: str) -> Callable[[], Tensor]:
        def run() -> Tensor:
            module.config._experts_implementation = implementation
            return module(hidden, index, weight.to(dtype))

        return run

    def ours(kernel: str) -> Callable[[], Tensor]:
        return lambda: experts_forward(module, hidden, index, weight, kernel)

    size = f"T={tokens} D={width} E={count} K={top} I={inner}"
    case = Case("experts", size, {"eager": _with_gradients(theirs("eager"), inputs)})
    case.versions["transformers grouped_mm"] = _with_gradients(theirs("grouped_mm"), inputs)
    for kernel in ("sorted", "grouped_mm"):
        if _there(case, "experts", kernel, device, dtype):
            case.versions[kernel] = _with_gradients(ours(kernel), inputs)
    return case


def loss(device: torch.device, dtype: torch.dtype, full: bool) -> Case:
    """Log-probabilities of the targets, at Kimi-VL's vocabulary."""
    positions, width, words = (16_384, 2048, 163_840) if full else (1024, 256, 163_840)
    hidden = torch.randn(positions, width, device=device, dtype=dtype, requires_grad=True)
    weight = torch.randn(words, width, device=device).mul_(0.02).to(dtype).requires_grad_()
    targets = torch.randint(words, (positions,), device=device)

    def ours(kernel: str) -> Callable[[], Tensor]:
        return lambda: linear_log_probs(hidden, weight, targets, kernel=kernel)

    def logits() -> Tensor:
        return -F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="none")

    size = f"S={positions} D={width} W={words}"
    case = Case("loss", size, {"full logits": _with_gradients(logits, [hidden, weight])})
    for kernel in ("chunked", "liger"):
        if _there(case, "loss", kernel, device, dtype):
            case.versions[kernel] = _with_gradients(ours(kernel), [hidden, weight])
    return case


def muon(device: torch.device, dtype: torch.dtype, full: bool) -> Case:
    """One update of a layer's routed experts; torch has Muon for single matrices."""
    count, width, inner = (64, 2048, 1408) if full else (16, 512, 128)
    shapes = {"gate_up_proj": (count, 2 * inner, width), "down_proj": (count, width, inner)}
    start = {name: torch.randn(shape, device=device).mul_(0.02).to(dtype) for name, shape in shapes.items()}
    gradients = {name: torch.randn(shape, device=device).to(dtype) for name, shape in shapes.items()}

    def stacks() -> dict[str, nn.Parameter]:
        parameters = {name: nn.Parameter(tensor.clone()) for name, tensor in start.items()}
        for name, parameter in parameters.items():
            parameter.grad = gradients[name]
        return parameters

    def moved(parameters: dict[str, nn.Parameter]) -> list[Tensor]:
        return [parameter.detach() - start[name] for name, parameter in parameters.items()]

    def batched() -> list[Tensor]:
        parameters = stacks()
        named = [(f"mlp.experts.{name}", parameter) for name, parameter in parameters.items()]
        MuonAdamW(named, lr=1.0, weight_decay=0.0, rounding="nearest").step()
        return moved(parameters)

    def loop() -> list[Tensor]:
        parameters = stacks()
        matrices = []
        for name, parameter in parameters.items():
            rows = (count * 2, inner, width) if name == "gate_up_proj" else (count, width, inner)
            gradient = gradients[name].view(rows)
            for number, view in enumerate(parameter.detach().view(rows)):
                matrices.append(nn.Parameter(view))
                matrices[-1].grad = gradient[number]
        if device.type == "cpu":
            _muon._zeropower_via_newtonschulz = newton_schulz_float32
        torch.optim.Muon(matrices, lr=1.0, weight_decay=0.0, adjust_lr_fn="match_rms_adamw").step()
        return moved(parameters)

    size = f"{3 * count} matrices, D={width} I={inner}"
    return Case("muon", size, {"torch.optim.Muon": loop, "batched": batched})


CASES: dict[str, Callable[[torch.device, torch.dtype, bool], Sequence[Case] | Iterator[Case]]] = {
    "attention": lambda *given: (attention(*given, vision=vision) for vision in (False, True)),
    "experts": lambda *given: iter([experts(*given)]),
    "loss": lambda *given: iter([loss(*given)]),
    "muon": lambda *given: iter([muon(*given)]),
}


def _there(case: Case, part: str, kernel: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a kernel runs here; where not, the reason is noted."""
    try:
        choice: dict[str, Any] = {part: kernel}
        Kernels(**choice).resolve(device, dtype)
    except ValueError as error:
        case.missing[kernel] = str(error)
        return False
    return True


def _with_gradients(forward: Callable[[], Tensor], inputs: Sequence[Tensor]) -> Version:
    """The result, and the gradients of a fixed weighting of it."""

    def run() -> list[Tensor]:
        out = forward()
        direction = torch.linspace(-1, 1, out.numel(), device=out.device).sin().view_as(out).to(out.dtype)
        return [out.detach(), *torch.autograd.grad(out, inputs, direction)]

    return run


def _lengths(tokens: int, median: int) -> list[int]:
    draw, lengths = np.random.default_rng(0), []
    while tokens:
        lengths.append(min(tokens, max(4, int(draw.lognormal(np.log(median), 0.8)))))
        tokens -= lengths[-1]
    return sorted(lengths)
