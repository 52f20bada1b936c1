"""Scans: split by image, drawn one digit to an image token, and none held out is ever seen in training."""

import io

import numpy as np
import pytest
from PIL import Image

from kimivl.data.sample import Sample
from kimivl.tasks.digits.scans import CELL, Cells, compose, draw, draw_splits, layout, png, split_scans

from .conftest import SEED


@pytest.fixture(scope="module")
def cells() -> dict[str, Cells]:
    return draw_splits(SEED)


def cut(sample: Sample) -> list[np.ndarray]:
    """The cells of a sample's picture in reading order."""
    if not sample.images:
        return []
    pixels = np.asarray(Image.open(io.BytesIO(sample.images[0])))
    rows, columns = np.array(pixels.shape) // CELL
    assert pixels.shape == (rows * CELL, columns * CELL)
    grid = pixels.reshape(rows, CELL, columns, CELL).swapaxes(1, 2)
    return list(grid.reshape(-1, CELL, CELL))


def test_every_scan_is_in_one_split_with_an_even_share_of_digits(cells):
    assert {name: len(set(part.scans)) for name, part in cells.items()} == {"train": 1200, "val": 200, "test": 397}
    assert sorted(scan for part in cells.values() for scan in set(part.scans)) == list(range(1797))
    for part in cells.values():
        share = np.bincount(part.labels, minlength=10) / len(part.labels)
        assert abs(share - 0.1).max() < 0.01


def test_the_split_follows_from_the_seed(cells):
    labels = np.zeros(1797, int)
    for part in cells.values():
        labels[part.scans] = part.labels
    again, other = split_scans(labels, SEED), split_scans(labels, SEED + 1)
    assert set(again["val"]) == set(cells["val"].scans) != set(other["val"])


def test_training_scans_have_six_looks_and_held_out_ones_their_own(cells):
    train = cells["train"]
    assert len(train.pixels) == 6 * 1200 and len(cells["val"].pixels) == 200 and len(cells["test"].pixels) == 397
    first = train.pixels[train.scans == train.scans[0]]
    assert len({look.tobytes() for look in first}) == 6
    assert all(look.max() > 200 for look in first)


def test_a_variant_stays_close_to_its_scan(cells):
    """A rotation of 12 degrees and a small shift leave most of the ink where it was."""
    train = cells["train"]
    original = train.pixels[::6].astype(float).reshape(1200, -1)
    varied = train.pixels[3::6].astype(float).reshape(1200, -1)
    same = [np.corrcoef(a, b)[0, 1] for a, b in zip(original[:200], varied[:200], strict=True)]
    other = [np.corrcoef(a, b)[0, 1] for a, b in zip(original[:200], varied[200:400], strict=True)]
    assert np.mean(same) > 0.7 > 0.6 > np.mean(other)


def test_no_held_out_scan_is_in_any_training_set(cells, sets):
    """By pixels: every cell of every training picture is a training cell, and no held-out cell equals one."""
    looks = {name: {cell.tobytes() for cell in part.pixels} for name, part in cells.items()}
    assert not looks["train"] & (looks["val"] | looks["test"]) and not looks["val"] & looks["test"]
    # A held-out scan drawn as training would draw it is none of the training looks either.
    blank = np.zeros((CELL, CELL), np.uint8).tobytes()
    for name, split in {"sft": "train", "long_cot": "train", "rl": "train", "val": "val", "test": "test"}.items():
        shown = {cell.tobytes() for sample in sets[name] for cell in cut(sample)} - {blank}
        assert shown and shown <= looks[split]


@pytest.mark.parametrize(
    ("count", "shape"), [(1, (1, 1)), (4, (1, 4)), (5, (2, 3)), (6, (2, 3)), (7, (2, 4)), (8, (2, 4))]
)
def test_digits_stand_in_reading_order_and_only_a_last_cell_is_blank(count: int, shape: tuple[int, int]):
    given = np.arange(1, count + 1, dtype=np.uint8)[:, None, None] * np.ones((CELL, CELL), np.uint8)
    assert layout(count) == shape
    picture = compose(given)
    sample = Sample("x", [], (png(picture),))
    values = [int(cell.max()) for cell in cut(sample)]
    assert all(cell.min() == cell.max() for cell in cut(sample))
    assert values == [*range(1, count + 1)] + [0] * (shape[0] * shape[1] - count)


def test_a_drawing_is_upright_and_fills_its_cell():
    image = np.zeros((8, 8))
    image[0, :4] = 1.0  # a stroke at the top left
    drawn = draw(image, seed=0, scan=0, variant=0)
    rows, columns = np.nonzero(drawn > 128)
    assert drawn.shape == (CELL, CELL)
    assert rows.max() < 6 and columns.min() <= 3 and columns.max() < 16
