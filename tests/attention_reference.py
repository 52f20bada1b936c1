"""Attention on packs for tests: plain references, and stand-ins on a CPU for the kernels of a GPU."""

from __future__ import annotations

import math
import types
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec

import torch
from torch import Tensor


def visible(lengths: list[int], causal: bool, device: str | torch.device = "cpu") -> Tensor:
    """(T, T) mask of a pack, written down plainly."""
    number = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    mask = number[:, None] == number[None]
    return (mask.tril() if causal else mask).to(device)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float, causal: bool) -> Tensor:
    """softmax(q k^T) v with a T x T mask, in float64: (T, N, D), (T, N, D), (T, N, V) -> (T, N, V)."""
    scores = torch.einsum("qnd,knd->nqk", q.double(), k.double()) * scale
    scores = scores.masked_fill(~visible(lengths, causal, q.device), -math.inf)
    return torch.einsum("nqk,knd->qnd", scores.softmax(-1), v.double()).to(v.dtype)


def _flash_reference(q, k, v, ends, scale, causal):
    """What a flash kernel computes, after the checks that a real one makes of its inputs."""
    assert all(x.stride(-1) == 1 for x in (q, k, v)), "the last dimension must be contiguous"
    assert q.shape[-1] == k.shape[-1] and q.shape[-1] % 8 == 0 and v.shape[-1] % 8 == 0
    assert ends.dtype == torch.int32 and ends.is_contiguous()
    return dense_attention(q, k, v, ends.diff().tolist(), q.shape[-1] ** -0.5 if scale is None else scale, causal)


@contextmanager
def flash_ops_on_cpu() -> Iterator[list[str]]:
    """Give aten's flash operators, which torch has on CUDA only, a CPU kernel; yields the list of calls."""
    calls: list[str] = []

    def forward(q, k, v, cum_q, cum_k, max_q, max_k, dropout, causal, return_mask, *, scale=None, **options):
        calls.append("forward")
        assert q.shape == k.shape == v.shape and cum_q is cum_k and max_q == max_k == int(cum_q.diff().max())
        assert not dropout and not return_mask
        assert (options["window_size_left"], options["window_size_right"]) == (-1, 0 if causal else -1)
        out = _flash_reference(q, k, v, cum_q, scale, causal)
        lse = torch.zeros(q.shape[1], q.shape[0])
        return out, lse, torch.zeros(2, dtype=torch.uint64), torch.empty(0), torch.empty(0)

    def backward(
        grad, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, dropout, causal, rng, unused, *, scale, **options
    ):
        calls.append("backward")
        assert grad.shape == out.shape == q.shape and grad.stride(-1) == 1
        # written out: below the dispatcher, autograd records nothing
        scores = torch.einsum("qnd,knd->nqk", q.double(), k.double()) * scale
        lengths = cum_q.diff().tolist()
        p = scores.masked_fill(~visible(lengths, causal), -math.inf).softmax(-1)
        dp = torch.einsum("qnd,knd->nqk", grad.double(), v.double())
        ds = p * (dp - (dp * p).sum(-1, keepdim=True)) * scale
        dq, dk = torch.einsum("nqk,knd->qnd", ds, k.double()), torch.einsum("nqk,qnd->knd", ds, q.double())
        dv = torch.einsum("nqk,qnd->knd", p, grad.double())
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)

    library = torch.library.Library("aten", "IMPL", "CPU")
    try:
        library.impl("_flash_attention_forward", forward)
        library.impl("_flash_attention_backward", backward)
        yield calls
    finally:
        library._destroy()


def flash_package(version: int, returns_normaliser: bool = False) -> types.ModuleType:
    """A stand-in for flash-attn 2 or 3 with the signature of its function; `calls` keeps the q, k, v it was given."""

    def flash_2(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False
    ):
        assert q.shape == k.shape == v.shape, "FlashAttention 2 knows one width"
        assert max_seqlen_q == max_seqlen_k == int(cu_seqlens_q.diff().max())
        module.calls.append((q, k, v))
        return _flash_reference(q, k, v, cu_seqlens_q, softmax_scale, causal)

    def flash_3(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        seqused_q=None, seqused_k=None, softmax_scale=None, causal=False,
    ):  # fmt: skip
        module.calls.append((q, k, v))
        out = _flash_reference(q, k, v, cu_seqlens_q, softmax_scale, causal)
        return (out, out.new_zeros(q.shape[1], q.shape[0])) if returns_normaliser else out

    name = {2: "flash_attn", 3: "flash_attn_interface"}[version]
    module = types.ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    module.calls = []
    module.flash_attn_varlen_func = {2: flash_2, 3: flash_3}[version]
    return module
