"""The typed schema of what every run has, and the checks that no schema can express.

Swappable objects are YAML with ``_target_``; their schema is the constructor's signature, and ``check_targets``
compares the two, so a misspelt or mistyped key is named before anything starts.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import types
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException, InstantiationException
from hydra.types import RunMode
from omegaconf import MISSING, DictConfig, OmegaConf

CONF = Path(__file__).parents[1] / "conf"
RUN_FILE, METRICS_FILE, HISTORY_FILE = "run.json", "metrics.json", "history.jsonl"
AUDIT = "audit"
"""What a run leaves in its folder: its configuration and status, its final figures, every logged figure, and
the folder that says which sample was trained on when."""

_INSTANTIATE_KEYS = {"_target_", "_partial_", "_convert_", "_args_", "_recursive_"}

_PLANNED = {"max_epochs", "max_steps", "max_time", "limit_train_batches", "overfit_batches"}


@dataclass
class TrainConfig:
    """Top-level keys of a run; the groups below them are YAML."""

    stage: str = MISSING
    name: str = MISSING
    seed: int = MISSING
    ckpt_path: str | None = None
    init_from: str | None = None
    optimized_metric: str = MISSING
    test: bool = True
    evaluation: Any = MISSING
    trainer: Any = MISSING
    model: Any = MISSING
    data: Any = MISSING
    module: Any = MISSING
    kernels: Any = MISSING
    router: Any = MISSING
    lora: Any = None
    activation_checkpointing: str = MISSING
    optimizer: Any = MISSING
    rollout: Any = MISSING
    reward: Any = MISSING
    objective: Any = None
    sampler: Any = None
    assess: Any = None
    synthesize: Any = None
    logger: Any = None
    callbacks: Any = None
    paths: dict[str, str] = field(default_factory=dict)


class Interrupted(BaseException):
    """The run was asked to stop; the message says what is saved and how to go on. Like KeyboardInterrupt it is none of
    the errors that code in between may handle.

    ``code``: exit code of the process. ``requeued``: SLURM runs the job again, so nobody is told that it is over.
    """

    code = 130
    requeued = False


def register() -> None:
    """Make the schema known to Hydra under the name ``schema``."""
    ConfigStore.instance().store(name="schema", node=TrainConfig)


def compose_run(*overrides: str) -> DictConfig:
    """The configuration that ``python train.py OVERRIDES`` would have, for notebooks and tests."""
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", overrides=list(overrides))


@contextmanager
def report_errors() -> Iterator[None]:
    """Say foreseeable errors in one sentence and leave with exit code 2 (an interruption: 130), no traceback.

    In a multirun Hydra says it, after the other jobs have run.
    """
    try:
        yield
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)
    except (ValueError, Interrupted, InstantiationException) as caught:
        # Hydra wraps what a constructor raises; the constructor's own sentence names the key.
        wrapped = isinstance(caught, InstantiationException) and isinstance(caught.__cause__, ValueError)
        error = caught.__cause__ if wrapped else caught
        stopped = isinstance(error, Interrupted)
        # A job that is stopped ends a sweep inside this process; submitit's jobs have processes of their own.
        returns = not isinstance(error, Interrupted) or ("SUBMITIT_EXECUTOR" in os.environ and not error.requeued)
        if HydraConfig.get().mode == RunMode.MULTIRUN and returns:
            raise CompactHydraException(str(error)) from error
        print(f"\n{'stopped' if stopped else 'error'}: {error}", file=sys.stderr)
        sys.exit(error.code if isinstance(error, Interrupted) else 2)


def validate(cfg: DictConfig) -> None:
    """Check what crosses the groups, and every target's keys and types.

    Raises:
        ValueError: naming the first wrong key and what it takes.
    """
    OmegaConf.resolve(cfg)
    if cfg.data.get("phases") is not None and len(cfg.data.phases) == 0:
        raise ValueError("data.phases is empty: give at least one {epochs, lr, max_length}")
    for key in sorted(_PLANNED & set(cfg.trainer)):
        raise ValueError(f"trainer.{key}: the length of a run is planned from data.phases; set epochs there")
    if str(cfg.trainer.get("precision")).startswith("16"):
        raise ValueError(
            f"trainer.precision={cfg.trainer.precision}: fp16 has not the range for these gradients; use bf16-true or "
            "bf16-mixed"
        )
    _check_in_backward(cfg)
    # What `module` refers to is found there too: the shortest name is the one that a user types.
    for key, problem in sorted(check_targets(cfg), key=lambda mistake: mistake[0].count(".")):
        own = key.removeprefix("module.")
        raise ValueError(f"{own if own in cfg else key}: {problem}")
    _check_trainer(cfg.trainer)


def _check_trainer(trainer: DictConfig) -> None:
    """What Lightning takes without a word, and makes something else of than it seems to say."""
    for key, wanted in (
        ("gradient_clip_val", "a number above 0, or null for no clipping"),
        ("accumulate_grad_batches", "1 or more"),
        ("check_val_every_n_epoch", "1 or more; data.val_shards=null leaves validation out"),
    ):
        if (value := trainer.get(key)) is not None and not value > 0:
            raise ValueError(f"trainer.{key}={value}: give {wanted}")
    if trainer.get("fast_dev_run"):
        raise ValueError("trainer.fast_dev_run ends as if all was trained; debug=miniature is a whole run in seconds")
    if isinstance(name := trainer.get("strategy"), str) and name not in ("auto", "ddp"):
        raise ValueError(
            f"trainer.strategy={name}: type strategy=fsdp (without trainer.) for FSDP2, or strategy=auto for DDP"
        )


def _check_in_backward(cfg: DictConfig) -> None:
    """An optimiser that steps in the backward pass has each gradient once: nothing can add to it or clip it."""
    if not str(cfg.optimizer.get("_target_")).endswith("MuonAdamWInBackward"):
        return
    ranks = "its steps do not wait for the gradients of other ranks; optimizer=muon strategy=fsdp shares the memory out"
    for key, wanted, instead in (
        ("devices", 1, ranks),
        ("num_nodes", 1, ranks),
        ("accumulate_grad_batches", 1, "longer packs (data.phases) make larger steps"),
        ("gradient_clip_val", None, "it clips by itself, as optimizer.clip and optimizer.clip_norm say"),
    ):
        if cfg.trainer.get(key, wanted) != wanted:
            value = "null" if wanted is None else wanted
            raise ValueError(
                f"trainer.{key}={cfg.trainer[key]}: optimizer=muon_in_backward needs trainer.{key}={value}; {instead}"
            )


def check_targets(node: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every mistake in the keys and simple types of ``_target_`` nodes under ``node``, as (key, what is wrong)."""
    if isinstance(node, DictConfig):
        if node.get("_target_") is not None:
            yield from _check_target(node, path)
        for name in map(str, node):
            yield from check_targets(node[name], f"{path}.{name}" if path else name)
    elif OmegaConf.is_list(node):
        for number, item in enumerate(node):
            yield from check_targets(item, f"{path}.{number}")


def _check_target(node: DictConfig, path: str) -> Iterator[tuple[str, str]]:
    try:
        target = _locate(node["_target_"])
    except (ImportError, AttributeError) as error:
        yield f"{path}._target_", f"{node['_target_']} cannot be imported: {error}"
        return
    parameters, open_ended = _parameters(target)
    for name in map(str, node):
        if name in _INSTANTIATE_KEYS:
            continue
        if name not in parameters:
            if not open_ended:
                yield f"{path}.{name}", f"{node['_target_']} takes no such key; it takes {', '.join(parameters)}"
        elif not _accepts(parameters[name], node[name]):
            yield f"{path}.{name}", f"{node[name]!r} is not {_spell(parameters[name])}"


def _locate(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    if not module:
        raise ImportError("give the module too, as package.module.Name")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError:
        owner, _, method = module.rpartition(".")  # a class's own constructor, such as Class.from_x
        if not owner:
            raise
        return getattr(getattr(importlib.import_module(owner), method), attribute)


def _parameters(target: Any) -> tuple[dict[str, Any], bool]:
    """Parameters by name with their types, and whether any other key is taken too.

    A subclass that hands ``**kwargs`` on to its base has the base's parameters besides its own.
    """
    found: dict[str, Any] = {}
    owners = [cls for cls in target.__mro__ if "__init__" in vars(cls)] if inspect.isclass(target) else [target]
    for owner in owners:
        function = vars(owner)["__init__"] if inspect.isclass(owner) else owner
        signature = inspect.signature(function)
        hints = _hints(function)
        for name, parameter in signature.parameters.items():
            if name != "self" and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                found.setdefault(name, hints.get(name, Any))
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.parameters.values()):
            return found, False
    return found, True


def _hints(function: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function)
    except (NameError, TypeError):  # annotations of a library that exist for type checkers only
        return {}


def _accepts(hint: Any, value: Any) -> bool:
    """Whether a YAML value fits a type; only the simple types are judged, anything else passes."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_accepts(option, value) for option in typing.get_args(hint))
    if hint is type(None):
        return value is None
    if origin is typing.Literal:
        return value in typing.get_args(hint)
    if hint is bool:
        return isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is str:
        return isinstance(value, str)
    return True


def _spell(hint: Any) -> str:
    """What a value must be, after "is not": "a float", "one of none, full", "a str or null"."""
    if typing.get_origin(hint) is typing.Literal:
        return f"one of {', '.join(map(str, typing.get_args(hint)))}"
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_spell(option) for option in typing.get_args(hint))
    if hint is type(None):
        return "null"
    return f"a {getattr(hint, '__name__', hint)}"
