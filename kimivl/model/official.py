"""The official checkpoint format: tensor names, reading and writing.

In memory the model has the official names already, except that transformers stacks a layer's experts:

    ...mlp.experts.gate_up_proj (E, 2I, H)  <->  ...mlp.experts.{e}.gate_proj.weight, .up_proj.weight (I, H)
    ...mlp.experts.down_proj    (E, H, I)   <->  ...mlp.experts.{e}.down_proj.weight (H, I)

and that each layer of the files carries a stale `self_attn.rotary_emb.inv_freq`, which is not used, but kept.
`official_views` gives every official name as a view into the model, so that reading is copying into views, and
writing is copying out of them, one shard at a time.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig
from transformers.initialization import no_init_weights
from transformers.modeling_utils import local_torch_dtype

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

# What AutoModel hands on about downloads; a checkpoint is a local folder here.
_HUB_ARGUMENTS = {"_from_auto", "adapter_kwargs", "cache_dir", "code_revision", "force_download", "proxies"}
_HUB_ARGUMENTS |= {"local_files_only", "revision", "subfolder", "token", "trust_remote_code", "use_safetensors"}


class OfficialFormat:
    """Loading and saving of a model whose files are official checkpoints (mix in before PreTrainedModel).

    `_stored` remembers of the files what the memory does not hold: see `load_official`.
    """

    config_class: type[PreTrainedConfig]
    config: PreTrainedConfig
    generation_config: GenerationConfig
    language_model: Any
    _stored: dict[str, Tensor | torch.dtype] | None = None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        config: PreTrainedConfig | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str = "cpu",
        **kwargs: Any,
    ) -> Self:
        """Load a local folder, in evaluation mode.

        `dtype` of the parameters: that of config.json by default ("auto"). Tensors are copied one by one, so the
        peak is the model and one tensor. Raises ValueError naming the first wrong tensor.
        """
        dtype = kwargs.pop("torch_dtype", dtype)
        if unknown := sorted(set(kwargs) - _HUB_ARGUMENTS):
            raise ValueError(f"from_pretrained: unknown argument {unknown[0]!r}")
        folder = Path(pretrained_model_name_or_path)
        if not (folder / "config.json").is_file():
            raise ValueError(f"{folder} holds no config.json: give the local folder of a checkpoint")
        config = cls.config_class.from_pretrained(folder) if config is None else copy.deepcopy(config)
        precision = _precision(dtype, config)
        _set_dtype(config, precision)
        with no_init_weights(), local_torch_dtype(precision, cls.__name__), torch.device(device):
            model = cls(config)  # type: ignore[call-arg]
        model._stored = load_official(model, folder)
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
        return model.eval()  # type: ignore[attr-defined]

    def save_pretrained(self, save_directory: str | os.PathLike[str], max_shard_size: int | str = "5GB") -> None:
        """Write config.json, generation_config.json and the weights under their official names."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        save_official(self.official_tensors(), folder, max_shard_size)
        _set_dtype(self.config, self.dtype)  # type: ignore[attr-defined]
        self.config.save_pretrained(folder)
        self.generation_config.save_pretrained(folder)

    def official_tensors(self) -> dict[str, Tensor]:
        """Official name -> tensor, as they are written: all 5,679 of the full model."""
        tensors = official_views(self)  # type: ignore[arg-type]
        for name, stored in (self._stored or {}).items():
            tensors[name] = stored if isinstance(stored, Tensor) else tensors[name].to(stored)
        decoder = self.language_model.model
        for name in inv_freq_names(len(decoder.layers)):
            tensors.setdefault(name, decoder.rotary_emb.inv_freq.clone())
        return tensors


def _precision(dtype: torch.dtype | str | None, config: PreTrainedConfig) -> torch.dtype:
    if dtype in (None, "auto"):
        return config.dtype or torch.float32
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def _set_dtype(config: PreTrainedConfig, dtype: torch.dtype) -> None:
    for part in (config, *(getattr(config, name) for name in config.sub_configs)):
        part.dtype = dtype


def official_views(model: nn.Module) -> dict[str, Tensor]:
    """Official name -> view into the model's memory (inv_freq is not among them)."""
    views: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=False).items():
        if name.endswith(".experts.gate_up_proj"):
            for expert, both in enumerate(tensor.unbind(0)):
                gate, up = both.chunk(2, 0)
                views[f"{name.removesuffix('gate_up_proj')}{expert}.gate_proj.weight"] = gate
                views[f"{name.removesuffix('gate_up_proj')}{expert}.up_proj.weight"] = up
        elif name.endswith(".experts.down_proj"):
            for expert, down in enumerate(tensor.unbind(0)):
                views[f"{name.removesuffix('down_proj')}{expert}.down_proj.weight"] = down
        else:
            views[name] = tensor
    return views


def inv_freq_names(layers: int) -> list[str]:
    """Names of the rotary frequencies that the official files carry once per layer."""
    return [f"language_model.model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(layers)]


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder, by its index where it has one."""
    if (folder / INDEX).is_file():
        names = json.loads((folder / INDEX).read_text())["weight_map"].values()
        files = [folder / name for name in dict.fromkeys(names)]
    else:
        files = [folder / WEIGHTS]
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file} does not exist: {folder} is not a complete checkpoint in official format")
    return files


def read_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a checkpoint, one in memory at a time."""
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118 (not a dictionary)
                yield name, shard.get_tensor(name)


@torch.no_grad()
def load_official(model: Any, folder: Path) -> dict[str, Tensor | torch.dtype]:
    """Copy a checkpoint into `model`.

    Returns what must be remembered to write the same files again: the inv_freq tensors, and the stored dtype of
    every buffer (the router biases, which are float32 in memory whatever the file has).
    Raises ValueError naming the first missing, unknown or mis-shaped tensor.
    """
    views = official_views(model)
    buffers = {name for name, _ in model.named_buffers()}
    stale = set(inv_freq_names(len(model.language_model.model.layers)))
    kept: dict[str, Tensor | torch.dtype] = {}
    for name, tensor in read_tensors(folder):
        if name in stale:
            kept[name] = tensor
            continue
        view = views.pop(name, None)
        if view is None:
            raise ValueError(f"{folder}: tensor {name} is not in this model; is config.json of another checkpoint?")
        if view.shape != tensor.shape:
            raise ValueError(f"{folder}: {name} has shape {tuple(tensor.shape)}, not {tuple(view.shape)}")
        view.copy_(tensor)
        if name in buffers:
            kept[name] = tensor.dtype
    if views:
        raise ValueError(f"{folder}: tensor {next(iter(views))} is missing ({len(views)} in all)")
    return kept


def parse_size(size: int | str) -> int:
    """Bytes of "5GB", "200MB", "1GiB" or a number."""
    if isinstance(size, int):
        return size
    match = re.fullmatch(r"\s*([\d.]+)\s*([KMG]I?B|)\s*", size.upper())
    if match is None:
        raise ValueError(f"max_shard_size {size!r}: write a number of bytes, or for example '5GB'")
    return int(float(match[1]) * _UNITS[match[2]])


def save_official(tensors: dict[str, Tensor], folder: Path, max_shard_size: int | str = "5GB") -> None:
    """Write `tensors` as one file, or as numbered shards with an index. Stale files of an earlier save go."""
    shards = _split(tensors, parse_size(max_shard_size))
    files = [WEIGHTS] if len(shards) == 1 else [_shard_name(i, len(shards)) for i in range(len(shards))]
    for file, names in zip(files, shards, strict=True):
        partial = folder / f"{file}.partial"
        save_file({name: tensors[name].contiguous() for name in names}, partial, metadata={"format": "pt"})
        partial.replace(folder / file)
    if len(shards) == 1:
        (folder / INDEX).unlink(missing_ok=True)
    else:
        _write_index(folder, dict(zip(files, shards, strict=True)), sum(map(_nbytes, tensors.values())))
    for old in folder.glob("model*.safetensors"):
        if old.name not in files:
            old.unlink()


def _write_index(folder: Path, shards: dict[str, list[str]], total: int) -> None:
    weight_map = {name: file for file, names in shards.items() for name in names}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    partial = folder / f"{INDEX}.partial"
    partial.write_text(json.dumps(index, indent=2) + "\n")
    partial.replace(folder / INDEX)


def _split(tensors: dict[str, Tensor], limit: int) -> list[list[str]]:
    """Fill shards in order; a tensor larger than the limit has a shard of its own."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + _nbytes(tensor) > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += _nbytes(tensor)
    return shards


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _shard_name(index: int, total: int) -> str:
    return f"model-{index + 1:05d}-of-{total:05d}.safetensors"
