"""The questions of the digits task, with their exact answers.

A problem is its kind, its digits and, for `count`, the threshold k. Direct answers are `\\boxed{...}`, so
that one verifier reads every stage; only `sentence`, a reading in plain words of stage 1, is not.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

PHRASINGS: dict[str, tuple[str, ...]] = {
    "read": (
        "Read the digits.",
        "Which digits do you see?",
        "What number is written here?",
        "Read the digits from left to right.",
        "Write down the digits in order.",
    ),
    "sentence": (
        "Say in a sentence which digits you see.",
        "Read the digits as a sentence.",
        "Describe the digits in one sentence.",
    ),
    "backwards": (
        "Read the digits backwards.",
        "Read the digits from last to first.",
        "Write down the digits in reverse order.",
    ),
    "sum": (
        "What is the sum of the digits?",
        "Add the digits.",
        "Add up all the digits you see.",
        "What do the digits add up to?",
    ),
    "count": (
        "How many digits exceed {k}?",
        "How many digits are greater than {k}?",
        "Count the digits above {k}.",
    ),
    "largest": (
        "Which digit is the largest?",
        "What is the largest digit?",
        "Find the largest of the digits.",
    ),
    "text_sum": (
        "What is the sum of {list}?",
        "Add {list}.",
        "Add up the digits {list}.",
        "What is {plus}?",
        "{plus} = ?",
    ),
    "addition": (
        "What is {plus}?",
        "{plus} = ?",
        "Add {list}.",
        "What is the sum of {list}?",
        "Calculate {plus}.",
        "How much is {plus}?",
    ),
}
THRESHOLDS = range(2, 8)


@dataclass(frozen=True, slots=True)
class Problem:
    """A question about `numbers`: the digits in the picture, or the operands of a text-only question."""

    kind: str
    numbers: tuple[int, ...]
    threshold: int = -1

    @property
    def answer(self) -> str:
        """The exact answer."""
        match self.kind:
            case "read":
                return joined(self.numbers)
            case "sentence":
                return sentence(self.numbers)
            case "backwards":
                return joined(self.numbers[::-1])
            case "count":
                return str(sum(number > self.threshold for number in self.numbers))
            case "largest":
                return str(max(self.numbers))
            case _:
                return str(sum(self.numbers))

    @property
    def reply(self) -> str:
        """The answer as the assistant gives it."""
        return self.answer if self.kind == "sentence" else boxed(self.answer)

    @property
    def difficulty(self) -> int:
        """The number of digits the question is about, 1 to 8."""
        return len(joined(self.numbers))


def boxed(answer: str) -> str:
    """`\\boxed{answer}`"""
    return f"\\boxed{{{answer}}}"


def joined(numbers: Sequence[int]) -> str:
    """(3, 7, 8) -> "378" """
    return "".join(map(str, numbers))


def sentence(numbers: tuple[int, ...]) -> str:
    """(3, 7, 8) -> "The digits are 3, 7 and 8." """
    if len(numbers) == 1:
        return f"The digit is {numbers[0]}."
    return f"The digits are {', '.join(map(str, numbers[:-1]))} and {numbers[-1]}."


def ask(problem: Problem, rng: Random) -> str:
    """The question in one of its phrasings."""
    phrasings = PHRASINGS[problem.kind]
    if problem.kind == "text_sum" and len(problem.numbers) == 1:
        phrasings = tuple(phrasing for phrasing in phrasings if "{plus}" not in phrasing)
    *others, last = map(str, problem.numbers)
    return rng.choice(phrasings).format(
        k=problem.threshold,
        list=f"{', '.join(others)} and {last}" if others else last,
        plus="+".join([*others, last]),
    )


def draw_operands(rng: Random) -> tuple[int, int]:
    """Two numbers to add: mostly a running total and a digit, the step that long chains are made of."""
    if rng.random() < 0.7:
        return rng.randint(0, 63), rng.randint(0, 9)
    return rng.randint(10, 99), rng.randint(10, 99)
