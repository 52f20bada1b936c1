"""The model cut up over ranks by FSDP2, block by block."""

from __future__ import annotations

from typing import Any

from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from kimivl.model.modeling import KimiVLForConditionalGeneration


def shard(model: KimiVLForConditionalGeneration, mesh: Any) -> None:
    """Cut the parameters of every block, and what is left, along their first dimension over the ranks of ``mesh``."""
    for block in (*model.vision_tower.encoder.blocks, *model.language_model.model.layers):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "target_log_probs")
