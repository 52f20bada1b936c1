"""How often a model solves each problem of a set, and which answers it guesses without thinking.

Sources: Kimi k1.5 (arXiv 2501.12599) section 2.1 (difficulty from ten responses at high temperature; a prompt whose
answer is guessed within eight tries without thinking is easy to hack).
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from kimivl.assess.kinds import answer_kind
from kimivl.assess.ledger import Ledger
from kimivl.data.chat import THINK_CLOSE, THINK_OPEN
from kimivl.data.columns import assessed_file
from kimivl.data.index import Index
from kimivl.inference import Inference
from kimivl.rl.repetition import Repetition
from kimivl.rl.rewards import Reward, Verdict
from kimivl.rl.rollout import response_seed
from kimivl.rl.types import Problem, Request, Response, Sampling

log = logging.getLogger(__name__)

Read = Callable[[Iterable[int]], list[Problem]]
"""Numbers -> the problems that can be read."""


class Assessment:
    """Answers the problems of an index in batches, judges the answers, and writes a line for each problem.

    Args:
        index: of the problems. read: see ``Read``.
        inference: who answers. reward: judges. model: what says which model answers, for the file.
        samples, temperature, max_new_tokens: of the responses that make the pass rate.
        guesses, guess_tokens: tries without thinking, and the tokens of one; 0 tries none.
        thinking: the model thinks first, so that a guess is asked for behind an empty thought.
        repetition: what counts as a response that repeats itself and is stopped.
        batch: problems in memory at a time. limit: problems to assess, drawn at random; None is all.
        anew: begin again where there is an assessment already.
    """

    def __init__(
        self,
        index: Index,
        read: Read,
        inference: Inference,
        reward: Reward,
        model: dict[str, Any],
        samples: int = 10,
        temperature: float = 1.0,
        max_new_tokens: int = 256,
        guesses: int = 8,
        guess_tokens: int = 48,
        thinking: bool = True,
        repetition: Repetition | None = None,
        batch: int = 64,
        limit: int | None = None,
        anew: bool = False,
        seed: int = 0,
    ) -> None:
        for name, value, least in (("samples", samples, 1), ("guesses", guesses, 0), ("batch", batch, 1)):
            if value < least:
                raise ValueError(f"assess.{name}={value} must be at least {least}")
        if limit is not None and limit < 1:
            raise ValueError(f"assess.limit={limit} must be at least 1, or null for all problems")
        if temperature <= 0:
            raise ValueError(f"assess.temperature={temperature}: greedy responses are all alike; draw above 0")
        self.index, self.read, self.inference, self.reward = index, read, inference, reward
        self.samples, self.guesses, self.batch, self.seed = samples, guesses, batch, seed
        self.numbers = np.sort(np.random.default_rng(seed).permutation(len(index))[:limit])
        prefix = inference.processor.tokenizer.encode(THINK_OPEN + THINK_CLOSE, add_special_tokens=False)
        self.prefix = tuple(prefix) if thinking else ()
        self.sampling = Sampling(max_new_tokens, temperature, repetition)
        self.guessing = Sampling(guess_tokens + len(self.prefix), temperature)
        settings = {"samples": samples, "temperature": temperature, "max_new_tokens": max_new_tokens}
        settings |= {"guesses": guesses, "guess_tokens": guess_tokens, "thinking": thinking, "seed": seed}
        self.ledger = Ledger(assessed_file(index), model | settings, anew)

    @property
    def left(self) -> list[int]:
        """Numbers of the problems that are still to be assessed."""
        return [number for number in self.numbers.tolist() if self.row_of(number) is None]

    def row_of(self, number: int) -> dict[str, Any] | None:
        """The line of a problem, where it has been assessed as it is now."""
        return self.ledger.rows.get((self.index.key(number), int(self.index.crc32[number])))

    def run(self) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        """Assess what is left; yields, for each batch, how many problems it had and the lines written for it.

        A problem that cannot be read, or that the engine answers with errors alone, gets no line: the next call tries
        it again.
        """
        left = self.left
        for first in range(0, len(left), self.batch):
            numbers = left[first : first + self.batch]
            rows = self._assess(self.read(numbers))
            self.ledger.write(rows)
            yield len(numbers), rows

    def _assess(self, problems: Sequence[Problem]) -> list[dict[str, Any]]:
        answered = self._answer(problems, self.samples, self.sampling, (), 0)
        guessed = self._answer(problems, self.guesses, self.guessing, self.prefix, 1)
        rows = zip(problems, answered, guessed, strict=True)
        return [self._row(*row) for row in rows if any(response.stop != "error" for response, _ in row[1])]

    def _answer(
        self, problems: Sequence[Problem], count: int, sampling: Sampling, prefix: tuple[int, ...], purpose: int
    ) -> list[list[tuple[Response, Verdict]]]:
        """``count`` judged responses to each problem. A seed knows its problem by its key, whatever the set is."""
        requests = [
            Request(problem, response_seed(self.seed, zlib.crc32(problem.key.encode()), number, purpose), prefix)
            for problem in problems
            for number in range(count)
        ]
        if not requests:
            return [[] for _ in problems]
        responses = self.inference.engine.generate(requests, sampling)
        for response in responses:
            if response.stop != "error" and response.tokens[: len(prefix)] != prefix:
                raise ValueError(
                    "the rollout engine does not go on from given tokens, so that nothing can be guessed without "
                    "thinking: assess with rollout=hf, or without guesses (assess.guesses=0)"
                )
        pairs = [(request.problem, response) for request, response in zip(requests, responses, strict=True)]
        judged = list(zip(responses, self.reward.judge(pairs), strict=True))
        return [judged[count * n : count * (n + 1)] for n in range(len(problems))]

    def _row(
        self,
        problem: Problem,
        answered: Sequence[tuple[Response, Verdict]],
        guessed: Sequence[tuple[Response, Verdict]],
    ) -> dict[str, Any]:
        right, guesses = _verdicts(answered), _verdicts(guessed)
        responses = [response for response, _ in answered if response.stop != "error"]
        last = next(message for message in reversed(problem.sample.messages) if message["role"] == "user")
        question = "\n".join(part["text"] for part in last["content"] if part["type"] == "text")
        return {
            "key": problem.key,
            "crc32": int(self.index.crc32[problem.number]),
            "pass_rate": round(float(right.mean()), 4) if len(right) else None,
            "judged": len(right),
            "easy_to_hack": bool((guesses == 1).any()) if len(guesses) else None,
            "guessed": int((guesses == 1).sum()),
            "answer_kind": answer_kind(question, problem.answer),
            "difficulty": problem.difficulty,
            "tokens": round(float(np.mean([len(response) for response in responses])), 1),
            "finished": round(float(np.mean([response.finished for response in responses])), 4),
        }


def _verdicts(judged: Sequence[tuple[Response, Verdict]]) -> np.ndarray:
    """0 to 1 of each response that the engine produced and the verifier could judge."""
    marks = np.array([verdict.correct for response, verdict in judged if response.stop != "error"], float)
    return marks[~np.isnan(marks)]
