"""The mixture: counts of uses exact in each epoch, even over epochs, and kept when samples move between phases."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimivl.data.mixture import Limits, uses_of_epoch

SOURCES = ["ocr", "charts", "text"]
ONE_PHASE = [Limits(max_length=100, max_patches=100, epochs=20)]


def uses(source, epoch: int = 0, *, tokens=None, phases=ONE_PHASE, mixture=None, too_long="drop", seed: int = 0):
    source = np.asarray(source, np.int16)
    tokens = np.ones(len(source), int) if tokens is None else np.asarray(tokens)
    options = {"sources": SOURCES, "phases": phases, "epoch": epoch, "seed": seed}
    return uses_of_epoch(tokens, 0 * tokens, source, mixture=mixture, too_long=too_long, **options)


def test_without_a_mixture_each_sample_is_used_once():
    found = uses([0, 1, 2, 0])
    assert found.count.tolist() == [1, 1, 1, 1]
    assert found.count.dtype == np.uint8
    assert not found.moved.any()


@settings(max_examples=60)
@given(st.floats(0.01, 6), st.integers(1, 90), st.integers(0, 19))
def test_an_epoch_has_exactly_its_share(weight, members, epoch):
    source = np.array([0] * members + [1] * 7)
    count = uses(source, epoch, mixture={"ocr": weight}).count
    extra = round((weight - int(weight)) * members)
    assert count[:members].sum() == int(weight) * members + extra
    assert set(count[:members].tolist()) <= {int(weight), int(weight) + 1}
    assert (count[members:] == 1).all()


@pytest.mark.parametrize(("weight", "epochs"), [(0.5, 2), (0.25, 4), (2.75, 4), (0.1, 10)])
def test_over_epochs_the_use_is_even(weight, epochs):
    source = np.zeros(40, int)
    total = sum(uses(source, epoch, mixture={"ocr": weight}).count.astype(int) for epoch in range(epochs))
    assert (total == round(weight * epochs)).all()


def test_use_differs_by_one_at_most_after_any_number_of_epochs():
    total = np.zeros(33, int)
    for epoch in range(20):
        total += uses(np.zeros(33, int), epoch, mixture={"ocr": 0.3}).count
        assert np.ptp(total) <= 1


def test_the_seed_decides_who_comes_first():
    source = np.zeros(40, int)
    first, again, other = (uses(source, mixture={"ocr": 0.5}, seed=seed).count.tolist() for seed in (0, 0, 1))
    assert first == again != other


def test_many_uses_need_a_wider_type():
    assert uses([0, 1], mixture={"ocr": 300}).count.tolist() == [300, 1]


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.sampled_from([10, 50, 100]), st.integers(1, 4)), min_size=1, max_size=4),
    st.sampled_from([None, {"ocr": 0.5}, {"ocr": 1.5, "charts": 0, "text": 2.25}]),
    st.integers(0, 100),
)
def test_moving_keeps_the_uses_of_the_run(lengths, mixture, seed):
    """Every sample is used as often over the run as without limits, and only where it fits if it fits anywhere."""
    generator = np.random.default_rng(seed)
    source, tokens = generator.integers(0, 3, 50), generator.integers(1, 120, 50)
    phases = [Limits(max_length=length, max_patches=0, epochs=epochs) for length, epochs in lengths]
    unlimited = [Limits(max_length=1000, max_patches=0, epochs=sum(phase.epochs for phase in phases))]
    limit_of_epoch = [phase.max_length for phase in phases for _ in range(phase.epochs)]
    total, expected, late = np.zeros(50, int), np.zeros(50, int), 0
    for epoch, limit in enumerate(limit_of_epoch):
        found = uses(source, epoch, tokens=tokens, phases=phases, mixture=mixture, too_long="move")
        base = uses(source, epoch, phases=unlimited, mixture=mixture).count.astype(int)
        later = max(limit_of_epoch[epoch:])
        leaves = (tokens > limit) & (tokens <= later)
        assert found.moved.sum() == base[leaves].sum()
        assert not found.count[leaves].any()
        assert (found.count[tokens > later] == base[tokens > later]).all()  # dropped by the plan, and counted there
        total += found.count
        expected += base
        late += found.moved.sum()
    np.testing.assert_array_equal(total, expected)


def test_moved_uses_are_spread_over_the_epochs_of_the_later_phase():
    phases = [Limits(32, 0, 2), Limits(64, 0, 1), Limits(128, 0, 4)]
    tokens = [50, 100, 100, 100, 100, 10, 500]
    counts = [uses([0] * 7, e, tokens=tokens, phases=phases, too_long="move").count.tolist() for e in range(7)]
    assert counts[0] == counts[1] == [0, 0, 0, 0, 0, 1, 1]
    assert counts[2] == [3, 0, 0, 0, 0, 1, 1]  # the two of epochs 0 and 1, and its own
    late = np.array(counts[3:])
    assert (late[:, 0] == 1).all()
    assert (late[:, 1:5].sum(0) == 4 + 3).all()  # three missed uses of each long sample
    assert late[:, 1:5].sum(1).tolist() == [7, 7, 7, 7]


def test_dropping_leaves_counts_to_the_plan():
    found = uses([0, 0], tokens=[10, 5000], phases=[Limits(32, 0, 1), Limits(8000, 0, 1)])
    assert found.count.tolist() == [1, 1]
    assert not found.moved.any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixture": {"orc": 1.0}}, r"data.mixture names the unknown source 'orc'; the data has ocr, charts, text"),
        ({"mixture": {"ocr": -1}}, r"data.mixture.ocr must be a number from 0"),
        ({"mixture": {"ocr": float("nan")}}, r"data.mixture.ocr must be a number from 0"),
        ({"mixture": {"ocr": float("inf")}}, r"data.mixture.ocr must be a number from 0"),
        ({"mixture": {"ocr": 0, "charts": 0, "text": 0}}, r"data.mixture uses none of the samples"),
        ({"too_long": "cut"}, r"data.too_long must be drop or move, not 'cut'"),
        ({"epoch": 20}, r"epoch 20 lies outside of the 20 epochs of data.phases"),
    ],
)
def test_mistakes_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        uses([0, 1, 2], **changes)
