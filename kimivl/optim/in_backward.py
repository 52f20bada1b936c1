"""The optimiser step inside the backward pass: gradients never exist all at once.

16.4B parameters in bf16 have 32.8 GB of gradients. Here each is used as soon as autograd has it, and freed.
"""

import math
import weakref
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from kimivl.optim.clipping import clip_factor, gradient_norms, total_norm
from kimivl.optim.muon import MuonAdamW


class MuonAdamWInBackward(MuonAdamW):
    """``MuonAdamW`` that moves each parameter during ``step(closure)``, in the backward pass of the closure.

    A gradient must be whole when autograd has it: one backward pass a step, no accumulation over batches, and no
    clipping from outside. Backward passes outside ``step`` leave their gradients, as ever.

    Clipping:

    - ``two_pass``: the closure runs twice. The first backward pass takes the norm of each gradient and frees it, the
      second steps with the factor of their global norm. Exactly ``clip_grad_norm_`` and then ``MuonAdamW``, for twice
      the time; what the closure logs, it logs twice, with the same values: nothing has moved in between.
    - ``per_tensor``: each gradient is clipped by its own norm. One pass, but another direction: large
      gradients lose, small ones do not.
    - ``None``: no clipping.

    A step that breaks off in the backward pass (out of memory, Ctrl-C) leaves some parameters moved and some not: go
    on from a checkpoint then.

    Example::

        optimizer = MuonAdamWInBackward(model.named_parameters(), lr=2e-5, clip="two_pass", clip_norm=1.0)

        def closure():
            loss = forward(model, batch)
            loss.backward()
            return loss

        loss = optimizer.step(closure)    # that of the last pass; optimizer.grad_norm: before clipping

    Args:
        named_parameters, lr, others: see ``MuonAdamW``.
        clip: how gradients are clipped.
        clip_norm: to which norm.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        lr: float,
        clip: Literal["two_pass", "per_tensor"] | None = "two_pass",
        clip_norm: float = 1.0,
        **others: Any,
    ) -> None:
        if clip not in ("two_pass", "per_tensor", None):
            raise ValueError(f"optimizer.clip={clip}: choose two_pass, per_tensor or null")
        if not 0 < clip_norm < math.inf:
            raise ValueError(f"optimizer.clip_norm={clip_norm}: give a positive number, or optimizer.clip=null")
        super().__init__(named_parameters, lr, **others)
        self.clip, self.clip_norm = clip, clip_norm
        self.grad_norm: Tensor | None = None
        self.may_step: Callable[[Tensor], bool] = lambda norm: True
        """Asked between the passes of ``two_pass``: whether a step of this norm is made."""
        self._norms: list[Tensor] = []
        self._factor: Tensor | None = None
        self._use: Callable[[Tensor], None] | None = None
        # Parameters must not keep an optimiser alive, and its states with it, that nobody has any more.
        myself = weakref.ref(self)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.register_post_accumulate_grad_hook(lambda owner: _hand_over(myself(), owner))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; returns what the closure returned the last time.

        Raises:
            ValueError: without a closure.
        """
        if closure is None:
            raise ValueError("MuonAdamWInBackward.step needs a closure that runs the forward and backward pass")
        self._begin_step()
        if self.clip == "two_pass":
            result = self._run(closure, self._measure)
            if self.grad_norm is not None and not self.may_step(self.grad_norm):
                return result
            self._factor = clip_factor(total_norm(self._norms), self.clip_norm)
        return self._run(closure, self._move_now)

    def _run(self, closure: Callable[[], Any], use: Callable[[Tensor], None]) -> Any:
        """The closure, with each gradient used and freed when it is there."""
        self._norms, self._use = [], use
        try:
            with torch.enable_grad():
                result = closure()
        finally:
            self._use = None
        self.grad_norm = total_norm(self._norms)
        return result

    @torch.no_grad()
    def take(self, parameter: Tensor) -> None:
        """Called by autograd when the gradient of a parameter is whole."""
        if self._use is not None and parameter.grad is not None:
            self._norms += gradient_norms([parameter.grad])
            self._use(parameter)
            parameter.grad = None

    def _measure(self, parameter: Tensor) -> None:
        """The norm is all that the first pass is for."""

    def _move_now(self, parameter: Tensor) -> None:
        factor = self._factor
        if self.clip == "per_tensor":
            factor = clip_factor(self._norms[-1], self.clip_norm)
        if factor is not None and parameter.grad is not None:
            parameter.grad.mul_(factor.to(parameter.device))
        if parameter in self._matrices:
            self._step_muon([parameter])
        else:
            self._step_adamw([parameter])


def _hand_over(optimizer: MuonAdamWInBackward | None, parameter: Tensor) -> None:
    if optimizer is not None:
        optimizer.take(parameter)
