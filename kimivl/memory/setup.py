"""What of a run's config decides about memory.

Legend: B bytes of a number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from kimivl.model import Kernels, KimiVLConfig

_PRECISIONS = {
    "32-true": (4, 4),
    "32": (4, 4),
    "bf16-mixed": (4, 2),
    "bf16-true": (2, 2),
}
EVALUATION_BATCH = 128
"""Held-out problems that are answered together (``kimivl.stages.datamodule``)."""
PATCHES_PER_TOKEN = 4
"""Image patches of an image token: the most that a pack can hold for each of its tokens."""


@dataclass(frozen=True, slots=True)
class Numbers:
    """Bytes of a parameter, of the result of a matrix product, and of a number of the residual stream."""

    parameter: int
    compute: int

    @property
    def stream(self) -> int:
        """Autocast leaves the stream in float32: float32 embeddings and norms, to which half-precision is added."""
        return self.parameter

    @property
    def mixed(self) -> bool:
        return self.parameter != self.compute


@dataclass(frozen=True, slots=True)
class Pack:
    """The largest pack of a phase; all of its tokens taken as supervised, its image tokens among them."""

    label: str
    tokens: int
    patches: int
    phase: int = 0


@dataclass(frozen=True, slots=True)
class Answers:
    """Responses that an engine is asked for together: ``rows`` of the ``requests`` at a time.

    ``prompt`` and ``new``: tokens of a problem and of a response at its cap; ``samples``: responses to a problem.
    """

    requests: int
    rows: int
    samples: int
    prompt: int
    new: int

    @property
    def tokens(self) -> int:
        return self.prompt + self.new

    @property
    def prompts(self) -> int:
        """Different ones, of the rows."""
        return -(-self.rows // self.samples)

    def within(self, rows: int) -> Answers:
        return replace(self, rows=min(self.requests, rows))


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Held-out problems: ``passes`` over a batch of them, greedy and sampled. There are no gradients meanwhile.

    ``in_fit``: some are answered during training. After the fit Lightning has moved the optimiser's states to the host,
    unless the model is cut up.
    """

    passes: tuple[Answers, ...]
    in_fit: bool


@dataclass(frozen=True, slots=True)
class Engine:
    """Who answers: ``hf`` the training model, ``vllm`` beside it on its device, ``elsewhere`` on another.

    Of a vLLM: ``cache`` bytes of keys and values, bytes of a ``number`` of its weights (0: as the trainer's), whether
    it ``sleeps`` while the model trains, whether it is ``eager`` (no captured graphs), and the ``length`` of a prompt
    with its response that it must have room for (0: the model's own limit).
    """

    kind: Literal["hf", "vllm", "elsewhere"] = "hf"
    max_rows: int = 256
    prefill_tokens: int = 8192
    cache: float = 0.0
    number: int = 0
    sleeps: bool = False
    eager: bool = False
    length: int = 0


@dataclass(frozen=True, slots=True)
class Setup:
    """See the fields of the same names in ``conf/train.yaml``.

    ``sharded``: parameters, gradients and states are cut up over all ``devices`` (``strategy=fsdp``).
    ``max_accumulate``: the packs that an update can be dealt to; ``patches_given``: not those that the config allows.
    """

    model: KimiVLConfig
    numbers: Numbers
    packs: tuple[Pack, ...]
    optimizer: dict[str, Any]
    checkpointing: str = "none"
    kernels: Kernels = Kernels()
    freeze: tuple[str, ...] = ()
    lora: dict[str, Any] | None = None
    on_cpu: bool = False
    accumulate: int = 1
    devices: int = 1
    sharded: bool = False
    rollouts: Answers | None = None
    held_out: HeldOut | None = None
    engine: Engine = Engine()
    max_accumulate: int = 1
    patches_given: bool = False

    @property
    def engine_number(self) -> int:
        """Bytes of a number of an engine's own weights."""
        return self.engine.number or self.numbers.parameter

    @property
    def asked(self) -> tuple[Answers, ...]:
        """All that an engine is asked for in the run."""
        rollouts = () if self.rollouts is None else (self.rollouts,)
        return rollouts if self.held_out is None else (*rollouts, *self.held_out.passes)

    @classmethod
    def of(cls, cfg: Mapping[str, Any], patches: int | None = None, prompt_tokens: int = 1024) -> Setup:
        """From a resolved config in plain containers.

        Args:
            patches: image patches of a pack, instead of the most that the config allows.
            prompt_tokens: of a problem of RL or of evaluation, which no config knows; its image tokens among them.

        Raises:
            ValueError: for a config that does not say what is needed, naming the key.
        """
        trainer, data = cfg["trainer"], cfg["data"]
        sharded = is_sharded(trainer)
        if sharded is None:
            raise ValueError(
                f"trainer.strategy={_strategy(trainer)}: the estimate knows strategy=auto and strategy=fsdp"
            )
        precision = str(trainer["precision"])
        if precision not in _PRECISIONS:
            raise ValueError(f"trainer.precision={precision}: the estimate knows {', '.join(_PRECISIONS)}")
        devices = _devices(trainer)
        engine = _engine(cfg["rollout"], trainer["accelerator"] == "cpu")
        rollouts = _rollouts(data, devices, engine, prompt_tokens) if "problems" in data else None
        accumulate = max(int(trainer["accumulate_grad_batches"]), _packs_of_update(data, rollouts, devices))
        return cls(
            model=_model(cfg),
            numbers=Numbers(*_PRECISIONS[precision]),
            packs=_packs(data, accumulate * devices, rollouts, patches, prompt_tokens),
            optimizer=dict(cfg["optimizer"]),
            checkpointing=cfg["activation_checkpointing"],
            kernels=Kernels(**{name: kernel for name, kernel in cfg["kernels"].items() if name[0] != "_"}),
            freeze=tuple(cfg["module"]["freeze"] or ()),
            lora=cfg["lora"],
            on_cpu=trainer["accelerator"] == "cpu",
            accumulate=accumulate,
            devices=devices,
            sharded=sharded,
            rollouts=rollouts,
            held_out=_held_out(cfg, engine, prompt_tokens),
            engine=engine,
            max_accumulate=(
                max(1, data["problems"] * data["responses"] // (data["updates"] * devices)) if rollouts else accumulate
            ),
            patches_given=patches is not None,
        )


def _model(cfg: Mapping[str, Any]) -> KimiVLConfig:
    fields = {name: value for name, value in cfg["model"].items() if name[0] != "_"}
    if fields.get("vocab_size") is None:
        # A recipe of a new model takes its vocabulary from the tokenizer, which the task makes of this size.
        size = (cfg["data"].get("prepare") or {}).get("vocab_size")
        if size is None:
            raise ValueError("model.vocab_size is null and no tokenizer is read here: give model.vocab_size=N")
        fields |= {"vocab_size": size, "media_placeholder_token_id": size - 1}
    return KimiVLConfig(**fields)


def is_sharded(trainer: Mapping[str, Any]) -> bool | None:
    """Whether the model is cut up over the devices, rather than whole on each; None where nothing is known of it."""
    name = _strategy(trainer)
    if name in ("auto", "ddp") or name.startswith("ddp_"):
        return False
    return True if name == "ShardedStrategy" else None


def _strategy(trainer: Mapping[str, Any]) -> str:
    strategy = trainer.get("strategy", "auto")
    return strategy["_target_"].rpartition(".")[2] if isinstance(strategy, Mapping) else str(strategy)


def _devices(trainer: Mapping[str, Any]) -> int:
    devices = trainer["devices"]
    count = len(devices) if isinstance(devices, list) else devices
    nodes = int(trainer["num_nodes"])
    return max(1, int(count) * nodes) if isinstance(count, int) and count > 0 else 2  # "auto", -1: taken as several


def _packs(
    data: Mapping[str, Any], dealt: int, rollouts: Answers | None, patches: int | None, prompt_tokens: int
) -> tuple[Pack, ...]:
    phases = data.get("phases")
    if not phases:
        raise ValueError("data.phases is empty: give at least one {epochs, lr, max_length}")
    if rollouts is not None:
        return (_experience_pack(data, dealt, rollouts, patches, prompt_tokens),)
    packs = []
    for number, phase in enumerate(phases):
        length = phase.get("max_length")
        if not length:
            raise ValueError(f"data.phases.{number}.max_length is missing: the length of a pack decides its memory")
        most = min(phase.get("max_patches") or math.inf, PATCHES_PER_TOKEN * length)
        most = int(most) if patches is None else patches
        packs.append(Pack(f"{_thousands(length)} pack", length, most, number))
    return tuple(packs)


def _experience_pack(
    data: Mapping[str, Any], dealt: int, rollouts: Answers, patches: int | None, prompt_tokens: int
) -> Pack:
    """An iteration's responses, all at the cap, over its updates, each ``dealt`` to so many packs; a problem's image
    goes once."""
    packs = data["updates"] * dealt
    responses = -(-data["problems"] * data["responses"] // packs)
    tokens = responses * rollouts.tokens
    images = -(-responses // data["responses"])
    most = images * prompt_tokens * PATCHES_PER_TOKEN
    return Pack(f"{responses} response{'s' * (responses > 1)}", tokens, most if patches is None else patches)


def _packs_of_update(data: Mapping[str, Any], rollouts: Answers | None, devices: int) -> int:
    """Packs that an RL update takes on a device so that none passes ``data.max_length``, all responses at the cap."""
    if rollouts is None or not data.get("max_length"):
        return 1
    responses = -(-data["problems"] * data["responses"] // (data["updates"] * devices))
    return math.ceil(responses / max(1, data["max_length"] // rollouts.tokens))


def _rollouts(data: Mapping[str, Any], devices: int, engine: Engine, prompt_tokens: int) -> Answers:
    """A device answers its share of the problems."""
    requests = -(-data["problems"] // devices) * data["responses"]
    return _answers(requests, data["responses"], prompt_tokens, data["max_new_tokens"], engine)


def _answers(requests: int, samples: int, prompt: int, new: int, engine: Engine) -> Answers:
    return Answers(requests, min(requests, engine.max_rows), samples, prompt, new)


def _held_out(cfg: Mapping[str, Any], engine: Engine, prompt_tokens: int) -> HeldOut | None:
    """As ``kimivl.run`` and the datamodules decide it: validation where there are problems for it, and a test where
    there are and ``test`` is true. How many problems there are is not known: a full batch of them."""
    data, evaluation = cfg["data"], cfg["evaluation"]
    validated, tested = bool(data.get("val_shards")), bool(data.get("test_shards") and cfg.get("test"))
    if not validated and not tested:
        return None
    every = cfg["trainer"].get("check_val_every_n_epoch") or 1
    epochs = sum(phase["epochs"] for phase in data["phases"])
    passes = [
        _answers(EVALUATION_BATCH * samples, samples, prompt_tokens, evaluation["max_new_tokens"], engine)
        for samples in dict.fromkeys((1, evaluation["samples"] or 1))
    ]
    return HeldOut(tuple(passes), in_fit=validated and epochs >= every)


def _engine(rollout: Mapping[str, Any], on_cpu: bool) -> Engine:
    """Of the engines that are not known here, nothing is known to be on the device."""
    name = str(rollout.get("_target_", "")).rpartition(".")[2]
    rows = rollout.get("max_rows") or 256
    if name == "HFRolloutEngine":
        return Engine("hf", rows, rollout.get("prefill_tokens") or 8192)
    if name != "VLLMRolloutEngine":
        return Engine("elsewhere")
    dtype = rollout.get("dtype")
    return Engine(
        "vllm",
        rows,
        cache=1e9 * float(rollout.get("kv_cache_gb") or 1),
        number=0 if dtype is None else 4 if dtype == "float32" else 2,
        sleeps=bool(rollout.get("sleep", True)) and not on_cpu,
        eager=bool(rollout.get("enforce_eager")) or on_cpu,
        length=rollout.get("max_model_len") or 0,
    )


def _thousands(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else f"{tokens:,}"
