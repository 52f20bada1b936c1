"""What the three stages share: the model, the optimiser, the one division of the loss, and the evaluation."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor

from kimivl.checkpoint import build_model, policy_of
from kimivl.data.pack import PackedBatch
from kimivl.model import Kernels, KimiVLConfig, KimiVLForConditionalGeneration
from kimivl.model.checkpointing import Mode, checkpoint_activations
from kimivl.model.lora import add_lora, check_lora, fingerprint, frozen_names
from kimivl.model.parallel import gathered, shard
from kimivl.model.router import Balancing, Router
from kimivl.model.segment_attention import check_gradients, compute_dtype
from kimivl.optim import MuonAdamW, MuonAdamWInBackward, PhaseSchedule
from kimivl.optim.clipping import clip_gradients
from kimivl.rl.rewards import Reward
from kimivl.rl.rollout import RolloutEngine
from kimivl.rl.types import Policy, Problem, Response
from kimivl.runtime import interruption, ranks
from kimivl.stages.batch_counts import recount_batches
from kimivl.stages.evaluation import Evaluation, Tally, Transcript
from kimivl.stages.sharding import ShardedStrategy

log = logging.getLogger(__name__)


class StageModule(LightningModule):
    """A stage of post-training; subclasses add ``training_step``.

    Args:
        model: configuration of a fresh model; used where ``init_from`` is None.
        optimizer: named parameters -> optimiser.
        rollout: policy -> rollout engine, for evaluation and RL.
        reward: judges responses; evaluation uses its verdict on the answer, never its length term.
        evaluation: how the held-out problems are answered.
        init_from: folder of the model to start from.
        freeze: children of the model that do not train, for example ``vision_tower``.
        kernels: who computes attention, experts and loss.
        router: balancing of the experts.
        activation_checkpointing: what the forward pass keeps for the backward pass.
        lora: ``rank``, ``alpha`` and ``targets`` of low-rank adapters, or None to train the parameters themselves.
    """

    model: KimiVLForConditionalGeneration

    def __init__(
        self,
        model: KimiVLConfig,
        optimizer: Callable[..., torch.optim.Optimizer],
        rollout: Callable[[Policy], RolloutEngine],
        reward: Reward,
        evaluation: Evaluation,
        init_from: str | None = None,
        freeze: Sequence[str] = (),
        kernels: Kernels | None = None,
        router: Balancing | None = None,
        activation_checkpointing: Mode = "none",
        lora: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.model_config = model
        self.make_optimizer = optimizer
        self.make_rollout = rollout
        self.reward = reward
        self.evaluation = evaluation
        self.init_from = init_from
        self.freeze_parts = freeze
        self.kernels = kernels or Kernels()
        self.balancing = router or Balancing()
        self.activation_checkpointing = activation_checkpointing
        if lora is not None:
            check_lora(lora)
        self.lora = lora
        self.tally = Tally()
        self._left_out = False
        self._whole = ExitStack()
        self._step_sums: dict[str, tuple[Tensor | float, int]] = {}
        self._train_started = self._seconds_before = 0.0

    @property
    def datamodule(self) -> Any:
        return self.trainer.datamodule  # type: ignore[attr-defined]

    def setup(self, stage: str) -> None:
        # Lightning's bf16-true casts all floating-point numbers of a batch, and stops at a frozen dataclass. The model
        # casts what it takes; the rest (advantages, reference log-probabilities) must keep its bits.
        self.trainer.precision_plugin.convert_input = _as_it_is  # type: ignore[method-assign]

    def configure_model(self) -> None:
        """Build the model once the data (and with it the tokenizer) is there; Lightning calls this for every entry."""
        if hasattr(self, "model"):
            return
        self._check_kernels()
        processor = self.datamodule.processor
        self.model = build_model(self.model_config, self.init_from, processor)
        for part in self.freeze_parts:
            if not hasattr(self.model, part):
                raise ValueError(f"module.freeze names {part!r}, which the model does not have")
            getattr(self.model, part).requires_grad_(False)
        if self.lora is not None:
            add_lora(self.model, **self.lora)
        self.model.set_kernels(self.kernels)
        checkpoint_activations(self.model, self.activation_checkpointing)
        self.router = Router(self.model, self.balancing.bias_update_rate, self.balancing.aux_loss_weight)
        if isinstance(strategy := self.trainer.strategy, ShardedStrategy):
            shard(self.model, strategy.device_mesh["data_parallel"])
        self.engine = self.make_rollout(policy_of(self.model, processor, self.datamodule.encoder.stop_id))

    def close(self) -> None:
        """Free what the rollout engine holds; the module answers nothing afterwards."""
        if hasattr(self, "engine"):
            self.engine.close()

    def _check_kernels(self) -> None:
        """Refuse kernels that cannot train on the run's device in its dtype, before the weights are read."""
        device = self.trainer.strategy.root_device
        with self.trainer.precision_plugin.forward_context():
            dtype = compute_dtype(torch.empty(0, device=device))
        check_gradients(self.kernels.resolve(device, dtype).attention, device)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        trainable = [(name, weight) for name, weight in self.model.named_parameters() if weight.requires_grad]
        optimizer = self.make_optimizer(trainable)
        if any(weight.dtype == torch.bfloat16 for _, weight in trainable) and not isinstance(optimizer, MuonAdamW):
            log.warning(
                "%s rounds bf16 parameters to nearest: updates below 1/256 of a weight are lost; use optimizer=muon, "
                "or trainer.precision=bf16-mixed",
                type(optimizer).__name__,
            )
        if isinstance(optimizer, MuonAdamWInBackward):
            optimizer.may_step = self._is_made
        if isinstance(optimizer, MuonAdamW) and isinstance(self.trainer.strategy, DDPStrategy):
            optimizer.deal_over(dist.group.WORLD)
        scheduler = PhaseSchedule(self.datamodule.schedule_phases()).scheduler(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the global norm, taken in float32 whatever the gradients are, and log it before clipping."""
        if isinstance(optimizer, MuonAdamWInBackward):  # which has used the gradients, and freed them
            return
        by_value = gradient_clip_algorithm == "value"
        norm = clip_gradients(self.parameters(), None if by_value else gradient_clip_val)
        self.log("train/grad_norm", norm, batch_size=1)
        if by_value:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        if not self._is_made(norm):
            optimizer.zero_grad(set_to_none=True)  # parameters without a gradient stay as they are

    def _is_made(self, norm: Tensor) -> bool:
        """Whether the callbacks let a step of this gradient norm be made; Lightning has no hook for that."""
        judges = [one for one in self.trainer.callbacks if hasattr(one, "on_gradient_norm")]  # type: ignore[attr-defined]
        self._left_out = not all(judge.on_gradient_norm(self.trainer, self, norm) for judge in judges)
        return not self._left_out

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        def closure() -> Any:
            # With clip=two_pass the optimiser runs it twice, and the same pack must count once.
            self.router.forget()
            return optimizer_closure()

        in_backward = isinstance(optimizer, MuonAdamWInBackward)  # which takes one pack a step
        super().optimizer_step(epoch, batch_idx, optimizer, closure if in_backward else optimizer_closure)
        self.router.update_bias(move=not self._left_out)
        self._left_out = False
        if in_backward:
            self.log("train/grad_norm", optimizer.grad_norm, batch_size=1)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        # Problems stay where they are: the rollout engine moves what it reads.
        return batch.to(device) if hasattr(batch, "to") else batch

    def normalised(self, total: Tensor, count: int) -> Tensor:
        """A sum over this pack divided by the count over the whole optimiser step: the exact mean.

        Lightning divides by the accumulated batches and DDP by the ranks; both are multiplied back here.
        """
        return total * (self.trainer.accumulate_grad_batches * self.trainer.world_size / count)

    def auxiliary_loss(self) -> Tensor:
        """The experts' auxiliary loss of the pack recorded last; a mean already, it is added to the loss as it is.

        Lightning's mean over the accumulated batches and DDP's over the ranks make it the mean over the step.
        """
        loss = self.router.aux_loss
        if self.balancing.aux_loss_weight:
            self.log_mean("train/aux_loss", loss.detach(), 1)
        return loss

    def log_mean(self, name: str, total: Tensor, count: int, prog_bar: bool = False) -> None:
        """Log ``total / count`` of the optimiser step, both summed over its packs and all ranks: exact where packs
        count differently. All ranks call it once for each pack; they exchange two numbers, at log steps only.
        """
        before, counted = self._step_sums.pop(name, (0.0, 0))
        total, count = before + total.double(), counted + count
        if self.trainer.fit_loop._should_accumulate():
            self._step_sums[name] = total, count
        elif self.logs_this_step:
            if ranks.world_size() > 1:
                sums = torch.stack((total, total.new_full((), count)))
                dist.all_reduce(sums)
                total, count = sums[0], int(sums[1])
            if count:
                self.log(name, (total / count).float(), prog_bar=prog_bar, batch_size=1)

    @property
    def logs_this_step(self) -> bool:
        """Whether the figures of the step in progress are wanted, on all ranks alike; a single process has no cost of
        exchanging them."""
        trainer: Any = self.trainer
        every = max(1, trainer.log_every_n_steps)
        return ranks.world_size() == 1 or (trainer.global_step + 1) % every == 0 or trainer.is_last_batch

    def target_log_probs(self, pack: PackedBatch, temperature: float = 1.0, experts: Tensor | None = None) -> Tensor:
        """(K,) log-probability of each supervised token at ``temperature``; ``experts``: those to go through."""
        return self.model.target_log_probs(**pack.model_inputs(), temperature=temperature, experts=experts)

    # The time of training, over all the processes that a run was interrupted into.

    @property
    def train_seconds(self) -> float:
        """Seconds from the start of training to now or to its end, with rollouts and validation."""
        running = time.perf_counter() - self._train_started if self._train_started else 0.0
        return self._seconds_before + running

    def on_train_start(self) -> None:
        self._train_started = time.perf_counter()
        self.log_dropped()

    def log_dropped(self) -> None:
        """``data/dropped/<reason>``: the samples left out so far."""
        dropped = {f"data/dropped/{reason}": count for reason, count in self.datamodule.dropped.items()}
        for logger in self.loggers if dropped else ():
            logger.log_metrics(dropped, step=self.global_step)

    def on_train_end(self) -> None:
        self._seconds_before, self._train_started = self.train_seconds, 0.0

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["train_seconds"], checkpoint["world_size"] = self.train_seconds, self.trainer.world_size
        checkpoint["lora"] = self.lora and self.lora | {"base": self._leave_out_base(checkpoint["state_dict"])}

    def _leave_out_base(self, state: dict[str, Tensor]) -> str | None:
        """Take out of ``state`` what ``init_from`` holds, and return what tells that base from another.

        A fresh base stays in.
        """
        whole = (SingleDeviceStrategy, DDPStrategy, ShardedStrategy)
        if self.init_from is None or not isinstance(self.trainer.strategy, whole):
            return None
        for name in frozen_names(self.model):
            del state[f"model.{name}"]
        return self._base

    @cached_property
    def _base(self) -> str:
        return fingerprint(self.model)

    def _bring_back_base(self, checkpoint: dict[str, Any]) -> None:
        """Undo `_leave_out_base`; ValueError for a checkpoint of other adapters or of another base."""
        saved = dict(checkpoint.get("lora") or {})
        base = saved.pop("base", None)
        if (saved or None) != self.lora:
            raise ValueError(
                f"the checkpoint was made with lora={saved or None}, this run has lora={self.lora}: go on with its "
                "settings, or start from the model folder of its run with init_from"
            )
        if base is None:
            return
        if base != self._base:
            raise ValueError(
                f"the checkpoint holds adapters of another base than init_from={self.init_from}: give the folder (and "
                "trainer.precision) that its run began with"
            )
        own = self.model.state_dict()
        checkpoint["state_dict"] |= {f"model.{name}": own[name] for name in frozen_names(self.model)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._seconds_before = checkpoint["train_seconds"]
        recount_batches(checkpoint, self.trainer.world_size)
        self._bring_back_base(checkpoint)

    # Evaluation: the same code in all stages, in `validate` during training and in `test` at its end.

    def on_validation_epoch_start(self) -> None:
        self.tally = Tally()
        self._whole.enter_context(gathered(self.model))
        self.engine.sync()  # the model is evaluated as it stands
        if getattr(self.engine, "concurrent", False) is True:  # it has weights of its own
            self._whole.close()

    def validation_step(self, problems: list[Problem], batch_idx: int) -> None:
        def answer() -> None:
            self.evaluation.run(problems, self.engine, self.reward, self.describe, self.tally)

        interruption.until_asked(answer)

    def on_validation_epoch_end(self) -> None:
        self._log_tally("val")

    def on_test_epoch_start(self) -> None:
        self.on_validation_epoch_start()

    def test_step(self, problems: list[Problem], batch_idx: int) -> None:
        self.validation_step(problems, batch_idx)

    def on_test_epoch_end(self) -> None:
        self._log_tally("test")

    def leave_evaluation(self) -> None:
        """The model is as it was before the evaluation, however far that has come. All ranks call it together."""
        self._whole.close()

    def _log_tally(self, prefix: str) -> None:
        self.leave_evaluation()
        self.tally = self.tally.of_all_ranks()
        for name, value in self.tally.metrics().items():
            self.log(f"{prefix}/{name}", value, prog_bar=name == "accuracy" and prefix == "val", batch_size=1)

    def describe(self, response: Response) -> dict[str, float]:
        """Further figures of one greedy response, averaged into the evaluation; a stage may add some."""
        return {}

    @property
    def transcripts(self) -> list[Transcript]:
        """Examples of the last evaluation."""
        return self.tally.transcripts


def _as_it_is(data: Any) -> Any:
    return data
