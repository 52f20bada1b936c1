"""Generation with the training model itself, through its KV cache (``rollout=hf``)."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kimivl.data.pack import EncodedSample
from kimivl.rl.rollout import RolloutEngine, sample_tokens, uniform
from kimivl.rl.types import Policy, Request, Response, Sampling, Stop


@dataclass(slots=True)
class _Rows:
    """Responses in flight: which one each row of the cache belongs to, and what the next step needs of it."""

    slot: Tensor
    mask: Tensor
    token: Tensor
    seeds: np.ndarray

    def keep(self, rows: Tensor) -> _Rows:
        return _Rows(self.slot[rows], self.mask[rows], self.token[rows], self.seeds[rows.cpu().numpy()])


class HFRolloutEngine(RolloutEngine):
    """Rollouts by the training model: always in step with the trainer, no second copy of the weights.

    Prompts are left-padded; each is read once, and its cache is repeated for its responses. Rows that have ended
    leave the batch when a quarter of it has, so long responses do not pay for short ones.

    Args:
        policy: its model is put into eval mode while generating, and back.
        max_rows: responses generated at one time; bounds the memory of the cache.
    """

    def __init__(self, policy: Policy, max_rows: int = 256) -> None:
        if max_rows < 1:
            raise ValueError(f"rollout.max_rows must be at least 1, not {max_rows}")
        self.policy = policy
        self.model = policy.model
        self.max_rows = max_rows

    @torch.no_grad()
    def stream(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[tuple[int, Response]]:
        started, training, count = time.perf_counter(), self.model.training, 0
        self.model.eval()
        try:
            for first in range(0, len(requests), self.max_rows):
                chunk = requests[first : first + self.max_rows]
                seeds = [request.seed for request in chunk]
                for number, tokens in enumerate(self._generate([r.problem.prompt for r in chunk], 1, seeds, sampling)):
                    count += len(tokens)
                    yield first + number, self._response(tokens)
        finally:
            self.model.train(training)
        self.tokens_per_second = count / (time.perf_counter() - started)

    def _response(self, tokens: list[int]) -> Response:
        finished = bool(tokens) and tokens[-1] == self.policy.stop_id
        stop: Stop = "stop" if finished else "length"
        return Response(tuple(tokens), self.policy.decode(tokens[:-1] if finished else tokens), stop)

    def _generate(
        self, prompts: Sequence[EncodedSample], group: int, seeds: list[int], sampling: Sampling
    ) -> list[list[int]]:
        logits, cache, mask = self._prefill(prompts)
        if group > 1:
            cache.batch_repeat_interleave(group)
            logits, mask = (tensor.repeat_interleave(group, 0) for tensor in (logits, mask))
        drawn: list[list[int]] = [[] for _ in seeds]
        slot = torch.arange(len(seeds), device=mask.device)
        rows = _Rows(slot, mask, torch.zeros_like(slot), np.array(seeds, np.uint64))
        running = torch.ones(len(seeds), dtype=torch.bool, device=mask.device)
        for position in range(sampling.max_new_tokens):
            logits[:, list(self.policy.never)] = float("-inf")
            rows.token = sample_tokens(logits, sampling.temperature, uniform(rows.seeds, position))
            slots = zip(rows.slot.tolist(), rows.token.tolist(), running.tolist(), strict=True)
            for number, token, active in slots:
                if active:
                    drawn[number].append(token)
            running = running & (rows.token != self.policy.stop_id)
            alive = int(running.sum())
            if alive == 0 or position + 1 == sampling.max_new_tokens:
                break
            if alive <= 0.75 * len(running):
                kept = running.nonzero().squeeze(1)
                cache.batch_select_indices(kept)
                rows, running = rows.keep(kept), running[kept]
            logits = self._step(rows, cache)
        return drawn

    def _prefill(self, prompts: Sequence[EncodedSample]) -> tuple[Tensor, Any, Tensor]:
        """Read the prompts: logits of the next token (B, V), their cache, and the mask of real tokens (B, L)."""
        device = next(self.model.parameters()).device
        length = max(len(prompt) for prompt in prompts)
        ids = torch.full((len(prompts), length), self.policy.pad_id)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, length - len(prompt) :] = prompt.input_ids
            mask[row, length - len(prompt) :] = 1
        output = self.model(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            pixel_values=torch.cat([prompt.pixel_values for prompt in prompts]).to(device),
            image_grid_hws=torch.cat([prompt.image_grid_hws for prompt in prompts]).to(device),
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1], output.past_key_values, mask.to(device)

    def _step(self, rows: _Rows, cache: Any) -> Tensor:
        """Feed each row's last token: (rows, V) logits of the next one."""
        rows.mask = torch.cat([rows.mask, torch.ones_like(rows.mask[:, :1])], 1)
        output = self.model(
            input_ids=rows.token[:, None],
            attention_mask=rows.mask,
            past_key_values=cache,
            use_cache=True,
        )
        return output.logits[:, -1]
