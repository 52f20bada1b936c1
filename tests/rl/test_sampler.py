"""The draw of problems: curriculum, priorities, caps, forgetting, filters, and its state."""

import logging
from collections import Counter

import numpy as np
import pytest
import torch

from kimivl.rl.gates import Gates
from kimivl.rl.sampler import Curriculum, ProblemSampler

DIFFICULTY = np.repeat(np.arange(1, 9), 50)
NAN = float("nan")


def make(difficulty=DIFFICULTY, columns=None, **settings) -> ProblemSampler:
    return ProblemSampler({"difficulty": np.asarray(difficulty)} | (columns or {}), **settings)


def visit(sampler, rates, iteration=0):
    """Each problem in the order of the set scored once; NaN is left unvisited."""
    rates = np.asarray(rates, float)
    numbers = np.flatnonzero(~np.isnan(rates))
    sampler.update(numbers, rates[numbers], iteration)


def chi_square(counts, expected):
    return float(((np.asarray(counts) - expected) ** 2 / expected).sum())


# The draw.


def test_problems_are_distinct_and_follow_seed_iteration_and_attempt():
    drawn = make(seed=4).sample(32, 3, 0.9).tolist()
    assert len(set(drawn)) == 32
    assert drawn == make(seed=4).sample(32, 3, 0.9).tolist()
    others = [make(seed=5).sample(32, 3, 0.9), make(seed=4).sample(32, 4, 0.9), make(seed=4).sample(32, 3, 0.9, (), 1)]
    assert all(drawn != other.tolist() for other in others)


def test_earlier_draws_do_not_change_later_ones():
    """No generator is carried along: an iteration's draw depends on the state and on its number alone."""
    used = make(seed=4)
    for iteration in range(3):
        used.sample(16, iteration, 0.5)
    assert used.sample(16, 3, 0.5).tolist() == make(seed=4).sample(16, 3, 0.5).tolist()


def test_uniform_draws_every_problem_as_often():
    sampler = make(np.ones(40, int), priority="uniform")
    visit(sampler, np.linspace(0, 1, 40))  # success changes nothing
    counts = np.bincount(np.concatenate([sampler.sample(4, i, 1.0) for i in range(2000)]), minlength=40)
    assert chi_square(counts, 200.0) < 72  # 39 degrees of freedom: 99.9%


@pytest.mark.parametrize(
    ("priority", "closed_form"),
    [("failure", lambda s: 1 - s), ("variance", lambda s: s * (1 - s)), ("uniform", lambda s: np.ones_like(s))],
)
def test_a_single_draw_is_in_proportion_to_the_priority(priority, closed_form):
    rates = np.array([0.0, 0.25, 0.5, 0.75, 0.9])
    sampler = make(np.ones(5, int), priority=priority, floor=1e-9, momentum=0.0)
    visit(sampler, rates)
    wanted = closed_form(rates)
    assert sampler.weights() / sampler.weights().sum() == pytest.approx(wanted / wanted.sum(), abs=1e-8)
    counts = np.bincount([int(sampler.sample(1, i, 1.0)[0]) for i in range(1500)], minlength=5)
    drawn = wanted > 0
    assert counts[~drawn].sum() == 0
    assert chi_square(counts[drawn], 1500 * wanted[drawn] / wanted.sum()) < 18.5  # 4 degrees of freedom: 99.9%


@pytest.mark.parametrize(
    ("priority", "golden"), [("failure", [1, 0.75, 0.05, 0.05]), ("variance", [0.05, 0.75, 0.19, 0.05])]
)
def test_weights_have_a_floor(priority, golden):
    sampler = make([1, 1, 1, 1], priority=priority, floor=0.05)
    visit(sampler, [0.0, 0.25, 0.95, 1.0])
    assert sampler.weights().tolist() == pytest.approx(golden)


# What is believed of a problem.


def test_unseen_problems_take_the_rate_of_their_difficulty():
    sampler = make([1, 1, 2], prior=0.4)
    visit(sampler, [0.9, NAN, NAN])
    assert sampler.success_rate().tolist() == [0.9, 0.9, 0.4]


def test_an_assessed_problem_begins_with_its_pass_rate():
    sampler = make([1, 1, 2], {"pass_rate": np.array([0.2, NAN, 0.7])}, prior=0.4, momentum=0.5)
    assert sampler.success_rate().tolist() == [0.2, 0.4, 0.7]
    visit(sampler, [1.0, NAN, NAN])
    assert sampler.success_rate().tolist() == pytest.approx([0.6, 0.6, 0.7])  # half of 0.2, half of 1.0


def test_the_moving_average():
    sampler = make([1], momentum=0.75)
    for success, golden in ((0.0, 0.0), (1.0, 0.25), (1.0, 0.4375)):
        visit(sampler, [success])
        assert sampler.success_rate().tolist() == pytest.approx([golden])


def test_a_group_without_a_verdict_is_no_visit():
    sampler = make([1, 1])
    sampler.update(np.array([0, 1]), np.array([NAN, 1.0]), 0)
    assert sampler.visits.tolist() == [0, 1]
    assert not np.isnan(sampler.success_rate()).any()


def test_forgetting_halves_the_distance_to_what_was_expected():
    sampler = make([1, 2], {"pass_rate": np.array([0.2, 0.5])}, momentum=0.0, half_life=10)
    visit(sampler, [1.0, NAN], iteration=5)
    for iteration, golden in ((5, 1.0), (15, 0.6), (25, 0.4), (1000, 0.2)):
        assert sampler.success_rate(iteration).tolist() == pytest.approx([golden, 0.5])


def test_a_visit_adds_to_what_is_left_of_the_ones_before():
    sampler = make([1], {"pass_rate": np.array([0.2])}, momentum=0.5, half_life=10)
    visit(sampler, [1.0], iteration=5)
    assert sampler.rate.tolist() == pytest.approx([0.6])  # half of it is the assessment's
    visit(sampler, [1.0], iteration=15)
    assert sampler.rate.tolist() == pytest.approx([(0.2 + 0.4 / 2 + 1) / 2])


def test_without_a_half_life_nothing_is_forgotten():
    sampler = make([1, 1])
    visit(sampler, [1.0, 0.0])
    assert sampler.success_rate(10_000).tolist() == [1.0, 0.0]


# The curriculum.


def test_the_curriculum_rises_from_easy_to_hard():
    sampler = make(curriculum=Curriculum(start=0.25, end=0.5))
    assert [sampler.ceiling(progress) for progress in (0, 0.25, 0.5, 1)] == pytest.approx([2.75, 5.375, 8, 8])
    assert DIFFICULTY[sampler.sample(32, 0, 0.0)].max() == 2
    assert DIFFICULTY[sampler.sample(200, 0, 1.0)].max() == 8


def test_the_root_schedule_opens_faster():
    root = Curriculum(start=0.2, end=0.4, schedule="root")
    assert [root.opened(progress) for progress in (0, 0.1, 0.4)] == pytest.approx([0.2, 0.6, 1.0])


def test_a_curriculum_by_measured_difficulty():
    rates = np.linspace(0, 1, 11)
    sampler = make(np.full(11, -1), {"pass_rate": rates}, curriculum=Curriculum("pass_rate", start=0.3, end=1.0))
    assert rates[sampler.sample(4, 0, 0.0)].min() >= 0.7 - 1e-9
    assert sorted(sampler.sample(11, 0, 1.0).tolist()) == list(range(11))


def test_the_range_of_difficulties_is_that_of_the_open_problems():
    sampler = make(curriculum=Curriculum(start=0.5, end=1.0), filter={"difficulty": [3, 5]})
    assert [sampler.ceiling(0.0), sampler.ceiling(1.0)] == [4.0, 5.0]


def test_a_problem_of_unknown_difficulty_counts_as_the_median():
    sampler = make([1, 5, 9, -1], curriculum=Curriculum(start=0.0, end=1.0))
    assert sampler.difficulty.tolist() == [1, 5, 9, 5]
    assert make([-1, -1], curriculum=Curriculum()).ceiling(0.0) == 0


def test_few_open_problems_are_topped_up_with_the_next_harder():
    drawn = DIFFICULTY[make(curriculum=Curriculum(start=0.0, end=1.0)).sample(60, 0, 0.0)]
    assert sorted(np.unique(drawn, return_counts=True)[1]) == [10, 50]


def test_a_measured_curriculum_needs_a_measurement():
    with pytest.raises(ValueError, match=r"sampler.curriculum.by=pass_rate.*kimivl assess"):
        make(curriculum=Curriculum("pass_rate"))


# Problems never solved, and problems done with.


def test_never_solved_problems_take_at_most_their_share():
    sampler = make(np.ones(100, int), priority="failure", max_never_solved=0.25, never_solved_after=2)
    rates = np.repeat([0.0, 0.8], 50)
    visit(sampler, rates)
    assert (sampler.sample(40, 0, 1.0) < 50).sum() > 20  # one visit without success is not "never" yet
    visit(sampler, rates)
    for iteration in range(50):
        drawn = sampler.sample(40, iteration, 1.0)
        assert len(set(drawn.tolist())) == 40
        assert (drawn < 50).sum() == 10


def test_the_cap_keeps_the_proportions_of_the_others():
    sampler = make(np.ones(40, int), priority="failure", max_never_solved=0.0, never_solved_after=1, floor=1e-9)
    rates = np.repeat([0.0, 0.2, 0.6, 0.99], 10)
    visit(sampler, rates)
    counts = Counter(rates[sampler.sample(1, i, 1.0)].item() for i in range(1500))
    expected = np.array([0.8, 0.4, 0.01]) / 1.21 * 1500
    assert chi_square([counts[0.2], counts[0.6], counts[0.99]], expected) < 13.9  # 2 degrees of freedom: 99.9%
    assert counts[0.0] == 0


def test_the_cap_gives_way_where_nothing_else_is_left():
    sampler = make(np.ones(10, int), max_never_solved=0.0, never_solved_after=1)
    visit(sampler, [0.0] * 8 + [1.0] * 2)
    assert {8, 9} < set(sampler.sample(5, 0, 1.0).tolist())
    assert sorted(sampler.sample(10, 0, 1.0).tolist()) == list(range(10))


def test_one_success_lifts_the_cap():
    sampler = make([1, 1], never_solved_after=1)
    visit(sampler, [0.0, 0.0])
    visit(sampler, [0.125, 0.0])
    visit(sampler, [0.0, 0.0])
    assert sampler.never_solved().tolist() == [False, True]


def test_perfect_visits_in_a_row_retire_a_problem():
    sampler = make(np.ones(4, int), gates=Gates(retire_after=2))
    for rates in ([1, 1, 1, 0], [1, 0.5, NAN, 1], [NAN, 1, NAN, NAN]):
        visit(sampler, rates)
    assert sampler.perfect.tolist() == [2, 1, 1, 1]
    assert sorted(sampler.sample(3, 0, 1.0).tolist()) == [1, 2, 3]


def test_a_set_that_is_used_up_gives_what_is_left_and_says_so_once(caplog):
    sampler = make(np.ones(6, int), gates=Gates(retire_after=1))
    visit(sampler, [1, 1, 1, 0, 0, 0])
    with caplog.at_level(logging.WARNING):
        assert sorted(sampler.sample(4, 0, 1.0).tolist()) == [3, 4, 5]
        assert sorted(sampler.sample(4, 1, 1.0, leave_out=[3]).tolist()) == [4, 5]
    assert len(caplog.records) == 1 and "3 are retired" in caplog.text
    visit(sampler, [1] * 6)
    assert sampler.sample(4, 2, 1.0).tolist() == []


def test_problems_in_use_are_left_out():
    sampler = make(np.arange(10))
    assert sorted(sampler.sample(7, 0, 1.0, leave_out={0, 4, 9}).tolist()) == [1, 2, 3, 5, 6, 7, 8]


def test_asking_for_more_problems_than_there_are():
    with pytest.raises(ValueError, match="asks for 500 problems, but the set has 400; lower data.problems"):
        make().sample(500, 0, 1.0)
    with pytest.raises(ValueError, match="asks for 60 problems, but the set has 50 after sampler.filter, of 400"):
        make(filter={"difficulty": 3}).sample(60, 0, 1.0)


# Filters.


def test_a_filter_closes_problems_and_says_how_many(caplog):
    columns = {"pass_rate": np.linspace(0, 1, 400), "easy_to_hack": np.tile([0.0, 1.0], 200)}
    with caplog.at_level(logging.INFO):
        sampler = make(columns=columns, filter={"pass_rate": [0.25, 0.75], "easy_to_hack": False})
    assert "leaves 100 of 400 problems: out are 200 by pass_rate, 100 by easy_to_hack" in caplog.text
    drawn = sampler.sample(100, 0, 1.0)
    assert columns["easy_to_hack"][drawn].max() == 0
    assert columns["pass_rate"][drawn].min() >= 0.25 and columns["pass_rate"][drawn].max() <= 0.75


def test_a_filter_that_leaves_nothing_is_refused():
    with pytest.raises(ValueError, match=r"leaves 0 of 400 problems: out are 400 by difficulty; widen sampler.filter"):
        make(filter={"difficulty": 99})


# Gates, figures and state.


def test_the_gates_are_asked_about_correctness_alone():
    sampler = make(gates=Gates(zero_advantage=True))
    shaped = np.array([1.2, 0.8, 1.0])  # the length reward would make a signal
    assert sampler.admit(0, np.ones(3), shaped) == "zero_advantage"
    assert sampler.admit(0, np.array([1.0, 0.0, 1.0]), np.ones(3)) is None


def test_figures():
    sampler = make(
        [1, 1, 2, 2], curriculum=Curriculum(start=0.0, end=1.0), gates=Gates(retire_after=1), never_solved_after=1
    )
    visit(sampler, [1.0, 0.0, NAN, NAN])
    sampler.sample(1, 0, 0.0)
    sampler.sample(1, 0, 1.0, attempt=1)
    figures = sampler.figures(1.0)
    assert figures.pop("sampler/difficulty") in (1.0, 1.5)  # of both draws together
    assert figures == {
        "sampler/ceiling": 2.0,
        "sampler/solve_rate_mean": pytest.approx((1.0 + 0.0 + 0.5 + 0.5) / 4),
        "sampler/seen": 0.5,
        "sampler/never_solved": 1.0,
        "sampler/retired": 1.0,
    }
    sampler.sample(1, 3, 1.0, leave_out=[0, 1, 2], attempt=1)  # the first draw of iteration 3: groups waited before
    assert sampler.figures(1.0)["sampler/difficulty"] == 2.0


def used_sampler() -> ProblemSampler:
    settings = {"priority": "failure", "half_life": 3.0, "max_never_solved": 0.2, "never_solved_after": 1}
    return make(seed=2, curriculum=Curriculum(), gates=Gates(retire_after=2), **settings)


def run(sampler, iterations):
    drawn = []
    for iteration in iterations:
        numbers = sampler.sample(32, iteration, iteration / 12)
        drawn.append(numbers.tolist())
        sampler.update(numbers, np.random.default_rng(iteration).integers(0, 5, 32) / 4, iteration)
    return drawn


def bits(sampler):
    state = sampler.state_dict()
    return {name: value.numpy().tobytes() if torch.is_tensor(value) else value for name, value in state.items()}


def test_a_resumed_sampler_goes_on_bit_for_bit(tmp_path):
    whole = used_sampler()
    drawn = run(whole, range(12))
    first = used_sampler()
    run(first, range(5))
    torch.save(first.state_dict(), tmp_path / "state.pt")
    again = used_sampler()
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert run(again, range(5, 12)) == drawn[5:]
    assert bits(again) == bits(whole)
    assert again.figures(1.0) == whole.figures(1.0)


def test_the_state_is_small_and_does_not_change_behind_ones_back():
    sampler = used_sampler()
    before = bits(sampler)
    state = sampler.state_dict()
    run(sampler, range(3))
    again = used_sampler()
    again.load_state_dict(state)
    assert bits(again) == before
    assert sum(value.nbytes for value in state.values() if torch.is_tensor(value)) <= 33 * len(DIFFICULTY)


@pytest.mark.parametrize(
    ("others", "said"),
    [
        ({"difficulty": DIFFICULTY[:10]}, "tracks 400 problems, but data.shards has 10:"),
        ({"difficulty": DIFFICULTY, "crc32": np.arange(1, 401, dtype=np.uint32)}, "data.shards has 400 others: resume"),
    ],
)
def test_a_checkpoint_of_other_problems_is_refused(others, said):
    columns = {"difficulty": DIFFICULTY, "crc32": np.arange(400, dtype=np.uint32)}
    with pytest.raises(ValueError, match=said):
        ProblemSampler(others).load_state_dict(ProblemSampler(columns).state_dict())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"prior": 1.5}, "sampler.prior"),
        ({"max_never_solved": -0.1}, "sampler.max_never_solved"),
        ({"momentum": 1.0}, "momentum"),
        ({"floor": 0.0}, "floor"),
        ({"half_life": 0.0}, "half_life"),
        ({"never_solved_after": 0}, "never_solved_after"),
        ({"filter": {"pass_rate": [0, 1]}}, "kimivl assess"),
    ],
)
def test_wrong_settings_are_named(settings, said):
    with pytest.raises(ValueError, match=said):
        make(**settings)


def test_a_wrong_curriculum_is_named():
    with pytest.raises(ValueError, match=r"sampler.curriculum needs 0 <= start, end <= 1, not 1.5"):
        Curriculum(start=1.5)
