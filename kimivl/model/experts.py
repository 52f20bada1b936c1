"""Routed experts: each token through its K experts, summed with the router's weights.

    out_t = sum_k weight_tk * down_e(silu(gate_e(x_t)) * up_e(x_t)),  e = index_tk

Two kernels compute it, from tokens sorted by expert, with a backward pass written out:

- ``sorted``: a loop over the experts, plain matrix products. The fastest on a CPU, and it runs anywhere, in any dtype.
- ``grouped_mm``: one call of ``torch.nn.functional.grouped_mm`` for all experts. It does not wait for the device; its
  fast form is bfloat16 on GPUs of compute capability 9 and 10, elsewhere it is a loop inside torch that copies the
  group sizes to the host at every call.

For the backward pass both keep the gate and up products (S, 2I) and nothing else of that size: inputs are gathered
again, the activation is computed again, and the weights' gradient needs no outputs because
<dout_t, down_e(a)> = <down_e^T dout_t, a>. For the same reason the weight is applied before ``down``, to I channels
instead of D. transformers' loop differentiates through indexing of the stacked weights, which costs a gradient of the
whole stack per expert, and its grouped_mm keeps 3.5 times as much at Kimi-VL's proportion of I to D.

Legend: T tokens, K experts per token, S = T K rows, E experts, D width, I expert width.
"""

from __future__ import annotations

from functools import partial
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts

from kimivl.model.kernels import Experts

NAMES: tuple[Experts, ...] = get_args(Experts)

# grouped_mm works on whole (S, .) tensors. At 128K tokens with 6 experts each and I = 1408 a backward pass would hold
# 19 GB of them for a moment; tokens are independent, so longer packs go through in parts.
_GROUPED_TOKENS = 32_768


def resolve(name: Experts, device: torch.device, dtype: torch.dtype) -> Experts:
    """The experts kernel that ``name`` stands for on a device.

    Raises:
        ValueError: when the named one cannot run there.
    """
    if name == "auto":
        return "grouped_mm" if _grouped_is_fast(device, dtype) else "sorted"
    if name == "grouped_mm" and (reason := _grouped_fails(device, dtype)):
        raise ValueError(f"kernels.experts=grouped_mm {reason}; use kernels.experts=sorted")
    return name


def implementation(name: str) -> str:
    """What ``config._experts_implementation`` says for a kernel."""
    return f"kimivl_{name}"


def _grouped_is_fast(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether grouped_mm is one kernel there, not a loop."""
    if device.type != "cuda" or dtype != torch.bfloat16 or not hasattr(F, "grouped_mm"):
        return False
    return torch.cuda.get_device_capability(device)[0] in (9, 10)


def _grouped_fails(device: torch.device, dtype: torch.dtype) -> str:
    """Why grouped_mm cannot run there; empty where it can."""
    if not hasattr(F, "grouped_mm"):
        return f"needs torch 2.10 or newer, this is {torch.__version__}"
    if device.type not in ("cpu", "cuda"):
        return f"runs on CUDA and on a CPU, not on {device.type}"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"has no kernel for {dtype}"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "needs compute capability 8.0 or higher"
    return ""


def experts_forward(
    module: DeepseekV3Experts, hidden: Tensor, index: Tensor, weight: Tensor, kernel: Experts = "auto"
) -> Tensor:
    """(T, D) tokens through the (T, K) chosen experts of ``module``, summed with the (T, K) weights.

    Under autocast the products are computed in its dtype, as a linear layer's are.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else module.gate_up_proj.dtype
    stacks = (module.gate_up_proj, module.down_proj)
    if resolve(kernel, hidden.device, dtype) == "sorted":
        return _Sorted.apply(hidden, weight, *stacks, index, dtype)
    _check_widths(stacks[1], dtype)
    parts = zip(*(tensor.split(_GROUPED_TOKENS) for tensor in (hidden, weight, index)), strict=True)
    outputs = [_Grouped.apply(x, w, *stacks, i, dtype) for x, w, i in parts]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _check_widths(down: Tensor, dtype: torch.dtype) -> None:
    multiple = 16 // dtype.itemsize
    if down.shape[1] % multiple or down.shape[2] % multiple:
        raise ValueError(
            f"kernels.experts=grouped_mm needs hidden_size {down.shape[1]} and moe_intermediate_size {down.shape[2]} "
            f"to be multiples of {multiple} in {dtype}; use kernels.experts=sorted"
        )


def register() -> None:
    """Make the kernels known to transformers."""
    for name in NAMES:
        ALL_EXPERTS_FUNCTIONS.register(implementation(name), partial(experts_forward, kernel=name))


# ---- shared by the kernels --------------------------------------------------------------------------------------


def _by_expert(index: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Rows in the order of their experts.

    ``order`` (S,): row s of the sorted rows is place ``order[s]`` of the flat (T, K) index. ``ends`` (E,) int32: where
    each expert's rows end. Nothing here waits for the device.
    """
    keys, order = index.flatten().to(torch.int16).sort(stable=True)
    numbers = torch.arange(experts, device=index.device, dtype=torch.int16)
    return order, torch.searchsorted(keys, numbers, right=True, out_int32=True)


def _activate(h: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """(n, 2I) gate and up products, (n,) weights -> weight * silu(gate) * up, written to ``out`` (n, I)."""
    gate, up = h.chunk(2, 1)
    torch.ops.aten.silu.out(gate, out=out)
    return out.mul_(up).mul_(weight.unsqueeze(1))


def _activate_backward(h: Tensor, weight: Tensor, grad: Tensor, act: Tensor, silu: Tensor, dh: Tensor) -> Tensor:
    """The backward of ``_activate``; returns the gradient of the weights (n,).

    ``grad`` (n, I) is that of silu(gate) * up before the weight; it is spent. Written are ``act``, what the forward
    pass computed, and ``dh`` (n, 2I); ``silu`` (n, I) is room to work in.
    """
    gate, up = h.chunk(2, 1)
    dgate, dup = dh.chunk(2, 1)
    column = weight.unsqueeze(1)
    torch.ops.aten.silu.out(gate, out=silu)
    torch.mul(silu, up, out=act)
    dweight = torch.mul(grad, act, out=dup).sum(1, dtype=weight.dtype)
    act.mul_(column)
    grad.mul_(column)
    torch.mul(grad, silu, out=dup)
    torch.ops.aten.silu_backward.grad_input(grad.mul_(up), gate, grad_input=dgate)
    return dweight


def _unsorted(rows: Tensor, order: Tensor, shape: torch.Size) -> Tensor:
    """Sorted (S,) values back at their (T, K) places."""
    return torch.empty_like(rows).index_copy_(0, order, rows).view(shape)


# ---- a loop over the experts ------------------------------------------------------------------------------------


class _Sorted(torch.autograd.Function):
    """One expert after the other, in buffers as long as the longest: what is reused stays in the processor's cache."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor, index: Tensor, dtype: torch.dtype
    ) -> Tensor:
        order, ends = _by_expert(index, len(down))
        tokens, weights = order // index.shape[1], weight.flatten()[order]
        x, h = hidden.to(dtype), hidden.new_empty(len(order), gate_up.shape[1], dtype=dtype)
        out = _total(x)
        spans = _spans(ends)
        (x_rows, y_rows), (act,) = _buffers(spans, x, down.shape[1], 2), _buffers(spans, x, down.shape[2], 1)
        for e, start, end in spans:
            n, rows = end - start, tokens[start:end]
            torch.index_select(x, 0, rows, out=x_rows[:n])
            torch.mm(x_rows[:n], gate_up[e].to(dtype).t(), out=h[start:end])
            _activate(h[start:end], weights[start:end], act[:n])
            torch.mm(act[:n], down[e].to(dtype).t(), out=y_rows[:n])
            out.index_add_(0, rows, y_rows[:n].to(out.dtype))
        ctx.save_for_backward(hidden, weight, gate_up, down, order, h)
        ctx.spans = spans
        return out.to(hidden.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, gate_up, down, order, h = ctx.saved_tensors
        need_x, need_w, need_gate_up, need_down, *_ = ctx.needs_input_grad
        tokens, weights = order // weight.shape[1], weight.flatten()[order]
        x, grad = hidden.to(h.dtype), grad.to(h.dtype)
        dx = _total(x) if need_x else None
        dweights = torch.empty_like(weights)
        dgate_up = _gradient_of(gate_up, ctx.spans) if need_gate_up else None
        ddown = _gradient_of(down, ctx.spans) if need_down else None
        (x_rows, y_rows) = _buffers(ctx.spans, x, down.shape[1], 2)
        (act, silu, dact), (dh,) = _buffers(ctx.spans, x, down.shape[2], 3), _buffers(ctx.spans, x, h.shape[1], 1)
        for e, start, end in ctx.spans:
            n, rows = end - start, tokens[start:end]
            torch.index_select(grad, 0, rows, out=y_rows[:n])
            torch.mm(y_rows[:n], down[e].to(h.dtype), out=dact[:n])
            dweights[start:end] = _activate_backward(
                h[start:end], weights[start:end], dact[:n], act[:n], silu[:n], dh[:n]
            )
            if ddown is not None:
                _product(y_rows[:n].t(), act[:n], ddown[e])
            if dgate_up is not None:
                torch.index_select(x, 0, rows, out=x_rows[:n])
                _product(dh[:n].t(), x_rows[:n], dgate_up[e])
            if dx is not None:
                torch.mm(dh[:n], gate_up[e].to(h.dtype), out=y_rows[:n])
                dx.index_add_(0, rows, y_rows[:n].to(dx.dtype))
        dweight = _unsorted(dweights, order, weight.shape) if need_w else None
        return None if dx is None else dx.to(hidden.dtype), dweight, dgate_up, ddown, None, None


def _spans(ends: Tensor) -> list[tuple[int, int, int]]:
    """(expert, first row, end) of the experts that have rows. On an accelerator this waits for the device, once."""
    last = ends.tolist()
    return [(e, start, end) for e, (start, end) in enumerate(zip([0, *last], last, strict=False)) if start < end]


def _buffers(spans: list[tuple[int, int, int]], like: Tensor, width: int, count: int) -> list[Tensor]:
    """Room for the rows of any one expert, ``count`` times; with memory of its own for each, a layer of the tiny model
    took 1.15 times the CPU time at 4K tokens, one of the small model 1.1 times."""
    longest = max((end - start for _, start, end in spans), default=0)
    return [like.new_empty(longest, width) for _ in range(count)]


def _gradient_of(stack: Tensor, spans: list[tuple[int, int, int]]) -> Tensor:
    """Room for the gradient of stacked weights, zero at the experts without rows; the others are written later."""
    gradient = torch.empty_like(stack)
    for e in {*range(len(stack))} - {e for e, _, _ in spans}:
        gradient[e].zero_()
    return gradient


def _total(like: Tensor) -> Tensor:
    """Zeros to sum into, at least float32."""
    return torch.zeros_like(like, dtype=torch.promote_types(like.dtype, torch.float32))


def _product(left: Tensor, right: Tensor, out: Tensor) -> None:
    """out = left @ right; ``out`` may be of another dtype."""
    if out.dtype == left.dtype:
        torch.mm(left, right, out=out)
    else:
        out.copy_(left @ right)


# ---- all experts in one call ------------------------------------------------------------------------------------


class _Grouped(torch.autograd.Function):
    """Grouped products over the whole sorted rows; no step waits for the device."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor, index: Tensor, dtype: torch.dtype
    ) -> Tensor:
        order, ends = _by_expert(index, len(down))
        rows = hidden.to(dtype).index_select(0, order // index.shape[1])
        h = F.grouped_mm(rows, gate_up.to(dtype).transpose(1, 2), offs=ends)
        del rows
        act = _activate(h, weight.flatten()[order], h.new_empty(len(h), down.shape[2]))
        y = F.grouped_mm(act, down.to(dtype).transpose(1, 2), offs=ends)
        ctx.save_for_backward(hidden, weight, gate_up, down, order, ends, h)
        return _sum_of_rows(y, order, index.shape).to(hidden.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, gate_up, down, order, ends, h = ctx.saved_tensors
        need_x, need_w, need_gate_up, need_down, *_ = ctx.needs_input_grad
        tokens = order // weight.shape[1]
        dy = grad.to(h.dtype).index_select(0, tokens)
        dact = F.grouped_mm(dy, down.to(h.dtype), offs=ends)
        act, silu, dh = torch.empty_like(dact), torch.empty_like(dact), torch.empty_like(h)
        dweights = _activate_backward(h, weight.flatten()[order], dact, act, silu, dh)
        del dact, silu
        ddown = _weight_gradient(dy, act, ends, down.dtype) if need_down else None
        del act, dy
        dx = dgate_up = None
        if need_gate_up:
            rows = hidden.to(h.dtype).index_select(0, tokens)
            dgate_up = _weight_gradient(dh, rows, ends, gate_up.dtype)
            del rows
        if need_x:
            drows = F.grouped_mm(dh, gate_up.to(h.dtype), offs=ends)
            dx = _sum_of_rows(drows, order, weight.shape).to(hidden.dtype)
        return dx, _unsorted(dweights, order, weight.shape) if need_w else None, dgate_up, ddown, None, None


def _weight_gradient(left: Tensor, right: Tensor, ends: Tensor, dtype: torch.dtype) -> Tensor:
    """left^T @ right inside each expert's rows: (S, a), (S, b) -> (E, a, b)."""
    product = F.grouped_mm(left.t(), right, offs=ends)
    # A group without rows is not promised to be written.
    empty = ends.diff(prepend=ends.new_zeros(1)) == 0
    return product.masked_fill_(empty.view(-1, 1, 1), 0).to(dtype)


def _sum_of_rows(rows: Tensor, order: Tensor, shape: torch.Size) -> Tensor:
    """Sorted (S, D) rows -> (T, D), the sum of each token's K rows, in float32 and without an (S, D) copy."""
    places = _unsorted(torch.arange(len(order), device=order.device), order, shape)
    return F.embedding_bag(places, rows, mode="sum")
