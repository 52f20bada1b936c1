"""What becomes of a step whose loss or gradient is not a number: it is left out, with a limit, or ends the run."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from kimivl.data.pack import Hole, PackedBatch
from kimivl.optim import MuonAdamWInBackward
from kimivl.rl.experience import TrajectoryBatch
from kimivl.rl.objectives import StepCounts, Trajectories

log = logging.getLogger(__name__)
SHOWN = 3
"""Sample keys that a sentence names; the file has all."""


class NonFinite(Callback):
    """Looks at the loss of each pack and at the gradient norm of each step, on all ranks together, before a parameter
    moves. In a step that is left out no parameter, no state of the optimiser and no router bias moves; learning rate,
    counters and data go on. ``train/nonfinite_steps``, logged from the first one on, is how many there were in the run.

    The packs of such a step are saved as ``step-000012-rank0.pt`` by every rank that had a bad loss; where all losses
    were finite and only their gradient was not, by all ranks, with all packs of the step. Beside each pack stand its
    loss, its place and the keys of its samples. To see it again, with the model of the run's last checkpoint::

        from kimivl.callbacks.nonfinite import load_packs

        [pack] = load_packs("outputs/digits/sft/nonfinite/step-000012-rank0.pt")
        loss = -model.target_log_probs(**pack.model_inputs()).sum()     # in RL: pack.pack.model_inputs()
        loss.backward()

    The device is waited for once a step, for one pair of numbers. An optimiser that steps in the backward pass is asked
    between its two passes; with one pass it has moved when the norm is known, so that only ``stop`` is possible.

    Args:
        path: folder of the saved packs.
        policy: ``skip`` leaves the step out, ``stop`` ends the run at once.
        in_a_row: steps left out one after the other, at most; one more ends the run: the model itself is damaged, or
            diverges. in_all: the same for the whole run, with its resumes.

    Raises:
        ValueError: for limits below 0, or a policy that the optimiser cannot follow; in the run, to end it.
    """

    def __init__(
        self, path: str, policy: Literal["skip", "stop"] = "skip", in_a_row: int = 3, in_all: int = 20
    ) -> None:
        for key, value in (("in_a_row", in_a_row), ("in_all", in_all)):
            if value < 0:
                raise ValueError(f"callbacks.nonfinite.{key}={value}: give a number of at least 0")
        if policy not in ("skip", "stop"):
            raise ValueError(f"callbacks.nonfinite.policy={policy}: choose skip or stop")
        self.folder, self.policy = Path(path), policy
        self.in_a_row, self.in_all = in_a_row, in_all
        self.row = self.total = 0
        self._losses: dict[int, Tensor] = {}
        self._batch: tuple[int, Any] = (-1, None)
        self._moves_first = False

    def state_dict(self) -> dict[str, int]:
        return {"row": self.row, "total": self.total}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.row, self.total = state_dict["row"], state_dict["total"]

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        optimizer = trainer.optimizers[0]
        self._moves_first = isinstance(optimizer, MuonAdamWInBackward) and optimizer.clip != "two_pass"
        if isinstance(optimizer, MuonAdamWInBackward) and self._moves_first and self.policy == "skip":
            clip = "null" if optimizer.clip is None else optimizer.clip
            raise ValueError(
                f"callbacks.nonfinite.policy=skip: with optimizer.clip={clip} parameters have moved before the step's "
                "gradient norm is known; set callbacks.nonfinite.policy=stop, or optimizer.clip=two_pass"
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._batch = batch_idx, batch

    def on_before_backward(self, trainer: Trainer, pl_module: Any, loss: Tensor) -> None:
        self._losses[self._batch[0]] = loss.detach()  # a pack that runs twice counts once
        if self._moves_first and not bool(torch.isfinite(loss)):
            self._stop(trainer, [True, False], "before a parameter moved")

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        if self._moves_first:
            norm = trainer.optimizers[0].grad_norm  # type: ignore[attr-defined]
            if norm is not None and not bool(torch.isfinite(norm)):
                self._stop(trainer, [False, True], "and parameters have moved by it")
            self._losses = {}

    def on_gradient_norm(self, trainer: Trainer, pl_module: Any, norm: Tensor) -> bool:
        """Whether the step is made; all ranks decide alike. The module calls it when the gradients of a step are there,
        and are not yet used.

        Args:
            norm: of all gradients of all ranks, before clipping.
        """
        losses, self._losses = self._losses, {}
        bad = self._agree(trainer, torch.stack([*losses.values()]), norm)
        self.row, self.total = (self.row + 1, self.total + 1) if any(bad) else (0, self.total)
        if self.total:
            pl_module.log("train/nonfinite_steps", float(self.total), batch_size=1)
        if not any(bad):
            return True
        self._losses = losses
        limit = self._limit()
        if limit is not None:
            self._stop(trainer, bad, limit)
        log.warning(
            "%s; left out (%d in a row of %d, %d in all of %d). %s",
            _fault(trainer.global_step + 1, bad),
            self.row,
            self.in_a_row,
            self.total,
            self.in_all,
            self._save(trainer, bad),
        )
        self._losses = {}
        return False

    def _limit(self) -> str | None:
        if self.policy == "stop":
            return "as callbacks.nonfinite.policy=stop says"
        if self.row > self.in_a_row:
            return f"the {self.row}. in a row, and callbacks.nonfinite.in_a_row={self.in_a_row} are left out"
        if self.total > self.in_all:
            return f"the {self.total}. of the run, and callbacks.nonfinite.in_all={self.in_all} are left out"
        return None

    def _agree(self, trainer: Trainer, losses: Tensor, norm: Tensor) -> list[bool]:
        """Whether any rank's loss was bad, and whether the norm was."""
        flags = torch.stack([~torch.isfinite(losses).all(), ~torch.isfinite(norm).to(losses.device)]).float()
        if trainer.world_size > 1:
            flags = trainer.strategy.reduce(flags, reduce_op="max")
        return [flag > 0 for flag in flags.tolist()]

    def _stop(self, trainer: Trainer, bad: list[bool], why: str) -> None:
        saved = self._save(trainer, bad)
        remedy = "a lower optimizer.lr or data.phases lr, or trainer.gradient_clip_val=1"
        if self.policy == "stop" and not self._moves_first:
            remedy = f"callbacks.nonfinite.policy=skip to leave such steps out, or {remedy}"
        raise ValueError(
            f"{_fault(trainer.global_step + 1, bad)}: the run is stopped, {why}. {saved} Try {remedy}; the same "
            "command goes on from the last checkpoint"
        )

    # The packs.

    def _save(self, trainer: Trainer, bad: list[bool]) -> str:
        """Write this rank's share of the step, where it is part of the fault; a sentence that says where."""
        finite = {number: bool(torch.isfinite(loss)) for number, loss in self._losses.items()}
        chosen = [number for number, good in finite.items() if not good] or ([] if bad[0] else [*finite])
        step = trainer.global_step + 1
        name = f"step-{step:06d}-rank{trainer.global_rank}.pt"
        if not chosen:
            return f"The packs are in {self.folder}/step-{step:06d}-rank*.pt."
        packs = [self._entry(trainer, number) for number in chosen]
        record = {"step": step, "epoch": trainer.current_epoch, "rank": trainer.global_rank, "packs": packs}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            torch.save(record, self.folder / name)
        except (OSError, RuntimeError) as error:  # a full disk: the step is bad all the same
            return f"Its packs could not be saved ({error})."
        keys = list(dict.fromkeys(key for pack in packs for key in pack["keys"]))  # in RL: one of several responses
        more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
        samples = f" (samples {', '.join(keys[:SHOWN])}{more})" if keys else ""
        return f"The {'packs are' if len(packs) > 1 else 'pack is'} in {self.folder / name}{samples}."

    def _entry(self, trainer: Trainer, number: int) -> dict[str, Any]:
        """A pack as tensors and numbers; an earlier one of the step is made once more, since none was kept."""
        current, batch = self._batch
        if number != current:
            batch = trainer.train_dataloader.again(number)  # type: ignore[union-attr]
        pack = getattr(batch, "pack", batch)
        index = getattr(trainer.datamodule, "index", None)  # type: ignore[attr-defined]
        keys = [] if index is None else [index.key(sample) for sample in pack.samples.tolist()]
        return {"batch": number, "loss": float(self._losses[number]), "keys": keys, "content": plain(batch)}


def _fault(step: int, bad: list[bool]) -> str:
    return f"step {step}: the {'loss' if bad[0] else 'gradient norm'} is not finite"


def plain(value: Any) -> Any:
    """Dataclasses as dicts and tuples as lists, down to tensors on the CPU, numbers and text: ``weights_only`` loads
    it."""
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    return [plain(inner) for inner in value] if isinstance(value, tuple | list) else value


def load_packs(path: str | Path) -> list[PackedBatch | TrajectoryBatch]:
    """The packs of a file that ``NonFinite`` has written, as the step had them, on the CPU."""
    return [_batch(entry["content"]) for entry in torch.load(path, weights_only=True)["packs"]]


def _batch(content: Mapping[str, Any]) -> PackedBatch | TrajectoryBatch:
    if "trajectories" not in content:
        return PackedBatch(**{**content, "holes": tuple(Hole(*hole) for hole in content["holes"])})
    counts = StepCounts(**content["trajectories"]["counts"])
    trajectories = Trajectories(**{**content["trajectories"], "counts": counts})
    pack = _batch(content["pack"])
    assert isinstance(pack, PackedBatch)
    return TrajectoryBatch(pack, trajectories, content["experts"])
