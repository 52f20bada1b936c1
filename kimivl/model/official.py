"""The official checkpoint format: tensor names, loading and saving of a model.

In memory the model has the official names already, except that transformers stacks a layer's experts:

    ...mlp.experts.gate_up_proj (E, 2I, H)  <->  ...mlp.experts.{e}.gate_proj.weight, .up_proj.weight (I, H)
    ...mlp.experts.down_proj    (E, H, I)   <->  ...mlp.experts.{e}.down_proj.weight (H, I)

and that each layer of the files carries a stale `self_attn.rotary_emb.inv_freq`, which is not used, but kept.
`official_views` gives every official name as a view into the model, so that reading is copying into views, and
writing is copying out of them.
"""

from __future__ import annotations

import copy
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig
from transformers.initialization import no_init_weights
from transformers.modeling_utils import local_torch_dtype

from kimivl.model.lora import merged
from kimivl.model.official_reading import Stored, check_tensors, copy_tensors, read_headers
from kimivl.model.official_writing import commit, stage, write_weights

# What AutoModel hands on about downloads; a checkpoint is a local folder here.
_HUB_ARGUMENTS = {"_from_auto", "adapter_kwargs", "cache_dir", "code_revision", "force_download", "proxies"}
_HUB_ARGUMENTS |= {"local_files_only", "revision", "subfolder", "token", "trust_remote_code", "use_safetensors"}


class OfficialFormat:
    """Loading and saving of a model whose files are official checkpoints (mix in before PreTrainedModel).

    Of its files a model remembers what the memory does not hold: `_stored_dtypes`, official name -> dtype, so that a
    bf16 checkpoint trained in float32 is written in bf16 again, and `_stale`, the inv_freq tensors.
    """

    config_class: type[PreTrainedConfig]
    config: PreTrainedConfig
    generation_config: GenerationConfig
    language_model: Any
    _stored_dtypes: Mapping[str, torch.dtype] | None = None
    _stale: Mapping[str, Tensor] | None = None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        config: PreTrainedConfig | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | int | None = None,
        **kwargs: Any,
    ) -> Self:
        """Load a local folder, in evaluation mode.

        Files are checked from their headers first, then copied one by one onto the device: of the host's memory it
        takes one file beside the model.

        Args:
            dtype: of the parameters in memory; by default ("auto") that of config.json.
            device: where the parameters are made; by default torch's default device.

        Raises:
            ValueError: naming the first wrong tensor and its file.
        """
        dtype = kwargs.pop("torch_dtype", dtype)
        device = kwargs.pop("device_map", None) if device is None else device
        if unknown := sorted(set(kwargs) - _HUB_ARGUMENTS):
            raise ValueError(f"from_pretrained: unknown argument {unknown[0]!r}")
        place = _device(device)
        folder = Path(pretrained_model_name_or_path)
        if not (folder / "config.json").is_file():
            raise ValueError(f"{folder} holds no config.json: give the local folder of a checkpoint")
        config = cls.config_class.from_pretrained(folder) if config is None else copy.deepcopy(config)
        stored = read_headers(folder)
        with no_init_weights(), torch.device("meta"):
            check_tensors(stored, *_expected(cls(copy.deepcopy(config))), folder)  # type: ignore[call-arg]
        with no_init_weights(), local_torch_dtype(_precision(dtype, config), cls.__name__), place:
            model = cls(config)  # type: ignore[call-arg]
        load_official(model, stored)
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
        return model.eval()  # type: ignore[attr-defined]

    def save_pretrained(self, save_directory: str | os.PathLike[str], max_shard_size: int | str = "5GB") -> None:
        """Write config.json, generation_config.json and the weights under their official names.

        A save that is killed leaves the folder as it was, complete, or without weights; never a mixture.

        Each tensor is written in the dtype that it was loaded with; those of a fresh model in `config.dtype`.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = self.official_tensors()
        dtypes = self._dtypes_to_write(tensors)
        staging = stage(folder)
        write_weights(tensors, dtypes, staging, max_shard_size)
        config = copy.deepcopy(self.config)
        _set_dtype(config, _most_common(tensors, dtypes))
        config.save_pretrained(staging)
        self.generation_config.save_pretrained(staging)
        commit(staging)

    def official_tensors(self) -> dict[str, Tensor]:
        """Official name -> tensor in memory, all 5,679 of the full model: views, except for inv_freq.

        Of a model with adapters: the merged weights, as copies.
        """
        with merged(self):  # type: ignore[arg-type]
            tensors = official_views(self)  # type: ignore[arg-type]
        decoder = self.language_model.model
        for name in inv_freq_names(len(decoder.layers)):
            stale = (self._stale or {}).get(name)
            tensors[name] = decoder.rotary_emb.inv_freq if stale is None else stale
        return tensors

    def _dtypes_to_write(self, tensors: Mapping[str, Tensor]) -> dict[str, torch.dtype]:
        """The dtype of each official name in the files.

        Buffers of a fresh model (routing biases, inv_freq) keep their float32: of the biases' small updates bf16
        would lose most.
        """
        kept = {name for name, _ in self.named_buffers()}  # type: ignore[attr-defined]
        kept.update(inv_freq_names(len(self.language_model.model.layers)))
        stored = self._stored_dtypes or {}
        fresh = {name: tensor.dtype if name in kept else self.config.dtype for name, tensor in tensors.items()}
        return {name: stored.get(name, fresh[name] or tensor.dtype) for name, tensor in tensors.items()}


def _device(device: torch.device | str | int | None) -> torch.device:
    """Where to load to; ValueError for the meta device, which would hold nothing."""
    if device in ("auto", "balanced", "sequential") or isinstance(device, dict):
        raise ValueError(f"device_map={device!r}: the model is loaded onto one device; give device='cuda' or 'cpu'")
    place = torch.get_default_device() if device is None else torch.device(device)
    if place.type == "meta":
        raise ValueError("a checkpoint cannot be loaded onto the meta device: give device='cpu' or 'cuda'")
    return place


def _precision(dtype: torch.dtype | str | None, config: PreTrainedConfig) -> torch.dtype:
    if dtype in (None, "auto"):
        return config.dtype or torch.float32
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def _most_common(tensors: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]) -> torch.dtype:
    """The dtype of most elements: what config.json says of the files."""
    elements: Counter[torch.dtype] = Counter()
    for name, tensor in tensors.items():
        elements[dtypes[name]] += tensor.numel()
    return elements.most_common(1)[0][0]


def _set_dtype(config: PreTrainedConfig, dtype: torch.dtype) -> None:
    for part in (config, *(getattr(config, name) for name in config.sub_configs)):
        part.dtype = dtype


def official_views(model: nn.Module) -> dict[str, Tensor]:
    """Official name -> view into the model's memory (inv_freq is not among them)."""
    views: dict[str, Tensor] = {}
    for name, tensor in _tensors(model):
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


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What ``state_dict`` has, in its order; that would cut a gathered model (``kimivl.model.parallel``) up again."""
    for path, module in model.named_modules():
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, tensor in own:
            if name not in module._non_persistent_buffers_set:
                yield f"{path}.{name}".lstrip("."), tensor.detach()


def inv_freq_names(layers: int) -> list[str]:
    """Names of the rotary frequencies that the official files carry once per layer."""
    return [f"language_model.model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(layers)]


def _expected(model: Any) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """The shapes of all official tensors of a model, and the names that a checkpoint may lack."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.official_tensors().items()}
    return shapes, inv_freq_names(len(model.language_model.model.layers))


def load_official(model: Any, stored: Mapping[str, Stored]) -> None:
    """Copy a checkpoint whose headers were checked into `model`, which remembers what it needs to write them again."""
    views = official_views(model)
    stale = {name: torch.empty(s.shape, dtype=s.dtype, device="cpu") for name, s in stored.items() if name not in views}
    copy_tensors(stored, views | stale)
    model._stored_dtypes = {name: tensor.dtype for name, tensor in stored.items()}
    model._stale = stale
