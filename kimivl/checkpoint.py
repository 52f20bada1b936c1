"""Models between stages: the official format in and out, ``init_from``, and what a run resumes from.

A run takes its start from the first of these that it has:

1. its own unfinished ``checkpoints/last.ckpt`` (an interrupted run, typed again or requeued, goes on);
2. ``ckpt_path`` (``last`` is the run's own; everything is restored, the optimiser and the data position too);
3. ``init_from`` (a folder in the official format; weights only);
4. fresh weights from ``model=``.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from kimivl.model import KimiVLConfig, KimiVLForConditionalGeneration, KimiVLImageProcessor, KimiVLProcessor
from kimivl.model.official_writing import sync
from kimivl.model.parallel import assembled
from kimivl.model.tokenizer import load_tokenizer
from kimivl.rl.types import Policy
from kimivl.runtime import interruption, ranks

LAST = Path("checkpoints/last.ckpt")
MODEL = Path("model")
_SIZES = [(part, name) for part in ("text_config", "vision_config") for name in ("hidden_size", "num_hidden_layers")]
_SIZES += [("text_config", name) for name in ("n_routed_experts", "moe_intermediate_size", "num_attention_heads")]
_IMAGE_SETTINGS = ("preprocessor_config.json", "processor_config.json")  # the official file, and transformers' own
_HERE, _RENAME_EXCHANGE = -100, 2  # AT_FDCWD and the flag of Linux' renameat2
_PREVIOUS_STAGE = {"long_cot": "sft", "rl": "long_cot"}


def load_processor(folder: str | Path) -> KimiVLProcessor:
    """Tokenizer and image processor of a model folder; a folder with a tokenizer only gets the official image one."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"data.processor={folder}: there is no such folder; it must hold a tokenizer")
    tokenizer = load_tokenizer(folder)
    if any((folder / name).is_file() for name in _IMAGE_SETTINGS):
        return KimiVLProcessor(KimiVLImageProcessor.from_pretrained(folder), tokenizer)
    return KimiVLProcessor(KimiVLImageProcessor(), tokenizer)


def build_model(
    config: KimiVLConfig, init_from: str | None, processor: KimiVLProcessor
) -> KimiVLForConditionalGeneration:
    """The model that a stage trains: from ``init_from`` where given, else fresh with the shapes of ``config``.

    It is made on torch's default device in torch's default dtype: Lightning sets both around ``configure_model``.

    Raises:
        ValueError: when the model in ``init_from`` is of another size than ``config`` says.
    """
    if init_from is None:
        return KimiVLForConditionalGeneration(config.with_tokenizer(processor.tokenizer))
    _check_sizes(KimiVLConfig.from_pretrained(init_from), config, init_from)
    # In the run's precision: that of the files is for the hand-over, which goes back to it.
    return KimiVLForConditionalGeneration.from_pretrained(init_from, dtype=torch.get_default_dtype()).train()


def _check_sizes(found: KimiVLConfig, wanted: KimiVLConfig, init_from: str) -> None:
    for part, name in _SIZES:
        has, asked = (getattr(getattr(config, part), name) for config in (found, wanted))
        if has != asked:
            raise ValueError(
                f"init_from={init_from} has {part}.{name}={has}, but model.{part}.{name} is {asked}; "
                "choose the model= that the folder was made with"
            )


def check_init_from(stage: str, init_from: str | None, name: str) -> None:
    """Refuse a stage that has nothing to begin from, with the command that makes it.

    Raises:
        ValueError: ``init_from`` is missing where the stage needs it, or names no model folder.
    """
    previous = _PREVIOUS_STAGE.get(stage)
    named = "" if name == "digits" else f" name={name}"
    remedy = (
        f"make it with: python train.py stage={previous}{named}"
        if previous
        else "give a folder of this machine with a model"
    )
    if init_from is None:
        if previous:
            raise ValueError(
                f"stage={stage} starts from the model of stage={previous}, but init_from is null; {remedy}"
            )
        return
    put_back(Path(init_from))
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
    """Write model (adapters merged) and processor in the official format, whole or not at all.

    All is written into a folder beside ``folder``, which then takes its place; whatever stops the export leaves the
    folder of before.
    """
    put_back(folder)
    fresh = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)  # of an export that was killed
    fresh.mkdir(parents=True)
    try:
        model.save_pretrained(fresh)
        processor.save_pretrained(fresh)
        for file in fresh.iterdir():
            sync(file)
        sync(fresh)
        put_in_place(folder, fresh)
    finally:
        put_back(folder)
        shutil.rmtree(fresh, ignore_errors=True)


def hand_over(model: KimiVLForConditionalGeneration, processor: Any, folder: Path) -> None:
    """``export_model`` by rank 0, of a model that may be cut up over the ranks. All ranks call this.

    A signal ends the writing, which takes minutes for a large model; the folder is then as it was before.
    """
    # Signals come to ranks at different moments: whatever each was asked, all of them meet.
    with assembled(model):
        ranks.share(lambda: interruption.until_asked(lambda: export_model(model, processor, folder)))


def describe_model(model: KimiVLForConditionalGeneration, processor: Any, folder: Path) -> None:
    """Write what ``export_model`` writes, but the weights: for an engine that is sent them."""
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    processor.save_pretrained(folder)


def put_back(folder: Path) -> None:
    """Bring back the folder of before, where a run was killed between the two renames of ``put_in_place``."""
    if (old := _set_aside(folder)).exists() and not folder.exists():
        old.rename(folder)


def put_in_place(target: Path, fresh: Path) -> None:
    """Put ``fresh`` in the place of ``target``, which is removed; each may be a file or a folder."""
    if not target.exists() or not (target.is_dir() or fresh.is_dir()):
        fresh.replace(target)
    elif _exchange(target, fresh):
        remove(fresh)
    else:
        old = _set_aside(target)
        remove(old)
        target.rename(old)
        fresh.rename(target)
        remove(old)
    sync(target.parent)


def remove(path: Path) -> None:
    """Remove a file or a folder, where it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _set_aside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two folders in one step; False where the system or its file system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:
        return False
    return rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _RENAME_EXCHANGE) == 0


def resume_path(output_dir: Path, ckpt_path: str | None, unfinished: bool) -> Path | None:
    """The Lightning checkpoint to resume from, or None to start from ``init_from`` or fresh.

    It is a file, or a folder where the model was cut up over ranks.

    Args:
        unfinished: the run in ``output_dir`` was interrupted (``run.json`` says so).
    """
    last = output_dir / LAST
    put_back(last)
    if unfinished and last.exists():
        return last
    if ckpt_path is None:
        return None
    path = last if ckpt_path == "last" else Path(ckpt_path).absolute()
    put_back(path)
    if not path.exists():
        raise ValueError(
            f"ckpt_path={ckpt_path}: there is no checkpoint at {path}; leave ckpt_path out to start from the beginning"
        )
    return path


def policy_of(model: KimiVLForConditionalGeneration, processor: KimiVLProcessor, stop_id: int) -> Policy:
    """A model with its processor, as rollout engines see it."""
    return Policy(
        model=model,
        decode=processor.tokenizer.decode,
        stop_id=stop_id,
        pad_id=processor.tokenizer.pad_token_id,
        never=(model.media_id,),
        export=lambda folder: export_model(model, processor, folder),
        describe=lambda folder: describe_model(model, processor, folder),
    )
