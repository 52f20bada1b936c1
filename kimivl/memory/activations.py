"""What a block of the model keeps from its forward pass, by formula.

A tensor counts once, with the dtype that it has there: RMSNorm and the router work in float32 whatever the precision
is, so a norm of D numbers keeps D in float32, D normalised, and its result as the input of the next product. The
tests hold the formulas to what autograd keeps: of real blocks in float32, and of Kimi-VL-A3B's in bfloat16 on the
meta device.

Legend: per token (decoder) or patch (vision tower); D width, N heads, K chosen experts, E experts, I inner width,
R latent width, P rotary width, c bytes of the results of products, s bytes of the residual stream.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kimivl.memory.setup import Numbers, Setup

GROUPED_TOKENS = 32_768
"""Tokens whose routed experts are computed at one time (``kimivl.model.experts``)."""
UNEVEN = 1.5
"""Rows of the busiest expert, as a multiple of the mean."""
_FLASH_MULTIPLE = 8


@dataclass(frozen=True, slots=True)
class Block:
    """Bytes of one block for each of its tokens or patches.

    ``kept`` from the forward pass without checkpointing; ``inputs`` its input, which checkpointing keeps (and which
    is a part of ``kept`` where ``shared``: a float32 norm needs no copy of it); ``chosen`` the results that selective
    checkpointing keeps besides; ``passing`` on top of ``kept`` at the height of its backward pass.
    """

    kept: float
    inputs: float
    chosen: float
    passing: float
    shared: bool

    def held(self, mode: str) -> float:
        """What it keeps until its backward pass."""
        return {"none": self.kept, "full": self.inputs, "selective": self.inputs + self.chosen}[mode]

    def working(self, mode: str) -> float:
        """What its backward pass takes, beyond what is held: the rest computed again, and gradients passing through."""
        again = self.kept - self.inputs * self.shared - self.chosen * (mode == "selective")
        again *= mode != "none"
        return again + self.passing


def decoder_layer(setup: Setup, dense: bool, tokens: int) -> Block:
    """A layer of the language model; ``tokens`` is the length of the longest segment."""
    text, n = setup.model.text_config, setup.numbers
    width, c = text.hidden_size, n.compute
    attention, keep_attention = mla(setup, tokens)
    products = [attention]
    if dense:
        kept, chosen = _swiglu(width, text.intermediate_size, n)
        passing = 2.0 * text.intermediate_size * c
    else:
        shared, chosen = _swiglu(width, text.moe_intermediate_size * text.n_shared_experts, n)
        kept = shared + _routed(text, n)
        chosen += 4.0 * text.n_routed_experts
        # the shared experts come first, and free what they have kept
        inner = n.compute * text.moe_intermediate_size * text.n_shared_experts
        passing = max(2.0 * inner, _passing_experts(setup, tokens) - shared)
    kept += 2 * rms_norm(width, n.stream) + _inputs_of(width, n, 2) + _inputs_of(width, n, 2 if dense else 3)
    return Block(
        kept=kept + sum(products),
        inputs=float(n.stream * width),
        chosen=chosen + keep_attention,
        passing=passing + 2.0 * n.stream * width,
        shared=n.stream == 4,
    )


def vision_block(setup: Setup, patches: int) -> Block:
    """A block of the vision tower; ``patches`` is the size of the largest image."""
    vision, n = setup.model.vision_config, setup.numbers
    width, inner, c = vision.hidden_size, vision.intermediate_size, n.compute
    norm = n.stream * width + 8 + c * width  # input, mean and deviation, and the result as the next product's input
    attention = (2 + 3 + 1) * c * width + 4 * vision.num_attention_heads  # q and k turned, fused qkv, mixed values
    threshold = 2 * setup.model.text_config.hidden_size
    chosen = (
        c * width * (2 * inner >= threshold)
        + 5.0 * c * width * (2 * width >= threshold)
        + c * inner * (2 * width >= threshold)
    )
    if 4 * patches >= threshold:
        chosen += c * width + 4 * vision.num_attention_heads
    return Block(
        kept=2.0 * norm + attention + 2 * c * inner,
        inputs=float(n.stream * width),
        chosen=chosen,
        passing=2.0 * c * inner + 2.0 * n.stream * width,
        shared=True,
    )


def vision_ends(setup: Setup) -> float:
    """Bytes of a patch outside of the blocks: pixels, rotary angles, last norm, merging, projector."""
    vision, n = setup.model.vision_config, setup.numbers
    width, c = vision.hidden_size, n.compute
    pixels = 3 * vision.patch_size**2 * (1 + c)  # as they came, in uint8, and as the first product takes them
    angles = 4 * width // vision.num_attention_heads
    if "vision_tower" in setup.freeze:
        pixels, angles, last = 3 * vision.patch_size**2, 0, 0
    else:
        last = n.stream * width + 8
    if "multi_modal_projector" in setup.freeze and "vision_tower" in setup.freeze:
        return float(pixels)
    merged = c * width + 8 + c * width  # the projector's norm: its input and its result
    return float(pixels + angles + last + merged + 2 * c * width)


def decoder_ends(setup: Setup) -> float:
    """Bytes of a token outside of the layers: ids, embedding, rotary angles, last norm, hidden states of targets."""
    text, n = setup.model.text_config, setup.numbers
    embedded = n.stream * text.hidden_size  # the first layer's input, which the image features were written into
    angles = 2 * n.stream * text.qk_rope_head_dim
    return 5 * 8.0 + embedded + angles + rms_norm(text.hidden_size, n.stream) + n.compute * text.hidden_size


def mla(setup: Setup, tokens: int) -> tuple[float, float]:
    """Of multi-head latent attention: what it keeps, and what selective checkpointing keeps of that."""
    text, n = setup.model.text_config, setup.numbers
    heads, rank, rotary, c = text.num_attention_heads, text.kv_lora_rank, text.qk_rope_head_dim, n.compute
    query, value = text.qk_nope_head_dim + rotary, text.v_head_dim
    latent = 4.0 * (rank + (rotary if c == 4 else 0)) + 4 + 2.0 * c * rank
    padded = max(query, value) if setup.on_cpu else -(-max(query, value) // _FLASH_MULTIPLE) * _FLASH_MULTIPLE
    # Values are a part of what kv_b_proj wrote, or a copy of the queries' width; the result is cut to theirs again.
    values = padded if padded > value else text.qk_nope_head_dim + value
    result = padded + value if padded > value else value
    keys = padded if padded > query else query
    kept = latent + heads * (c * (2.0 * keys + values + result) + 4)
    threshold = 2 * text.hidden_size
    outputs = {
        heads * query: text.hidden_size,
        rank + rotary: text.hidden_size,
        heads * (text.qk_nope_head_dim + value): rank,
        text.hidden_size: heads * value,
    }
    chosen = sum(c * out for out, inner in outputs.items() if 2 * inner >= threshold)
    if tokens * (query + value) / value >= threshold:
        chosen += heads * (c * padded + 4)
    return kept, float(chosen)


def _routed(text: Any, n: Numbers) -> float:
    """The router in float32 and its indices, and the gate and up products of the chosen experts."""
    chosen, inner = text.num_experts_per_tok, text.moe_intermediate_size
    own_copy = 4 * text.hidden_size if n.compute != 4 else 0
    router = own_copy + 5 * text.n_routed_experts + 16 * text.n_group + 8 * text.topk_group + 4
    indices = chosen * (8 + 8 + 8 + 4)
    return router + indices + 2.0 * chosen * n.compute * inner


def _passing_experts(setup: Setup, tokens: int) -> float:
    """In their backward pass: rows and inner gradients of all chosen experts (grouped), or of one expert (sorted)."""
    text, c = setup.model.text_config, setup.numbers.compute
    width, inner = text.hidden_size, text.moe_intermediate_size
    if experts_kernel(setup) == "sorted":
        rows = UNEVEN * text.num_experts_per_tok / text.n_routed_experts
        return rows * c * (2.0 * width + 5 * inner) + 4.0 * width
    share = min(1.0, GROUPED_TOKENS / tokens)
    return share * text.num_experts_per_tok * c * (width + 5.0 * inner) + 2 * c * width


def experts_kernel(setup: Setup) -> str:
    """The kernel of the routed experts; a GPU is taken to be one that ``auto`` uses grouped products on."""
    name = setup.kernels.experts
    return ("sorted" if setup.on_cpu else "grouped_mm") if name == "auto" else name


def _swiglu(width: int, inner: int, n: Numbers) -> tuple[float, float]:
    """Gate, up, activated gate and product; selectively the results of the three products."""
    return 4.0 * n.compute * inner, float(n.compute * (2 * inner + width))


def rms_norm(width: int, stream: int) -> float:
    """Its input in float32 (a copy where the stream is not), the deviation, the normalised numbers."""
    return 4.0 * width + 4 + stream * width


def _inputs_of(width: int, n: Numbers, consumers: int) -> float:
    """Inputs of the products after a norm: one tensor for all, with autocast a copy for each."""
    return float(n.compute * width * (consumers if n.mixed else 1))
