"""What the two vLLM engines share: a request as vLLM reads it, and the response as it grows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from kimivl.rl.rollout import response_seed
from kimivl.rl.types import Policy, Problem, Request, Response, Sampling, Stop

_BIAS = 100.0
"""Taken off the logits of ids that are not to be drawn: vLLM's most."""


def collapsed(problem: Problem, media_id: int) -> list[int]:
    """The prompt's ids with one placeholder per image, as vLLM expands them itself.

    Worked example, an image of 4 x 2 patches (two tokens) between text, placeholder 9: ``1 9 9 2 -> 1 9 2``.

    Raises:
        ValueError: when the prompt does not have the placeholders of its images.
    """
    ids = problem.prompt.input_ids.tolist()
    sizes = [height * width // 4 for height, width in problem.prompt.image_grid_hws.tolist()]
    short: list[int] = []
    place, image = 0, 0
    while place < len(ids):
        short.append(ids[place])
        if ids[place] != media_id:
            place += 1
            continue
        size = sizes[image] if image < len(sizes) else 0
        if size == 0 or ids[place : place + size] != [media_id] * size:
            break
        place, image = place + size, image + 1
    if place < len(ids) or image < len(sizes) or len(sizes) != len(problem.sample.images):
        raise ValueError(
            f"sample {problem.key!r}: its prompt does not hold the {sizes} placeholders of its "
            f"{len(problem.sample.images)} images; make its index anew"
        )
    return short


class Writing:
    """One response while it is written.

    Args:
        request: what was asked for. sampling: how. policy: whose text it is.
    """

    def __init__(self, request: Request, sampling: Sampling, policy: Policy) -> None:
        self.request = request
        self.sampling = sampling
        self.policy = policy
        room = sampling.max_new_tokens - len(request.prefix)
        self.limit = max(room if request.budget is None else min(room, request.budget), 0)
        self.tokens = list(request.prefix)
        self.logp = [float("nan")] * len(request.prefix)
        self.stop: Stop | None = None if self.limit else self._end_of_room()

    @property
    def count(self) -> int:
        """Tokens written by this call."""
        return len(self.tokens) - len(self.request.prefix)

    def add(self, tokens: Sequence[int], logp: Sequence[float]) -> bool:
        """Add what has been drawn, up to where the response ends; whether it has ended."""
        for token, value in zip(tokens, logp, strict=True):
            if self.stop is not None:
                break
            self.tokens.append(token)
            self.logp.append(value)
            if token == self.policy.stop_id:
                self.stop = "stop"
            elif self.sampling.repetition is not None and self.sampling.repetition(self.tokens):
                self.stop = "repetition"
            elif self.count >= self.limit:
                self.stop = self._end_of_room()
        return self.stop is not None

    def _end_of_room(self) -> Stop:
        return "length" if len(self.tokens) >= self.sampling.max_new_tokens else "budget"

    def response(self) -> Response:
        """The response as far as it is; one that has not ended is an error of the engine."""
        tokens = self.tokens[:-1] if self.stop == "stop" else self.tokens
        logp = np.array(self.logp, np.float32)
        return Response(tuple(self.tokens), self.policy.decode(tokens), self.stop or "error", logp)

    def settings(self) -> dict[str, Any]:
        """Arguments of vLLM's ``SamplingParams``.

        A response that is gone on with draws from a seed of its own, since vLLM counts draws from the call's start.
        Everything that a model folder could set otherwise is given.
        """
        seed, done = self.request.seed, len(self.request.prefix)
        settings: dict[str, Any] = {
            "max_tokens": self.limit,
            "temperature": float(self.sampling.temperature),
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "seed": response_seed(seed, done) if done else seed,
            "stop_token_ids": [self.policy.stop_id],
            "ignore_eos": True,
            "detokenize": False,
            "logprobs": 0,
        }
        if self.policy.never:
            settings["logit_bias"] = dict.fromkeys(self.policy.never, -_BIAS)
            # Their share is asked for, too (``unmasked``); one of them twice, since a server leaves the last one out.
            wanted = [*self.policy.never, self.policy.never[0]]
            settings |= {"logprobs": len(wanted), "logprob_token_ids": wanted}
        return settings

    def unmasked(self, value: float, never: Sequence[float]) -> float:
        """The log-probability among all ids, as the trainer has it, of one that vLLM gives among those not masked.

        Args:
            never: vLLM's log-probabilities of the masked ids, from which their bias is taken again.
        """
        if not never or self.sampling.temperature == 0:
            return value
        return value - math.log1p(sum(math.exp(v + _BIAS / self.sampling.temperature) for v in never))

    def check_prompt(self, read: Sequence[int]) -> None:
        """ValueError, naming the sample, when the engine read another prompt than the trainer does."""
        wanted = [*self.request.problem.prompt.input_ids.tolist(), *self.request.prefix]
        if list(read) != wanted:
            raise ValueError(
                f"sample {self.request.problem.key!r}: vLLM reads {len(read)} prompt tokens, the trainer {len(wanted)}"
                ", or other ones: the folder that vLLM serves must have the image processor of this run"
            )

    def check_room(self, max_model_len: int | None) -> None:
        """ValueError, naming the sample, when prompt and response have no room in the engine."""
        needed = len(self.request.problem.prompt) + len(self.request.prefix) + self.limit
        if max_model_len is not None and needed > max_model_len:
            raise ValueError(
                f"sample {self.request.problem.key!r}: prompt and response may have {needed} tokens, but vLLM's "
                f"max_model_len is {max_model_len}; raise rollout.max_model_len, or lower data.max_new_tokens"
            )
