"""Generation with the training model itself, through its KV cache (``rollout=hf``).

Continuous batching: the rows of the cache are slots. A response that ends leaves its slot to the next request in the
same step, so that a long response never holds the others; when no request is left, rows are closed up, so that it
does not pay for them either. A step moves one small array to the device and waits for one back.

Legend: R rows (slots) in use, L columns, V vocabulary, P prompts.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kimivl.data.pack import pack_samples
from kimivl.rl.batching import Prefilled, Reading, Slots, Ticket, by_batch, next_reading, over_before
from kimivl.rl.rollout import RolloutEngine, draw
from kimivl.rl.types import Policy, Request, Response, Sampling, Stop


class HFRolloutEngine(RolloutEngine):
    """Rollouts by the training model: always in step with the trainer, no second copy of the weights.

    Prompts are read in batches, each once, whatever the number of its responses; its cache is copied to the slots of
    its responses when these start.

    Args:
        policy: its model is in eval mode while a stream is read, and as it was before afterwards.
        max_rows: responses generated at one time; bounds the memory of the cache.
        prefill_tokens: tokens of the prompts read at one time, padded; one prompt may be longer.
        return_experts: keep the routed experts of every token, for router replay.

    Raises:
        ValueError: for settings out of range, or experts of a model that has none.
    """

    def __init__(
        self, policy: Policy, max_rows: int = 256, prefill_tokens: int = 8192, return_experts: bool = False
    ) -> None:
        for name, value in (("max_rows", max_rows), ("prefill_tokens", prefill_tokens)):
            if value < 1:
                raise ValueError(f"rollout.{name} must be at least 1, not {value}")
        self.policy = policy
        self.model = policy.model
        self.max_rows = max_rows
        self.prefill_tokens = prefill_tokens
        self.recorder = ExpertRecorder(self.model) if return_experts else None
        self._never = self._index(policy.never)
        self._counts = Counts()

    def figures(self) -> dict[str, float]:
        return self._counts.figures()

    @torch.no_grad()
    def stream(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[tuple[int, Response]]:
        """See `RolloutEngine.stream`.

        Raises:
            ValueError: when the policy's logits are not numbers any more, or a budget is negative.
        """
        modes = [(module, module.training) for module in self.model.modules()]
        counts = self._counts = Counts()
        started = time.perf_counter()
        self._never = self._never.to(self.device)
        self.model.eval()
        try:
            for number, response in self._run(requests, sampling, counts):
                counts.seconds += time.perf_counter() - started
                yield number, response
                started = time.perf_counter()  # the time of who reads the stream is not the engine's
        finally:
            for module, training in modes:
                module.training = training
            counts.seconds += time.perf_counter() - started
            self.tokens_per_second = counts.tokens / max(counts.seconds, 1e-9)

    def _run(self, requests: Sequence[Request], sampling: Sampling, counts: Counts) -> Iterator[tuple[int, Response]]:
        queue: deque[tuple[int, Request]] = deque()
        over = [over_before(request, sampling, self.policy.stop_id) for request in requests]
        for number, (request, reason) in enumerate(zip(requests, over, strict=True)):
            if reason is None:
                queue.append((number, request))
            else:
                nothing = np.full(len(request.prefix), np.nan, np.float32)
                yield number, self._response(request.prefix, reason, nothing, None)
        if not queue:
            return
        counts.slots = min(self.max_rows, len(queue))
        slots = Slots(counts.slots, sampling, self.policy.stop_id, self.recorder.shape if self.recorder else None)
        cache = self.model.slot_cache(counts.slots)
        tickets: deque[Ticket] = deque()
        while True:
            self.poll()
            self._fill(slots, cache, queue, tickets, counts)
            if slots.live == 0:
                return
            for slot, reason in slots.advance(*self._step(slots, cache, counts)):
                yield self._finish(slots, slot, reason)

    # ---- taking in --------------------------------------------------------------------------------------------

    def _fill(
        self, slots: Slots, cache: Any, queue: deque[tuple[int, Request]], tickets: deque[Ticket], counts: Counts
    ) -> None:
        """Put the next requests into the free slots; close up the rows for which there is none."""
        admitted = []
        while slots.free and (queue or tickets):
            if not tickets:
                tickets.extend(self._read(next_reading(queue, self.prefill_tokens), counts))
            ticket = tickets.popleft()
            admitted.append((slots.admit(ticket), ticket))
        for batch, targets, rows, length in by_batch(admitted):
            if length:
                cache.admit(self._index(targets), batch.cache, self._index(rows), length)
        if slots.holes:
            sources, targets = slots.close_holes()
            if sources:
                cache.move(self._index(sources), self._index(targets), int(slots.length[targets].max()))

    def _read(self, reading: Reading, counts: Counts) -> list[Ticket]:
        """Prefill: read all but the last token of each sequence, which its responses are fed first."""
        lengths = [len(ids) - 1 for ids in reading.sequences]
        counts.prefill_tokens += sum(lengths)
        batch = self._prefill(reading, lengths) if max(lengths) else Prefilled(None, None)
        return [Ticket(n, request, reading.sequences[row], batch, row) for n, request, row in reading.requests]

    def _prefill(self, reading: Reading, lengths: list[int]) -> Prefilled:
        width = max(lengths)
        ids = torch.full((len(lengths), width), self.policy.pad_id)
        mask = torch.zeros_like(ids)
        for row, (length, sequence) in enumerate(zip(lengths, reading.sequences, strict=True)):
            ids[row, width - length :] = torch.from_numpy(sequence[:length])
            mask[row, width - length :] = 1
        images = pack_samples(reading.prompts)  # an image of several sequences goes through the vision tower once
        embeds = self.model.embed(
            ids.to(self.device),
            images.pixel_values.to(self.device),
            images.image_grid_hws.to(self.device),
            images.image_order,
        )
        inputs = {"inputs_embeds": embeds, "attention_mask": mask.to(self.device), "use_cache": True}
        if self.recorder is None:
            return Prefilled(self.model(**inputs, logits_to_keep=1).past_key_values, None)
        with self.recorder as record:
            cache = self.model(**inputs, logits_to_keep=1).past_key_values
        return Prefilled(cache, record.taken().reshape(len(lengths), width, *self.recorder.shape[0]))

    # ---- a step -----------------------------------------------------------------------------------------------

    def _step(self, slots: Slots, cache: Any, counts: Counts) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Feed each row's last token and draw the next: token ids (R,), log-probabilities (R,), experts (R, ...)."""
        counts.steps += 1
        counts.tokens += slots.live
        width = int(slots.length[: slots.live].max()) + 1
        state = torch.from_numpy(slots.state()).to(self.device, non_blocking=True)
        tokens, lengths = state[:2].long()
        cache.step(slots.live, width)
        # All rows end at the same column, the last: a row's tokens are the last ones of the window.
        columns = torch.arange(width - 1, -1, -1, device=self.device)
        inputs = {
            "input_ids": tokens[:, None],
            "attention_mask": (columns <= lengths[:, None])[:, None, None],
            "position_ids": lengths[:, None],
            "past_key_values": cache,
            "use_cache": True,
        }
        if self.recorder is None:
            logits, experts = self.model(**inputs).logits[:, -1], None
            return *self._draw(logits, slots.sampling.temperature, state[2]), experts
        with self.recorder as record:
            logits = self.model(**inputs).logits[:, -1]
        return *self._draw(logits, slots.sampling.temperature, state[2]), record.taken()

    def _draw(self, logits: Tensor, temperature: float, draws: Tensor) -> tuple[np.ndarray, np.ndarray]:
        tokens, logp = draw(logits, temperature, draws, self._never)
        # Together, so that the host waits once; float64 holds every id.
        drawn, logps = torch.stack((tokens.double(), logp.double())).cpu().numpy()
        if np.isnan(logps).any():
            raise ValueError("the policy's logits are NaN: its weights have diverged; go back to an earlier checkpoint")
        return drawn.astype(np.int64), logps.astype(np.float32)

    # ---- handing out ------------------------------------------------------------------------------------------

    def _finish(self, slots: Slots, slot: int, reason: Stop) -> tuple[int, Response]:
        ticket, count = slots.leave(slot), int(slots.count[slot])
        experts = None
        if slots.experts is not None:
            drawn = slots.experts[slot, len(ticket.request.prefix) : count]
            read = ticket.batch.experts
            length = len(ticket.ids) - 1
            experts = drawn.copy() if read is None else np.concatenate([read[ticket.row, -length:][:length], drawn])
        tokens = slots.tokens[slot, :count].tolist()
        return ticket.number, self._response(tokens, reason, slots.logp[slot, :count].copy(), experts)

    def _response(self, tokens: Sequence[int], reason: Stop, logp: np.ndarray, experts: np.ndarray | None) -> Response:
        text = self.policy.decode(list(tokens[:-1] if reason == "stop" else tokens))
        return Response(tuple(tokens), text, reason, logp, experts)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _index(self, numbers: Sequence[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64).to(self.device, non_blocking=True)


class Counts:
    """What a stream has done so far.

    ``tokens`` drawn, ``steps`` of decoding, ``prefill_tokens`` read of prompts and prefixes, ``slots``, ``seconds``.
    """

    def __init__(self) -> None:
        self.tokens = self.steps = self.prefill_tokens = self.slots = 0
        self.seconds = 0.0

    def figures(self) -> dict[str, float]:
        rows = self.tokens / max(self.steps, 1)
        return {
            "perf/rollout_tokens_per_s": self.tokens / max(self.seconds, 1e-9),
            "perf/rollout_tokens": float(self.tokens),
            "perf/rollout_steps": float(self.steps),
            "perf/rollout_rows": rows,
            "perf/rollout_slot_use": rows / max(self.slots, 1),
            "perf/prefill_tokens": float(self.prefill_tokens),
        }


class ExpertRecorder:
    """The experts that the model's routers choose, while it is entered as a context.

    ``shape``: (MoE layers, experts per token), and the dtype that holds an expert's number.
    """

    def __init__(self, model: nn.Module) -> None:
        # By name: the room of RL does not know the model's classes.
        self.gates: list[Any] = [gate for gate in model.modules() if type(gate).__name__.endswith("TopkRouter")]
        if not self.gates:
            raise ValueError("rollout.return_experts=true, but the model has no routed experts: leave it false")
        gate = self.gates[0]
        dtype = np.dtype(np.uint8 if gate.num_experts <= 256 else np.int16)
        self.shape = ((len(self.gates), int(gate.top_k)), dtype)
        self._chosen: list[Tensor] = []
        self._hooks: list[Any] = []

    def __enter__(self) -> ExpertRecorder:
        self._chosen = []
        self._hooks = [gate.register_forward_hook(self._keep) for gate in self.gates]
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _keep(self, gate: nn.Module, inputs: Any, outputs: tuple[Tensor, ...]) -> None:
        self._chosen.append(outputs[2])

    def taken(self) -> np.ndarray:
        """(tokens, MoE layers, experts per token) of the forward pass inside."""
        return torch.stack(self._chosen, 1).cpu().numpy().astype(self.shape[1])
