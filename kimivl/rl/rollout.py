"""Rollout engines: who draws responses from the policy, and how their randomness is fixed.

Each response has a seed of its own and draws one uniform number per token, by inverting the cumulative
distribution: the same prompt and seed give the same response however the prompts are batched, up to kernel numerics.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from kimivl.rl.types import Request, Response, Sampling


class RolloutEngine(ABC):
    """Draws responses from the policy, as it was at the last ``sync``.

    Attributes:
        tokens_per_second: new tokens of the last ``generate`` or ``stream`` per second.
    """

    tokens_per_second: float = 0.0

    @abstractmethod
    def stream(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[tuple[int, Response]]:
        """(number of the request, its response), each as soon as it is there."""

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Response]:
        """The responses in the order of ``requests``."""
        found = dict(self.stream(requests, sampling))
        return [found[number] for number in range(len(requests))]

    def sync(self) -> dict[str, float]:
        """Take over the weights of the trainer; returns figures of it to log. Nothing to do where they are shared."""
        return {}

    def close(self) -> None:  # noqa: B027  most engines hold nothing
        """Free what the engine holds; it is not used afterwards."""


def response_seed(*parts: int) -> int:
    """A 63-bit seed from (run seed, iteration, problem, sample), well mixed."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


def uniform(seeds: np.ndarray, position: int) -> np.ndarray:
    """One uniform number in [0, 1) per seed and token position (the splitmix64 finaliser)."""
    with np.errstate(over="ignore"):
        x = seeds.astype(np.uint64) + np.uint64(position + 1) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    return (x >> np.uint64(11)).astype(np.float64) / 2.0**53


def sample_tokens(logits: Tensor, temperature: float, draws: np.ndarray) -> Tensor:
    """(rows, V) logits -> (rows,) token ids; ``draws`` (rows,) uniform numbers. Temperature 0 takes the largest."""
    if temperature == 0:
        return logits.argmax(-1)
    cumulative = torch.softmax(logits.double() / temperature, -1).cumsum(-1)
    # The last value differs from one by rounding: scaling by it keeps every draw inside.
    threshold = torch.from_numpy(draws).to(logits.device)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(1).clamp_max(logits.shape[-1] - 1)
