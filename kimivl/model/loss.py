"""Log-probabilities of the targets of a pack, from the last hidden states, without the (K, V) logits.

At Kimi-VL's vocabulary of 163,840 words the logits of 32K positions take 21 GB in float32, and as much again for their
gradient. Here the vocabulary is cut into blocks of columns: a block of logits is made, used, and overwritten by the
next. The forward pass keeps a running maximum and sum of exponentials for each position (the online softmax of Milakov
and Gimelshein, arXiv 1805.02867); the backward pass makes each block again from the hidden states, as

    log p_k = x_kt - lse_k,   x = H W^T / temperature,   t the target of position k
    dL/dx   = g_k (onehot(t) - softmax(x)_k),            g = dL/dlog p

so one product more than with stored logits (four in the place of three), and only the log-sum-exp (K,) is kept.
Columns rather than rows, because then each block of the head's gradient is one product over all positions: it needs no
second (V, D) buffer and no sum of rounded parts. The hidden states' gradient is summed over the blocks in float32; it
is the smaller one as long as K < V. Factors that belong to positions (g, 1 / temperature) are applied to hidden states
and gradients, (K, D), not to blocks.

Products are made in the dtype of hidden states and head (under CUDA autocast, in its dtype) and their results are kept
in float32: log-probabilities of a bf16 model are not rounded to bf16. Where a device has no such product, and on the
CPU, whose bf16 products are slower than float32 ones, a block of the head is widened first.

Legend: K supervised positions, D width, V vocabulary, C columns (words) of a block.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from types import MethodType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# A block that stays in the cache between the passes over it; measured best of 1 to 64 MiB.
CPU_BLOCK_BYTES = 4 * 2**20
# Elsewhere a block is a sixteenth of the logits, between these: enough columns to fill a GPU with one product
# (4,096 at 32K positions, 1,024 at 128K), little beside the gradients of the model it is used in.
SMALLEST_BLOCK_BYTES, LARGEST_BLOCK_BYTES = 16 * 2**20, 512 * 2**20
# Narrower products waste the hardware, and 128 columns are no more than the hidden states of a small model.
NARROWEST_BLOCK = 128

# The first liger-kernel whose gradient is right where that of log p differs from token to token.
LIGER = (0, 8, 2)


def resolve(name: str, device: torch.device, dtype: torch.dtype) -> Literal["chunked", "liger"]:
    """The loss kernel that ``name`` stands for on a device.

    ``auto`` is ``chunked`` everywhere. liger rounds the logits of a bf16 model to bf16 (an error of 0.01 to 0.1 in a
    log-probability), so it is for those who name it. cut-cross-entropy is not offered: its release (25.1.1) multiplies
    the target's logit in bf16, sums both gradients in bf16 in an order that changes, and refuses float32.

    Raises:
        ValueError: when the named kernel is not installed or does not run there.
    """
    if name != "liger":
        return "chunked"
    wanted = ".".join(map(str, LIGER))
    if device.type != "cuda":
        raise ValueError(f"kernels.loss=liger runs on CUDA devices, not on {device.type}: use kernels.loss=chunked")
    if dtype == torch.float64:
        raise ValueError("kernels.loss=liger has no float64: use kernels.loss=chunked")
    installed = _liger_version()
    if installed is None or _release(installed) < LIGER:
        found = "it is not installed" if installed is None else f"{installed}, installed, has wrong gradients"
        raise ValueError(
            f"kernels.loss=liger needs liger-kernel {wanted} or newer ({found}): "
            f"pip install 'liger-kernel>={wanted}', or use kernels.loss=chunked"
        )
    return "liger"


@cache
def _liger_version() -> str | None:
    try:
        return version("liger-kernel")
    except PackageNotFoundError:
        return None


def _release(number: str) -> tuple[int, ...]:
    """0.8.2rc1 -> (0, 8, 2)."""
    digits = (re.match(r"\d+", part) for part in number.split(".")[:3])
    return tuple(int(found[0]) for found in digits if found)


def linear_log_probs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0, kernel: str = "auto"
) -> Tensor:
    """(K, D) hidden states, (V, D) head, (K,) targets -> (K,) float32 log-probabilities at ``temperature``.

    The gradient may differ from position to position, as in reinforcement learning. Leave ignored positions out.

    Raises:
        ValueError: for shapes that do not fit, a temperature that is not above 0, a kernel that does not run here, and
            on the CPU for targets outside the vocabulary. On an accelerator those fail an assertion of the device,
            as in torch's own loss, because to look at them here would mean to wait for the device.
    """
    _refuse(hidden, weight, targets, temperature)
    if resolve(kernel, hidden.device, weight.dtype) == "liger" and len(hidden):
        return _liger_log_probs(hidden, weight, targets, temperature)
    return chunked_log_probs(hidden, weight, targets, temperature)


def linear_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """(..., D) hidden states, (V, D) head -> (..., V) float32 logits: the products of `linear_log_probs`, unrounded.

    What is drawn from them has the probabilities that training will find. Float64 stays float64.
    """
    dtype = _product_dtype(hidden, weight)
    wide = torch.promote_types(dtype, torch.float32)
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        dtype = wide  # that product has no derivative in every torch
    with _no_autocast(hidden.device.type):
        if dtype == wide:
            return F.linear(hidden.to(wide), weight.to(wide))
        logits = _product(hidden.flatten(0, -2).to(dtype), weight.to(dtype).t(), wide)
    return logits.unflatten(0, hidden.shape[:-1])


def make_logits_in_float32(head: nn.Linear) -> None:
    """Let the vocabulary projection ``head`` return `linear_logits`."""
    head.forward = MethodType(_logits_of_head, head)  # type: ignore[method-assign]


def _logits_of_head(head: nn.Linear, hidden: Tensor) -> Tensor:
    return linear_logits(hidden, head.weight)


def _liger_log_probs(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """`linear_log_probs` through liger-kernel. Blocks of rows, gradient of the head summed in float32 (V, D)."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    if temperature != 1:
        hidden = hidden / temperature  # it has no other place for it
    if not torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(weight.dtype)
    loss = liger_fused_linear_cross_entropy(hidden, weight, targets, reduction="none", accum_dtype=torch.float32)
    return -loss


def chunked_log_probs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0, columns: int | None = None
) -> Tensor:
    """`linear_log_probs` in blocks of ``columns`` words; None: as many as serve the device. Float64 stays float64."""
    dtype = _product_dtype(hidden, weight)
    columns = columns or block_columns(len(hidden), len(weight), hidden.device.type)
    return _ChunkedLogProbs.apply(hidden, weight, targets, temperature, dtype, columns)


def block_columns(positions: int, words: int, device_type: str) -> int:
    """Columns of a block of logits for K ``positions`` and V ``words``."""
    column = 4 * max(positions, 1)
    limit = CPU_BLOCK_BYTES
    if device_type != "cpu":
        limit = min(max(column * words // 16, SMALLEST_BLOCK_BYTES), LARGEST_BLOCK_BYTES)
    columns = limit // column // NARROWEST_BLOCK * NARROWEST_BLOCK
    return min(max(columns, NARROWEST_BLOCK), words)


def _refuse(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"the loss takes hidden (K, D), weight (V, D) and targets (K,), got {tuple(hidden.shape)}, "
            f"{tuple(weight.shape)} and {tuple(targets.shape)}: select the supervised positions of one pack first"
        )
    if not temperature > 0:
        raise ValueError(f"temperature {temperature}: log-probabilities need one above 0")
    outside = (targets < 0) | (targets >= len(weight))
    if targets.device.type != "cpu":
        torch._assert_async(~outside.any(), "a target of the loss is outside the vocabulary")
    elif bool(outside.any()):
        place = int(outside.nonzero()[0])
        raise ValueError(
            f"targets[{place}] = {int(targets[place])} is outside the {len(weight)} words of the vocabulary: "
            "leave ignored positions out, and use the tokenizer that the model was built with"
        )


def _product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype in which blocks are multiplied."""
    wide = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
    if hidden.device.type != "cuda" or wide == torch.float64:
        return wide
    if torch.is_autocast_enabled("cuda"):
        return torch.get_autocast_dtype("cuda")
    return hidden.dtype if hidden.dtype == weight.dtype else wide


def _product(a: Tensor, b: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """``a @ b`` in ``dtype``, which may be float32 where ``a`` and ``b`` are narrower (on CUDA only)."""
    return torch.mm(a, b, out=out) if a.dtype == dtype else torch.mm(a, b, dtype, out=out)


def _no_autocast(device_type: str) -> AbstractContextManager:
    """Products keep the dtypes that they are given here, inside an autocast region too."""
    available = torch.amp.is_autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if available else nullcontext()


class _Blocks:
    """The logits of all positions, a block of columns at a time, in one buffer."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, dtype: torch.dtype, columns: int
    ) -> None:
        self.hidden, self.weight, self.targets = hidden.to(dtype), weight, targets
        self.temperature, self.columns = temperature, min(columns, len(weight))
        self.wide = torch.promote_types(dtype, torch.float32)

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(columns, (C, D) rows of the head, (K, C) logits); the next block overwrites the logits."""
        positions, words = len(self.hidden), len(self.weight)
        buffer = self.hidden.new_empty(positions * self.columns, dtype=self.wide)
        for start in range(0, words, self.columns):
            part = slice(start, min(start + self.columns, words))
            head = self.weight[part].to(self.hidden.dtype)
            logits = buffer[: positions * len(head)].view(positions, len(head))
            _product(self.hidden, head.t(), self.wide, out=logits)
            yield part, head, logits if self.temperature == 1 else logits.div_(self.temperature)

    def place(self, part: slice) -> tuple[Tensor, Tensor]:
        """(K,) whether a target is in this block; (K, 1) its column, or some column where it is not."""
        inside = (self.targets >= part.start) & (self.targets < part.stop)
        return inside, (self.targets - part.start).clamp(0, part.stop - part.start - 1)[:, None]


class _ChunkedLogProbs(torch.autograd.Function):
    """The method of the module's docstring; saves references to its inputs and the log-sum-exp (K,)."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, dtype: torch.dtype, columns: int
    ) -> Tensor:
        blocks = _Blocks(hidden, weight, targets, temperature, dtype, columns)
        highest = hidden.new_full((len(hidden),), float("-inf"), dtype=blocks.wide)
        total, chosen = torch.zeros_like(highest), torch.zeros_like(highest)
        with _no_autocast(hidden.device.type):
            for part, _, logits in blocks:
                inside, column = blocks.place(part)
                chosen = torch.where(inside, logits.gather(1, column)[:, 0], chosen)
                higher = torch.maximum(highest, logits.amax(1))
                total.mul_((highest - higher).exp_()).add_(logits.sub_(higher[:, None]).exp_().sum(1))
                highest = higher
        total.log_()
        ctx.save_for_backward(hidden, weight, targets, highest + total)
        ctx.settings = (temperature, dtype, columns)
        return chosen.sub_(highest).sub_(total)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, lse = ctx.saved_tensors
        blocks = _Blocks(hidden, weight, targets, *ctx.settings)
        scale = (grad.to(blocks.wide) / -blocks.temperature)[:, None]
        with _no_autocast(hidden.device.type):
            d_hidden, d_weight = _gradients(blocks, lse, scale, *ctx.needs_input_grad[:2])
        return None if d_hidden is None else d_hidden.to(hidden.dtype), d_weight, None, None, None, None


def _gradients(
    blocks: _Blocks, lse: Tensor, scale: Tensor, for_hidden: bool, for_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(K, D) and (V, D): the gradients, where dL/dx = ``scale`` (K, 1) times (softmax - onehot)."""
    scaled = (blocks.hidden * scale).to(blocks.hidden.dtype) if for_weight else blocks.hidden
    d_hidden = torch.zeros_like(blocks.hidden, dtype=blocks.wide) if for_hidden else None
    d_weight = torch.empty_like(blocks.weight) if for_weight else None
    for part, head, logits in blocks:
        excess = _excess(logits.sub_(lse[:, None]), *blocks.place(part), scaled.dtype)
        if d_hidden is not None:
            if excess.dtype == blocks.wide:
                d_hidden.addmm_(excess, head)
            else:
                d_hidden.add_(_product(excess, head, blocks.wide))
        if d_weight is not None:
            rows = d_weight[part]
            if excess.dtype == rows.dtype == blocks.wide:
                torch.mm(excess.t(), scaled, out=rows)
            else:
                rows.copy_(_product(excess.t(), scaled, blocks.wide))
    return None if d_hidden is None else d_hidden.mul_(scale), d_weight


def _excess(log_probs: Tensor, inside: Tensor, column: Tensor, dtype: torch.dtype) -> Tensor:
    """(K, C) log-probabilities -> softmax - onehot in ``dtype``, in the same memory where that is possible."""
    at_target = log_probs.gather(1, column)
    # p - 1 before it is rounded: in bf16 a probability above 0.998 is 1, and its gradient would vanish
    at_target = torch.where(inside[:, None], at_target.expm1(), at_target.exp())
    into = log_probs if log_probs.dtype == dtype else torch.empty_like(log_probs, dtype=dtype)
    probs = torch.exp(log_probs, out=into)
    return probs.scatter_(1, column, at_target.to(dtype))
