"""FLOPs of a pack: against torch's own count of a real forward and backward pass, and the published figures."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from kimivl.data.plan import sample_cost
from kimivl.model import KimiVLConfig, KimiVLForConditionalGeneration
from kimivl.model.flops import Flops, decoder_parameters, mfu, pack_flops, peak_flops


@pytest.fixture(scope="module")
def a3b(recipe) -> KimiVLConfig:
    return KimiVLConfig(**recipe("kimi_vl_a3b"))


LENGTHS, GRIDS = [17, 40, 64], [(4, 6), (8, 4)]


@pytest.fixture
def pack(make_sample) -> dict[str, Tensor]:
    samples = [make_sample(LENGTHS[0]), make_sample(LENGTHS[1], GRIDS[0]), make_sample(LENGTHS[2], GRIDS[1])]
    ids = torch.cat([ids for ids, _, _ in samples])
    targets = torch.full_like(ids, -100)
    targets[::3] = 5
    return {
        "input_ids": ids,
        "targets": targets,
        "cu_seqlens": torch.tensor([0, *LENGTHS]).cumsum(0).int(),
        "pixel_values": torch.cat([pixels for _, pixels, _ in samples]),
        "image_grid_hws": torch.tensor(GRIDS),
    }


def _fused(query: tuple, key: tuple, value: tuple, *args: object, **kwargs: object) -> int:
    """The CPU's fused attention, which torch does not count: (B, N, L, D), all pairs."""
    rows, heads, length, width = query
    return 2 * rows * heads * length * length * (width + value[-1])


def _fused_backward(grad: tuple, query: tuple, key: tuple, value: tuple, *args: object, **kwargs: object) -> int:
    return 2 * _fused(query, key, value)


def counted(model: KimiVLForConditionalGeneration, pack: dict[str, Tensor], backward: bool) -> int:
    """What torch counts; attention over full squares, so that the causal half is counted too."""
    aten = torch.ops.aten
    fused = {
        aten._scaled_dot_product_flash_attention_for_cpu: _fused,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _fused_backward,
    }
    with FlopCounterMode(display=False, custom_mapping=fused) as counter:
        logp = model.target_log_probs(**pack)
        if backward:
            logp.sum().backward()
    return counter.get_total_flops()


def with_full_squares(flops: Flops) -> float:
    return flops.total + flops.attention


def forward(config: KimiVLConfig, pack: dict[str, Tensor]) -> Flops:
    return pack_flops(config, LENGTHS, int((pack["targets"] != -100).sum()), GRIDS)


@pytest.mark.parametrize("frozen", [(), ("vision_tower",), ("vision_tower", "multi_modal_projector")])
def test_torch_counts_the_same(tiny_config, pack, frozen: tuple[str, ...]):
    torch.manual_seed(0)
    model = KimiVLForConditionalGeneration(tiny_config).train()
    for part in frozen:
        getattr(model, part).requires_grad_(False)
    flops = forward(tiny_config, pack)

    # transformers 5.17 makes the rotary angles as a product, of 2 FLOPs an angle
    assert counted(model, pack, backward=False) == pytest.approx(with_full_squares(flops), rel=1e-5)
    training = with_full_squares(flops.training(frozen)) + flops.head  # the chunked loss makes its logits again
    assert counted(model, pack, backward=True) == pytest.approx(training, rel=0.01)


def test_published_figures(a3b: KimiVLConfig):
    text = pack_flops(a3b, [1], targets=1).training()
    assert text.decoder + text.head == pytest.approx(15.5e9, rel=0.01)
    assert decoder_parameters(a3b) + 2048 * 163840 == pytest.approx(2.58e9, rel=0.01)
    image = pack_flops(a3b, [1], 0, [(2, 2)]).training()
    assert image.vision + image.patches == pytest.approx(9.9e9, rel=0.01)


def test_the_planner_balances_by_these_costs(a3b: KimiVLConfig):
    """`data` may not import `model`: its constants are written out, and held to the formulas here."""
    cases = [(100, []), (32_768, []), (131_072, []), (4096, [(64, 64)] * 2), (2000, [(28, 40)] * 4)]
    token = pack_flops(a3b, [1], targets=1).training()
    per_token = token.total - token.attention
    for length, grids in cases:
        flops = pack_flops(a3b, [length], length, grids).training()
        patches = sum(h * w for h, w in grids)
        [cost] = sample_cost(np.array([length]), np.array([patches]), np.array([len(grids)]))
        assert cost == pytest.approx(flops.total / per_token, rel=0.02), (length, grids)


def test_parts_that_do_not_train_cost_no_gradients(a3b: KimiVLConfig):
    flops = pack_flops(a3b, [1000], 10, [(20, 20)])
    everything = ("vision_tower", "multi_modal_projector", "language_model")
    assert flops.training(everything).total == flops.total
    only_tower = flops.training(("multi_modal_projector", "language_model"))
    assert only_tower.decoder == 2 * flops.decoder and only_tower.vision == 3 * flops.vision
    with pytest.raises(ValueError, match="'visoin_tower'.*vision_tower"):
        flops.training(("visoin_tower",))


def test_packs_add_up(a3b: KimiVLConfig):
    one, two = pack_flops(a3b, [100], 5, [(4, 4)]), pack_flops(a3b, [30, 7], 3)
    assert (one + two).total == pytest.approx(pack_flops(a3b, [100, 30, 7], 8, [(4, 4)]).total)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA A10G", None),
        ("NVIDIA H20", None),
        ("NVIDIA H100", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("Tesla V100-SXM2-32GB", None),
        ("", None),
    ],
)
def test_peaks_by_name(name: str, peak: float | None):
    assert peak_flops(name) == peak
    assert mfu(1e15, 2.0, name) == (None if peak is None else pytest.approx(5e14 / peak))
