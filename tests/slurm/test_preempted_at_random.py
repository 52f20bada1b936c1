"""Runs that a real SLURM preempts in every one of their parts."""

import pytest
from preempted_at_random import arguments, preempt_and_compare


@pytest.mark.slow
def test_runs_preempted_in_every_part_are_those_that_nothing_stopped(nodes, root):
    given = arguments(["--runs", "4", "--times", "2", "--seconds", "1", "--limit", "2400"])
    assert given.runs * given.times == len(given.parts)  # each part once
    unequal, preemptions = preempt_and_compare(nodes, root, given)
    assert unequal == 0  # the report that is printed says which, and what they said
    assert preemptions >= given.runs  # a run that is told in its last second has nothing left to save
