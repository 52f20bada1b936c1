"""An OpenAI-compatible endpoint in a thread, which fails in whatever way a test asks for."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SAID = "<think>\nPlan: add. 3+4=7. Check: 4+3=7, the same.\n</think>\n\n\\boxed{7}"

ENDLESS_S = 16
"""Seconds that a server that never ends goes on."""

Act = Callable[["Handler", dict[str, Any]], None]


class Handler(BaseHTTPRequestHandler):
    """Gives request number n to the act that the test chose for it."""

    protocol_version = "HTTP/1.1"
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.teacher.lock:
            number = len(self.server.teacher.asked)
            self.server.teacher.asked.append(body)
            self.server.teacher.headers.append(dict(self.headers))
            self.server.teacher.times.append(time.monotonic())
        with suppress(BrokenPipeError, ConnectionResetError):  # the engine has gone
            self.server.teacher.act(number, body)(self, body)

    def send(self, body: bytes, status: int = 200, kind: str = "application/json", **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        for name, value in ({"Content_Length": str(len(body))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Quiet."""


class Server(ThreadingHTTPServer):
    daemon_threads = True
    teacher: FakeTeacher

    def handle_error(self, *_: Any) -> None:
        """Quiet."""


@dataclass
class FakeTeacher:
    act: Callable[[int, dict[str, Any]], Act]
    url: str = ""
    asked: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


@contextmanager
def fake_teacher(act: Act | Callable[[int, dict[str, Any]], Act], port: int = 0) -> Iterator[FakeTeacher]:
    """A teacher; ``act`` is what it does, or (request number, body) -> what it does."""
    chooses = act.__name__ in ("choose", "<lambda>")
    teacher = FakeTeacher(act if chooses else lambda number, body: act)  # type: ignore[arg-type, return-value]
    server = Server(("127.0.0.1", port), Handler)
    server.teacher = teacher
    teacher.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield teacher
    finally:
        server.shutdown()
        server.server_close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def answer(text: str | None = SAID, finish: str | None = "stop", **message: Any) -> dict[str, Any]:
    choice = {"message": {"role": "assistant", "content": text, **message}, "finish_reason": finish}
    return {"choices": [choice], "usage": {"completion_tokens": 9}}


def good(handler: Handler, body: dict[str, Any]) -> None:
    says(SAID)(handler, body)


def says(text: str, finish: str = "stop", **message: Any) -> Act:
    """An answer, streamed where the request asks for that."""

    def act(handler: Handler, body: dict[str, Any]) -> None:
        if not body.get("stream"):
            handler.send(json.dumps(answer(text, finish, **message)).encode())
            return
        handler.send(events(text, finish, **message), kind="text/event-stream; charset=utf-8")

    return act


def events(text: str, finish: str | None = "stop", done: bool = True, **message: Any) -> bytes:
    deltas: list[dict[str, Any]] = [{name: value} for name, value in message.items()]
    deltas += [{"content": text[start : start + 7]} for start in range(0, len(text), 7)]
    chunks: list[dict[str, Any]] = [{"choices": [{"delta": delta, "finish_reason": None}]} for delta in deltas]
    if finish:
        chunks.append({"choices": [{"delta": {}, "finish_reason": finish}], "usage": None})
    chunks.append({"choices": [], "usage": {"completion_tokens": 9}})
    lines = [": keep-alive", *(f"data: {json.dumps(chunk)}" for chunk in chunks), *(["data: [DONE]"] if done else [])]
    return "\n\n".join(lines).encode() + b"\n\n"


def raw(body: bytes, kind: str = "application/json") -> Act:
    def act(handler: Handler, _: dict[str, Any]) -> None:
        handler.send(body, kind=kind)

    return act


def status(code: int, body: str = "no", **headers: str) -> Act:
    def act(handler: Handler, _: dict[str, Any]) -> None:
        handler.send(body.encode(), code, "text/plain", **headers)

    return act


def reset(handler: Handler, body: dict[str, Any]) -> None:
    """The connection is torn down without a word."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
    handler.connection.close()
    handler.close_connection = True
    raise ConnectionResetError


def truncated(handler: Handler, body: dict[str, Any]) -> None:
    """Fewer bytes than promised."""
    handler.send(json.dumps(answer()).encode()[:40], Content_Length="4000")
    handler.close_connection = True


def silent(handler: Handler, body: dict[str, Any]) -> None:
    time.sleep(ENDLESS_S)


def drips(handler: Handler, body: dict[str, Any]) -> None:
    """One byte at a time, for ever."""
    handler.send(b"", kind="text/event-stream", Content_Length="100000")
    for _ in range(100 * ENDLESS_S):
        handler.wfile.write(b":")
        handler.wfile.flush()
        time.sleep(0.01)
