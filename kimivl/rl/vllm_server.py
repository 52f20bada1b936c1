"""Rollouts by a vLLM server over HTTP (``rollout=vllm_server``): tokens in and out, weights pushed through files."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

import torch
from safetensors.torch import save_file
from torch import Tensor

from kimivl.rl.rollout import RolloutEngine
from kimivl.rl.types import Policy, Request, Response, Sampling
from kimivl.rl.vllm_stream import ServerError, ServerGone, Streams
from kimivl.rl.vllm_worker import EXTENSION
from kimivl.rl.weights import Digests, check_digests, expected, in_dtype_of, policy_tensors
from kimivl.runtime import ranks

SERVE = (
    "VLLM_SERVER_DEV_MODE=1 vllm serve MODEL_FOLDER --enable-scale-out --trust-remote-code --generation-config vllm "
    f"--logprobs-mode processed_logprobs --worker-extension-cls {EXTENSION}"
)
"""The command that starts a server; MODEL_FOLDER is what the run begins with (``init_from``)."""

_SHARED_MEMORY = Path("/dev/shm")
_SHARD_BYTES = 1 << 30
_BUSY = (429, 502, 503, 504)
"""Statuses of a server, or of what stands before it, that may answer the next time."""


class VLLMServerRolloutEngine(RolloutEngine):
    """Asks a server that can generate while the trainer trains. It has the policy of the last ``sync``.

    A request whose connection fails is sent again, with waits that double. What has been answered has been handed out
    when the server is given up. Of several ranks all ask, and the first pushes the weights while the others wait.

    Args:
        policy: whose responses are drawn.
        url: of the server, such as ``http://127.0.0.1:8000``.
        in_flight: requests under way at one time, of all ranks together.
        timeout: seconds without a byte after which a connection counts as lost.
        retries: further attempts of a request. backoff: seconds before the first of them.
        sync_dir: where weights are written for the server, which must see the same files; None is shared memory.
        sync_timeout: seconds that the server may take to load them.

    Raises:
        ValueError: for settings that cannot be.
    """

    concurrent = True
    serve = SERVE

    def __init__(
        self,
        policy: Policy,
        url: str = "http://127.0.0.1:8000",
        in_flight: int = 256,
        timeout: float = 600.0,
        retries: int = 4,
        backoff: float = 1.0,
        sync_dir: str | None = None,
        sync_timeout: float = 600.0,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"rollout.url={url}: give the server's address, such as http://127.0.0.1:8000")
        if in_flight < 1 or timeout <= 0 or retries < 0 or backoff < 0 or sync_timeout <= 0:
            raise ValueError("rollout needs in_flight >= 1, timeout > 0, retries >= 0, backoff >= 0, sync_timeout > 0")
        if sync_dir is not None and not Path(sync_dir).is_dir():
            raise ValueError(f"rollout.sync_dir={sync_dir}: there is no such folder")
        self.policy = policy
        self.url = url.rstrip("/")
        self.in_flight = -(-in_flight // ranks.world_size())
        self.timeout = timeout
        self.retries = retries
        self.backoff = backoff
        self.sync_dir = sync_dir
        self.sync_timeout = sync_timeout
        self.max_model_len: int | None = None
        self._held: Digests = {}
        self._token = ""
        self._streams: list[int] = []  # threads that are asking
        self._idle = threading.Condition()

    # Weights

    def sync(self) -> dict[str, float]:
        """Push the trainer's weights, unless the server has them already; checksums are verified.

        Waits for the responses that other threads are asking for. All ranks call it; the weights are the first one's.

        Raises:
            ServerError: the server does not answer, or lacks what this engine needs of it.
            RuntimeError: naming the first tensor that differs after it was sent.
        """
        started = time.perf_counter()
        with self._idle:
            if threading.get_ident() in self._streams:
                raise RuntimeError("sync() inside stream(): finish or close the stream first")
            self._idle.wait_for(lambda: not self._streams)
            ranks.gather(None)  # no other rank is asking any more
            self._token, self.max_model_len = ranks.share(self._synced)
        return {"perf/sync_s": time.perf_counter() - started}

    def _synced(self) -> tuple[str, int | None]:
        self._greet()
        tensors = policy_tensors(self.policy.model)
        if not self._has_our_weights() or expected(self._held, tensors) != self._held:
            self._push(tensors)
        return self._token, self.max_model_len

    def _greet(self) -> None:
        """Ask what is served, and how long a response it may have."""
        served = self._call("GET", "/v1/models", timeout=30)["data"][0]
        self.max_model_len = served.get("max_model_len")

    def _has_our_weights(self, retries: int | None = None) -> bool:
        """Whether all workers hold what was pushed last: one that was started anew, or obeys another run, does not."""
        return bool(self._token) and all(t == [self._token] for t in self._rpc("held_policy", retries=retries))

    def _push(self, tensors: Mapping[str, Tensor]) -> None:
        self._token, known = "", self._held
        token = uuid.uuid4().hex
        root = self.sync_dir or (_SHARED_MEMORY if _SHARED_MEMORY.is_dir() else None)
        with TemporaryDirectory(prefix="kimivl-sync-", dir=root) as folder:
            _write(dict(in_dtype_of(known, tensors)) if known else tensors, Path(folder))
            held = self._rpc("load_policy", folder, token)
        for worker, digests in enumerate(held):
            check_digests(digests, expected(digests, tensors), f"worker {worker} of {self.url}")
        self._forget_old_activations()
        self._held = {name: (dtype, value) for name, (dtype, value) in held[0].items()}
        self._token = token

    def _forget_old_activations(self) -> None:
        """Have the server drop keys, values and image features of the old weights."""
        for attempt in range(10):  # blocks of requests that were just dropped are given back a moment later
            if self._call("POST", "/reset_prefix_cache")["success"]:
                break
            time.sleep(0.05 * 2**attempt)
        else:
            raise ServerError(f"{self.url} does not drop its prefix cache: is another run asking it? Give each its own")
        self._call("POST", "/reset_mm_cache")
        self._call("POST", "/reset_encoder_cache")

    # Responses

    def stream(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[tuple[int, Response]]:
        """Responses as they end.

        Raises:
            ServerError: the server does not answer, or was restarted since the last ``sync``.
            ValueError: naming the sample that the server refuses.
        """
        if self._token:
            self.check_weights()
        elif ranks.world_size() > 1:
            raise RuntimeError("stream() before sync(), which all ranks must call together")
        else:
            self.sync()
        started, count = time.perf_counter(), 0
        with self._asking():
            run = Streams(self, requests, sampling)
            try:
                for number, writing in run:
                    count += writing.count
                    yield number, writing.response()
            finally:
                run.close()
                self.tokens_per_second = count / max(time.perf_counter() - started, 1e-9)

    def check_weights(self, retries: int | None = None) -> None:
        """ServerError when the server no longer has the weights of the last ``sync``."""
        if not self._has_our_weights(retries):
            raise ServerError(
                f"{self.url} has lost this run's weights: it was started anew, or another run uses it; give this run "
                "a server of its own, and type the command again"
            )

    @contextmanager
    def _asking(self) -> Iterator[None]:
        thread = threading.get_ident()
        with self._idle:
            self._streams.append(thread)
        try:
            yield
        finally:
            with self._idle:
                self._streams.remove(thread)
                self._idle.notify_all()

    # The server's other addresses

    def _rpc(self, method: str, *args: str, retries: int | None = None) -> list[Any]:
        """Call a method of ``PolicyWorker`` in all workers: their answers."""
        body = {"method": method, "args": list(args), "timeout": self.sync_timeout}
        return self._call("POST", "/collective_rpc", body, self.sync_timeout + 30, retries)["results"]

    def _call(self, method: str, path: str, body: Any = None, timeout: float = 60.0, retries: int | None = None) -> Any:
        """One exchange, tried again when the connection fails; its JSON, or None where the answer is empty."""
        retries = self.retries if retries is None else retries
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        wanted = urllib.request.Request(self.url + path, data, headers, method=method)
        for attempt in range(retries + 1):
            try:
                with urllib.request.urlopen(wanted, timeout=timeout) as answer:
                    return json.loads(answer.read() or "null")
            except (OSError, ValueError) as error:  # no connection, a broken one, an answer that is not JSON
                if isinstance(error, urllib.error.HTTPError) and error.code not in _BUSY:
                    raise self._refused(path, error.code, error.read().decode("utf-8", "replace")) from error
                if attempt == retries:
                    raise self.dead(str(error)) from error
                time.sleep(self.backoff * 2**attempt)
        raise AssertionError("the last attempt returns or raises")

    def _refused(self, path: str, status: int, text: str) -> ServerError:
        if status == 404 and path != "/v1/models":
            return ServerError(f"{self.url} does not take weights ({path} is missing): start it with: {SERVE}")
        if "held_policy" in text or "load_policy" in text or "PolicyWorker" in text:
            return ServerError(f"{self.url} has no PolicyWorker to take weights: start it with: {SERVE}")
        return ServerError(f"{self.url}{path} answers {status}: {text[:500]}; see the server's log")

    def dead(self, detail: str) -> ServerGone:
        """One sentence about a server that does not answer."""
        return ServerGone(
            f"{self.url} does not answer ({detail}): start it with: {SERVE}, or give rollout.url, and type the command "
            "again; what was answered before is kept"
        )


def _write(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write tensors as safetensors files of about a gigabyte, layer after layer as they come."""
    shard: dict[str, Tensor] = {}
    written = size = 0
    for number, (name, tensor) in enumerate(tensors.items(), 1):
        # A copy, since safetensors refuses views of one storage, as experts are of their stack.
        shard[name] = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        size += tensor.nbytes
        if size >= _SHARD_BYTES or number == len(tensors):
            save_file(shard, folder / f"{written:05d}.safetensors")
            shard, size, written = {}, 0, written + 1
