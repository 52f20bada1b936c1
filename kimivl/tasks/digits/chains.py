"""Chains of thought for the digits task: plan, read, work, check, and mend what went wrong.

The four behaviours of a long-CoT warm-up set (arXiv 2501.12599, 2.2) are written into the chains:
planning (the steps are laid out first), evaluation (the result is checked from the other end), reflection
(a misreading or a slip is noticed and mended) and exploration (another way to the result). The final answer
is always right. Some parts are longer than they need be, which leaves the length reward of RL something to
shorten.
"""

from collections.abc import Callable, Sequence
from random import Random

from kimivl.tasks.digits.questions import Problem, boxed, joined

OPEN, CLOSE = "◁think▷", "◁/think▷"
MISREAD = 0.10  # share of chains with a digit misread at first
SLIP = 0.10  # share of chains with a wrong step at first
CAUGHT_BY_CHECK = 0.4  # share of the slips in sums that only the check brings to light
CHECK = 0.40  # share of chains that check the work from the other end
OTHER_WAY = 0.25  # share of chains that try another way instead
RESTATE = 0.30
VERBOSE_PLAN = 0.40
# Digits that are taken for one another in handwriting.
LOOKALIKES = ((6, 8), (7, 4), (7, 3), (8, 9), (9, 1), (6, 9), (0, 5), (1, 9), (3, 9), (4, 5))

# A short plan and a longer one.
PLANS: dict[str, tuple[str, str]] = {
    "sum": ("Plan: read, add.", "Plan: read the digits one by one, then add from left to right."),
    "text_sum": ("Plan: add.", "Plan: add the digits one by one from left to right."),
    "count": ("Plan: read, count.", "Plan: read the digits one by one, then count those above {k}."),
    "largest": ("Plan: read, compare.", "Plan: read the digits one by one, then keep the largest so far."),
    "backwards": ("Plan: read, reverse.", "Plan: read the digits one by one, then reverse the order."),
}


def chain(problem: Problem, rng: Random, redundant: float | None = None, hasty: float = 0.0) -> str:
    """`◁think▷...◁/think▷\\boxed{answer}` for a sum, text_sum, count, largest or backwards problem.

    `redundant`: write chains without mistakes, in which each part that such a chain could do without (the longer plan,
    the check, the other way, the result once more) stands with this probability. None: the shares above.
    `hasty`: share of the chains that leave out the work. Its answer is right, but a model that learns them guesses.
    """
    long_plan = VERBOSE_PLAN if redundant is None else redundant
    parts = [PLANS[problem.kind][rng.random() < long_plan].format(k=problem.threshold)]
    if problem.kind != "text_sum":
        parts.append(_reading(problem.numbers, rng, MISREAD if redundant is None else 0.0))
    if not (hasty and rng.random() < hasty):
        parts += _WORK[problem.kind](problem, rng, redundant)
    return f"{OPEN}{' '.join(parts)}{CLOSE}{boxed(problem.answer)}"


def _reading(digits: tuple[int, ...], rng: Random, misread: float) -> str:
    """`Read: 3781.`, in a share `misread` of the calls with one digit misread at first."""
    right = f"{joined(digits)}."
    if rng.random() >= misread:
        return f"Read: {right}"
    place = rng.randrange(len(digits))
    wrong = list(digits)
    wrong[place] = rng.choice(LOOKALIKES[digits[place]])
    return f"Read: {joined(wrong)}. Wait, look again: {right}"


def running_sum(numbers: Sequence[int]) -> str:
    """(3, 7, 8) -> "3+7=10+8=18"; one number stands alone."""
    text, total = str(numbers[0]), numbers[0]
    for number in numbers[1:]:
        total += number
        text += f"+{number}={total}"
    return text


def _slipped_sum(numbers: Sequence[int], rng: Random) -> str:
    """A running sum with one wrong step: "3+7=10+8=17. Wait, 10+8=18+1=19.", or caught by a check later."""
    step = rng.randrange(1, len(numbers))
    error = rng.choice((-1, 1, 10)) if sum(numbers[: step + 1]) else 1
    wrong = sum(numbers[: step + 1]) + error
    slipped = f"{running_sum(numbers[:step])}+{numbers[step]}={wrong}"
    if rng.random() < CAUGHT_BY_CHECK:
        rest = running_sum([wrong, *numbers[step + 1 :]]).removeprefix(str(wrong))
        check = f"Check: {running_sum(numbers[::-1])}, not {sum(numbers) + error}."
        return f"{slipped}{rest}. {check} Wait, again: {running_sum(numbers)}."
    return f"{slipped}. Wait, {running_sum([sum(numbers[:step]), *numbers[step:]])}."


def _sum_in_pairs(numbers: Sequence[int]) -> str:
    """Another way to a sum: (3, 7, 8, 1) -> "3+7=10, 8+1=9, 10+9=19"."""
    pairs = [numbers[i : i + 2] for i in range(0, len(numbers), 2)]
    steps = [running_sum(pair) for pair in pairs if len(pair) == 2]
    return ", ".join([*steps, running_sum([sum(pair) for pair in pairs])])


def _work_sum(problem: Problem, rng: Random, redundant: float | None) -> list[str]:
    digits = problem.numbers
    if len(digits) == 1:
        return [f"Sum: {problem.answer}."]
    slipped = rng.random() < _slip(redundant)
    work = _slipped_sum(digits, rng) if slipped else f"{running_sum(digits)}."
    if "Check" in work:
        return [work]
    check = f"Check: {running_sum(digits[::-1])}, the same."
    other_way = f"Another way: {_sum_in_pairs(digits)}, the same." if len(digits) > 2 else ""
    return [work, *_afterthoughts(check, other_way, f"So the sum is {problem.answer}.", rng, redundant)]


def _slip(redundant: float | None) -> float:
    """The share of chains with a wrong step at first."""
    return SLIP if redundant is None else 0.0


def _afterthoughts(check: str, other_way: str, restated: str, rng: Random, redundant: float | None) -> list[str]:
    """What may follow the work: a check or another way (empty: none is known), and the result once more."""
    if redundant is not None:
        return [part for part in (check, other_way, restated) if part and rng.random() < redundant]
    lot = rng.random()
    second = check if lot < CHECK else other_way if lot < CHECK + OTHER_WAY else ""
    return [part for part in (second, restated if rng.random() < RESTATE else "") if part]


def _tally(digits: Sequence[int], threshold: int, count: int = 0) -> str:
    """(3, 7, 8), 5 -> "3 no, 7 yes 1, 8 yes 2"."""
    steps = []
    for digit in digits:
        count += digit > threshold
        steps.append(f"{digit} yes {count}" if digit > threshold else f"{digit} no")
    return ", ".join(steps)


def _slipped_tally(digits: Sequence[int], threshold: int, rng: Random) -> str:
    """A tally with one wrong verdict, noticed at once: "3 no, 7 no. Wait, 7 yes 1, 8 yes 2"."""
    step = rng.randrange(len(digits))
    before = sum(digit > threshold for digit in digits[:step])
    verdict = "no" if digits[step] > threshold else f"yes {before + 1}"
    head = f"{_tally(digits[:step], threshold)}, " if step else ""
    return f"{head}{digits[step]} {verdict}. Wait, {_tally(digits[step:], threshold, before)}"


def _work_count(problem: Problem, rng: Random, redundant: float | None) -> list[str]:
    digits, k = problem.numbers, problem.threshold
    work = _slipped_tally(digits, k, rng) if rng.random() < _slip(redundant) else _tally(digits, k)
    if len(digits) == 1:
        return [f"{work}."]
    above = ", ".join(str(digit) for digit in digits if digit > k) or "none"
    check = f"Check: {_tally(digits[::-1], k)}, the same."
    other_way = f"Another way: above {k}: {above}, the same."
    return [f"{work}.", *_afterthoughts(check, other_way, f"So the count is {problem.answer}.", rng, redundant)]


def _largest_so_far(digits: Sequence[int]) -> str:
    """(3, 7, 1) -> "3, 7, 7"."""
    return ", ".join(str(max(digits[: i + 1])) for i in range(len(digits)))


def _work_largest(problem: Problem, rng: Random, redundant: float | None) -> list[str]:
    digits = problem.numbers
    work = f"Largest so far: {_largest_so_far(digits)}."
    if len(digits) == 1:
        return [work]
    check = f"Check: {_largest_so_far(digits[::-1])}, the same."
    other_way = f"Another way: in order {joined(sorted(digits))}, the same."
    return [work, *_afterthoughts(check, other_way, f"So the largest is {problem.answer}.", rng, redundant)]


def _work_backwards(problem: Problem, rng: Random, redundant: float | None) -> list[str]:
    work = f"Reverse: {problem.answer}."
    if len(problem.numbers) == 1:
        return [work]
    check = f"Check: {problem.answer} in reverse is {joined(problem.numbers)}, the same."
    return [work, *_afterthoughts(check, "", f"So the order is {problem.answer}.", rng, redundant)]


_WORK: dict[str, Callable[[Problem, Random, float | None], list[str]]] = {
    "sum": _work_sum,
    "text_sum": _work_sum,
    "count": _work_count,
    "largest": _work_largest,
    "backwards": _work_backwards,
}
