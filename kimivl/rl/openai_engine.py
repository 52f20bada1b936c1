"""Responses of a model behind any OpenAI-compatible HTTP endpoint (``rollout=openai``): a teacher or a judge."""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from kimivl.data.sample import SampleError
from kimivl.rl.lanes import in_lanes
from kimivl.rl.openai_protocol import Refused, Reply, StreamedReply, chat_messages, parse_json, refusal
from kimivl.rl.rollout import RolloutEngine
from kimivl.rl.types import Policy, Request, Response, Sampling

_PATH = "/chat/completions"
_MAX_BODY = 64 * 2**20
"""Bytes that an answer may have: a broken server must not fill the memory."""


class EndpointError(ValueError):
    """The endpoint answers no request at all; the message says what to do."""


class OpenAIEngine(RolloutEngine):
    """Asks an endpoint, ``concurrent`` requests at a time. It does not follow a trainer's weights.

    A request that fails is tried again, with waits that double and are drawn at random up to that, or as long as the
    server asks for. What fails for good becomes a response with stop ``error`` and the reason as its text.

    Args:
        policy: ``encode`` gives the tokens of responses (none without it); its ``model`` must be None.
        url: of the API, such as ``https://host/v1``. model: name of the model there.
        api_key_env: environment variable with the key; where it is not set, no key is sent.
        concurrent: requests in flight. timeout: seconds for one attempt, from the connection to the last byte.
        retries: further attempts of a request. backoff: seconds before the first of them. max_wait: most seconds
            before any of them, also when the server asks for more.
        give_up: failed requests one after the other, none answered between, that tell that the endpoint is dead; and
            problems that are refused for good before it has answered anything.
        streaming: ask for server-sent events; proxies cut connections on which long thinking sends nothing.
        extra: further fields of the request, such as ``{top_p: 0.95}``; null takes a field out.

    Attributes:
        failures: attempts that failed, by reason; over the life of the engine.
    """

    def __init__(
        self,
        policy: Policy | None,
        url: str | None,
        model: str | None,
        api_key_env: str | None = "OPENAI_API_KEY",
        concurrent: int = 16,
        timeout: float = 600.0,
        retries: int = 5,
        backoff: float = 1.0,
        max_wait: float = 60.0,
        give_up: int = 8,
        streaming: bool = True,
        extra: dict[str, Any] | None = None,
    ) -> None:
        if policy is not None and policy.model is not None:
            raise ValueError(
                "rollout=openai asks another model than the one that is trained: use rollout=hf here, and "
                "rollout=openai for the teacher of `kimivl synthesize`"
            )
        parts = urlsplit(url or "")
        if not url or parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"rollout.url={url}: give the address of the API, such as rollout.url=https://host/v1")
        if not model:
            raise ValueError(f"rollout.model={model}: name a model of the endpoint {parts.hostname}")
        if concurrent < 1 or timeout <= 0 or retries < 0 or backoff < 0 or max_wait < 0 or give_up < 1:
            raise ValueError(
                "rollout needs concurrent >= 1, timeout > 0, retries >= 0, backoff >= 0, max_wait >= 0, give_up >= 1"
            )
        self.url = url.rstrip("/").removesuffix(_PATH) + _PATH
        self.shown_url = self.url.replace(f"{parts.netloc}", parts.netloc.rpartition("@")[2], 1)
        self.model = model
        self.api_key_env = api_key_env
        self.concurrent = concurrent
        self.timeout = timeout
        self.retries = retries
        self.backoff = backoff
        self.max_wait = max_wait
        self.give_up = give_up
        self.streaming = streaming
        self.extra = extra or {}
        self.encode = policy and policy.encode
        self.failures: Counter[str] = Counter()

    def stream(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[tuple[int, Response]]:
        """As they arrive; ``requests[i]`` is asked for when its turn comes, so a sequence may make them then.

        Raises:
            EndpointError: the endpoint refuses the key, knows no such model or address, or has died. What was
                answered before has been handed out; requests in flight are dropped.
        """
        started, count = time.perf_counter(), 0
        run = _Run(self, requests, sampling)
        run.start()
        try:
            while (item := run.results.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                number, response, tokens = item
                count += tokens
                yield number, response
        finally:
            run.stop()
            self.tokens_per_second = count / max(time.perf_counter() - started, 1e-9)

    def body(self, request: Request, sampling: Sampling) -> dict[str, Any]:
        """The JSON of a request."""
        if request.prefix or request.budget is not None:
            raise ValueError("rollout=openai cannot go on with a response: leave data.budget (partial rollouts) out")
        fields = {
            "model": self.model,
            "messages": chat_messages(request.problem.sample),
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "seed": request.seed % 2**31,  # what every server takes
            "stream": self.streaming,
        } | self.extra
        return {name: value for name, value in fields.items() if value is not None}

    @property
    def key(self) -> str | None:
        return os.environ.get(self.api_key_env or "") or None

    def fatal_message(self, refused: Refused) -> str:
        """One sentence about an endpoint that refuses everything."""
        said = f"{self.shown_url} refuses all requests ({self.without_key(refused.detail)})"
        if refused.reason in ("http_401", "http_403"):
            if self.api_key_env is None:
                return f"{said}: name the environment variable of its key in rollout.api_key_env"
            state = "holds a key that it does not take" if self.key else "is not set"
            return f"{said}: the environment variable {self.api_key_env} {state}; set it, and type the command again"
        return f"{said}: check rollout.url and rollout.model={self.model}, and type the command again"

    def dead_message(self, failed: int, reason: str) -> str:
        return (
            f"{self.shown_url} failed {failed} requests one after the other (the last: {self.without_key(reason)}); "
            "everything answered so far is kept: type the command again when it is back, it asks for the rest"
        )

    def refused_message(self, problems: int, reason: str) -> str:
        return (
            f"{self.shown_url} answered nothing, and refused {problems} problems (the last: "
            f"{self.without_key(reason)}): what it says of the request is to be mended first"
        )

    def without_key(self, text: str) -> str:
        """Servers and libraries quote keys in their errors."""
        return text.replace(self.key, "***") if self.key else text


class _Run:
    """One ``stream``: an event loop in a thread of its own, since the caller may be inside another (a notebook)."""

    def __init__(self, engine: OpenAIEngine, requests: Sequence[Request], sampling: Sampling) -> None:
        self.engine, self.requests, self.sampling = engine, requests, sampling
        self.results: queue.Queue[tuple[int, Response, int] | BaseException | None] = queue.Queue()
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self._work, name="openai-engine", daemon=True)
        self.turn = iter(range(len(requests)))
        self.open_from = 0.0  # no attempt before this, when the server has asked for a pause
        self.in_a_row, self.has_answered = 0, False
        self.refused: set[int] = set()  # problems, while nothing was answered
        self.task: asyncio.Task[None] | None = None
        # Seeds only the waits, which are to differ between processes that met the same dead server.
        self.jitter = random.Random()

    def start(self) -> None:
        self.thread.start()

    def stop(self) -> None:
        """Drop what is in flight, and wait for the thread."""
        if self.thread.is_alive():
            with contextlib.suppress(RuntimeError):  # the loop has closed between the two
                self.loop.call_soon_threadsafe(self._cancel)
            self.thread.join()

    def _cancel(self) -> None:
        if self.task is not None:
            self.task.cancel()

    def _work(self) -> None:
        end: BaseException | None = None
        try:
            self.task = self.loop.create_task(self._all())
            self.loop.run_until_complete(self.task)
        except asyncio.CancelledError:
            end = None
        except BaseException as error:
            end = error  # said to the caller, in the caller's thread
        finally:
            self.loop.close()
            self.results.put(end)

    async def _all(self) -> None:
        connector = aiohttp.TCPConnector(limit=self.engine.concurrent)
        # The environment's proxies, as of every other client on the machine.
        async with aiohttp.ClientSession(connector=connector, trust_env=True) as session:
            await in_lanes(min(self.engine.concurrent, len(self.requests)), lambda: self._lane(session))

    async def _lane(self, session: aiohttp.ClientSession) -> None:
        """Ask for one response after the other; ``concurrent`` lanes share the turn."""
        for number in self.turn:
            try:
                request = self.requests[number]
                body = self.engine.body(request, self.sampling)
            except SampleError as fault:  # a problem that is read only now; it says nothing about the endpoint
                self.results.put((number, Response((), f"{fault.reason}: {fault}", "error"), 0))
                continue
            try:
                reply = await self._ask(session, body)
            except Refused as refused:
                self._failed(number, request.problem.number, refused)
                continue
            self.in_a_row, self.has_answered = 0, True
            tokens = tuple(self.engine.encode(reply.text)) if self.engine.encode else ()
            self.results.put((number, Response(tokens, reply.text, reply.stop), reply.tokens or len(tokens)))

    def _failed(self, number: int, problem: int, refused: Refused) -> None:
        """Hand out the failure, and stop where it is the endpoint's.

        What another attempt cannot change is usually the problem's own (too long, filtered), and comes once for each
        of its samples: it tells against the endpoint while that has answered nothing at all, once for a problem.
        """
        if refused.fatal:
            raise EndpointError(self.engine.fatal_message(refused))
        text = f"{refused.reason}: {self.engine.without_key(refused.detail)}"
        self.results.put((number, Response((), text, "error"), 0))
        if refused.again:
            self.in_a_row += 1
        elif not self.has_answered:
            self.refused.add(problem)
        if self.in_a_row >= self.engine.give_up:
            raise EndpointError(self.engine.dead_message(self.in_a_row, text))
        if len(self.refused) >= self.engine.give_up:
            raise EndpointError(self.engine.refused_message(len(self.refused), text))

    async def _ask(self, session: aiohttp.ClientSession, body: dict[str, Any]) -> Reply:
        """The reply, after as many attempts as it takes. Raises Refused after the last."""
        for attempt in range(self.engine.retries + 1):
            await self._pause()
            try:
                return await self._attempt(session, body)
            except Refused as refused:
                self.engine.failures[refused.reason] += 1
                if not refused.again or attempt == self.engine.retries:
                    raise
                await self._wait(attempt, refused.wait)
        raise AssertionError("the last attempt returns or raises")

    async def _pause(self) -> None:
        while (left := self.open_from - self.loop.time()) > 0:
            await asyncio.sleep(left)

    async def _wait(self, attempt: int, asked: float) -> None:
        if asked:  # by the server, and of everybody
            self.open_from = max(self.open_from, self.loop.time() + min(asked, self.engine.max_wait))
        longest = min(self.engine.max_wait, self.engine.backoff * 2**attempt)
        await asyncio.sleep(self.jitter.uniform(longest / 2, longest))

    async def _attempt(self, session: aiohttp.ClientSession, body: dict[str, Any]) -> Reply:
        """One exchange. Every way to fail becomes ``Refused``."""
        engine = self.engine
        headers = {"Authorization": f"Bearer {engine.key}"} if engine.key else {}
        try:
            async with asyncio.timeout(engine.timeout):
                async with session.post(
                    engine.url, json=body, headers=headers, timeout=aiohttp.ClientTimeout(total=None)
                ) as answer:
                    return await _read(answer)
        except TimeoutError as error:
            raise Refused("timeout", f"no whole answer within {engine.timeout:g} s") from error
        except aiohttp.ClientPayloadError as error:
            raise Refused("truncated", f"the answer broke off ({error})") from error
        except aiohttp.ClientConnectorError as error:
            raise Refused("no_connection", f"{error}") from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise Refused("connection_lost", f"{type(error).__name__}: {error}") from error


async def _read(answer: aiohttp.ClientResponse) -> Reply:
    if answer.status != 200:
        raise refusal(answer.status, (await answer.content.read(4096)).decode("utf-8", "replace"), _retry_after(answer))
    if answer.content_type == "text/event-stream":
        return await _read_events(answer)
    body = bytearray()
    async for chunk in answer.content.iter_any():
        body += chunk
        if len(body) > _MAX_BODY:
            raise Refused("too_large", f"an answer of more than {_MAX_BODY} bytes", again=False)
    if answer.content_type != "application/json":
        raise Refused("content_type", f"the answer is {answer.content_type}, not JSON: {bytes(body[:80])!r}")
    return parse_json(bytes(body))


def _retry_after(answer: aiohttp.ClientResponse) -> str | None:
    return answer.headers.get("Retry-After")


async def _read_events(answer: aiohttp.ClientResponse) -> Reply:
    streamed, left, size = StreamedReply(), b"", 0
    async for chunk in answer.content.iter_any():
        size += len(chunk)
        if size > _MAX_BODY:
            raise Refused("too_large", f"an answer of more than {_MAX_BODY} bytes", again=False)
        *lines, left = (left + chunk).split(b"\n")
        for line in lines:
            streamed.feed(line.decode("utf-8", "replace").strip())
        if streamed.done:
            break
    streamed.feed(left.decode("utf-8", "replace").strip())
    return streamed.reply()
