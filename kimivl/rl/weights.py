"""Weights of a trainer and of an engine, compared tensor by tensor under their official names.

An engine stacks and fuses what the files keep apart (a layer's experts, gate and up projections). A checksum is taken
of each official part as it lies in the engine, and compared with that of the trainer's tensor in the engine's dtype: a
tensor that was lost, cut, mixed up or rounded another way has another checksum.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

_CHUNK = 1 << 22
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
SAMPLED = 512
_MIX = 0x9E3779B97F4A7C15 - (1 << 64)  # splitmix64's odd constant, as int64

Digests = Mapping[str, tuple[str, int]]
"""Official name -> dtype (``bfloat16``) and checksum."""


def checksum(tensor: Tensor) -> Tensor:
    """A 64-bit sum over a tensor's bits, each weighted by its place: () int64, on the tensor's device.

    Integers are summed modulo 2^64, so the order of summation, and with it the device, makes no difference.
    """
    bits = tensor.detach().contiguous().view(-1).view(_INTEGERS[tensor.element_size()])
    total = torch.full((), bits.numel(), dtype=torch.int64, device=bits.device)
    for start in range(0, bits.numel(), _CHUNK):
        part = bits[start : start + _CHUNK].to(torch.int64)
        place = torch.arange(start, start + len(part), device=bits.device)
        total += (part * ((2 * place + 1) * _MIX)).sum()
    return total


def digests(parts: Mapping[str, Tensor]) -> dict[str, tuple[str, int]]:
    """Dtype and checksum of each tensor; the device is waited for once."""
    if not parts:
        return {}
    device = next(iter(parts.values())).device
    sums = torch.stack([checksum(tensor).to(device) for tensor in parts.values()]).tolist()
    names = (str(tensor.dtype).removeprefix("torch.") for tensor in parts.values())
    return dict(zip(parts, zip(names, sums, strict=True), strict=True))


def official_parts(name: str, tensor: Tensor, vocab_size: int | None = None) -> Iterator[tuple[str, Tensor]]:
    """An engine's parameter as the official tensors that it is made of.

    Worked example, two experts of inner size 3 and width 4::

        mlp.experts.routed_experts.w13_weight (2, 6, 4) -> mlp.experts.0.gate_proj.weight (3, 4), .0.up_proj.weight, ...
        mlp.gate_up_proj.weight               (6, 4)    -> mlp.gate_proj.weight (3, 4), mlp.up_proj.weight (3, 4)

    Args:
        vocab_size: rows of the embedding and of the head that are not padding.
    """
    head, _, leaf = name.rpartition(".")
    experts = head.removesuffix(".routed_experts")
    if leaf == "w13_weight":
        for expert, both in enumerate(tensor.unbind(0)):
            for part, half in zip(("gate", "up"), both.chunk(2, 0), strict=True):
                yield f"{experts}.{expert}.{part}_proj.weight", half
    elif leaf == "w2_weight":
        for expert, down in enumerate(tensor.unbind(0)):
            yield f"{experts}.{expert}.down_proj.weight", down
    elif head.endswith(".gate_up_proj"):
        for part, half in zip(("gate", "up"), tensor.chunk(2, 0), strict=True):
            yield f"{head.removesuffix('gate_up_proj')}{part}_proj.{leaf}", half
    else:
        yield name, tensor if vocab_size is None else tensor[:vocab_size]


def weights_digest(model: Any, of: str) -> str:
    """What tells these weights, with the text ``of``, from others: a sample of each, ``SAMPLED`` values."""
    digest = hashlib.sha256(of.encode())
    for weight in model.parameters():
        flat = weight.detach().flatten()
        # A copy: what numpy has seen of a storage keeps FSDP from freeing it.
        digest.update(flat[:: max(1, len(flat) // SAMPLED)].float().cpu().clone().numpy().tobytes())
    return digest.hexdigest()


def policy_tensors(model: Any) -> dict[str, Tensor]:
    """The tensors that an engine is sent, by official name; the stale ``inv_freq`` of the files stay behind.

    Raises:
        ValueError: when the weights are cut up over ranks.
    """
    tensors = {
        name: tensor.detach()
        for name, tensor in model.official_tensors().items()
        if not name.endswith(".rotary_emb.inv_freq")
    }
    if cut := next((name for name, tensor in tensors.items() if hasattr(tensor, "full_tensor")), None):
        raise ValueError(
            f"{cut} is cut up over ranks, and an engine takes whole tensors: use rollout=hf, or a strategy that keeps "
            "the model whole (trainer.strategy=auto)"
        )
    return tensors


def in_dtype_of(engine: Digests, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The trainer's tensors, each in the dtype that the engine keeps it in.

    Raises:
        ValueError: naming the first tensor that only one of the two has.
    """
    if odd := sorted(set(engine) ^ set(tensors)):
        side = "engine lacks" if odd[0] in tensors else "trainer lacks"
        raise ValueError(
            f"the {side} the tensor {odd[0]} ({len(odd)} of {len(tensors)} names differ): the engine serves another "
            "model; start it with the model folder that this run began with"
        )
    for name, tensor in tensors.items():
        yield name, tensor.to(getattr(torch, engine[name][0]))


def expected(engine: Digests, tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, int]]:
    """The digests that an engine has when it holds the trainer's weights; a tensor is converted at a time."""
    sums = [checksum(tensor) for _, tensor in in_dtype_of(engine, tensors)]
    device = sums[0].device
    values = torch.stack([value.to(device) for value in sums]).tolist()
    return {name: (engine[name][0], value) for name, value in zip(tensors, values, strict=True)}


def check_digests(engine: Digests, wanted: Digests, where: str) -> None:
    """RuntimeError for an engine that holds other weights than the trainer, naming the first tensor that differs."""
    wrong = [name for name in wanted if tuple(engine.get(name, ())) != tuple(wanted[name])]
    if wrong:
        raise RuntimeError(
            f"after the weights were sent, {len(wrong)} of {len(wanted)} tensors in {where} differ from the trainer's, "
            f"the first is {wrong[0]}: responses would come from another policy. Restart the run from its last "
            "checkpoint; if it happens again use rollout=hf, and report the version of vLLM"
        )
