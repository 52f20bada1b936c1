"""What several ranks have evaluated is what one would have."""

import random
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from kimivl.stages.evaluation import Tally, Transcript, varied


def test_examples_are_of_different_difficulties_where_there_are_as_many():
    assert varied([(0, 3), (1, 3), (2, 1), (3, 3), (4, 1)], 2) == [0, 2]
    assert varied([(0, 3), (1, 3), (2, 1), (3, 3), (4, 1)], 4) == [0, 2, 1, 3]
    assert varied([(7, 1)], 4) == [7] and varied([], 4) == varied([(7, 1)], 0) == []


@dataclass
class Answer:
    text: str
    finished: bool

    def __len__(self) -> int:
        return len(self.text)


def tally_of(numbers, difficulties, limit) -> Tally:
    tally = Tally()
    for number in numbers:
        problem = SimpleNamespace(number=number, difficulty=difficulties[number])
        response = Answer(str(number), number % 3 > 0)
        tally.add(problem.difficulty, response, number % 2 == 0, {"think_tokens": float(number)})
        tally.add_sampled(response, number % 5 == 0)
        tally.keep(Transcript(problem, response, True), limit)
    return tally


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_tallies_of_ranks_make_the_tally_of_one(ranks):
    generator = random.Random(ranks)
    for _ in range(50):
        total, limit = generator.randrange(1, 20), generator.randrange(7)
        difficulties = [generator.randrange(4) for _ in range(total)]
        whole = tally_of(range(total), difficulties, limit)
        parts = [tally_of(range(rank, total, ranks), difficulties, limit) for rank in range(ranks)]
        merged = Tally.merged(parts)
        assert merged.metrics() == whole.metrics()
        assert [kept.response.text for kept in merged.transcripts] == [kept.response.text for kept in whole.transcripts]
        assert len(whole.transcripts) == min(limit, total)
