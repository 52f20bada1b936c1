"""Responses from the policy: batched generation with a KV cache.

Each response has a seed of its own and draws one uniform number per token, by inverting the cumulative
distribution: the same prompt and seed give the same response however the prompts are batched, up to kernel numerics.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from kimivl.data.pack import EncodedSample
from kimivl.rl.types import Response, Sampling


class RolloutEngine(Protocol):
    """Draws responses; ``seeds[b][g]`` is the seed of response ``g`` to prompt ``b``."""

    tokens_per_second: float

    def generate(
        self, prompts: Sequence[EncodedSample], seeds: Sequence[Sequence[int]], sampling: Sampling
    ) -> list[list[Response]]: ...


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


@dataclass(slots=True)
class _Rows:
    """Responses in flight: which one each row of the cache belongs to, and what the next step needs of it."""

    slot: Tensor
    mask: Tensor
    token: Tensor
    seeds: np.ndarray

    def keep(self, rows: Tensor) -> _Rows:
        return _Rows(self.slot[rows], self.mask[rows], self.token[rows], self.seeds[rows.cpu().numpy()])


class HFRolloutEngine:
    """Generation with the training model itself through transformers' cache (``rollout=hf``).

    Prompts are left-padded; each is read once, and its cache is repeated for its responses. Rows that have ended
    leave the batch when a quarter of it has, so long responses do not pay for short ones.

    Args:
        model: ``KimiVLForConditionalGeneration``; it is put into eval mode while generating, and back.
        decode: token ids -> text.
        stop_id: ``<|im_end|>``. pad_id: any valid id, never attended to.
        never: ids that are not to be drawn; a drawn image placeholder would have no image in training.
        max_rows: responses generated at one time; bounds the memory of the cache.
    """

    def __init__(
        self,
        model: Any,
        decode: Callable[[list[int]], str],
        stop_id: int,
        pad_id: int,
        never: Sequence[int] = (),
        max_rows: int = 256,
    ) -> None:
        if max_rows < 1:
            raise ValueError(f"rollout.max_rows must be at least 1, not {max_rows}")
        self.model = model
        self.decode = decode
        self.stop_id = stop_id
        self.pad_id = pad_id
        self.never = list(never)
        self.max_rows = max_rows
        self.tokens_per_second = 0.0

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[EncodedSample], seeds: Sequence[Sequence[int]], sampling: Sampling
    ) -> list[list[Response]]:
        """Draw ``len(seeds[b])`` responses (the same number for all) to each prompt ``b``."""
        group = len(seeds[0])
        if any(len(row) != group for row in seeds):
            raise ValueError("every prompt of a batch needs the same number of seeds")
        started, training = time.perf_counter(), self.model.training
        self.model.eval()
        try:
            step = max(1, self.max_rows // group)
            drawn: list[list[int]] = []
            for first in range(0, len(prompts), step):
                chunk = [seed for row in seeds[first : first + step] for seed in row]
                drawn += self._generate(prompts[first : first + step], group, chunk, sampling)
        finally:
            self.model.train(training)
        self.tokens_per_second = sum(map(len, drawn)) / (time.perf_counter() - started)
        responses = [self._response(tokens) for tokens in drawn]
        return [responses[first : first + group] for first in range(0, len(responses), group)]

    def _response(self, tokens: list[int]) -> Response:
        finished = bool(tokens) and tokens[-1] == self.stop_id
        text = self.decode(tokens[:-1] if finished else tokens)
        return Response(tokens=tuple(tokens), text=text, finished=finished)

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
            logits[:, self.never] = float("-inf")
            rows.token = sample_tokens(logits, sampling.temperature, uniform(rows.seeds, position))
            slots = zip(rows.slot.tolist(), rows.token.tolist(), running.tolist(), strict=True)
            for number, token, active in slots:
                if active:
                    drawn[number].append(token)
            running = running & (rows.token != self.stop_id)
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
        ids = torch.full((len(prompts), length), self.pad_id)
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
