from __future__ import annotations

import pytest
import torch

from kimivl.model.vision import PositionTable, rope_2d, rotate


def pixels(patches: int, seed: int = 0):
    return torch.randn(patches, 3, 14, 14, generator=torch.Generator().manual_seed(seed))


def test_rope_is_the_published_formula():
    """f_i = 10000^(-4i/d); the complex factors are interleaved, x (column) first."""
    head_dim, (h, w) = 72, (4, 6)
    x = torch.randn(h * w, 2, 3, head_dim, generator=torch.Generator().manual_seed(0))
    turned = rotate(x, *rope_2d([(h, w)], head_dim, torch.device("cpu")))
    freqs = 10000.0 ** (-4 * torch.arange(18) / 72)
    for row, column in ((0, 0), (1, 0), (0, 5), (3, 4)):
        angles = torch.stack((column * freqs, row * freqs), 1).flatten()
        patch = torch.view_as_complex(x[row * w + column].unflatten(-1, (-1, 2)).contiguous())
        expected = torch.view_as_real(patch * torch.polar(torch.ones(36), angles)).flatten(-2)
        torch.testing.assert_close(turned[row * w + column], expected, atol=1e-5, rtol=1e-5)


def test_positions_at_their_own_size_are_the_table():
    table = PositionTable(4, 6, 8)
    torch.nn.init.normal_(table.weight)
    assert torch.equal(table([(4, 6)]), table.weight.flatten(0, 1))
    both = table([(8, 2), (4, 6), (8, 2)])
    assert both.shape == (16 + 24 + 16, 8)
    assert torch.equal(both[:16], both[-16:])


def test_merge_groups_squares_in_raster_order(tiny):
    """A 4 x 4 image of patches 0..15 gives (0 1 4 5) (2 3 6 7) (8 9 12 13) (10 11 14 15), alone or beside others."""
    ids = torch.arange(16.0)[:, None]
    expected = [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    assert tiny.vision_tower._merge(ids, [(4, 4)])[..., 0].tolist() == expected
    mixed = tiny.vision_tower._merge(torch.cat([torch.zeros(8, 1), ids]), [(2, 4), (4, 4)])
    assert mixed[2:, :, 0].tolist() == expected


@torch.no_grad()
def test_images_do_not_see_one_another(tiny):
    grids = [(2, 8), (4, 4), (2, 8), (6, 2)]
    sizes = [h * w for h, w in grids]
    x = pixels(sum(sizes))
    together = tiny.vision_tower(x, torch.tensor(grids)).split([n // 4 for n in sizes])
    for image, grid, out in zip(x.split(sizes), grids, together, strict=True):
        torch.testing.assert_close(tiny.vision_tower(image, torch.tensor([grid])), out, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("grids", "patches", "message"),
    [
        ([(2, 3)], 6, "image 0: grid 2x3 must be even"),
        ([(2, 2), (2, 512)], 1028, "image 1: grid 2x512 .* under 512"),
        ([(512, 2)], 1024, "image 0: grid 512x2 must be even and under 512 patches a side; prepare images with"),
        ([(2, 0)], 0, "image 0: grid 2x0"),
        ([(2, -2)], 4, "image 0: grid 2x-2"),
        ([], 4, "no images"),
        ([(2, 4)], 12, "counts 8 patches, pixel_values has 12"),
    ],
)
def test_wrong_grids_are_named(tiny, grids, patches, message):
    with pytest.raises(ValueError, match=message) as error:
        tiny.vision_tower(pixels(patches), torch.tensor(grids, dtype=torch.int64).view(-1, 2))
    assert "\n" not in str(error.value)


def test_longest_side():
    """511 is odd, so 510 patches are the longest side; the rope has no table that ends there."""
    cos, _ = rope_2d([(2, 510)], 24, torch.device("cpu"))
    assert cos.shape == (1020, 1, 1, 12) and cos.isfinite().all()


@pytest.mark.parametrize("stand_in", ["varlen", "flash_2", "flash_3"], indirect=True)
def test_gpu_kernels_give_the_same_tokens(tiny, stand_in):
    """And the same gradients of the pixels, whose patches of one image do not reach another."""
    grids = torch.tensor([(2, 8), (4, 4), (2, 8), (6, 2)])
    results = []
    for kernel in ("sdpa", stand_in):
        x = pixels(60).requires_grad_()
        out = tiny.vision_tower(x, grids, kernel)
        results.append((out, torch.autograd.grad(out[:4].square().sum(), x)[0]))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    assert results[0][1][:16].any() and not results[1][1][16:].any()
