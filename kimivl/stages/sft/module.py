"""Stage 1: supervised fine-tuning on packed chats, loss on the answers (Kimi-VL, arXiv 2504.07491, section 2.4)."""

from __future__ import annotations

from torch import Tensor

from kimivl.data.pack import PackedBatch
from kimivl.stages.base import StageModule


class SFTModule(StageModule):
    """Cross-entropy of the supervised tokens, averaged exactly over the optimiser step."""

    def training_step(self, batch: PackedBatch, batch_idx: int) -> Tensor:
        with self.router.record(batch.cu_seqlens):
            logp = self.model.target_log_probs(**batch.model_inputs())
        # A pack may be all holes: it counts nothing.
        self.log_mean("train/loss", -logp.detach().sum(), len(logp), prog_bar=True)
        if self.logs_this_step and self.datamodule.count_holes():
            self.log_dropped()
        return self.normalised(-logp.sum(), batch.step_targets) + self.auxiliary_loss()
