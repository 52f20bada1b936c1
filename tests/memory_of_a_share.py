"""Memory of the first of N ranks in a training step, with collectives that carry nothing; prints bytes at the peak.

    python tests/memory_of_a_share.py 8 full [vision_tower ...]
    python tests/memory_of_a_share.py 8 whole       # not in a step, but with the whole model gathered on each rank

What the allocator of the CPU gives out is counted, so it is a process of its own. Numbers are nonsense: nothing comes
from ranks that are not there.
"""

import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from test_memory_estimate import recipe
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore

from kimivl.model import KimiVLConfig, KimiVLForConditionalGeneration
from kimivl.model.checkpointing import checkpoint_activations
from kimivl.model.parallel import gathered, shard
from kimivl.optim import MuonAdamW

LENGTHS, IMAGES = [64] * 4, [(8, 8)] * 4


def config() -> KimiVLConfig:
    """Few tokens for its parameters: 11 M in 5 layers and 3 blocks, a quarter of them embedding and head."""
    return recipe(
        "tiny",
        vocab_size=4000,
        media_placeholder_token_id=3999,
        text_config={"num_hidden_layers": 5, "hidden_size": 320},
    )


def main(ranks: int, mode: str, freeze: list[str]) -> int:
    torch.manual_seed(0)
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    model = KimiVLForConditionalGeneration(config()).train()
    for part in freeze:
        getattr(model, part).requires_grad_(False)
    checkpoint_activations(model, "full" if mode == "whole" else mode)
    shard(model, init_device_mesh("cpu", (ranks,)))
    optimizer = MuonAdamW([(n, w) for n, w in model.named_parameters() if w.requires_grad], lr=1e-4)
    pack = _pack(model.config)

    def step() -> None:
        loss = -model.target_log_probs(**pack).mean()
        optimizer.zero_grad()
        loss.backward()
        del loss
        optimizer.step()

    step()
    optimizer.zero_grad()
    states = [state for states in optimizer.state.values() for state in states.values()]
    before = sum(_local(tensor).nbytes for tensor in (*model.parameters(), *model.buffers(), *states))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        if mode == "whole":
            with gathered(model):
                pass
        else:
            step()
            step()
    return before + _peak(found)


def _pack(config: KimiVLConfig) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 900, (sum(LENGTHS),))
    for number, (h, w) in enumerate(IMAGES):
        ids[number * LENGTHS[0] : number * LENGTHS[0] + h * w // 4] = config.media_placeholder_token_id
    return {
        "input_ids": ids,
        "targets": ids.roll(-1),
        "cu_seqlens": torch.tensor([0, *LENGTHS]).cumsum(0).int(),
        "pixel_values": torch.zeros(sum(h * w for h, w in IMAGES), 3, 14, 14, dtype=torch.uint8),
        "image_grid_hws": torch.tensor(IMAGES),
    }


def _local(tensor: Any) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _peak(found: profile) -> int:
    """Most bytes at a time of what was given out while it looked."""
    given = sorted(_given(found.profiler.kineto_results.experimental_event_tree()))
    now = peak = 0
    for _, size in given:
        now += size
        peak = max(peak, now)
    return peak


def _given(events: list[Any]) -> Iterator[tuple[int, int]]:
    """(time, bytes; negative where they come back)."""
    for event in events:
        if event.tag.name == "Allocation":
            yield event.start_time_ns, event.extra_fields.alloc_size
        yield from _given(event.children)


if __name__ == "__main__":
    print(main(int(sys.argv[1]), sys.argv[2], sys.argv[3:]))
