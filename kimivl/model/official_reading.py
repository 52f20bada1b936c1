"""Reading official checkpoints: everything is checked from the files' headers before anything is allocated or copied.

A safetensors file is 8 bytes with the length of a JSON header, the header, and the tensors one behind the other. The
header says each tensor's dtype, shape and place, so names, shapes, dtypes and truncation are known from a few hundred
kilobytes of a checkpoint of 33 GB.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SAVING = ".saving"
"""The subfolder in which a save collects its files."""
LENGTH_BYTES = 8
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
"""What a tensor may be stored as; also the order, from behind, in which safetensors lays tensors out."""

_AGAIN = "copy or download the file again"
_COUNTED = {
    "experts": re.compile(r"\.mlp\.experts\.(\d+)\."),
    "language model layers": re.compile(r"^language_model\.model\.layers\.(\d+)\."),
    "vision tower blocks": re.compile(r"^vision_tower\.encoder\.blocks\.(\d+)\."),
}


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor as a file's header describes it; `end` is its last byte's place behind the header."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    end: int


def read_headers(folder: Path) -> dict[str, Stored]:
    """All tensors of a checkpoint, file by file in the order in which they lie there.

    Raises ValueError, with the remedy, for an index that does not fit its files, for a tensor that stands in two
    files, and for files that are broken or cut short.
    """
    weight_map = _weight_map(folder)
    stored: dict[str, Stored] = {}
    for file in _files(folder, weight_map):
        for name, tensor in _header(file).items():
            if name in stored:
                raise ValueError(
                    f"{name} is in {stored[name].file} and in {file}: files of two checkpoints are mixed in this "
                    "folder; copy one checkpoint to a folder of its own"
                )
            stored[name] = tensor
    for name, file_name in (weight_map or {}).items():
        if name not in stored or stored[name].file.name != file_name:
            raise ValueError(
                f"{folder / INDEX} says that {name} is in {file_name}, which does not have it: index and files are "
                "of different checkpoints; copy both again"
            )
    if weight_map and (unlisted := next((name for name in stored if name not in weight_map), None)):
        raise ValueError(
            f"{stored[unlisted].file} holds {unlisted}, which {folder / INDEX} does not list: index and files are of "
            "different checkpoints; copy both again"
        )
    return stored


def _weight_map(folder: Path) -> dict[str, str] | None:
    """Tensor -> file name by the folder's index, or None where it has none."""
    index = folder / INDEX
    if not index.is_file():
        return None
    if (folder / WEIGHTS).is_file():
        raise ValueError(f"{folder} holds both {WEIGHTS} and {INDEX}: remove the one that is not of this checkpoint")
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        return {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not an index of safetensors files ({error!r}): {_AGAIN}") from error


def _files(folder: Path, weight_map: dict[str, str] | None) -> list[Path]:
    files = [folder / name for name in sorted(set(weight_map.values()))] if weight_map else [folder / WEIGHTS]
    if weight_map is None and not files[0].is_file() and (folder / SAVING).is_dir():
        raise ValueError(
            f"{folder} holds no whole checkpoint: writing one there was interrupted; save again, or copy one there"
        )
    for file in files:
        if not file.is_file():
            why = f"{INDEX} names it" if weight_map else f"nor does {INDEX}"
            raise ValueError(
                f"{file} does not exist ({why}): {folder} is not a complete checkpoint in official format; "
                "copy or download the missing file"
            )
    return files


def _header(file: Path) -> dict[str, Stored]:
    """The tensors of one file, in the order of their bytes; ValueError where the file does not hold them all."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(LENGTH_BYTES)
        length = int.from_bytes(start, "little")
        if start == b"version " and size < 1024:
            raise ValueError(f"{file} is a pointer of Git LFS, not the weights: run `git lfs pull` in its folder")
        if not 0 < length <= size - LENGTH_BYTES:
            raise ValueError(f"{file} is cut inside its header, or is no safetensors file: {_AGAIN}")
        text = stream.read(length)
    try:
        entries = json.loads(text)
        entries.pop("__metadata__", None)
        placed = sorted(entries.items(), key=lambda item: item[1]["data_offsets"])
        tensors = {name: _stored(file, name, **entry) for name, entry in placed}
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} has a broken header ({error!r}): {_AGAIN}") from error
    held = size - LENGTH_BYTES - length
    for name, tensor in tensors.items():
        if tensor.end > held:
            raise ValueError(
                f"{file} is cut short, it has {size:,} bytes of "
                f"{size - held + max(t.end for t in tensors.values()):,}; the first tensor that is not whole is "
                f"{name}: {_AGAIN}"
            )
    if held > max((tensor.end for tensor in tensors.values()), default=0):
        raise ValueError(f"{file} is longer than its header says: {_AGAIN}")
    return tensors


def _stored(file: Path, name: str, dtype: str, shape: list[int], data_offsets: list[int]) -> Stored:
    if dtype not in DTYPES:
        raise ValueError(
            f"{file}: {name} is stored as {dtype}, kimivl reads {', '.join(DTYPES)}: convert a quantised checkpoint "
            "to one of them first"
        )
    begin, end = data_offsets
    if end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(f"{file} has a broken header ({name}: {end - begin} bytes for {dtype} {shape}): {_AGAIN}")
    return Stored(file, DTYPES[dtype], tuple(shape), end)


def check_tensors(
    stored: Mapping[str, Stored], expected: Mapping[str, tuple[int, ...]], optional: Iterable[str], folder: Path
) -> None:
    """ValueError naming the first tensor that is missing, unknown or of another shape than `expected`.

    A wrong number of experts or layers is said as such. The names in `optional` may be missing.
    """
    for what, pattern in _COUNTED.items():
        found, wanted = _count(pattern, stored), _count(pattern, expected)
        if found != wanted:
            raise ValueError(
                f"{folder}: {what}: {found} in the files, {wanted} in config.json; config.json is of another "
                "checkpoint: copy the one that belongs to these files"
            )
    missing = [name for name in expected.keys() - set(optional) if name not in stored]
    if missing:
        first = next(name for name in expected if name in set(missing))
        raise ValueError(
            f"{folder}: tensor {first} is missing ({len(missing)} in all): {folder} is not a complete Kimi-VL "
            "checkpoint; copy or download it again"
        )
    for name, tensor in stored.items():
        if name not in expected:
            raise ValueError(
                f"{tensor.file}: tensor {name} is not in this model; is config.json of another checkpoint?"
            )
        if tensor.shape != expected[name]:
            raise ValueError(
                f"{tensor.file}: {name} has shape {tensor.shape}, not {expected[name]}; is config.json of another "
                "checkpoint?"
            )


def _count(pattern: re.Pattern[str], names: Iterable[str]) -> int:
    return max((int(match[1]) + 1 for name in names if (match := pattern.search(name))), default=0)


@torch.no_grad()
def copy_tensors(stored: Mapping[str, Stored], views: Mapping[str, Tensor]) -> None:
    """Copy the files' tensors into `views`, wherever they are and whatever their dtype.

    Files are mapped one at a time, so that no more of them than one counts as memory. A tensor for another device
    travels in its own dtype and is converted there.
    """
    for file in dict.fromkeys(tensor.file for tensor in stored.values()):
        _copy_file(file, [name for name, tensor in stored.items() if tensor.file == file], views)


def _copy_file(file: Path, names: list[str], views: Mapping[str, Tensor]) -> None:
    # The reader makes tensors on the default device, which may be the model's, or meta.
    with torch.device("cpu"), safe_open(file, framework="pt") as shard:
        for name in names:
            view = views[name]
            tensor: Any = shard.get_tensor(name)
            view.copy_(tensor if view.device.type == "cpu" else tensor.to(view.device))
