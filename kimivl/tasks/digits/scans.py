"""The handwritten digits (UCI, 1,797 scans of 8x8 pixels, shipped in scikit-learn), split, varied and drawn.

The split is by image and stratified by digit: 1200 scans to train on, 200 to choose settings on, 397 to
report on. A training scan is drawn six times, once as it is and five times rotated, scaled and shifted; a
held-out scan once. A digit is drawn white on black into a cell of 28x28 pixels, which Kimi-VL turns into
exactly one image token. Up to 4 digits stand in one row, more in two; a cell that is left over is black.
"""

import io
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

CELL = 28  # pixels: 2x2 patches of 14x14, merged into one image token
MARGIN = 2  # black pixels put around a scan of 8x8, so that strokes at its edge are not cut when it is smoothed
ZOOM = 3.0  # pixels of the cell per pixel of the scan, which leaves a margin of 2 pixels
SPLIT_SIZES = {"train": 1200, "val": 200, "test": 397}
VARIANTS = 6
MAX_ROTATION = 12.0  # degrees
SCALES = (0.88, 1.12)
MAX_SHIFT = 1.6  # pixels of the cell
BRIGHTEST = 16.0  # of a scan


@dataclass(frozen=True, slots=True)
class Cells:
    """Drawn digits of a split: `pixels` (n, 28, 28) uint8, `labels` (n,) digits, `scans` (n,) ids 0..1796."""

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]
    scans: NDArray[np.int64]


def split_scans(labels: NDArray[np.int64], seed: int) -> dict[str, NDArray[np.int64]]:
    """Scan ids of train, val and test, each with its share of every digit; a function of the seed."""
    rng = np.random.default_rng([seed, 0])
    # Shuffled inside each digit, then dealt out by evenly spaced ranks: any cut of the order is stratified.
    shuffled = rng.permutation(len(labels))
    ranks = np.empty(len(labels))
    for digit in range(10):
        members = shuffled[labels[shuffled] == digit]
        ranks[members] = (np.arange(len(members)) + rng.random()) / len(members)
    order = np.argsort(ranks, kind="stable")
    cuts = np.cumsum(list(SPLIT_SIZES.values()))[:-1]
    parts = np.split(order, cuts)
    return {name: np.sort(part) for name, part in zip(SPLIT_SIZES, parts, strict=True)}


def draw_splits(seed: int) -> dict[str, Cells]:
    """All cells of train (six per scan), val and test (one per scan)."""
    from sklearn.datasets import load_digits  # a second to import; a finished folder never needs it

    data = load_digits()
    images, labels = data.images / BRIGHTEST, data.target
    cells = {}
    for name, scans in split_scans(labels, seed).items():
        variants = VARIANTS if name == "train" else 1
        pixels = [draw(images[scan], seed, int(scan), v) for scan in scans for v in range(variants)]
        ids = np.repeat(scans, variants)
        cells[name] = Cells(np.stack(pixels), labels[ids], ids)
    return cells


def draw(image: NDArray[np.float64], seed: int, scan: int, variant: int) -> NDArray[np.uint8]:
    """One scan (8, 8) in [0, 1] as a cell (28, 28); variant 0 is the scan itself, others move at random."""
    from scipy import ndimage  # as above

    angle, scale, shift = 0.0, 1.0, np.zeros(2)
    if variant:
        rng = np.random.default_rng([seed, 1, scan, variant])
        angle = np.deg2rad(rng.uniform(-MAX_ROTATION, MAX_ROTATION))
        scale = rng.uniform(*SCALES)
        shift = rng.uniform(-MAX_SHIFT, MAX_SHIFT, size=2)
    cos, sin = np.cos(angle), np.sin(angle)
    # affine_transform asks where in the scan a pixel of the cell comes from, so this is the inverse map.
    inverse = np.array([[cos, -sin], [sin, cos]]) / (ZOOM * scale)
    padded = np.pad(image, MARGIN)
    offset = (len(padded) - 1) / 2 - inverse @ ((CELL - 1) / 2 + shift)
    drawn = ndimage.affine_transform(padded, inverse, offset, output_shape=(CELL, CELL), order=3)
    return np.rint(255 * drawn.clip(0, 1)).astype(np.uint8)


def layout(count: int) -> tuple[int, int]:
    """(rows, columns) for `count` digits: one row up to 4, then two rows as equal as can be (5 is 3 + 2)."""
    rows = 1 if count <= 4 else 2
    return rows, -(-count // rows)


def compose(cells: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Lay cells (n, 28, 28) out in reading order; where the last row is one short its cell stays black."""
    rows, columns = layout(len(cells))
    grid = np.zeros((rows * columns, CELL, CELL), np.uint8)
    grid[: len(cells)] = cells
    return grid.reshape(rows, columns, CELL, CELL).swapaxes(1, 2).reshape(rows * CELL, columns * CELL)


def png(pixels: NDArray[np.uint8]) -> bytes:
    """A greyscale picture as PNG bytes."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "png", compress_level=1)
    return stream.getvalue()
