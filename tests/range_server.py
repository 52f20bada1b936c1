"""A web server on the loopback with byte ranges, entity tags and faults that can be switched, for tests of storage."""

import contextlib
import threading
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from urllib.parse import unquote, urlsplit


class RangeServer:
    """Serves the files of `folder` while the `with` block lasts. Its faults may be changed at any time.

    Attributes:
        url: address of the folder, without a slash at its end.
        fail: how many of the next GET requests are answered with `status` and no file.
        status: what a failing request is answered with.
        cut: how many of the next bodies end after half of what their header promises.
        delay: seconds that each GET request waits.
        gone: everything is answered with 404 from now on.
        ranges: whether byte ranges are served; if not, each answer is the whole file.
        gets: the `(name, first byte)` of each GET request for a file, failed ones included.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.fail = self.cut = 0
        self.status = 503
        self.delay = 0.0
        self.gone = False
        self.ranges = True
        self.gets: list[tuple[str, int]] = []
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"web": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "RangeServer":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()

    def take(self, fault: str) -> bool:
        """Whether this request has its turn to suffer `fault` (`fail` or `cut`)."""
        with self._lock:
            left = getattr(self, fault)
            setattr(self, fault, max(0, left - 1))
        return left > 0


class _Handler(BaseHTTPRequestHandler):
    web: RangeServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes; together with delayed answers they cost 40 ms

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # a client that ends without a word is no news
            super().handle()

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, *_: object) -> None:
        """Nothing: a test reads `gets`."""

    def _answer(self, body: bool) -> None:
        path = self.web.folder / unquote(urlsplit(self.path).path).lstrip("/")
        if path.is_dir() and not self.web.gone:
            return self._list(path, body)
        first, last = self._range()
        if body:
            self.web.gets.append((path.name, first))
            time.sleep(self.web.delay)
        if body and self.web.take("fail"):
            return self._empty(self.web.status)
        if self.web.gone or not path.is_file():
            return self._empty(HTTPStatus.NOT_FOUND)
        return self._file(path, first, last, body)

    def _file(self, path: Path, first: int, last: int | None, body: bool) -> None:
        data, part = path.read_bytes(), self.web.ranges and "Range" in self.headers
        end = len(data) if last is None or not part else min(last + 1, len(data))
        chosen = data[first:end] if part else data
        self.send_response(HTTPStatus.PARTIAL_CONTENT if part else HTTPStatus.OK)
        if part:
            self.send_header("Content-Range", f"bytes {first}-{end - 1}/{len(data)}")
        self.send_header("ETag", f'"{path.stat().st_mtime_ns:x}"')
        self.send_header("Content-Length", str(len(chosen)))
        self.end_headers()
        if not body:
            return
        if self.web.take("cut"):
            chosen = chosen[: len(chosen) // 2]
            self.close_connection = True
        self.wfile.write(chosen)

    def _range(self) -> tuple[int, int | None]:
        """First and last byte that are asked for (None: to the end)."""
        first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        return int(first), int(last) if last else None

    def _list(self, folder: Path, body: bool) -> None:
        """The folder as a page of links, which is what globs on web addresses are answered from."""
        names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())
        page = "".join(f'<a href="{name}">{name}</a>\n' for name in names).encode()
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        if body:
            self.wfile.write(page)

    def _empty(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()
