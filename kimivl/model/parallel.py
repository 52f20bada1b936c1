"""The model cut up over ranks by FSDP2, and whole again where one rank alone must read it.

Every decoder layer, every vision block, and the rest of the model together (embedding, head, projector, norms) are a
group each: a group's parameters are gathered when it runs, and freed again. Parameters are cut along their first
dimension as ``torch.chunk`` does: stacked experts (E, 2I, H) by whole experts, whatever E and the ranks are; a rank may
have fewer rows than another, or none. Buffers (routing biases, rotary frequencies) are not cut.

Each rank builds or reads the whole model in the host's memory, and ``shard`` moves it to the device block by block: of
the device it takes a rank's share, of the host the whole model for each rank of it (32 GB in bfloat16 for
Kimi-VL-A3B, 256 GB on a node of eight).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from kimivl.model.modeling import KimiVLForConditionalGeneration


def shard(model: KimiVLForConditionalGeneration, mesh: Any) -> None:
    """Cut the parameters of every block, and what is left, along their first dimension over the ranks of ``mesh``.

    Training goes through ``model.target_log_probs`` or ``model(...)``: no other method gathers parameters. They are
    gathered in the dtype that they have (autocast then works as on one device); gradients are summed in float32,
    those of a float64 model in float64.
    """
    dtype = model.language_model.lm_head.weight.dtype
    policy = MixedPrecisionPolicy(reduce_dtype=torch.promote_types(dtype, torch.float32))
    for block in (*model.vision_tower.encoder.blocks, *model.language_model.model.layers):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    register_fsdp_forward_method(model, "target_log_probs")
    model.cut_up = True


def is_sharded(model: nn.Module) -> bool:
    """Whether ``shard`` has cut this model up."""
    return isinstance(model, FSDPModule)


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Inside, every rank has the whole model on its device and runs it alone, without a word to the others.

    For what differs in length from rank to rank: answering problems, rollouts with ``rollout=hf``. All ranks enter and
    leave together; inside there are no gradients. Nothing happens to a model that is not cut up (one process, DDP).

    Example::

        engine.sync()
        with gathered(model):                       # all ranks; one all-gather for each block
            responses = engine.generate(mine, sampling)     # as many as this rank has
        reference = model.target_log_probs(...)     # again sharded: equally often on every rank
    """
    blocks = _blocks(model)
    if blocks:
        # The first module to run becomes FSDP's root: it must be the model, and not the block that runs first here.
        fully_shard.state(model)._lazy_init()  # type: ignore[attr-defined]
    for block in blocks:
        block.set_reshard_after_forward(False, recurse=False)
        block.unshard()
    if blocks:
        model.cut_up = False  # type: ignore[assignment]  # each rank for itself
    try:
        yield
    finally:
        if blocks:
            model.cut_up = True  # type: ignore[assignment]
        for block in blocks:
            block.reshard()
            block.set_reshard_after_forward(block is not model, recurse=False)


@contextmanager
def assembled(model: nn.Module) -> Iterator[None]:
    """Inside, the model of rank 0 has its whole parameters, as copies in the host's memory; for writing it.

    They are gathered one by one: the device holds a rank's share and one whole parameter. All ranks enter together; on
    the others nothing changes. Nothing happens to a model that is not cut up.
    """
    for block in _blocks(model):
        block.reshard()  # a forward pass without gradients leaves the last group gathered
    cut = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if isinstance(parameter, DTensor)
    ]
    whole = [_copy_on_first(parameter) for _, _, parameter in cut]
    try:
        for (module, name, parameter), copy in zip(cut, whole, strict=True):
            if copy is not None:
                module._parameters[name] = nn.Parameter(copy, parameter.requires_grad)
        yield
    finally:
        for module, name, parameter in cut:
            module._parameters[name] = parameter


@torch.no_grad()
def _copy_on_first(parameter: DTensor) -> Tensor | None:
    whole = parameter.full_tensor()
    return whole.cpu() if parameter.device_mesh.get_local_rank() == 0 else None


def _blocks(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]
