"""Remote files through fsspec: what there is, one range of bytes, and which errors are worth another try."""

import asyncio
from typing import Any, TypeVar

import fsspec
import fsspec.asyn

T = TypeVar("T")

PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}
WEB_VERSIONS = ("ETag", "Last-Modified", "Content-MD5")
STORE_VERSIONS = ("etag", "generation", "md5Hash", "LastModified", "last_modified", "updated", "mtime", "created")
PAGES = 10  # a listing may take as long as so many requests
SLOW_DOWN = (408, 429)  # the client errors that pass
FINAL_ERRORS = (
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    ValueError,
    TypeError,
    ImportError,
    NotImplementedError,
    MemoryError,
)


class Remote:
    """One URL and its filesystem. Belongs to the process that made it.

    Raises ValueError where the URL's protocol is unknown or needs a package that is not installed.
    """

    def __init__(self, url: str, timeout: float) -> None:
        self.url = url
        self.timeout = timeout
        protocol = url.split("://", 1)[0]
        try:
            self.files, self.path = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            package = PACKAGES.get(protocol)
            remedy = f"pip install {package}" if package else "check the part before '://'"
            raise ValueError(f"{url} cannot be opened: {error}; {remedy}") from error

    def stat(self) -> tuple[int, str]:
        """Bytes of the file, and the text that its server changes with it."""
        info = self._call("info")
        if info.get("type") == "directory" or info.get("size") is None:
            raise FileNotFoundError(f"{self.url} is no file, or its server does not say how large it is")
        if info.get("partial") is False:
            raise NotImplementedError(f"the server of {self.url} does not serve ranges of bytes")
        known = [f"{name}={info[name]}" for name in (*WEB_VERSIONS, *STORE_VERSIONS) if info.get(name)]
        return int(info["size"]), f"size={info['size']} " + " ".join(known)

    def fetch(self, start: int, size: int) -> bytes:
        """Bytes `[start, start + size)`, all of them."""
        data = self._call("cat_file", start=start, end=start + size)
        if len(data) > size:
            raise NotImplementedError(f"the server of {self.url} does not serve ranges of bytes")
        if len(data) < size:
            raise ConnectionError(f"{self.url} sent {len(data)} of {size} bytes at {start}")
        return data

    def matches(self) -> list[str]:
        """URLs of the files that this one stands for: itself, the `.tar` files of a folder, or a glob's; sorted.

        Raises FileNotFoundError where there is nothing.
        """
        globs = "*[" if self.url.startswith("http") else "*?["  # a question mark starts the query of a web address
        if any(sign in self.path for sign in globs):
            found = self._call("glob", self.path)
        elif not self.path.endswith(".tar") and self._call("isdir", self.path):
            found = self._call("glob", self.path.rstrip("/") + "/*.tar")
        else:
            self.stat()
            return [self.url]
        return sorted(self._url_of(name) for name in found)

    def _url_of(self, name: str) -> str:
        """The URL of a path of this filesystem, written as this one is (with its user, host and slashes)."""
        url, path = self.url.rstrip("/"), self.path.rstrip("/")
        return url.removesuffix(path) + name if url.endswith(path) else self.files.unstrip_protocol(name)

    def _call(self, method: str, path: str | None = None, **arguments: Any) -> Any:
        """A method of the filesystem, within the time limit where the filesystem can be interrupted."""
        path = self.path if path is None else path
        limit = self.timeout * (PAGES if method == "glob" else 1)
        if not self.files.async_impl:
            return getattr(self.files, method)(path, **arguments)

        async def limited() -> Any:
            return await asyncio.wait_for(getattr(self.files, f"_{method}")(path, **arguments), limit)

        return fsspec.asyn.sync(self.files.loop, limited)


def cause_of(error: Exception) -> Exception:
    """What really went wrong: fsspec calls every failure to look at a web address a missing file."""
    cause = error.__cause__
    return cause if isinstance(error, FileNotFoundError) and isinstance(cause, Exception) else error


def status_of(error: Exception) -> int | None:
    """The HTTP status in an error of aiohttp (`status`) or gcsfs (`code`)."""
    status: Any = getattr(error, "status", None) or getattr(error, "code", None)
    return int(status) if str(status).isdigit() else None


def is_transient(error: Exception) -> bool:
    """Whether the same request may succeed later. Libraries have errors of their own: unknown ones are retried."""
    status = status_of(error)
    if status is not None and 400 <= status < 500:
        return status in SLOW_DOWN
    return not isinstance(error, FINAL_ERRORS)


def as_os_error(error: Exception, shard: str) -> Exception:
    """The error to raise for `shard`, which it names."""
    status = status_of(error)
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return FileNotFoundError(f"{shard} does not exist (any more): {error}")
    if isinstance(error, PermissionError) or status in (401, 403):
        return PermissionError(f"{shard} may not be read: {error}")
    if isinstance(error, MemoryError):
        return error
    return OSError(f"{shard} cannot be read: {type(error).__name__}: {error}")
