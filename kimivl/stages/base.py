"""What the three stages share: the model, the optimiser, the one division of the loss, and the evaluation."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor

from kimivl.checkpoint import build_model
from kimivl.data.pack import PackedBatch
from kimivl.model import Kernels, KimiVLConfig, KimiVLForConditionalGeneration
from kimivl.optim.schedule import PhaseSchedule
from kimivl.rl.rewards import Reward
from kimivl.rl.rollout import RolloutEngine
from kimivl.rl.types import Problem, Response
from kimivl.stages.evaluation import Evaluation, Tally, Transcript


class StageModule(LightningModule):
    """A stage of post-training; subclasses add ``training_step``.

    Args:
        model: configuration of a fresh model; used where ``init_from`` is None.
        optimizer: named parameters -> optimiser.
        rollout: keyword arguments model, decode, stop_id, pad_id, never -> rollout engine, for evaluation and RL.
        reward: judges responses; evaluation uses its verdict on the answer, never its length term.
        evaluation: how the held-out problems are answered.
        init_from: folder of the model to start from.
        freeze: children of the model that do not train, for example ``vision_tower``.
        kernels: who computes attention, experts and loss.
        router: ``bias_update_rate`` and ``aux_loss_weight`` of the experts' balancing.
        activation_checkpointing: what the forward pass keeps for the backward pass.
        lora: ``rank``, ``alpha`` and ``targets`` of low-rank adapters, or None to train the parameters themselves.
    """

    model: KimiVLForConditionalGeneration

    def __init__(
        self,
        model: KimiVLConfig,
        optimizer: Callable[..., torch.optim.Optimizer],
        rollout: Callable[..., RolloutEngine],
        reward: Reward,
        evaluation: Evaluation,
        init_from: str | None = None,
        freeze: Sequence[str] = (),
        kernels: Kernels | None = None,
        router: dict[str, float] | None = None,
        activation_checkpointing: str = "none",
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
        self.router = router or {}
        self.activation_checkpointing = activation_checkpointing
        self.lora = lora
        self.tally = Tally()
        self._train_started = self._seconds_before = 0.0

    @property
    def datamodule(self) -> Any:
        return self.trainer.datamodule  # type: ignore[attr-defined]

    def configure_model(self) -> None:
        """Build the model once the data (and with it the tokenizer) is there; Lightning calls this for every entry."""
        if hasattr(self, "model"):
            return
        processor = self.datamodule.processor
        self.model = build_model(self.model_config, self.init_from, processor)
        for part in self.freeze_parts:
            if not hasattr(self.model, part):
                raise ValueError(f"module.freeze names {part!r}, which the model does not have")
            getattr(self.model, part).requires_grad_(False)
        self.model.set_kernels(self.kernels)
        tokenizer = processor.tokenizer
        self.engine = self.make_rollout(
            model=self.model,
            decode=tokenizer.decode,
            stop_id=self.datamodule.encoder.stop_id,
            pad_id=tokenizer.pad_token_id,
            never=[self.model.config.media_placeholder_token_id],
        )

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        trainable = [(name, weight) for name, weight in self.model.named_parameters() if weight.requires_grad]
        optimizer = self.make_optimizer(trainable)
        scheduler = PhaseSchedule(self.datamodule.schedule_phases()).scheduler(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        # Problems stay where they are: the rollout engine moves what it reads.
        return batch.to(device) if hasattr(batch, "to") else batch

    def normalised(self, total: Tensor, count: int) -> Tensor:
        """A sum over this pack divided by the count over the whole optimiser step: the exact mean.

        Lightning divides by the accumulated batches and DDP by the ranks; both are multiplied back here.
        """
        return total * (self.trainer.accumulate_grad_batches * self.trainer.world_size / count)

    def sequence_log_probs(self, pack: PackedBatch, temperature: float = 1.0) -> Tensor:
        """(S,) log-probability of each segment's supervised tokens at ``temperature``, summed."""
        return pack.sum_by_segment(self.model.target_log_probs(**pack.model_inputs(), temperature=temperature))

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
        checkpoint["train_seconds"] = self.train_seconds

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._seconds_before = checkpoint["train_seconds"]

    # Evaluation: the same code in all stages, in `validate` during training and in `test` at its end.

    def on_validation_epoch_start(self) -> None:
        self.tally = Tally()

    def validation_step(self, problems: list[Problem], batch_idx: int) -> None:
        self.evaluation.run(problems, self.engine, self.reward, self.describe, self.tally)

    def on_validation_epoch_end(self) -> None:
        self._log_tally("val")

    def on_test_epoch_start(self) -> None:
        self.tally = Tally()

    def test_step(self, problems: list[Problem], batch_idx: int) -> None:
        self.validation_step(problems, batch_idx)

    def on_test_epoch_end(self) -> None:
        self._log_tally("test")

    def _log_tally(self, prefix: str) -> None:
        for name, value in self.tally.metrics().items():
            self.log(f"{prefix}/{name}", value, prog_bar=name == "accuracy" and prefix == "val", batch_size=1)

    def describe(self, response: Response) -> dict[str, float]:
        """Further figures of one greedy response, averaged into the evaluation; a stage may add some."""
        return {}

    @property
    def transcripts(self) -> list[Transcript]:
        """Examples of the last evaluation."""
        return self.tally.transcripts
