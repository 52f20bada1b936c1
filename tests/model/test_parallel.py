"""A model that is cut up over ranks: what lies where, and the whole of it where one rank alone reads it."""

from __future__ import annotations

import filecmp
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from in_ranks import in_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from kimivl.model import KimiVLConfig, KimiVLForConditionalGeneration
from kimivl.model.lora import add_lora
from kimivl.model.parallel import assembled, gathered, is_sharded, shard
from kimivl.model.router import Router
from kimivl.runtime import ranks

ADAPTERS: dict[str, Any] = {"rank": 3, "alpha": 6.0, "targets": ["attention", "routed_experts", "vision"]}


def make(config: KimiVLConfig, adapters: bool) -> KimiVLForConditionalGeneration:
    torch.manual_seed(0)
    model = KimiVLForConditionalGeneration(config)
    if adapters:
        add_lora(model, **ADAPTERS)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1)
    return model


def pack(config: KimiVLConfig) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 400, (24,), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "targets": ids.roll(-1), "cu_seqlens": torch.tensor([0, 10, 24])}


class Watched:
    """Counts the collectives of this rank."""

    def __enter__(self) -> Watched:
        self.count, self._before = 0, {}
        for name in ("all_gather_into_tensor", "all_gather_single", "reduce_scatter_tensor", "all_reduce"):
            if hasattr(dist, name):
                self._before[name] = getattr(dist, name)
                setattr(dist, name, self._counted(self._before[name]))
        return self

    def _counted(self, call: Any) -> Any:
        def run(*args: Any, **options: Any) -> Any:
            self.count += 1
            return call(*args, **options)

        return run

    def __exit__(self, *error: object) -> None:
        for name, call in self._before.items():
            setattr(dist, name, call)


def _rank(config: KimiVLConfig, folder: Path) -> dict[str, Any]:
    mesh, found = init_device_mesh("cpu", (2,)), dict[str, Any]()
    for adapters in (False, True):
        model = make(config, adapters)
        with torch.no_grad():
            before = model.target_log_probs(**pack(config))
        shard(model, mesh)
        assert is_sharded(model)
        with gathered(model), torch.no_grad(), Watched() as watched:
            alone = [model.target_log_probs(**pack(config)) for _ in range(1 + 2 * ranks.rank())]
            embedded = model.embed(pack(config)["input_ids"][None], None, None)
            tensors = model.official_tensors()
            own = [model.target_log_probs(**pack(config))]
        assert not watched.count
        assert not any(isinstance(tensor, DTensor) for tensor in tensors.values())
        assert all(torch.equal(logp, before) for logp in [*alone, *own]) and embedded.shape[:2] == (1, 24)
        assert all(isinstance(weight, DTensor) for weight in model.parameters())
        with torch.no_grad(), Watched() as watched:
            together = model.target_log_probs(**pack(config))
        assert watched.count
        with assembled(model):
            if ranks.is_first():
                model.save_pretrained(folder / f"sharded {adapters}")
                assert not any(isinstance(weight, DTensor) for weight in model.parameters())
        assert all(isinstance(weight, DTensor) for weight in model.parameters())
        model.target_log_probs(**pack(config)).sum().backward()
        assert all(weight.grad is not None for weight in model.parameters() if weight.requires_grad)
        found[str(adapters)] = (before, together)
        if not adapters:
            found["shapes"] = {name: tuple(weight.to_local().shape) for name, weight in model.named_parameters()}
            found["buffers"] = {name: type(buffer) for name, buffer in model.named_buffers()}
    return found


@pytest.fixture(scope="module")
def cut(tiny_config, tmp_path_factory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("cut")
    for adapters in (False, True):
        make(tiny_config, adapters).save_pretrained(folder / f"whole {adapters}")
    return folder, in_ranks(_rank, tiny_config, folder)


@pytest.mark.parametrize("adapters", [False, True])
def test_a_rank_runs_the_gathered_model_alone_and_all_run_it_together(cut, adapters):
    for rank in cut[1]:
        before, together = rank[str(adapters)]
        assert torch.equal(before, together)


@pytest.mark.parametrize("adapters", [False, True])
def test_the_files_are_those_of_the_model_in_one_piece(cut, adapters):
    whole, sharded = (cut[0] / f"{name} {adapters}" for name in ("whole", "sharded"))
    files = sorted(path.name for path in whole.iterdir())
    assert files == sorted(path.name for path in sharded.iterdir()) and len(files) >= 3
    assert filecmp.cmpfiles(whole, sharded, files, shallow=False)[0] == files


def test_experts_are_whole_on_a_rank_and_buffers_are_not_cut(cut, tiny_config):
    first, second = (rank["shapes"] for rank in cut[1])
    config = tiny_config.text_config
    stacks = [name for name in first if name.endswith("experts.gate_up_proj")]
    assert stacks
    for name in stacks:
        assert first[name][1:] == (2 * config.moe_intermediate_size, config.hidden_size)
        assert first[name][0] + second[name][0] == config.n_routed_experts
    assert cut[1][0]["buffers"] and not any(issubclass(kind, DTensor) for kind in cut[1][0]["buffers"].values())


def test_a_model_in_one_piece_is_left_alone(tiny_config):
    model = make(tiny_config, False)
    weights = dict(model.named_parameters())
    with gathered(model), assembled(model):
        assert all(weight is weights[name] for name, weight in model.named_parameters())
    assert not is_sharded(model) and Router(model).layers
