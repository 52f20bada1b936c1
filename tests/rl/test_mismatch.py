"""Engine against trainer: nothing where they agree, closed forms where they do not."""

from __future__ import annotations

import math

import pytest
import torch

from kimivl.rl.mismatch import Mismatch, compare

SEGMENT = torch.tensor([0, 0, 0, 1, 1, 2])
REF = torch.tensor([-1.0, -2.0, -0.5, -3.0, -1.0, -0.2])


def engine(*log_ratio: float) -> torch.Tensor:
    """Log-probabilities by an engine, of which ``log_ratio`` is log pi / mu."""
    return REF - torch.tensor(log_ratio)


@pytest.mark.parametrize("importance", ["none", "token", "sequence"])
@pytest.mark.parametrize("mask", ["none", "geometric_mean", "max"])
def test_where_engine_and_trainer_agree_nothing_happens(importance, mask):
    figures = compare(REF, REF, SEGMENT)
    assert len(figures) == 6 and set(figures.values()) == {0.0}
    weight, counts = Mismatch(importance, mask=mask, low=1.0, high=1.0)(REF, REF, SEGMENT)
    assert weight.tolist() == [1.0] * 6
    assert counts["policy/importance_weight"] == 1
    assert sum(counts.values()) == 1


def test_figures_are_those_of_the_difference():
    difference = torch.tensor([0.0, 0.1, -0.3, 0.0, 0.5, -0.05])
    figures = compare(REF + difference, REF, SEGMENT)
    assert figures["policy/mismatch_k1"] == pytest.approx(float(difference.mean()), rel=1e-5)
    assert figures["policy/mismatch_kl"] == pytest.approx(
        float((-difference).exp().mean() - 1 + difference.mean()), 1e-4
    )
    assert figures["policy/mismatch_p50"] == pytest.approx(0.05, rel=1e-4)
    assert figures["policy/mismatch_p99"] == figures["policy/mismatch_max"] == pytest.approx(0.5, rel=1e-5)
    assert figures["policy/mismatch_sequence_max"] == pytest.approx(0.5, rel=1e-5)


def test_both_estimates_are_the_divergence_in_expectation():
    """KL(mu || pi), by all words of a vocabulary as often as mu says them."""
    counts = torch.tensor([5, 3, 2])
    mu, pi = (counts / 10).log(), torch.tensor([0.2, 0.3, 0.5]).log()
    drawn = torch.arange(3).repeat_interleave(counts)
    figures = compare(mu[drawn], pi[drawn])
    expected = float((mu.exp() * (mu - pi)).sum())
    assert figures["policy/mismatch_kl"] == pytest.approx(expected, rel=1e-5)
    assert figures["policy/mismatch_k1"] == pytest.approx(expected, rel=1e-5)


def test_only_what_is_known_and_counts_is_compared():
    rollout = engine(math.nan, 0.1, 9.0, 0.0, 0.0, 0.0)
    counted = torch.tensor([True, True, False, True, True, True])
    assert compare(rollout, REF, SEGMENT, counted)["policy/mismatch_max"] == pytest.approx(0.1, rel=1e-5)
    assert compare(torch.full((6,), math.nan), REF, SEGMENT) == {}
    assert compare(REF, REF, SEGMENT, torch.zeros(6, dtype=torch.bool)) == {}
    assert compare(torch.zeros(0), torch.zeros(0), torch.zeros(0, dtype=torch.int64)) == {}


def test_the_quantile_is_an_order_statistic():
    difference = torch.arange(1, 1001) / 1000
    figures = compare(difference, torch.zeros(1000))
    assert figures["policy/mismatch_p50"] == pytest.approx(0.5)
    assert figures["policy/mismatch_p99"] == pytest.approx(0.99)


def test_weights_of_tokens_are_truncated_ratios():
    rollout = engine(math.log(3), math.log(1.5), math.log(0.5), 0.0, 50.0, -200.0)
    weight, counts = Mismatch("token", cap=2.0)(REF, rollout, SEGMENT)
    assert weight[:5].tolist() == pytest.approx([2.0, 1.5, 0.5, 1.0, 2.0], rel=1e-5)
    assert 0 < weight[5] < 1e-20  # as good as nothing, but a counted token
    assert counts["policy/truncated_tokens"] == 2
    assert counts["policy/importance_weight"] == pytest.approx(7 / 6, rel=1e-5)


def test_weights_of_sequences_are_products():
    rollout = engine(math.log(3), math.log(1.5), math.log(0.25), math.log(2), math.log(3), 0.0)
    weight, counts = Mismatch("sequence", cap=4.0)(REF, rollout, SEGMENT)
    assert weight.tolist() == pytest.approx([1.125] * 3 + [4.0] * 2 + [1.0], rel=1e-5)
    assert counts["policy/truncated_tokens"] == 2


def test_weights_make_the_engines_draws_those_of_the_trainer():
    """Expectation under mu of weight * f is that under pi, where no weight is capped."""
    mu, pi = (torch.tensor(p).log() for p in ([0.5, 0.3, 0.2], [0.2, 0.3, 0.5]))
    f = torch.tensor([1.0, -2.0, 5.0])
    weight, _ = Mismatch("token", cap=10.0)(pi, mu, torch.arange(3))
    assert float((mu.exp() * weight * f).sum()) == pytest.approx(float((pi.exp() * f).sum()), rel=1e-5)


@pytest.mark.parametrize(
    ("mask", "kept", "count"),
    [("none", [1] * 6, 0), ("geometric_mean", [1, 1, 1, 0, 0, 1], 1), ("max", [0, 0, 0, 0, 0, 1], 2)],
)
def test_masks_leave_out_whole_sequences(mask, kept, count):
    """Response 0 has a token far out and a mean of 1; response 1 is out on the whole."""
    rollout = engine(math.log(4), math.log(0.25), 0.0, math.log(0.3), math.log(0.7), 0.1)
    weight, counts = Mismatch(mask=mask, low=0.5, high=2.0)(REF, rollout, SEGMENT)
    assert weight.tolist() == kept
    assert counts["policy/masked_sequences"] == count


def test_what_did_not_count_is_neither_read_nor_brought_back():
    """A segment of an earlier policy (weight 0) has ratios of its own, and the sequence is judged without it."""
    rollout = engine(9.0, 0.0, 0.0, math.nan, 0.0, 0.0)
    before = torch.tensor([0.0, 1.0, 0.5, 1.0, 1.0, 1.0])
    weight, counts = Mismatch("sequence", mask="max", low=0.5, high=2.0)(REF, rollout, SEGMENT, before)
    assert weight.tolist() == before.tolist()
    assert counts["policy/masked_sequences"] == 0


def test_tokens_that_the_trainer_holds_impossible_are_left_out_and_counted():
    ref = REF.clone()
    ref[1] = -math.inf
    for mismatch in (Mismatch(), Mismatch("token"), Mismatch("sequence", mask="geometric_mean")):
        weight, counts = mismatch(ref, REF, SEGMENT)
        assert weight.tolist() == [1, 0, 1, 1, 1, 1]
        assert counts["policy/impossible_tokens"] == 1
    assert compare(REF, ref, SEGMENT)["policy/mismatch_max"] == 0


def test_no_tokens():
    none = torch.zeros(0)
    weight, counts = Mismatch("sequence", mask="max")(none, none, none.long())
    assert len(weight) == 0 and counts["policy/masked_sequences"] == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"importance": "word"}, "module.mismatch.importance=word: choose one of none, token, sequence"),
        ({"mask": "mean"}, "module.mismatch.mask=mean: choose one of none, geometric_mean, max"),
        ({"cap": 0}, "module.mismatch.cap=0"),
        ({"low": 1.5}, "must hold 1"),
        ({"high": 0.5}, "must hold 1"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Mismatch(**settings)
