"""Many streamed responses of a vLLM server at one time."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import queue
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import aiohttp
from PIL import Image

from kimivl.data.images import decode_image
from kimivl.rl.lanes import in_lanes
from kimivl.rl.types import Problem, Request, Sampling
from kimivl.rl.vllm_requests import Writing, collapsed

if TYPE_CHECKING:
    from kimivl.rl.vllm_server import VLLMServerRolloutEngine

_GENERATE = "/inference/v1/generate"
_LINE_BYTES = 1 << 24


class ServerError(ValueError):
    """The server does not answer, or not as this engine needs it; the message says what to do."""


class ServerGone(ServerError):
    """The server does not answer at all."""


class _Lost(Exception):
    """A connection that failed, and may work the next time."""


class Streams:
    """Asks for responses over ``in_flight`` connections; iterate over (number of the request, what was written).

    The event loop has a thread of its own: the caller may be inside another (a notebook), and is free while it waits.

    Raises:
        ServerError: when a request has failed ``retries`` + 1 times; all that had ended before was handed out.
        ValueError: when the server refuses a request for good, or reads another prompt than the trainer.
    """

    def __init__(self, engine: VLLMServerRolloutEngine, requests: Sequence[Request], sampling: Sampling) -> None:
        self.engine, self.requests, self.sampling = engine, requests, sampling
        self.results: queue.Queue[tuple[int, Writing] | BaseException | None] = queue.Queue()
        self.turn = iter(range(len(requests)))
        self.images: dict[int, list[dict[str, str]]] = {}
        self.loop = asyncio.new_event_loop()
        self.task = self.loop.create_task(self._all())
        self.thread = threading.Thread(target=self._work, name="vllm-server", daemon=True)
        self.thread.start()

    def __iter__(self) -> Iterator[tuple[int, Writing]]:
        while (item := self._next()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    def _next(self) -> tuple[int, Writing] | BaseException | None:
        while True:
            self.engine.poll()
            with contextlib.suppress(queue.Empty):
                return self.results.get(timeout=1)

    def close(self) -> None:
        """Drop what is under way (the server stops writing it), and wait for the thread."""
        if self.thread.is_alive():
            with contextlib.suppress(RuntimeError):  # the loop has closed between the two
                self.loop.call_soon_threadsafe(self.task.cancel)
        self.thread.join()

    def _work(self) -> None:
        end: BaseException | None = None
        try:
            self.loop.run_until_complete(self.task)
        except asyncio.CancelledError:
            pass  # by close()
        except BaseException as error:
            end = error  # raised in the caller's thread
        finally:
            self.loop.close()
            self.results.put(end)

    async def _all(self) -> None:
        lanes = min(self.engine.in_flight, len(self.requests))
        connector = aiohttp.TCPConnector(limit=lanes)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=self.engine.timeout)
        async with aiohttp.ClientSession(
            connector=connector, timeout=timeout, trust_env=True, read_bufsize=_LINE_BYTES
        ) as session:
            await in_lanes(lanes, lambda: self._lane(session))

    async def _lane(self, session: aiohttp.ClientSession) -> None:
        """Ask for one response after the other; the lanes share the turn."""
        for number in self.turn:
            self.results.put((number, await self._ask(session, self.requests[number])))

    async def _ask(self, session: aiohttp.ClientSession, request: Request) -> Writing:
        """One response, after as many attempts as it takes; with its seed each attempt writes the same."""
        for attempt in range(self.engine.retries + 1):
            writing = Writing(request, self.sampling, self.engine.policy)
            if writing.stop is not None:
                return writing
            writing.check_room(self.engine.max_model_len)
            try:
                await self._attempt(session, writing)
                return writing
            except (_Lost, aiohttp.ClientError, TimeoutError, OSError) as error:
                if attempt == self.engine.retries:
                    raise self.engine.dead(f"{type(error).__name__}: {error}") from error
                await asyncio.sleep(self.engine.backoff * 2**attempt)
                with contextlib.suppress(ServerGone):  # it may come back, but not with the weights that it began with
                    await asyncio.to_thread(self.engine.check_weights, 0)
        raise AssertionError("the last attempt returns or raises")

    async def _attempt(self, session: aiohttp.ClientSession, writing: Writing) -> None:
        """Read tokens until the response ends; leaving the connection then tells the server to stop."""
        async with session.post(self.engine.url + _GENERATE, json=self._body(writing)) as answer:
            if answer.status != 200:
                raise self._refusal(
                    writing, answer.status, (await answer.content.read(4096)).decode("utf-8", "replace")
                )
            async for event in _events(answer):
                if "error" in event:
                    raise _Lost(f"the server says: {json.dumps(event['error'])[:500]}")
                if event.get("prompt_token_ids") is not None:
                    writing.check_prompt(event["prompt_token_ids"])
                for choice in event.get("choices", ()):
                    tokens = choice.get("token_ids") or []
                    content = (choice.get("logprobs") or {}).get("content") or []
                    if writing.add(tokens, [self._logp(writing, entry) for entry in content]):
                        return
        raise _Lost("the answer broke off")

    def _logp(self, writing: Writing, entry: dict[str, Any]) -> float:
        others = {other["token_id"]: other["logprob"] for other in entry["top_logprobs"]}
        return writing.unmasked(entry["logprob"], [others[n] for n in self.engine.policy.never if n in others])

    def _refusal(self, writing: Writing, status: int, text: str) -> Exception:
        if status >= 500 or status == 429:
            return _Lost(f"status {status}: {text[:500]}")
        if status in (403, 404):  # an address that the server was not started with
            return ServerError(f"{self.engine.url}{_GENERATE} answers {status}: start it with: {self.engine.serve}")
        key = writing.request.problem.key
        return ValueError(f"sample {key!r}: {self.engine.url}{_GENERATE} refuses it with {status}: {text[:500]}")

    def _body(self, writing: Writing) -> dict[str, Any]:
        """The JSON of a request."""
        problem = writing.request.problem
        body: dict[str, Any] = {
            "token_ids": [*collapsed(problem, self.engine.policy.model.media_id), *writing.request.prefix],
            "sampling_params": writing.settings(),
            "stream": True,
            "return_token_ids": True,
        }
        if problem.sample.images:
            if id(problem) not in self.images:
                self.images[id(problem)] = _parts(problem)
            body["content_parts"] = self.images[id(problem)]
        return body


def _parts(problem: Problem) -> list[dict[str, str]]:
    """The images as data URLs of PNGs: the very pixels that the trainer reads, whoever decodes them."""
    parts = []
    for image in problem.sample.images:
        stream = io.BytesIO()
        Image.fromarray(decode_image(image, problem.key)).save(stream, "PNG", compress_level=1)
        data = base64.b64encode(stream.getvalue()).decode()
        parts.append({"type": "image_url", "url": f"data:image/png;base64,{data}"})
    return parts


async def _events(answer: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    """The server-sent events of an answer, up to ``[DONE]``."""
    async for line in answer.content:
        data = line.strip().removeprefix(b"data:").strip()
        if data == b"[DONE]":
            return
        if line.startswith(b"data:"):
            try:
                yield json.loads(data)
            except ValueError as error:
                raise _Lost(f"an event that is not JSON: {data[:80]!r}") from error
