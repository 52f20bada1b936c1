"""Muon for the matrices and AdamW for the rest, in one optimiser (Moonlight, arXiv 2502.16982, section 2.2).

Muon moves a matrix by its orthogonalised momentum, scaled to the update size of AdamW, so that learning
rate and weight decay are shared:

    M <- momentum M + G;  U = G + momentum M;  O = NewtonSchulz5(U)
    W <- (1 - lr weight_decay) W - lr 0.2 sqrt(max(rows, cols)) O

A model of this family has thousands of small matrices (one per expert and projection). They are never
walked one by one: all of one shape are orthogonalised together by batched products.

Shapes: B matrices of one shape, R rows <= C columns; E experts, H hidden, I expert width.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NS_EPS = 1e-7
# The update RMS of AdamW that Muon's update is scaled to (Moonlight, equation 4).
RMS_MATCH = 0.2
# Numbers in one batched product at most, so that a 16B model's experts are not copied all at once.
MAX_BATCH_NUMEL = 2**28

# Tables and heads: two dimensions or more, but rows that are looked up and not a map between spaces.
TABLES = ("embed_tokens", "lm_head", "pos_emb")
# Parameters that hold several matrices stacked along their rows, by the module or parameter that names them.
SPLITS = {"wqkv": 3, "gate_up_proj": 2}


class Matrices(NamedTuple):
    """A parameter read as matrices: ``tensor.reshape(number, rows, cols)``, each transposed if tall."""

    number: int
    rows: int
    cols: int

    def of(self, tensor: Tensor) -> Tensor:
        """(number, R, C), R <= C, of a tensor shaped like the parameter; a view of a contiguous one."""
        stack = tensor.reshape(self)
        return stack.mT if self.rows > self.cols else stack

    @property
    def wide(self) -> tuple[int, int]:
        """(R, C) after the transposition: what parameters of one batch have in common."""
        return min(self.rows, self.cols), max(self.rows, self.cols)


class MuonAdamW(Optimizer):
    """One optimiser, with one state dict, for all parameters of a Kimi-VL model.

    Routing is by name and shape. Muon takes matrices: the rows of fused ``wqkv`` per q, k and v, stacked
    experts (E, 2I, H) and (E, H, I) per expert and per gate and up, a convolution (D, 3, 14, 14) as
    (D, 588); MLA matrices are not split by head. AdamW takes the embedding, ``lm_head``, the vision
    tower's position table, norms and biases. Parameters without a gradient are skipped.

    Example::

        optimizer = MuonAdamW(model.named_parameters(), lr=2e-5)
        optimizer.param_groups    # [{muon, lr 2e-5}, {adamw, lr 2e-5 * adamw_lr_ratio}], for any LR scheduler
        reset_state(optimizer)    # as if newly made: what RL does at the start of each iteration

    Args:
        named_parameters: ``model.named_parameters()``; the parameters must be contiguous.
        lr: learning rate of both rules; AdamW's is multiplied by ``adamw_lr_ratio``.
        weight_decay: decoupled, on all parameters.
        momentum: Muon's, Nesterov.
        ns_steps: Newton-Schulz iterations.
        adamw_betas, adamw_eps: AdamW's.
        splits: number of equal matrices along the rows of the parameters that have this part in their name.
        ns_dtype: dtype of the Newton-Schulz products (``"float32"``, ``"bfloat16"``); by default bfloat16,
            and float32 on the CPU, where bfloat16 products are many times slower.

    Raises:
        ValueError: for a setting out of its range, or a parameter that is not contiguous, whose rows do not
            divide by its split, or that has three dimensions without being a stack of experts.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        lr: float,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        ns_steps: int = 5,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        adamw_lr_ratio: float = 1.0,
        splits: Mapping[str, int] | None = None,
        ns_dtype: str | None = None,
    ) -> None:
        _check_at_least_zero(lr=lr, weight_decay=weight_decay, adamw_eps=adamw_eps, adamw_lr_ratio=adamw_lr_ratio)
        _check_below_one(momentum=momentum, beta1=adamw_betas[0], beta2=adamw_betas[1])
        named = dict(named_parameters)
        splits = SPLITS if splits is None else splits
        self._matrices = {
            parameter: matrices
            for name, parameter in named.items()
            if (matrices := matrices_of(name, parameter, splits)) is not None
        }
        self._ns_dtype = _float_dtype(ns_dtype)
        muon = {
            "params": [parameter for parameter in named.values() if parameter in self._matrices],
            "lr": lr,
            "momentum": momentum,
            "ns_steps": ns_steps,
        }
        rest = {
            "params": [parameter for parameter in named.values() if parameter not in self._matrices],
            "lr": lr * adamw_lr_ratio,
            "betas": tuple(adamw_betas),
            "eps": adamw_eps,
            "fused": True,  # also tells load_state_dict to keep the step counters beside the parameters
        }
        super().__init__([muon, rest], {"weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; returns what the closure returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        muon, rest = self.param_groups
        self._step_muon(muon)
        self._step_adamw(rest)
        return loss

    def _step_muon(self, group: dict[str, Any]) -> None:
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        if not parameters:
            return
        updates = self._nesterov(parameters, group["momentum"])
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        batches: dict[tuple[Any, ...], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for parameter, update in zip(parameters, updates, strict=True):
            matrices = self._matrices[parameter]
            key = (matrices.wide, parameter.device, parameter.dtype)
            batches[key].append((matrices.of(parameter), matrices.of(update)))
        for ((_, cols), device, _), batch in batches.items():
            dtype = self._ns_dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
            step_size = group["lr"] * RMS_MATCH * math.sqrt(cols)
            for stacks, updates in _chunks(batch):
                _add_orthogonalised(stacks, updates, -step_size, group["ns_steps"], dtype)

    def _nesterov(self, parameters: list[Tensor], momentum: float) -> list[Tensor]:
        """The updates U, after the momenta M have taken in the gradients.

        Written as interpolations, as torch.optim.Muon does: M and U are then ``1 - momentum`` times those
        of the paper, a factor that the normalisation in Newton-Schulz takes out again.
        """
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        buffers = [self._momentum_buffer(parameter) for parameter in parameters]
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        return list(torch._foreach_lerp(gradients, buffers, momentum))

    def _momentum_buffer(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return state["momentum_buffer"]

    def _step_adamw(self, group: dict[str, Any]) -> None:
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        if not parameters:
            return
        states = [self._adamw_state(parameter) for parameter in parameters]
        adamw(
            parameters,
            [parameter.grad for parameter in parameters if parameter.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=group["fused"],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _adamw_state(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        return state


def matrices_of(name: str, parameter: Tensor, splits: Mapping[str, int]) -> Matrices | None:
    """How Muon reads a parameter, or None where it belongs to AdamW.

    Example, with the default splits::

        vision_tower.encoder.blocks.0.wqkv.weight (3456, 1152)      -> Matrices(3, 1152, 1152)
        vision_tower.patch_embed.proj.weight (1152, 3, 14, 14)      -> Matrices(1, 1152, 588)
        ...mlp.experts.gate_up_proj (64, 2816, 2048)                -> Matrices(128, 1408, 2048)
        ...mlp.experts.down_proj (64, 2048, 1408)                   -> Matrices(64, 2048, 1408)
        ...embed_tokens.weight, lm_head.weight, pos_emb.weight, any norm or bias -> None
    """
    parts = name.split(".")
    if parameter.ndim < 2 or any(table in parts for table in TABLES):
        return None
    if not parameter.is_contiguous():
        raise ValueError(f"{name} is not contiguous: call .contiguous() on it before making the optimizer")
    split = next((count for part, count in splits.items() if part in parts), 1)
    if parameter.ndim == 3:
        if "experts" not in parts:
            raise ValueError(f"{name} {tuple(parameter.shape)}: only stacked experts may have three dimensions")
        stacked, rows, cols = parameter.shape
    else:
        stacked, rows, cols = 1, parameter.shape[0], parameter[0].numel()
    if rows % split:
        raise ValueError(f"{name} {tuple(parameter.shape)}: {rows} rows do not divide into {split} matrices")
    return Matrices(stacked * split, rows // split, cols)


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz: replace the singular values of each matrix by values near 1. Overwrites its argument.

    The quintic of Keller Jordan's Muon, whose coefficients trade exactness (values end in about [0.7, 1.2])
    for the steepest rise from 0.

    Args:
        matrices: (B, R, C), R <= C, in the dtype to compute in.
        steps: iterations.

    Returns:
        (B, R, C) in the same dtype.
    """
    a, b, c = NS_COEFFICIENTS
    norms = torch.linalg.vector_norm(matrices, dim=(1, 2), keepdim=True)
    x = matrices.div_(norms.clamp_(min=NS_EPS))
    spare = torch.empty_like(x)
    gram = x.new_empty(len(x), x.shape[1], x.shape[1])
    polynomial = torch.empty_like(gram)
    for _ in range(steps):
        torch.bmm(x, x.mT, out=gram)
        torch.baddbmm(gram, gram, gram, beta=b, alpha=c, out=polynomial)
        torch.baddbmm(x, polynomial, x, beta=a, out=spare)
        x, spare = spare, x
    return x


def reset_state(optimizer: Optimizer) -> None:
    """Zero all state tensors in place: moments, momenta and step counts, as in a new optimiser."""
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                value.zero_()


def _chunks(batch: list[tuple[Tensor, Tensor]]) -> Iterable[tuple[list[Tensor], list[Tensor]]]:
    """Cut a batch between parameters, at most MAX_BATCH_NUMEL numbers a piece (one parameter at least)."""
    stacks: list[Tensor] = []
    updates: list[Tensor] = []
    numel = 0
    for stack, update in batch:
        if stacks and numel + stack.numel() > MAX_BATCH_NUMEL:
            yield stacks, updates
            stacks, updates, numel = [], [], 0
        stacks.append(stack)
        updates.append(update)
        numel += stack.numel()
    yield stacks, updates


def _add_orthogonalised(
    stacks: list[Tensor], updates: list[Tensor], alpha: float, ns_steps: int, dtype: torch.dtype
) -> None:
    """``stack += alpha * orthogonalise(update)`` for stacks (b, R, C) of equal R and C, as one batch."""
    moves = orthogonalise(torch.cat(updates).to(dtype), ns_steps).to(stacks[0].dtype)
    torch._foreach_add_(stacks, list(moves.split([len(stack) for stack in stacks])), alpha=alpha)


def _float_dtype(name: str | None) -> torch.dtype | None:
    if name is None:
        return None
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"optimizer.ns_dtype={name}: name a floating-point dtype such as bfloat16 or float32")
    return dtype


def _check_at_least_zero(**settings: float) -> None:
    for key, value in settings.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"optimizer.{key}={value}: give a number of at least 0")


def _check_below_one(**settings: float) -> None:
    for key, value in settings.items():
        if not 0 <= value < 1:
            raise ValueError(f"optimizer.{key}={value}: give a number from 0 to below 1")
