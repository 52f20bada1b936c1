"""Muon for the matrices and AdamW for the rest, in one optimiser (Moonlight, arXiv 2502.16982, section 2.2).

Muon moves a matrix by its orthogonalised momentum, scaled to the update size of AdamW, so that learning
rate and weight decay are shared:

    M <- momentum M + G;  U = G + momentum M;  O = NewtonSchulz5(U)
    W <- (1 - lr weight_decay) W - lr 0.2 sqrt(max(rows, cols)) O

A model of this family has thousands of small matrices (one per expert and projection). They are never
walked one by one: all of one shape are orthogonalised together, in batches that bound the workspace.

Shapes: B matrices of one shape, R rows <= C columns.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.adamw import adamw

from kimivl.optim.costs import Copies, adamw_bytes, muon_bytes
from kimivl.optim.dealing import deal, orthogonalise_cut, orthogonalise_replicas, rounds
from kimivl.optim.matrices import SPLITS, Matrices, Piece, cut, local, matrices_of, shards_of
from kimivl.optim.newton_schulz import newton_schulz_flops, orthogonalise
from kimivl.optim.rounding import ROUNDINGS, Wide
from kimivl.optim.states import WideOptimizer, float_dtype

# The update RMS of AdamW that Muon's update is scaled to (Moonlight, equation 4).
RMS_MATCH = 0.2
# Numbers in one batch at most: at 16B parameters the workspace is then about 1 GB, and not a copy of the model.
MAX_BATCH_NUMEL = 2**26
# On the CPU what the iterations of a batch pass over stays in a core's cache: a tenth faster than from memory.
CPU_BATCH_NUMEL = 2**18
# Numbers that stay together when AdamW's parameters are cut, so that pieces begin at aligned addresses.
BLOCK = 1024


class MuonAdamW(WideOptimizer):
    """One optimiser, with one state dict, for all parameters of a Kimi-VL model.

    Routing is by name and shape. Muon takes matrices: the rows of fused ``wqkv`` per q, k and v, stacked
    experts (E, 2I, H) and (E, H, I) per expert and per gate and up, a convolution (D, 3, 14, 14) as
    (D, 588); MLA matrices are not split by head. AdamW takes the embedding, ``lm_head``, the vision
    tower's position table, norms, biases and LoRA factors. Parameters without a gradient are skipped.

    All arithmetic but the Newton-Schulz products is in float32, whatever the dtype of parameters and states.

    Parameters that FSDP2 has cut up over ranks are moved where they lie; matrices that no rank has whole are dealt out
    (``kimivl.optim.dealing``). Where every rank holds all parameters, ``deal_over`` shares that work out too.

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
        rounding: how results are kept in bf16 parameters (``kimivl.optim.rounding``); ``stochastic`` rounds bf16
            moments so, too. The random bits are a function of the number of steps, which is in the state dict.
        state_dtype: of momenta and moments (``"float32"``, ``"bfloat16"``); by default that of the parameter.

    Raises:
        ValueError: for a setting out of its range, or a parameter that ``matrices_of`` refuses.
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
        ns_dtype: Literal["float32", "bfloat16"] | None = None,
        rounding: Literal["stochastic", "nearest", "master"] = "stochastic",
        state_dtype: Literal["float32", "bfloat16"] | None = None,
    ) -> None:
        _check(math.inf, lr=lr, weight_decay=weight_decay, adamw_eps=adamw_eps, adamw_lr_ratio=adamw_lr_ratio)
        _check(1, momentum=momentum, beta1=adamw_betas[0], beta2=adamw_betas[1])
        if rounding not in ROUNDINGS:
            raise ValueError(f"optimizer.rounding={rounding}: choose one of {', '.join(ROUNDINGS)}")
        named = dict(named_parameters)
        splits = SPLITS if splits is None else splits
        self._matrices: dict[Tensor, Matrices] = {}
        self._cut: set[Tensor] = set()  # matrices whose rows lie on several ranks
        self._replicas: Any = None  # the ranks that hold the same parameters, and share the work
        for name, parameter in named.items():
            self._take_in(parameter, matrices_of(name, parameter, splits), shards_of(name, parameter))
        self._ns_dtype = float_dtype("ns_dtype", ns_dtype)
        self._state_dtype = float_dtype("state_dtype", state_dtype)
        self._rounding = rounding
        self._generators = {}
        muon = {
            "params": [parameter for parameter in named.values() if parameter in self._matrices],
            "lr": lr,
            "momentum": momentum,
            "ns_steps": ns_steps,
            "steps": 0,  # of the whole optimiser, for the random bits; never reset, unlike the states
        }
        rest = {
            "params": [parameter for parameter in named.values() if parameter not in self._matrices],
            "lr": lr * adamw_lr_ratio,
            "betas": tuple(adamw_betas),
            "eps": adamw_eps,
            "fused": True,
        }
        super().__init__([muon, rest], {"weight_decay": weight_decay})

    def _take_in(self, parameter: Tensor, matrices: Matrices | None, shards: Any) -> None:
        self._shards = self._shards or shards
        if matrices is None:
            return
        if shards is not None and parameter.ndim == 3:  # stacked experts: each of them is whole on a rank
            matrices = matrices._replace(number=matrices.number // len(parameter) * len(local(parameter)))
        elif shards is not None:
            self._cut.add(parameter)
        self._matrices[parameter] = matrices

    def deal_over(self, group: Any) -> None:
        """Share the Newton-Schulz work among the ranks of ``group``, which hold the same parameters and gradients.

        They must step together then. The result is that of each working alone.
        """
        self._replicas = group

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; returns what the closure returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._begin_step()
        muon, rest = self.param_groups
        self._step_muon(_with_gradient(muon["params"]))
        self._step_adamw(_with_gradient(rest["params"]))
        return loss

    # ---- Muon -------------------------------------------------------------------------------------------------

    def _step_muon(self, parameters: Sequence[Tensor]) -> None:
        self._make_states(parameters, "momentum_buffer")
        batches = self._muon_batches([parameter for parameter in parameters if parameter not in self._cut])
        if self._replicas is None:
            for batch in batches:
                self._move_stack(batch, orthogonalise(self._stacked(batch), self.param_groups[0]["ns_steps"]))
        else:
            self._step_replicas(list(batches))
        for members in _alike(parameter for parameter in parameters if parameter in self._cut):
            self._step_cut(members)

    def _muon_batches(self, parameters: Sequence[Tensor]) -> Iterator[list[Piece]]:
        """Matrices of one shape and dtype, at most MAX_BATCH_NUMEL numbers (and at least one matrix) at a time."""
        alike: dict[tuple[Any, ...], list[Tensor]] = defaultdict(list)
        for parameter in parameters:
            alike[self._matrices[parameter].wide, parameter.device, parameter.dtype].append(parameter)
        ranks = 1 if self._replicas is None else dist.get_world_size(self._replicas)
        for (wide, _, _), members in alike.items():
            limit = max(1, min(_batch_numel(members[0]), MAX_BATCH_NUMEL // ranks) // math.prod(wide))
            for batch in cut([self._matrices[parameter].number for parameter in members], limit):
                yield [Piece(members[i], self._matrices[members[i]], part) for i, part in batch]

    def _step_replicas(self, batches: list[list[Piece]]) -> None:
        """All ranks make all updates, do their share of the products, and move all parameters."""
        sizes = [sum(piece.of(piece.parameter).numel() for piece in batch) for batch in batches]
        for taken in rounds([0] * len(batches), sizes, MAX_BATCH_NUMEL):
            stacks = [self._stacked(batches[number]) for number in taken]
            moves = orthogonalise_replicas(stacks, self.param_groups[0]["ns_steps"], self._replicas)
            for number, move in zip(taken, moves, strict=True):
                self._move_stack(batches[number], move)

    def _step_cut(self, parameters: list[Tensor]) -> None:
        """Each rank updates its rows; a matrix goes to one rank for the products, and its rows come back."""
        ranks, steps = dist.get_world_size(self._shards), self.param_groups[0]["ns_steps"]
        matrices = [self._matrices[parameter] for parameter in parameters]
        owners = deal([newton_schulz_flops(*each, steps=steps) for each in matrices], ranks)
        for taken in rounds(owners, [math.prod(each) for each in matrices], MAX_BATCH_NUMEL):
            pieces = [Piece(parameters[n], (-1, matrices[n].cols), slice(None)) for n in taken]
            moves = orthogonalise_cut(
                self._updates(pieces),
                [matrices[number] for number in taken],
                [owners[number] for number in taken],
                steps,
                _batch_numel(parameters[0]),
                self._shards,
            )
            for long in sorted({matrices[number].wide[1] for number in taken}):
                alike = [place for place, number in enumerate(taken) if matrices[number].wide[1] == long]
                self._move([pieces[i] for i in alike], [moves[i] for i in alike], long, laid_wide=False)

    def _stacked(self, pieces: list[Piece]) -> Tensor:
        """(B, R, C) updates of the matrices of one batch."""
        return torch.cat(self._laid_wide(pieces, self._updates(pieces)))

    def _updates(self, pieces: list[Piece]) -> list[Tensor]:
        """The updates U of pieces, in ``ns_dtype``, after the momenta M have taken in the gradients.

        Written as interpolations, as torch.optim.Muon does: M and U are then ``1 - momentum`` times those
        of the paper, a factor that the normalisation in Newton-Schulz takes out again.
        """
        momentum, device = self.param_groups[0]["momentum"], pieces[0].parameter.device
        gradients = self._gradients(pieces)
        momenta = Wide([piece.of(self._state(piece.parameter, "momentum_buffer")) for piece in pieces])
        torch._foreach_lerp_(momenta.values, gradients, 1 - momentum)
        updates = torch._foreach_lerp(gradients, momenta.values, momentum)
        momenta.store(self._noise(device))
        del gradients, momenta  # frees float32 copies
        return [update.to(self._products_dtype(device)) for update in updates]

    def _move(self, pieces: list[Piece], moves: Sequence[Tensor], long: int, laid_wide: bool = True) -> None:
        """Move pieces by their orthogonalised updates, of matrices with a longer side of ``long``."""
        group = self.param_groups[0]
        weights = self._weights(pieces)
        torch._foreach_mul_(weights.values, 1 - group["lr"] * group["weight_decay"])
        values = self._laid_wide(pieces, weights.values) if laid_wide else weights.values
        step_size = group["lr"] * RMS_MATCH * math.sqrt(long)
        torch._foreach_add_(values, [move.float() for move in moves], alpha=-step_size)
        weights.store(self._noise(pieces[0].parameter.device))

    def _move_stack(self, pieces: list[Piece], moves: Tensor) -> None:
        counts = [len(piece.of(piece.parameter)) for piece in pieces]
        self._move(pieces, moves.split(counts), moves.shape[2])

    def _products_dtype(self, device: torch.device) -> torch.dtype:
        return self._ns_dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)

    def _laid_wide(self, pieces: list[Piece], values: Sequence[Tensor]) -> list[Tensor]:
        return [self._matrices[piece.parameter].laid_wide(value) for piece, value in zip(pieces, values, strict=True)]

    # ---- AdamW ------------------------------------------------------------------------------------------------

    def _step_adamw(self, parameters: Sequence[Tensor]) -> None:
        self._make_states(parameters, "exp_avg", "exp_avg_sq", "step")
        for members in _alike(parameters):
            for batch in self._adamw_batches([member for member in members if local(member).numel()]):
                self._adamw(batch)
            torch._foreach_add_([self._state(parameter, "step") for parameter in members], 1)

    def _adamw_batches(self, members: list[Tensor]) -> Iterator[list[Piece]]:
        """Four tensors a parameter are widened at once; where all are float32 there is nothing to widen or to cut."""
        if not members:
            return
        if members[0].dtype == self._dtype_of_state(members[0]) == torch.float32:
            yield [Piece(member, (-1,), slice(None)) for member in members]
            return
        blocks = [math.ceil(local(member).numel() / BLOCK) for member in members]
        for batch in cut(blocks, max(1, _batch_numel(members[0]) // (4 * BLOCK))):
            yield [Piece(members[i], (-1,), slice(part.start * BLOCK, part.stop * BLOCK)) for i, part in batch]

    def _adamw(self, pieces: list[Piece]) -> None:
        """torch's own update, on float32 values."""
        group, noise = self.param_groups[1], self._noise(pieces[0].parameter.device)
        weights, gradients = self._weights(pieces), self._gradients(pieces)
        first, second = (
            Wide([piece.of(self._state(piece.parameter, name)) for piece in pieces])
            for name in ("exp_avg", "exp_avg_sq")
        )
        # Copies: it counts a step, and a parameter may come in several pieces.
        steps = list(torch.stack([self._state(piece.parameter, "step") for piece in pieces]).unbind())
        adamw(
            weights.values,
            gradients,
            first.values,
            second.values,
            [],
            steps,
            fused=group["fused"],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        for changed in (weights, first, second):
            changed.store(noise)

    # ---- costs ------------------------------------------------------------------------------------------------

    def newton_schulz_flops(self) -> int:
        """Floating-point operations of the orthogonalisation in one step, of what this rank does on average."""
        steps = self.param_groups[0]["ns_steps"]
        own, dealt = 0, 0
        for parameter, matrices in self._matrices.items():
            flops = newton_schulz_flops(*matrices, steps=steps)
            if parameter in self._cut or self._replicas is not None:
                dealt += flops
            else:
                own += flops
        ranks = dist.get_world_size(self._shards or self._replicas) if dealt else 1
        return own + dealt // ranks

    def workspace(self) -> int:
        """Bytes that one step takes at its peak and gives back, every parameter with a gradient; on any device."""
        muon, rest = self.param_groups
        peaks = [0.0]
        for batch in self._muon_batches(muon["params"]):
            parameter = batch[0].parameter
            wide = self._matrices[parameter].wide
            number = sum(piece.part.stop - piece.part.start for piece in batch)
            product = self._products_dtype(parameter.device).itemsize
            peaks.append(muon_bytes(self._copies(parameter), product, number, *wide))
        for members in _alike(rest["params"]):
            for batch in self._adamw_batches(members):
                numel = sum(piece.of(piece.parameter).numel() for piece in batch)
                peaks.append(adamw_bytes(self._copies(batch[0].parameter), numel))
        return math.ceil(max(peaks))

    def _copies(self, parameter: Tensor) -> Copies:
        return Copies.of(parameter.dtype, self._dtype_of_state(parameter), self._rounding)


def _alike(parameters: Iterable[Tensor]) -> Iterable[list[Tensor]]:
    """Parameters by device and dtype."""
    groups: dict[tuple[Any, ...], list[Tensor]] = defaultdict(list)
    for parameter in parameters:
        groups[parameter.device, parameter.dtype].append(parameter)
    return groups.values()


def _batch_numel(parameter: Tensor) -> int:
    return min(MAX_BATCH_NUMEL, CPU_BATCH_NUMEL) if parameter.device.type == "cpu" else MAX_BATCH_NUMEL


def _with_gradient(parameters: Iterable[Tensor]) -> list[Tensor]:
    return [parameter for parameter in parameters if parameter.grad is not None]


def _check(below: float, **settings: float) -> None:
    for key, value in settings.items():
        if not 0 <= value < below:
            wanted = "of at least 0" if below == math.inf else f"from 0 to below {below}"
            raise ValueError(f"optimizer.{key}={value}: give a number {wanted}")
