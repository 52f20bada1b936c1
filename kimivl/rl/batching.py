"""Continuous batching, the part on the host: which response each row of the cache belongs to, and when it ends.

Legend: R rows (slots), C response tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from kimivl.rl.repetition import EVERY
from kimivl.rl.rollout import uniform
from kimivl.rl.types import Request, Sampling, Stop


@dataclass(frozen=True, slots=True)
class Prefilled:
    """Prompts (with prefixes) that were read in one batch, all but the last token of each.

    ``cache``: the model's, right-aligned. ``experts`` (prompts, columns, MoE layers, experts per token), or None.
    """

    cache: Any
    experts: np.ndarray | None


@dataclass(frozen=True, slots=True)
class Ticket:
    """A request that can start: its prompt is row ``row`` of ``batch``; ``ids`` are prompt and prefix."""

    number: int
    request: Request
    ids: np.ndarray
    batch: Prefilled
    row: int


@dataclass(slots=True)
class Reading:
    """What one prefill reads: distinct sequences, and the requests that start from each."""

    requests: list[tuple[int, Request, int]] = field(default_factory=list)
    sequences: list[np.ndarray] = field(default_factory=list)
    prompts: list[Any] = field(default_factory=list)


def next_reading(queue: deque[tuple[int, Request]], limit: int) -> Reading:
    """Take requests from the front of ``queue``, up to ``limit`` tokens of distinct, padded sequences (at least one).

    Requests of one prompt and prefix share a sequence, wherever they stand among those taken.
    """
    reading, rows, longest = Reading(), dict[tuple[int, tuple[int, ...]], int](), 0
    while queue:
        number, request = queue[0]
        prompt = request.problem.prompt
        key = (id(prompt), request.prefix)
        if key not in rows:
            length = len(prompt) + len(request.prefix)
            if rows and (len(rows) + 1) * max(longest, length) > limit:
                break
            longest = max(longest, length)
            rows[key] = len(rows)
            ids = prompt.input_ids.numpy()
            reading.sequences.append(np.concatenate([ids, np.array(request.prefix, ids.dtype)]))
            reading.prompts.append(prompt)
        reading.requests.append((number, request, rows[key]))
        queue.popleft()
    return reading


def over_before(request: Request, sampling: Sampling, stop_id: int) -> Stop | None:
    """Why a request has nothing to draw; None where it has.

    Raises:
        ValueError: for a negative budget.
    """
    if request.budget is not None and request.budget < 0:
        raise ValueError(f"problem {request.problem.key}: a budget of {request.budget} tokens; give 0 or more, or None")
    if request.prefix and request.prefix[-1] == stop_id:
        return "stop"
    if len(request.prefix) >= sampling.max_new_tokens:
        return "length"
    return "budget" if request.budget == 0 else None


class Slots:
    """The responses in flight, one in each slot. Slots 0 to ``live`` - 1 are in use, but for the ``holes``.

    Arrays (R,): ``length`` columns of the cache, ``token`` to be fed next, ``count`` response tokens so far.

    Args:
        slots: R. sampling: of all responses. stop_id: that closes a turn.
        experts: (MoE layers, experts per token) and dtype of what is recorded of each token, or None.
    """

    def __init__(
        self, slots: int, sampling: Sampling, stop_id: int, experts: tuple[tuple[int, int], np.dtype] | None = None
    ) -> None:
        self.slots = slots
        self.sampling = sampling
        self.stop_id = stop_id
        self.live = 0
        self.holes: list[int] = []
        self.tickets: list[Ticket | None] = [None] * slots
        self.seed = np.zeros(slots, np.uint64)
        self.length, self.token, self.count, self.limit = np.zeros((4, slots), np.int64)
        columns = min(sampling.max_new_tokens, 128)
        self.tokens = np.zeros((slots, columns), np.int64)
        self.logp = np.zeros((slots, columns), np.float32)
        self.experts = np.zeros((slots, columns, *experts[0]), experts[1]) if experts else None

    @property
    def free(self) -> int:
        """Responses that can be taken in."""
        return self.slots - self.live + len(self.holes)

    def admit(self, ticket: Ticket) -> int:
        """Put a response into a free slot, and return which."""
        slot = self.holes.pop() if self.holes else self.live
        self.live = max(self.live, slot + 1)
        request, cap = ticket.request, self.sampling.max_new_tokens
        # Without the cache that was read, of which the slot has a copy: it would live as long as the response.
        self.tickets[slot] = replace(ticket, batch=Prefilled(None, ticket.batch.experts))
        self.seed[slot] = request.seed
        self.length[slot], self.token[slot] = len(ticket.ids) - 1, ticket.ids[-1]
        self.count[slot] = written = len(request.prefix)
        self.limit[slot] = cap if request.budget is None else min(cap, written + request.budget)
        self._make_room(written + 1)
        self.tokens[slot, :written] = request.prefix
        self.logp[slot, :written] = np.nan
        return slot

    def state(self) -> np.ndarray:
        """(3, live) float64: the token that each row is fed, its position, and the number that draws the next."""
        rows = slice(self.live)
        return np.stack([self.token[rows], self.length[rows], uniform(self.seed[rows], self.count[rows])])

    def advance(self, tokens: np.ndarray, logp: np.ndarray, experts: np.ndarray | None) -> list[tuple[int, Stop]]:
        """Add what a step has drawn, (live,) each; returns the slots whose responses have ended, and why."""
        rows, count = np.arange(self.live), self.count[: self.live]
        self._make_room(int(count.max()) + 1)
        self.tokens[rows, count] = tokens
        self.logp[rows, count] = logp
        if self.experts is not None:
            self.experts[rows, count] = experts
        self.token[rows] = tokens
        count += 1
        self.length[rows] += 1
        over = (tokens == self.stop_id) | (count >= self.limit[rows])
        if self.sampling.repetition is not None:
            for slot in np.flatnonzero(~over & (count % EVERY == 0)).tolist():
                over[slot] = self._repeats(slot)
        return [(slot, self._reason(slot)) for slot in np.flatnonzero(over).tolist()]

    def _repeats(self, slot: int) -> bool:
        assert self.sampling.repetition is not None
        return self.sampling.repetition(self.tokens[slot, : self.count[slot]])

    def _reason(self, slot: int) -> Stop:
        if self.token[slot] == self.stop_id:
            return "stop"
        if self.sampling.repetition is not None and self._repeats(slot):
            return "repetition"
        return "length" if self.count[slot] >= self.sampling.max_new_tokens else "budget"

    def leave(self, slot: int) -> Ticket:
        """Make a slot a hole."""
        ticket = self.tickets[slot]
        assert ticket is not None
        self.tickets[slot] = None
        self.holes.append(slot)
        return ticket

    def close_holes(self) -> tuple[list[int], list[int]]:
        """Move the last responses into the holes; returns the slots that they come from and go to."""
        live = self.live - len(self.holes)
        targets = [slot for slot in self.holes if slot < live]
        sources = [slot for slot in range(live, self.live) if self.tickets[slot] is not None]
        for array in (self.seed, self.length, self.token, self.count, self.limit, self.tokens, self.logp):
            array[targets] = array[sources]
        if self.experts is not None:
            self.experts[targets] = self.experts[sources]
        for source, target in zip(sources, targets, strict=True):
            self.tickets[target], self.tickets[source] = self.tickets[source], None
        self.live, self.holes = live, []
        return sources, targets

    def _make_room(self, columns: int) -> None:
        if columns > self.tokens.shape[1]:
            columns = min(self.sampling.max_new_tokens, columns + columns // 2)
            self.tokens, self.logp = _wider(self.tokens, columns), _wider(self.logp, columns)
            self.experts = None if self.experts is None else _wider(self.experts, columns)


def _wider(array: np.ndarray, columns: int) -> np.ndarray:
    wider = np.zeros((len(array), columns, *array.shape[2:]), array.dtype)
    wider[:, : array.shape[1]] = array
    return wider


def by_batch(tickets: Sequence[tuple[int, Ticket]]) -> list[tuple[Prefilled, list[int], list[int], int]]:
    """(slot, ticket) pairs -> for each prefilled batch: slots, rows of its cache, and the columns of the longest."""
    groups: dict[int, list[tuple[int, Ticket]]] = {}
    for slot, ticket in tickets:
        groups.setdefault(id(ticket.batch), []).append((slot, ticket))
    return [
        (
            members[0][1].batch,
            [slot for slot, _ in members],
            [ticket.row for _, ticket in members],
            max(len(ticket.ids) for _, ticket in members) - 1,
        )
        for members in groups.values()
    ]
