"""A vLLM server on the loopback that writes tokens from the seed of a request, with faults that can be switched."""

import base64
import contextlib
import io
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors.torch import load_file

from kimivl.rl.rollout import response_seed
from kimivl.rl.weights import digests

STOP, MEDIA = 9, 5


class FakeVLLM:
    """Serves while the `with` block lasts. Its faults may be changed at any time.

    Attributes:
        fail: how many of the next generate requests are answered with `status`.
        cut: how many of the next streams end after one token.
        wrong: name of a tensor that is spoilt when weights are loaded.
        no_extension: was started without the worker extension. no_dev_mode: without the addresses for weights.
        other_grid: reads one image token more than there are.
        pace: seconds for each token. max_model_len: tokens.
        bodies: of all generate requests. running: those under way. most: how many of them there were at one time.
        loads: weights taken over. pixels: images that were sent. written: tokens that were sent.
    """

    def __init__(self) -> None:
        self.fail = self.cut = self.loads = self.most = self.written = 0
        self.status = 503
        self.wrong, self.pace, self.max_model_len = "", 0.0, 64
        self.no_extension = self.no_dev_mode = self.other_grid = False
        self.token = ""
        self.weights: dict[str, Any] = {}
        self.resets: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.pixels: list[Image.Image] = []
        self.running: set[_Handler] = set()
        self.lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"fake": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "FakeVLLM":
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def tokens(self, seed: int, count: int) -> list[int]:
        """What a request with this seed is answered: ids from 10 to 29, ended by STOP one time in twelve."""
        drawn: list[int] = []
        while len(drawn) < count and STOP not in drawn:
            value = response_seed(seed, len(drawn)) % 240
            drawn.append(STOP if value < 20 else 10 + value % 20)
        return drawn

    def take(self, name: str) -> bool:
        """Whether a counted fault happens now."""
        with self.lock:
            left = getattr(self, name)
            setattr(self, name, max(left - 1, 0))
            return left > 0


class _Handler(BaseHTTPRequestHandler):
    fake: FakeVLLM

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._json({"data": [{"id": "model", "max_model_len": self.fake.max_model_len}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "null")
        if self.path == "/inference/v1/generate":
            self._generate(body)
        elif self.fake.no_dev_mode:
            self._json({"detail": "Not Found"}, 404)
        elif self.path == "/collective_rpc":
            self._rpc(body["method"], body["args"])
        else:
            self.fake.resets.append(self.path)
            self._json({"success": True} if "prefix" in self.path else None)

    def _rpc(self, method: str, args: list[str]) -> None:
        if self.fake.no_extension:
            self._json({"error": f"'CPUWorker' object has no attribute '{method}'"}, 500)
        elif method == "held_policy":
            self._json({"results": [[self.fake.token]]})
        else:
            loaded = {k: v for file in sorted(Path(args[0]).iterdir()) for k, v in load_file(file).items()}
            if self.fake.wrong:
                loaded[self.fake.wrong].view(-1)[0] += 1
            self.fake.weights, self.fake.token = loaded, args[1]
            self.fake.loads += 1
            self._json({"results": [digests(loaded)]})

    def _generate(self, body: dict[str, Any]) -> None:
        fake = self.fake
        fake.bodies.append(body)
        if fake.take("fail"):
            self._json({"error": {"message": "not now"}}, fake.status)
            return
        with fake.lock:
            fake.running.add(self)
            fake.most = max(fake.most, len(fake.running))
        try:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            with contextlib.suppress(OSError):  # the client has gone
                self._stream(body)
        finally:
            self._ended()

    def _ended(self) -> None:
        with self.fake.lock:
            self.fake.running.discard(self)

    def _stream(self, body: dict[str, Any]) -> None:
        settings = body["sampling_params"]
        cut = self.fake.take("cut")
        prompt = self._expanded(body)
        tokens = self.fake.tokens(settings["seed"], settings["max_tokens"])
        for place, token in enumerate(tokens):
            time.sleep(self.fake.pace)
            logprobs = {"content": [{"token_id": token, "logprob": -float(token), "top_logprobs": []}]}
            event: dict[str, Any] = {"choices": [{"index": 0, "token_ids": [token], "logprobs": logprobs}]}
            if place == 0:
                event["prompt_token_ids"] = prompt
            if place == len(tokens) - 1:
                self._ended()  # the client may send the next request as soon as it has the last token
            self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
            self.wfile.flush()
            self.fake.written += 1
            if cut:
                return
        self.wfile.write(b"data: [DONE]\n\n")

    def _expanded(self, body: dict[str, Any]) -> list[int]:
        images = []
        for part in body.get("content_parts", ()):
            images.append(Image.open(io.BytesIO(base64.b64decode(part["url"].partition(",")[2]))))
        self.fake.pixels += images
        sizes = iter(image.width * image.height // 28**2 + self.fake.other_grid for image in images)
        return [id_ for token in body["token_ids"] for id_ in [token] * (next(sizes) if token == MEDIA else 1)]

    def _json(self, value: Any, status: int = 200) -> None:
        data = b"" if value is None else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
