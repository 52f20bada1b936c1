"""The moments of a training step at which memory may be highest, and what fills it then.

    forward's end       all activations are kept, and the gradients of the step before are still there (Lightning frees
                        them between forward and backward; with accumulation they are the sums so far)
    loss backward       blocks of logits, the gradient of the head
    layer's backward    a layer computed again, and the gradients that pass through it: at the last layer next to all
                        activations, at the first next to the gradients of all others
    vision backward     the same in the vision tower, when the decoder's gradients are all there
    last sums           of a model that is cut up: the gradients of embedding and head go to the ranks
    update              all gradients, the optimiser's workspace; no activations
    rollouts            the KV cache, and logits or prompts; no activations. A model that is cut up is whole on each
                        device while it answers by itself, or gives its weights to an engine
    evaluation          the same with the held-out problems, where there are some. There are no gradients then; after
                        the fit no optimiser states either, unless the model is cut up

The peak is the highest of them. A vLLM in the same process has weights and a cache of its own: where it sleeps, while
it answers, else at all moments.
"""

from __future__ import annotations

from dataclasses import dataclass

from kimivl.memory.activations import (
    GROUPED_TOKENS,
    decoder_ends,
    decoder_layer,
    experts_kernel,
    vision_block,
    vision_ends,
)
from kimivl.memory.generation import GRAPHS, Height, generation
from kimivl.memory.parameters import Parameters, measure
from kimivl.memory.setup import Answers, Pack, Setup
from kimivl.model.loss import block_columns

CUDA_CONTEXT = 600_000_000
"""Kernels of torch, workspaces of cuBLAS: an allowance, since what a driver takes is not the same everywhere."""
ANSWERING = ("rollouts", "evaluation")
"""Moments at which the model answers."""
COLLECTIVES = 1_000_000_000
"""Buffers of NCCL on more than one device: an allowance."""
SCRAPS, SCRAPS_PASSING = 0.01, 0.06
"""Share that the caching allocator cannot use: of what stays, and of what comes and goes. An allowance too."""


@dataclass(frozen=True, slots=True)
class Moment:
    """Bytes by row; ``workspace`` says what it is for."""

    name: str
    rows: dict[str, float]
    workspace: str = ""

    @property
    def total(self) -> float:
        return sum(self.rows.values())


@dataclass(frozen=True, slots=True)
class PackEstimate:
    """The moments of a step on the largest pack of a phase."""

    pack: Pack
    moments: tuple[Moment, ...]

    @property
    def peak(self) -> Moment:
        return max(self.moments, key=lambda moment: moment.total)

    @property
    def training(self) -> float:
        """Bytes at the height of its steps alone."""
        return max(moment.total for moment in self.moments if moment.name not in ANSWERING)


@dataclass(frozen=True, slots=True)
class Estimate:
    """Memory of a run on one device."""

    setup: Setup
    parameters: Parameters
    packs: tuple[PackEstimate, ...]

    @property
    def peak(self) -> float:
        return max(pack.peak.total for pack in self.packs)


def estimate(setup: Setup, before: Estimate | None = None) -> Estimate:
    """Where the memory of a run goes; parameters and states are taken from ``before`` where they are the same."""
    same = before is not None and _same_parameters(setup, before.setup)
    parameters = before.parameters if before is not None and same else measure(setup)
    packs = tuple(PackEstimate(pack, _moments(setup, parameters, pack)) for pack in setup.packs)
    return Estimate(setup, parameters, packs)


def _same_parameters(one: Setup, other: Setup) -> bool:
    return (
        one.model is other.model
        and (one.numbers, one.optimizer, one.freeze, one.lora, one.sharded)
        == (other.numbers, other.optimizer, other.freeze, other.lora, other.sharded)
        and (one.checkpointing == other.checkpointing or not one.numbers.mixed)
    )


@dataclass(frozen=True, slots=True)
class _Step:
    """Bytes of one forward and backward pass on a pack."""

    decoder: float
    first_layers: float
    vision: float
    rest: float
    loss_forward: float
    loss_backward: float
    layer: float
    block: float


def _step(setup: Setup, parameters: Parameters, pack: Pack) -> _Step:
    text, vision, mode = setup.model.text_config, setup.model.vision_config, setup.checkpointing
    dense = min(text.first_k_dense_replace, text.num_hidden_layers)
    sparse = text.num_hidden_layers - dense
    layers = [(dense, decoder_layer(setup, True, pack.tokens)), (sparse, decoder_layer(setup, False, pack.tokens))]
    patches = max(4, pack.patches)  # a pack without images sends four patches through the tower
    block = vision_block(setup, patches)
    trains = "vision_tower" not in setup.freeze and setup.lora is None
    decoder = sum(count * layer.held(mode) for count, layer in layers) * pack.tokens
    working = max(layer.working(mode) for count, layer in layers if count) * pack.tokens
    own_stack, stacks = _adapted_stacks(setup, parameters, sparse)
    if setup.lora is None and pack.tokens > GROUPED_TOKENS and experts_kernel(setup) == "grouped_mm":
        own_stack += parameters.expert_stack  # the parts of a pack have each a gradient of the weights, to be added
    forward, backward = _loss(setup, pack)
    return _Step(
        decoder=decoder + stacks,
        first_layers=layers[0 if dense else 1][1].held(mode) * pack.tokens,
        vision=patches * (vision.num_hidden_layers * block.held(mode) * trains + vision_ends(setup)),
        rest=pack.tokens * decoder_ends(setup),
        loss_forward=forward,
        loss_backward=backward,
        layer=working + own_stack,
        block=patches * block.working(mode) * trains,
    )


def _adapted_stacks(setup: Setup, parameters: Parameters, layers: int) -> tuple[float, float]:
    """Adapted routed experts are stack + factors, made at each call: in the layer at work (with its gradient), kept."""
    if setup.lora is None or "routed_experts" not in setup.lora["targets"]:
        return 0.0, 0.0
    stack = float(parameters.expert_stack)
    return 2 * stack, 0.0 if setup.checkpointing == "full" else layers * stack


def _loss(setup: Setup, pack: Pack) -> tuple[float, float]:
    """Workspace of the chunked loss: a block of logits; backward also hidden states' gradients in float32."""
    text, c = setup.model.text_config, setup.numbers.compute
    columns = block_columns(pack.tokens, text.vocab_size, "cpu" if setup.on_cpu else "cuda")
    block = 4.0 * pack.tokens * columns
    narrow = c / 4 if c < 4 else 0.0
    hidden = pack.tokens * text.hidden_size
    return block + 24.0 * pack.tokens, block * (1 + narrow) + hidden * (8.0 + 2 * c)


def _moments(setup: Setup, parameters: Parameters, pack: Pack) -> tuple[Moment, ...]:
    step = _step(setup, parameters, pack)
    gradients = _gradients(setup, parameters)
    kept = {"activations: decoder": step.decoder, "activations: vision": step.vision}
    everything = kept | {"activations: the rest": step.rest}
    first = {"activations: decoder": step.first_layers, "activations: vision": step.vision}
    only_vision = {"activations: vision": step.vision}
    update = parameters.update if parameters.in_backward else 0.0
    moments = [
        ("forward's end", gradients["forward"], everything, step.loss_forward, "a block of logits"),
        ("loss backward", gradients["loss"], everything, step.loss_backward + update, "logits, gradients"),
        ("last layer's backward", gradients["loss"], everything, step.layer + update, "a layer's pass"),
        ("first layer's backward", gradients["decoder"], first, step.layer + update, "a layer's pass"),
        ("vision backward", gradients["vision"], only_vision, step.block + update, "a block's pass"),
    ]
    if setup.sharded:
        moments.append(("last sums", gradients["update"], {}, 0.0, ""))
    moments.append(("update", gradients["update"], {}, float(parameters.update), "the optimiser"))
    found = [_moment(setup, parameters, *moment) for moment in moments]
    return (*found, *_answering(setup, parameters, gradients["forward"]))


def _answering(setup: Setup, parameters: Parameters, gradients: float) -> list[Moment]:
    """The moments at which the model answers, or gives its weights to an engine that does."""
    if setup.engine.kind == "elsewhere" and not setup.sharded:
        return []  # the engine is sent tensors that are there
    found = []
    if setup.rollouts is not None:
        height = _highest(setup, parameters, (setup.rollouts,))
        found.append(_answered(setup, parameters, "rollouts", gradients, height))
    if setup.held_out is not None:
        height = _highest(setup, parameters, setup.held_out.passes)
        found.append(_answered(setup, parameters, "evaluation", 0.0, height, fitted=not setup.held_out.in_fit))
    return found


def _highest(setup: Setup, parameters: Parameters, asked: tuple[Answers, ...]) -> Height:
    if setup.engine.kind == "elsewhere":
        return Height(0.0, 0.0, "weights for the engine")
    stack = _adapted_stacks(setup, parameters, 0)[0]
    heights = [generation(setup, parameters, one, stack) for one in asked]
    return max(heights, key=lambda height: height.total)


def _answered(
    setup: Setup, parameters: Parameters, name: str, gradients: float, height: Height, fitted: bool = False
) -> Moment:
    cache = {"KV cache": height.cache} if setup.engine.kind == "hf" else {}
    return _moment(setup, parameters, name, gradients, cache, height.workspace, height.purpose, fitted)


def _gradients(setup: Setup, parameters: Parameters) -> dict[str, float]:
    """What is there of the gradients at each moment."""
    if parameters.in_backward:
        one = float(parameters.largest_gradient)
        return {"forward": 0.0, "loss": one, "decoder": one, "vision": one, "update": one}
    full = float(parameters.gradients)
    if setup.sharded and setup.accumulate > 1:
        return dict.fromkeys(("forward", "loss", "decoder", "vision", "update"), full)
    if setup.accumulate > 1:  # sums so far, and the largest that is to be added
        more = full + parameters.largest_gradient
        return {"forward": full, "loss": more, "decoder": more, "vision": more, "update": full}
    decoder = float(parameters.part_gradients["language_model"])
    before = full - parameters.part_gradients["vision_tower"]
    if setup.sharded:
        return {"forward": full, "loss": 0.0, "decoder": decoder, "vision": before, "update": full}
    last = max(parameters.head_gradient, parameters.expert_stack if setup.lora is None else 0)
    loss = min(full, float(parameters.head_gradient + last))
    return {"forward": full, "loss": loss, "decoder": decoder, "vision": before, "update": full}


def _moment(
    setup: Setup,
    parameters: Parameters,
    name: str,
    gradients: float,
    passing: dict[str, float],
    workspace: float,
    purpose: str,
    fitted: bool = False,
) -> Moment:
    rows: dict[str, float] = {"weights": float(parameters.weights), "gradients": gradients}
    if setup.devices > 1 and not setup.sharded and not fitted:
        rows["gradient buckets"] = float(parameters.gradients)
    if setup.sharded or not fitted:
        rows |= {f"optimiser: {kind}": float(size) for kind, size in parameters.states.items()}
    rows |= _engine(setup, parameters, name)
    stays = sum(rows.values())
    if parameters.casts and name not in ("update", *ANSWERING):
        rows["weights in half"] = float(parameters.casts)
    if parameters.groups is not None:
        whole = parameters.numel * setup.numbers.parameter
        rows |= parameters.groups.rows(name, whole, parameters.head_gradient)
    rows |= passing | {"workspace": workspace}
    goes = sum(rows.values()) - stays
    if not setup.on_cpu:
        rows["CUDA context"] = float(CUDA_CONTEXT + (COLLECTIVES if setup.devices > 1 else 0))
        rows["allocator's scraps"] = SCRAPS * stays + SCRAPS_PASSING * goes
    return Moment(name, rows, purpose)


def _engine(setup: Setup, parameters: Parameters, name: str) -> dict[str, float]:
    """What a vLLM in this process has of its own; it is started by the first that asks it."""
    engine = setup.engine
    if engine.kind != "vllm" or (setup.rollouts is None and setup.held_out is None):
        return {}
    rows = {} if setup.on_cpu else {"engine: graphs": GRAPHS / (3.0 if engine.eager else 1.0)}
    if name not in ANSWERING and engine.sleeps:
        return rows
    return {"engine: weights": float(parameters.numel * setup.engine_number), "engine: KV cache": engine.cache} | rows
