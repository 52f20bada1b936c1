"""What answering problems takes on a device, beside the weights: by the training model itself, or by a vLLM beside it.

All responses are taken to run to their cap. The training model (``rollout=hf``) reads prompts in batches and copies
their caches into the buffers of the rows, which grow as the responses do. Three heights are compared, for evaluation
those of the greedy and of the sampled answers: when the first prompts have all been read, when others are read beside
full rows, and the last step of the longest rows.

Legend: per token or patch, as in ``activations``: L columns of the cache.
"""

from __future__ import annotations

from dataclasses import dataclass

from kimivl.memory.activations import UNEVEN, experts_kernel, mla, rms_norm
from kimivl.memory.parameters import Parameters
from kimivl.memory.setup import PATCHES_PER_TOKEN, Answers, Setup

DRAWN = 20
"""Bytes of each logit of a step: logits, scaled, probabilities, all in float32, and their sums in float64."""
GRAPHS = 1_500_000_000
"""What vLLM keeps when it sleeps, most of it captured graphs: an allowance. With ``enforce_eager`` a third of it."""
_ROOM = (128, 256)


@dataclass(frozen=True, slots=True)
class Height:
    """Bytes of the cache at one moment of generation, and of what passes then."""

    cache: float
    workspace: float
    purpose: str

    @property
    def total(self) -> float:
        return self.cache + self.workspace


def generation(setup: Setup, parameters: Parameters, asked: Answers, stack: float) -> Height:
    """The height of answering; ``stack``: adapted experts of a layer, which are made at each call.

    The cache of a vLLM is not in it: that is there at full size from the start.
    """
    text, n = setup.model.text_config, setup.numbers
    drawn = float(DRAWN * asked.rows * text.vocab_size)
    reading, read = _reading(setup, asked, stack), _read_token(setup)
    if n.mixed:  # autocast's copies are not kept here: each product makes its own
        stacks = parameters.expert_stack * n.compute / n.parameter * (experts_kernel(setup) == "grouped_mm")
        made = max(stacks, float(n.compute * text.vocab_size * text.hidden_size))
        drawn, reading = drawn + made, reading + made
    if setup.engine.kind == "vllm":
        return max(Height(0.0, drawn, "logits of a token"), Height(0.0, reading, "prompts being read"), key=_total_of)
    token = cached_numbers(setup) * n.compute
    full = float(asked.rows * token * _columns(asked))
    scores = asked.rows * text.num_attention_heads * asked.tokens * (8.0 + (n.compute if n.compute < 4 else 0))
    grown = full / text.num_hidden_layers  # a layer's buffer that is replaced by a longer one
    longest = "logits of a token" if drawn >= scores else "scores of a token"
    begun = float(asked.rows * token * (asked.prompt + _room(asked.prompt)))
    prompts = float(_prompts(setup, asked) * asked.prompt * read)
    heights = [
        Height(full, max(drawn, scores, grown) + stack, longest),
        Height(prompts, reading, "prompts being read"),
        Height(prompts + begun, begun / text.num_hidden_layers, "prompts that were read"),
    ]
    if asked.requests > asked.rows:  # rows that end together are filled together
        heights.append(Height(full + prompts, reading, "prompts being read"))
    return max(heights, key=_total_of)


def cached_numbers(setup: Setup) -> int:
    """Of a token in the cache: its latents and rotary keys in all layers."""
    text = setup.model.text_config
    return text.num_hidden_layers * (text.kv_lora_rank + text.qk_rope_head_dim)


def _total_of(height: Height) -> float:
    return height.total


def _columns(asked: Answers) -> int:
    """Of the buffers at the end (``kimivl.model.cache``): as they grow where all rows begin together, else at most."""
    if asked.requests > asked.rows:
        return asked.tokens + _room(asked.tokens)
    columns = asked.prompt + _room(asked.prompt)
    while columns < asked.tokens:
        columns += _room(columns)
    return columns


def _room(columns: int) -> int:
    return min(max(columns // 2, _ROOM[0]), _ROOM[1])


def _read_token(setup: Setup) -> int:
    """Bytes of a token in the cache of a batch of prompts, which has the dtype that the norm of the latents returns."""
    return cached_numbers(setup) * setup.numbers.stream


def _sequences(setup: Setup, asked: Answers) -> int:
    """Prompts of a batch, which reads ahead of the rows that are free."""
    return min(-(-asked.requests // asked.samples), max(1, setup.engine.prefill_tokens // asked.prompt))


def _prompts(setup: Setup, asked: Answers) -> int:
    """Prompts that have been read when all rows are filled, in whole batches."""
    batch = _sequences(setup, asked)
    return min(-(-asked.requests // asked.samples), -(-asked.prompts // batch) * batch)


def _reading(setup: Setup, asked: Answers, stack: float) -> float:
    """Workspace of reading a batch of prompts without gradients: the tower on their images, then the widest layer."""
    text, n = setup.model.text_config, setup.numbers
    sequences = _sequences(setup, asked)
    tokens = sequences * asked.prompt
    most = PATCHES_PER_TOKEN * tokens
    patches = min(most, max(pack.patches for pack in setup.packs)) if setup.patches_given else most
    layer = tokens * (_token(setup, asked.prompt) + asked.prompt) + stack  # with the mask of the batch, a byte each
    return max(patches * _patch(setup), layer) + tokens * n.stream * text.hidden_size


def _token(setup: Setup, prompt: int) -> float:
    """A token in a layer that keeps nothing: the stream before and after a norm, and attention (with the mask as it
    adds it) or an MLP."""
    text, n = setup.model.text_config, setup.numbers
    width, inner, c = text.hidden_size, text.moe_intermediate_size, n.compute
    dense = 3.0 * c * text.intermediate_size * (text.first_k_dense_replace > 0)
    rows = text.num_experts_per_tok
    # of the sorted kernel the outputs and activations of one expert
    beside = UNEVEN * rows / text.n_routed_experts if experts_kernel(setup) == "sorted" else float(rows)
    routed = c * (2.0 * inner * rows + (inner + width) * beside) + 4.0 * width + c * width
    return n.stream * width + rms_norm(width, n.stream) + max(mla(setup, 1)[0] + c * prompt, dense, routed)


def _patch(setup: Setup) -> float:
    """A patch in a block that keeps nothing, beside its pixels: as they came, in float32, as the product takes them."""
    vision, n = setup.model.vision_config, setup.numbers
    width, c = vision.hidden_size, n.compute
    pixels = 3 * vision.patch_size**2 * (5 + (c if c < 4 else 0))
    angles = 4 * width // vision.num_attention_heads
    norm = n.stream * width + 8 + c * width
    return pixels + angles + n.stream * width + norm + c * max(6.0 * width, 2.0 * vision.intermediate_size)
