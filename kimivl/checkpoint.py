"""Models between stages: the official format in and out, ``init_from``, and what a run resumes from.

A run takes its start from the first of these that it has:

1. its own unfinished ``checkpoints/last.ckpt`` (an interrupted run, typed again or requeued, goes on);
2. ``ckpt_path`` (``last`` is the run's own; everything is restored, the optimiser and the data position too);
3. ``init_from`` (a folder in the official format; weights only);
4. fresh weights from ``model=``.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from kimivl.model import KimiVLConfig, KimiVLForConditionalGeneration, KimiVLImageProcessor, KimiVLProcessor
from kimivl.model.tokenizer import load_tokenizer

LAST = Path("checkpoints/last.ckpt")
MODEL = Path("model")
_SIZES = [(part, name) for part in ("text_config", "vision_config") for name in ("hidden_size", "num_hidden_layers")]
_PREVIOUS_STAGE = {"long_cot": "sft", "rl": "long_cot"}


def load_processor(folder: str | Path) -> KimiVLProcessor:
    """Tokenizer and image processor of a model folder; a folder with a tokenizer only gets the official image one."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"data.processor={folder}: there is no such folder; it must hold a tokenizer")
    tokenizer = load_tokenizer(folder)
    if (folder / "preprocessor_config.json").exists():
        return KimiVLProcessor(KimiVLImageProcessor.from_pretrained(folder), tokenizer)
    return KimiVLProcessor(KimiVLImageProcessor(), tokenizer)


def build_model(
    config: KimiVLConfig, init_from: str | None, processor: KimiVLProcessor
) -> KimiVLForConditionalGeneration:
    """The model that a stage trains: from ``init_from`` where given, else fresh with the shapes of ``config``.

    Raises:
        ValueError: when the model in ``init_from`` is of another size than ``config`` says.
    """
    if init_from is None:
        return KimiVLForConditionalGeneration(config.with_tokenizer(processor.tokenizer))
    model = KimiVLForConditionalGeneration.from_pretrained(init_from).train()
    for part, name in _SIZES:
        found, wanted = (getattr(getattr(c, part), name) for c in (model.config, config))
        if found != wanted:
            raise ValueError(
                f"init_from={init_from} has {part}.{name}={found}, but model.{part}.{name} is {wanted}; "
                "choose the model= that the folder was made with"
            )
    return model


def check_init_from(stage: str, init_from: str | None, name: str) -> None:
    """Refuse a stage that has nothing to begin from, with the command that makes it.

    Raises:
        ValueError: ``init_from`` is missing where the stage needs it, or names no model folder.
    """
    previous = _PREVIOUS_STAGE.get(stage)
    named = "" if name == "digits" else f" name={name}"
    remedy = f"make it with: python train.py stage={previous}{named}" if previous else "give a folder with a model"
    if init_from is None:
        if previous:
            raise ValueError(
                f"stage={stage} starts from the model of stage={previous}, but init_from is null; {remedy}"
            )
        return
    config = Path(init_from) / "config.json"
    if not config.is_file():
        raise ValueError(f"init_from={init_from}: no model there (config.json is missing); {remedy}")
    try:
        kind = json.loads(config.read_text()).get("model_type")
    except ValueError as error:
        raise ValueError(f"init_from={init_from}: config.json is not JSON ({error}); {remedy}") from error
    if kind != KimiVLConfig.model_type:
        raise ValueError(f"init_from={init_from}: a {kind!r} model, but kimivl trains {KimiVLConfig.model_type!r}")


def export_model(model: KimiVLForConditionalGeneration, processor: Any, folder: Path) -> None:
    """Write model and processor in the official format, whole or not at all."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    model.save_pretrained(temporary)
    processor.save_pretrained(temporary)
    old = folder.with_name(f".{folder.name}.old.{os.getpid()}")
    if folder.exists():
        folder.replace(old)
    temporary.replace(folder)
    shutil.rmtree(old, ignore_errors=True)


def resume_path(output_dir: Path, ckpt_path: str | None, unfinished: bool) -> Path | None:
    """The Lightning checkpoint to resume from, or None to start from ``init_from`` or fresh.

    Args:
        unfinished: the run in ``output_dir`` was interrupted (``run.json`` says so).
    """
    last = output_dir / LAST
    if unfinished and last.is_file():
        return last
    if ckpt_path is None:
        return None
    path = last if ckpt_path == "last" else Path(ckpt_path)
    if not path.is_file():
        raise ValueError(
            f"ckpt_path={ckpt_path}: there is no checkpoint at {path}; leave ckpt_path out to start from the beginning"
        )
    return path
