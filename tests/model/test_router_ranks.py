"""The experts' load over several processes."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from kimivl.model import KimiVLConfig, KimiVLForConditionalGeneration
from kimivl.model.router import Router


def _rank(rank: int, folder: str, config: KimiVLConfig) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = KimiVLForConditionalGeneration(config)
    router = Router(model, bias_update_rate=0.01)
    router.load[:] = torch.tensor([4, 0, 2, 2, 2, 2, 2, 2] if rank else [0, 3, 2, 2, 2, 2, 2, 2])  # sums: mean 3.875
    router.update_bias()
    again = router.step_load()  # summed once
    torch.save((router.gates[0].e_score_correction_bias, again), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_loads_of_all_ranks_move_the_bias(tmp_path, tiny_config):
    mp.spawn(_rank, (str(tmp_path), tiny_config), nprocs=2)
    (first, load), (second, other) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert torch.equal(first, second) and torch.equal(load, other)
    assert load[0].tolist() == [4, 3, 4, 4, 4, 4, 4, 4]
    torch.testing.assert_close(first, 0.01 * torch.tensor([-1.0, 1, -1, -1, -1, -1, -1, -1]))
