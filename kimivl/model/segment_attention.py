"""Exact attention inside the segments of a packed row: the one entry of both towers, and its kernels.

    varlen  torch.nn.attention.varlen: FlashAttention 2 as built into torch (CUDA, half precision)
    flash   the flash-attn package: FlashAttention 3 on Hopper (keys and values of unequal width without a copy), else 2
    flex    FlexAttention with a block mask (CUDA, any precision; on a CPU without gradients)
    sdpa    one scaled-dot-product call per run of segments of equal length (any device)
    auto    by the device and the dtype at hand, see `resolve`

No kernel ever holds scores of T x T: memory is linear in the tokens of a pack.
Legend: T packed tokens, S segments, N heads, D width of queries and keys, V width of values.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import BlockMask

from kimivl.model.kernels import Attention
from kimivl.model.segments import Runs, Segments

_HALF = (torch.bfloat16, torch.float16)
_NEEDS = {
    "varlen": "a CUDA device of capability 8.0 or more and bf16 or fp16",
    "flash": "the package flash-attn, a CUDA device of capability 8.0 or more and bf16 or fp16",
    "flex": "a CUDA device, or a CPU without gradients",
}
_FLASH_2, _FLASH_3 = "flash_attn", "flash_attn_interface"  # modules
_FLASH_MULTIPLE = 8  # flash kernels take widths that are multiples of this
_FLEX_MULTIPLE = 16  # and FlexAttention none below this


def resolve(name: Attention, device: torch.device, dtype: torch.dtype) -> Attention:
    """The attention kernel that ``name`` stands for on a device.

    ``auto`` is, on CUDA in half precision, FlashAttention 3 where it is installed (Hopper), else varlen. In float32,
    which is for checking, it is sdpa there too: its memory-efficient kernel computes in float32 and needs no compiler,
    where FlexAttention at MLA's width of 192 runs short of shared memory. Everywhere else it is sdpa.

    Raises:
        ValueError: when a named kernel cannot run there.
    """
    flash_device = device.type == "cuda" and dtype in _HALF and _capability(device) >= (8, 0)
    if name == "auto":
        if not flash_device:
            return "sdpa"
        return "flash" if _flash_module(device) == _FLASH_3 else "varlen"
    runs = {
        "varlen": flash_device,
        "flash": flash_device and _flash_module(device) is not None,
        "flex": device.type in ("cuda", "cpu"),
        "sdpa": True,
    }
    if name not in runs:
        raise ValueError(f"kernels.attention={name}: choose one of auto, {', '.join(runs)}")
    if not runs[name]:
        here = f"{device.type} in {str(dtype).removeprefix('torch.')}"
        raise ValueError(f"kernels.attention={name} needs {_NEEDS[name]}, not {here}; use sdpa, or auto")
    return name


def check_gradients(name: Attention, device: torch.device) -> None:
    """ValueError where a kernel (not ``auto``) has no backward pass on a device."""
    if name == "flex" and device.type == "cpu":
        raise ValueError("kernels.attention=flex has no gradients on a CPU; use sdpa, or auto")


def segment_attention(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float, causal: bool, kernel: Attention = "auto"
) -> Tensor:
    """Attention inside each segment: q, k (T, N, D) and v (T, N, V), with any strides, -> (T, N, V).

    Under autocast the inputs are brought to its dtype first: rotary angles are float32, and promote what they touch.
    """
    dtype = compute_dtype(q)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    return _KERNELS[resolve(kernel, q.device, dtype)](q, k, v, segments, scale, causal)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that attention over ``x`` runs in: autocast's where that is on."""
    kind = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return x.dtype
    return torch.get_autocast_dtype(kind)


# ---- kernels of CUDA ------------------------------------------------------------------------------------------------


def _varlen(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float, causal: bool) -> Tensor:
    width = v.shape[-1]
    q, k, v = _widen((q, k, v), _FLASH_MULTIPLE)
    ends, longest = segments.cu_seqlens, segments.max_length
    return _varlen_function(causal)(q, k, v, ends, ends, longest, longest, scale=scale)[..., :width]


@cache
def _varlen_function(causal: bool) -> Callable[..., Tensor]:
    """`varlen_attn` with its flag for causal attention, which is not the same in all versions of torch."""
    from torch.nn.attention.varlen import varlen_attn

    by_window = "window_size" in inspect.signature(varlen_attn).parameters
    flag: dict[str, Any] = {"window_size": (-1, 0 if causal else -1)} if by_window else {"is_causal": causal}
    return cast("Callable[..., Tensor]", partial(varlen_attn, **flag))  # a pair only where the normaliser is asked for


def _flash(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float, causal: bool) -> Tensor:
    module, width = _flash_module(q.device), v.shape[-1]
    if module != _FLASH_3 or width % _FLASH_MULTIPLE or q.shape[-1] % _FLASH_MULTIPLE:
        q, k, v = _widen((q, k, v), _FLASH_MULTIPLE)
    ends, longest = segments.cu_seqlens, segments.max_length
    function = importlib.import_module(str(module)).flash_attn_varlen_func
    out = function(q, k, v, ends, ends, longest, longest, softmax_scale=scale, causal=causal)
    out = out[0] if isinstance(out, tuple) else out  # early releases of FlashAttention 3 return the normaliser too
    return out[..., :width]


def _flash_module(device: torch.device) -> str | None:
    """The newest installed release of flash-attn that has kernels for the device."""
    if _capability(device)[0] == 9 and find_spec(_FLASH_3):
        return _FLASH_3
    return _FLASH_2 if find_spec(_FLASH_2) else None


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _flex(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float, causal: bool) -> Tensor:
    width = v.shape[-1]
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        check_gradients("flex", q.device)
    if min(q.shape[-1], width) < _FLEX_MULTIPLE:
        q, k, v = _widen((q, k, v), _FLEX_MULTIPLE)
    if not math.isclose(factor := scale * math.sqrt(q.shape[-1]), 1.0):
        # The towers' scales differ. As an argument, the compiler would make a variable of what the kernel wants as a
        # constant; D^-0.5, which both towers have, is one by itself.
        q = q * factor
    rows = [x.transpose(0, 1).unsqueeze(0) for x in (q, k, v)]
    out = _flex_function(q.device.type != "cpu")(*rows, block_mask=segments.block_mask(causal))
    return out[0].transpose(0, 1)[..., :width]


@cache
def _flex_function(compiled: bool, backend: str | Callable[..., Any] = "inductor") -> Callable[..., Tensor]:
    """FlexAttention, compiled for packs of any length: of (1, N, T, D) only T changes from call to call.

    A graph for the first length and one for all others are made for each tower, with and without gradients. Failing
    to is an error (`fullgraph`), and the limit to their number is out of the way: without compilation the scores
    would be T x T.
    """
    from torch.nn.attention.flex_attention import flex_attention

    if not compiled:
        return cast("Callable[..., Tensor]", flex_attention)
    function = cast("Callable[..., Tensor]", torch.compile(flex_attention, fullgraph=True, backend=backend))

    def attend(*rows: Tensor, block_mask: BlockMask) -> Tensor:
        for row in rows:
            torch._dynamo.mark_static(row, [0, 1, 3])
        with torch._dynamo.config.patch(recompile_limit=64):
            return function(*rows, block_mask=block_mask)

    return attend


def _widen(tensors: tuple[Tensor, ...], multiple: int) -> list[Tensor]:
    """All to one width, the least multiple that holds each, with zeros: they change neither scores nor sums."""
    width = -(-max(x.shape[-1] for x in tensors) // multiple) * multiple
    return [x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1])) for x in tensors]


# ---- any device -----------------------------------------------------------------------------------------------------


def _per_run(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float, causal: bool) -> Tensor:
    """Scaled-dot-product attention, run by run."""
    if q.device.type != "cpu":
        return _per_run_by_autograd(q, k, v, segments.runs, scale, causal)
    width = v.shape[-1]
    return _FusedOnCPU.apply(*_widen((q, k, v), 1), segments.runs, scale, causal)[..., :width]


def _per_run_by_autograd(q: Tensor, k: Tensor, v: Tensor, runs: Runs, scale: float, causal: bool) -> Tensor:
    outputs = []
    for qs, ks, vs in _by_run((q, k, v), runs):
        outputs.append(_to_row(F.scaled_dot_product_attention(qs, ks, vs, scale=scale, is_causal=causal)))
    return torch.cat(outputs)


def _by_run(tensors: tuple[Tensor, ...], runs: Runs) -> list[tuple[Tensor, ...]]:
    """(T, N, D) each -> for each run, views (count, N, length, D) of its segments."""
    sizes = [count * length for count, length in runs]
    pieces = zip(*(x.split(sizes) for x in tensors), strict=True)
    return [tuple(x.unflatten(0, run).transpose(1, 2) for x in piece) for run, piece in zip(runs, pieces, strict=True)]


def _to_row(x: Tensor) -> Tensor:
    """(count, N, length, D) -> (count * length, N, D); a view of what the kernels write."""
    return x.transpose(1, 2).flatten(0, 1)


class _FusedOnCPU(torch.autograd.Function):
    """The CPU's fused kernel over all runs as one node of the graph: no splits and sums of gradients run by run."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, runs: Runs, scale: float, causal: bool) -> Tensor:
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        results = [fused(*qkv, 0.0, causal, scale=scale) for qkv in _by_run((q, k, v), runs)]
        out = torch.cat([_to_row(out) for out, _ in results])
        ctx.save_for_backward(q, k, v, out, *(normaliser for _, normaliser in results))
        ctx.runs, ctx.scale, ctx.causal = runs, scale, causal
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        q, k, v, out, *normalisers = ctx.saved_tensors
        pieces = zip(_by_run((grad, q, k, v, out), ctx.runs), normalisers, strict=True)
        grads = [fused(*piece, normaliser, 0.0, ctx.causal, scale=ctx.scale) for piece, normaliser in pieces]
        dq, dk, dv = (torch.cat([_to_row(x) for x in parts]) for parts in zip(*grads, strict=True))
        return dq, dk, dv, None, None, None


_KERNELS = {"varlen": _varlen, "flash": _flash, "flex": _flex, "sdpa": _per_run}
