"""Floating point operations of the model on a packed batch, by part, and what share of a device's peak they are.

Model FLOPs: what the mathematics asks for, a multiply-add counted as two. Recomputation (activation checkpointing,
the scores inside fused attention) is not counted, nor is anything but products of matrices, so the figure does not
depend on kernels. The constants in `kimivl.data.plan.sample_cost` are these formulas for Kimi-VL-A3B.

Worked example, Kimi-VL-A3B: a text token costs 2 x 2.58e9 forward and 15.5e9 in training, an image token 3.3e9
forward in the vision tower and 9.9e9 in training; two tokens l apart cost nothing, a segment of l tokens
27 x 16 x (192 + 128) x l^2 forward in causal attention.

Legend: T tokens, K supervised positions, P patches, D width, N heads.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, fields, replace

from kimivl.model.configuration import KimiVLConfig

PARTS = ("vision_tower", "multi_modal_projector", "language_model")

# Dense bf16 FLOP/s with float32 accumulation, from NVIDIA's data sheets. A name as torch.cuda.get_device_name gives
# it must hold all words of a key; keys of more words are tried first.
_PEAKS = {
    ("A100",): 312e12,
    ("A10",): 125e12,
    ("A30",): 165e12,
    ("A40",): 149.7e12,
    ("L4",): 121e12,
    ("L40",): 181e12,
    ("L40S",): 362e12,
    ("H100", "HBM3"): 989e12,
    ("H100", "PCIE"): 756e12,
    ("H100", "NVL"): 835e12,
    ("H200",): 989e12,
    ("H200", "NVL"): 835e12,
    ("GH200",): 989e12,
    ("B200",): 2250e12,
}


@dataclass(frozen=True, slots=True)
class Flops:
    """FLOPs of one pack by part.

    ``decoder`` MLA projections, dense and shared MLPs, chosen experts, router; ``attention`` the decoder's scores and
    mixing; ``head`` the vocabulary at the supervised positions; ``patches`` the first map of the vision tower;
    ``vision`` its blocks' linear maps; ``vision_attention``; ``projector``.
    """

    decoder: float
    attention: float
    head: float
    patches: float
    vision: float
    vision_attention: float
    projector: float

    @property
    def total(self) -> float:
        return math.fsum(getattr(self, field.name) for field in fields(self))

    def training(self, frozen: Collection[str] = (), adapters: bool = False) -> Flops:
        """Of forward and backward together, from those of the forward pass.

        A linear map costs its forward pass again for the gradient of its weights, and once more for that of its
        input where something before it trains; attention costs twice its forward pass for the gradients of its
        inputs. The pixels need no gradient.

        Args:
            frozen: children of the model that do not train, as in ``module.freeze``.
            adapters: only low-rank adapters of the decoder train. Their own products, about one in a hundred, are not
                counted.

        Raises:
            ValueError: for a name that is no child of the model.
        """
        if unknown := set(frozen) - set(PARTS):
            raise ValueError(f"module.freeze names {min(unknown)!r}; the parts are {', '.join(PARTS)}")
        if adapters:
            return replace(self, decoder=self.decoder * 2, attention=self.attention * 3, head=self.head * 2)
        tower, projector, decoder = (part not in frozen for part in PARTS)
        before_decoder = tower or projector
        if not (before_decoder or decoder):
            return self
        return Flops(
            decoder=self.decoder * (1 + decoder + (before_decoder or decoder)),
            attention=self.attention * 3,
            head=self.head * (1 + decoder + 1),
            patches=self.patches * (1 + tower),
            vision=self.vision * (3 if tower else 1),
            vision_attention=self.vision_attention * (3 if tower else 1),
            # the norm before its maps trains with it
            projector=self.projector * (1 + projector + before_decoder),
        )

    def __add__(self, other: Flops) -> Flops:
        return Flops(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))


def pack_flops(
    config: KimiVLConfig, lengths: Iterable[int], targets: int, grids: Iterable[Sequence[int]] = ()
) -> Flops:
    """FLOPs of the forward pass of one pack.

    Args:
        lengths: tokens of each segment, image tokens among them.
        targets: supervised positions, at which the vocabulary projection is applied.
        grids: (h, w) in patches of each image that goes through the vision tower.
    """
    lengths, patches = list(lengths), [int(h) * int(w) for h, w in grids]
    text, vision = config.text_config, config.vision_config
    tokens, width = sum(lengths), vision.hidden_size
    channels = text.num_attention_heads * (text.qk_nope_head_dim + text.qk_rope_head_dim + text.v_head_dim)
    merged = math.prod(vision.merge_kernel_size)
    wide = merged * width
    return Flops(
        decoder=2.0 * decoder_parameters(config) * tokens,
        # 2 FLOPs for each channel of each of l^2 / 2 pairs, in scores and mixing
        attention=float(text.num_hidden_layers * channels * sum(length**2 for length in lengths)),
        head=2.0 * text.hidden_size * text.vocab_size * targets,
        patches=2.0 * 3 * vision.patch_size**2 * width * sum(patches),
        vision=2.0 * vision.num_hidden_layers * width * (4 * width + 2 * vision.intermediate_size) * sum(patches),
        vision_attention=4.0 * vision.num_hidden_layers * width * sum(count**2 for count in patches),
        projector=2.0 * wide * (wide + text.hidden_size) * (sum(patches) // merged),
    )


def decoder_parameters(config: KimiVLConfig) -> int:
    """Weights of the decoder's layers that one token is multiplied with: of the routed experts only the chosen."""
    text = config.text_config
    width, heads = text.hidden_size, text.num_attention_heads
    query, rank = heads * (text.qk_nope_head_dim + text.qk_rope_head_dim), text.kv_lora_rank
    attention = width * query if text.q_lora_rank is None else text.q_lora_rank * (width + query)
    attention += width * (rank + text.qk_rope_head_dim)
    attention += rank * heads * (text.qk_nope_head_dim + text.v_head_dim) + heads * text.v_head_dim * width
    experts = text.num_experts_per_tok + text.n_shared_experts
    mixture = width * text.n_routed_experts + 3 * width * text.moe_intermediate_size * experts
    dense = min(text.first_k_dense_replace, text.num_hidden_layers)
    return (
        text.num_hidden_layers * attention
        + dense * 3 * width * text.intermediate_size
        + (text.num_hidden_layers - dense) * mixture
    )


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a whole device by the name that CUDA gives it; None where it is not in the table.

    A MIG slice has an unknown part of its device, so it is not in the table either.
    """
    words = set(re.split(r"[^A-Z0-9.]+", device_name.upper()))
    if "MIG" in words:
        return None
    known = [key for key in _PEAKS if words.issuperset(key)]
    return _PEAKS[max(known, key=len)] if known else None


def mfu(flops: float, seconds: float, device_name: str) -> float | None:
    """Model FLOPs utilisation: the share of a device's peak that ``flops`` in ``seconds`` are; None without a peak."""
    peak = peak_flops(device_name)
    return None if peak is None else flops / seconds / peak
