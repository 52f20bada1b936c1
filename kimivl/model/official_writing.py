"""Writing official checkpoints: what safetensors would write, tensor after tensor; old, new, or refused, never mixed.

A save writes all its files into the subfolder `.saving` and syncs them to the disk. Then it takes away what makes the
folder loadable (the index, or the only weights file), moves its files into place, and that one last. A folder whose
save was killed loads as it was before, or as what was saved, or is refused for having no weights.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from kimivl.model.official_reading import DTYPES, INDEX, LENGTH_BYTES, SAVING, WEIGHTS

_HEADS = (INDEX, WEIGHTS)
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LAYOUT = list(_NAMES)
_SHARD = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(size: int | str) -> int:
    """Bytes of "5GB", "200MB", "1GiB" or a number."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]I?B|)\s*", str(size).upper())
    if match is None or not (count := int(float(match[1]) * _UNITS[match[2]])):
        raise ValueError(f"max_shard_size {size!r}: write a number of bytes, or for example '5GB'")
    return count


def write_weights(
    tensors: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype], folder: Path, max_shard_size: int | str = "5GB"
) -> None:
    """Write `tensors`, each in its dtype of `dtypes`, as one file or as numbered shards with an index.

    Raises ValueError when the disk has no room for them.
    """
    sizes = {name: tensor.numel() * dtypes[name].itemsize for name, tensor in tensors.items()}
    _check_room(folder, sum(sizes.values()))
    shards = _split(sizes, parse_size(max_shard_size))
    files = [WEIGHTS] if len(shards) == 1 else [_shard_name(i, len(shards)) for i in range(len(shards))]
    for file, names in zip(files, shards, strict=True):
        _write_file(folder / file, {name: tensors[name] for name in names}, dtypes)
    if len(shards) > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _check_room(folder: Path, wanted: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < wanted:
        raise ValueError(
            f"{folder}: the checkpoint takes {wanted / 1e9:.1f} GB, and the disk has {free / 1e9:.1f} GB left; "
            "free some room, or write it elsewhere"
        )


def _split(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Fill shards in order; a tensor larger than the limit has a shard of its own."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _shard_name(index: int, total: int) -> str:
    return f"model-{index + 1:05d}-of-{total:05d}.safetensors"


def _write_file(path: Path, tensors: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]) -> None:
    """What safetensors' own `save_file` writes, byte by byte, but tensor after tensor instead of all at once."""
    # wide types first, so that every tensor is aligned
    names = sorted(tensors, key=lambda name: (-_LAYOUT.index(dtypes[name]), name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        begin, end = end, end + tensors[name].numel() * dtypes[name].itemsize
        shape = list(tensors[name].shape)
        header[name] = {"dtype": _NAMES[dtypes[name]], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % LENGTH_BYTES)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(LENGTH_BYTES, "little") + text)
        for name in names:
            values = tensors[name].detach().to(dtypes[name]).cpu().contiguous()  # converted where it is
            stream.write(values.reshape(-1).view(torch.uint8).numpy().data)


def stage(folder: Path) -> Path:
    """The empty folder in which a save into `folder` writes its files."""
    staging = folder / SAVING
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    return staging


def commit(staging: Path) -> None:
    """Make the files in `staging` those of its folder."""
    folder = staging.parent
    files = sorted(staging.iterdir(), key=lambda file: file.name in _HEADS)
    for file in files:
        sync(file)
    for head in _HEADS:
        (folder / head).unlink(missing_ok=True)
    sync(folder)
    for file in files:
        if file.name in _HEADS:
            sync(folder)
        file.replace(folder / file.name)
    sync(folder)
    staging.rmdir()
    _remove_stale_shards(folder)


def _remove_stale_shards(folder: Path) -> None:
    index = folder / INDEX
    current = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else {WEIGHTS}
    for file in folder.glob("model*.safetensors"):
        if _SHARD.fullmatch(file.name) and file.name not in current:
            file.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
