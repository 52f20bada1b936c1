"""Checkpoints of a model that is cut up over ranks: a folder into which each rank writes what it holds.

It takes the place of the one before in one step, when all ranks have written (torch.distributed.checkpoint) and the
files are on the disk. One process reads it as it would read a file, and ranks read a file as they would read a folder,
each its own rows: a run may go on with other ranks, or with none.

    last.ckpt/
      __0_0.distcp, __1_0.distcp, ...   the tensors: state_dict/NAME, optimizer/N/PARAMETER/STATE
      .metadata                         what of them is where
      rest.pt                           everything else, and the sizes of the files above
"""

from __future__ import annotations

import pickle
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from kimivl.checkpoint import put_in_place
from kimivl.model.official_writing import sync
from kimivl.optim.dealing import rows_of_ranks
from kimivl.optim.matrices import local
from kimivl.runtime import ranks
from kimivl.runtime.faults import reading, writing

REST = "rest.pt"
_MODEL, _OPTIMIZER = "state_dict", "optimizer"


# Writing.


def write_folder(checkpoint: dict[str, Any], folder: Path) -> None:
    """Write a Lightning checkpoint whose tensors may be cut up over the ranks. All ranks call this.

    Raises:
        MachineFault: on the rank that could not write, and PeerFailed on the others; what was there before is whole.
    """
    tensors, rest = _taken_apart(checkpoint)
    part = folder.with_name(f".{folder.name}.part")
    ranks.share(lambda: _make_empty(part, folder))
    try:
        with _alone(), _said_by_one(ranks.rank()):
            dcp.save(tensors, storage_writer=_Writer(part, folder, _own_bytes(tensors)))
        ranks.share(lambda: _finish(rest, part, folder))
    finally:
        if ranks.is_first():
            shutil.rmtree(part, ignore_errors=True)


@contextmanager
def _alone() -> Iterator[None]:
    """torch warns where there is no group of processes; one process needs none."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def _make_empty(part: Path, folder: Path) -> None:
    shutil.rmtree(part, ignore_errors=True)  # of a save that was killed
    with writing(folder, 0):
        part.mkdir(parents=True)


class _Writer(dcp.FileSystemWriter):
    """torch's own, whose errors say why."""

    def __init__(self, part: Path, folder: Path, size: int) -> None:
        super().__init__(part, sync_files=True)
        self._writing = partial(writing, folder, size)

    def write_data(self, *args: Any, **kwargs: Any) -> Any:
        with self._writing():
            return super().write_data(*args, **kwargs)

    def finish(self, *args: Any, **kwargs: Any) -> None:
        with self._writing():
            super().finish(*args, **kwargs)


def _own_bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(local(tensor).nbytes for tensor in tensors.values())


@contextmanager
def _said_by_one(own: int) -> Iterator[None]:
    """What torch raises on all ranks, and is no Exception, holds the errors of each: only the first one's is raised,
    and where that was told to stop, all stop.

    Args:
        own: the number of this rank among those that torch speaks of.
    """
    try:
        yield
    except dcp.api.CheckpointException as error:
        rank, (failure, _) = min(error.failures.items())
        if rank == own or not isinstance(failure, Exception):
            raise failure from error
        raise ranks.PeerFailed(f"rank {rank}: {failure}") from error


def _finish(rest: dict[str, Any], part: Path, folder: Path) -> None:
    sizes = {file.name: file.stat().st_size for file in part.iterdir()}
    with writing(folder, 10**6):  # about
        torch.save(rest | {"files": sizes}, part / REST)
        sync(part / REST)
        sync(part)
    put_in_place(folder, part)


def _taken_apart(checkpoint: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of model and optimisers by their names in the folder, and the checkpoint without them."""
    tensors = {f"{_MODEL}/{name}": tensor for name, tensor in checkpoint["state_dict"].items()}
    optimizers = []
    for number, saved in enumerate(checkpoint.get("optimizer_states", [])):
        others: dict[int, dict[str, Any]] = {}
        for parameter, state in saved["state"].items():
            others[parameter] = {name: value for name, value in state.items() if not isinstance(value, Tensor)}
            for name in state.keys() - others[parameter].keys():
                tensors[f"{_OPTIMIZER}/{number}/{parameter}/{name}"] = state[name]
        optimizers.append(saved | {"state": others})
    rest = {name: value for name, value in checkpoint.items() if name != "state_dict"}
    return tensors, rest | {"optimizer_states": optimizers}


# Reading.


def read_whole(folder: Path) -> dict[str, Any]:
    """The checkpoint in ``folder`` as that of one process, in the host's memory."""
    reader = _Reader(folder)
    tensors = {name: torch.empty(shape, dtype=dtype) for name, shape, dtype in reader.tensors()}
    with _alone(), _said_by_one(0):
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    return _put_together(tensors, read_rest(folder))


def read_own(path: Path, model: nn.Module, optimizers: Sequence[Optimizer]) -> dict[str, Any]:
    """The checkpoint at ``path`` (a folder, or the file of one process), of which this rank reads what is its own.

    The tensors of the model are read into those that it has. All ranks call this.

    Raises:
        ValueError: for a tensor of another shape than the model's, or one that the model does not have.
        MachineFault: on a rank that cannot read its part, and PeerFailed on the others.
    """
    return _own_of_folder(path, model, optimizers) if path.is_dir() else _own_of_file(path, model, optimizers)


def _own_of_folder(path: Path, model: nn.Module, optimizers: Sequence[Optimizer]) -> dict[str, Any]:
    reader, rest = _Reader(path), read_rest(path)
    like = _owners(model, rest["optimizer_states"], optimizers)
    tensors = {}
    for name, shape, dtype in reader.tensors():
        owner = like(name, shape, path)
        tensors[name] = owner if name.startswith(f"{_MODEL}/") else torch.empty_like(owner, dtype=dtype)
    with _said_by_one(ranks.rank()):
        dcp.load(tensors, storage_reader=reader)
    return _put_together(tensors, rest)


@torch.no_grad()
def _own_of_file(path: Path, model: nn.Module, optimizers: Sequence[Optimizer]) -> dict[str, Any]:
    whole, rest = _taken_apart(torch.load(path, weights_only=True, mmap=True, map_location="cpu"))
    like = _owners(model, rest["optimizer_states"], optimizers)
    tensors = {}
    for name, tensor in whole.items():
        owner = like(name, tensor.shape, path)
        own = owner if name.startswith(f"{_MODEL}/") else torch.empty_like(owner, dtype=tensor.dtype)
        local(own).copy_(tensor[_rows(own)] if isinstance(own, DTensor) else tensor)
        tensors[name] = own
    return _put_together(tensors, rest)


def _rows(tensor: DTensor) -> slice:
    rank, counts = tensor.device_mesh.get_local_rank(), rows_of_ranks(len(tensor), tensor.device_mesh.size())
    return slice(sum(counts[:rank]), sum(counts[: rank + 1]))


def _owners(model: nn.Module, saved: Sequence[Mapping[str, Any]], optimizers: Sequence[Optimizer]) -> Any:
    """(name, shape, path) -> the tensor of this run that a saved one belongs to, or that it is shaped like."""
    own = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    parameters = [
        dict(zip(_flat(groups["param_groups"]), _flat(optimizer.param_groups), strict=True))
        for groups, optimizer in zip(saved, optimizers, strict=True)
    ]

    def find(name: str, shape: Sequence[int], path: Path) -> Tensor:
        kind, _, key = name.partition("/")
        if kind == _OPTIMIZER:
            number, parameter, _ = key.split("/")
            owner = parameters[int(number)][int(parameter)].detach()
            return owner if owner.shape == torch.Size(shape) else torch.empty(shape, device=owner.device)
        if key not in own or own[key].shape != torch.Size(shape):
            here = f"{key} {tuple(own[key].shape)}" if key in own else f"no {key}"
            raise ValueError(
                f"{path} holds {key} {tuple(shape)}, and this run's model has {here}: go on with the settings of the "
                "run that wrote it, or start from its model folder with init_from"
            )
        return own[key]

    return find


def _flat(groups: Sequence[Mapping[str, Any]]) -> list[Any]:
    return [parameter for group in groups for parameter in group["params"]]


def _put_together(tensors: Mapping[str, Tensor], rest: dict[str, Any]) -> dict[str, Any]:
    checkpoint = {name: value for name, value in rest.items() if name != "files"} | {"state_dict": {}}
    for name, tensor in tensors.items():
        kind, _, key = name.partition("/")
        if kind == _MODEL:
            checkpoint["state_dict"][key] = tensor
        else:
            number, parameter, state = key.split("/")
            checkpoint["optimizer_states"][int(number)]["state"].setdefault(int(parameter), {})[state] = tensor
    return checkpoint


def read_rest(folder: Path) -> dict[str, Any]:
    """Everything but the tensors, and ``files``: the sizes of the files that hold them.

    Raises:
        ValueError: for a folder that holds no checkpoint, or where a file is missing or cut short.
    """
    if not (folder / REST).is_file():
        raise ValueError(f"{folder} is no checkpoint: {REST} is missing")
    rest: dict[str, Any] = torch.load(folder / REST, weights_only=True, map_location="cpu")
    for name, size in rest["files"].items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != size:
            is_now = "is missing" if found is None else f"is cut short ({found:,} of {size:,} bytes)"
            raise ValueError(f"{folder / name} {is_now}")
    return rest


class _Reader(dcp.FileSystemReader):
    """torch's own reads ``.metadata`` with pickle, which runs whatever it says; here it may only make what it must."""

    def tensors(self) -> Iterator[tuple[str, torch.Size, torch.dtype]]:
        """Name, shape and dtype of all that the folder holds."""
        for name, place in self.read_metadata().state_dict_metadata.items():
            assert isinstance(place, TensorStorageMetadata)
            yield name, place.size, place.properties.dtype

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with reading(Path(self.path)), (Path(self.path) / ".metadata").open("rb") as file:
            metadata: Metadata = _Unpickler(file).load()
        if metadata.storage_meta is not None:
            metadata.storage_meta.load_id = self.load_id
        return metadata

    def read_data(self, *args: Any, **kwargs: Any) -> Any:
        with reading(Path(self.path)):
            return super().read_data(*args, **kwargs)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _HARMLESS:
            return super().find_class(module, name)
        if module in _DESCRIBING and "." not in name:  # with a dot it would reach whatever the module has imported
            found = super().find_class(module, name)
            if isinstance(found, type) and found.__module__ == module:
                return found
        raise pickle.UnpicklingError(f".metadata asks for {module}.{name}, which no checkpoint needs")


_DESCRIBING = {f"torch.distributed.checkpoint.{name}" for name in ("metadata", "filesystem")}
_HARMLESS = {("torch", "Size"), ("torch.serialization", "_get_layout"), ("collections", "OrderedDict")}
_HARMLESS |= {("pathlib", "PosixPath"), ("pathlib._local", "PosixPath"), ("torch", "device")}
_HARMLESS |= {("torch", dtype) for dtype in dir(torch) if isinstance(getattr(torch, dtype), torch.dtype)}
