"""Rollout engines: who draws responses from the policy, and how their randomness is fixed.

Each response has a seed of its own and draws one uniform number per token, by inverting the cumulative
distribution: the same prompt and seed give the same response however the prompts are batched, up to kernel numerics.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from kimivl.rl.types import Request, Response, Sampling


class RolloutEngine(ABC):
    """Draws responses from the policy, as it was at the last ``sync``.

    Attributes:
        tokens_per_second: new tokens of the last ``generate`` or ``stream`` per second.
        poll: called every second or more often while a stream is read; what it raises ends the stream.
    """

    tokens_per_second: float = 0.0
    poll: Callable[[], None] = staticmethod(lambda: None)

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

    def figures(self) -> dict[str, float]:
        """Of the last ``generate`` or ``stream``, for the log."""
        return {"perf/rollout_tokens_per_s": self.tokens_per_second}

    def close(self) -> None:  # noqa: B027  most engines hold nothing
        """Free what the engine holds; it is not used afterwards."""


def response_seed(*parts: int) -> int:
    """A 63-bit seed from (run seed, iteration, problem, sample), well mixed."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


def uniform(seeds: np.ndarray, position: int | np.ndarray) -> np.ndarray:
    """One uniform number in [0, 1) per seed and token position (the splitmix64 finaliser)."""
    with np.errstate(over="ignore"):
        place = np.asarray(position).astype(np.uint64) + np.uint64(1)
        x = seeds.astype(np.uint64) + place * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    return (x >> np.uint64(11)).astype(np.float64) / 2.0**53


def draw(logits: Tensor, temperature: float, draws: Tensor, never: Tensor) -> tuple[Tensor, Tensor]:
    """Draw a token from each row of (rows, V) logits: its id (rows,) and its log-probability (rows,) float32.

    The log-probability is that under the model at ``temperature``, which is what the trainer computes: ids that are
    ``never`` drawn count in it, although the draw is from the others. At temperature 0 the most likely token is taken,
    and its log-probability is that at temperature 1.

    Args:
        draws: (rows,) float64 uniform numbers. never: ids.
    """
    scaled = logits.float() / (temperature or 1.0)
    total = scaled.logsumexp(-1, keepdim=True)
    if temperature == 0:
        tokens = scaled.index_fill(1, never, float("-inf")).argmax(-1, keepdim=True)
    else:
        # Summed in float64: in float32 the sum of a large vocabulary would lose the unlikely tokens.
        cumulative = (scaled - total).exp_().index_fill_(1, never, 0.0).cumsum(-1, dtype=torch.float64)
        end = cumulative[:, -1:]
        # Below the end, so that the token found is one with a share of its own even where the product rounds up.
        threshold = torch.minimum(draws[:, None] * end, end.nextafter(torch.zeros_like(end)))
        tokens = torch.searchsorted(cumulative, threshold, right=True).clamp_max(logits.shape[-1] - 1)
    return tokens.squeeze(1), (scaled.gather(1, tokens) - total).squeeze(1)
