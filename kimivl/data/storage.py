"""Byte ranges of shards, wherever they are: local files, or anything that fsspec has a filesystem for.

Remote files are read in aligned blocks that are kept in a folder shared by all processes of a machine, so that a
block is fetched once for all workers and epochs, as far as the space allows. Credentials and options of a protocol
are fsspec's own (its configuration files, or variables such as FSSPEC_HTTP).
"""

import io
import logging
import os
import queue
import random
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from kimivl.data.block_cache import BlockCache, block_name
from kimivl.data.remote import Remote, as_os_error, cause_of, is_transient

log = logging.getLogger(__name__)
T = TypeVar("T")

BLOCK_BYTES = 8 * 2**20
MAX_DESCRIPTORS = 64
LOCAL_BUFFER, REMOTE_BUFFER = 2**14, 2**20  # bytes a scanning reader asks for; it reads headers, and jumps over data
GIVE_UP_SECONDS = 60.0  # after all retries have failed: so long a read of that shard is tried only once
TIMEOUT = 60.0  # seconds that one request may take before it counts as failed, so that no dead server holds a worker
FETCHERS = 4  # threads of a process that fetch advised blocks
MAX_ADVISED = 64  # blocks that may wait for them; more are left to the reads


def is_remote(shard: str) -> bool:
    """Whether a shard's name is a URL, and not a path (`file://` is a path)."""
    return "://" in shard and not shard.startswith("file://")


def local_path(shard: str) -> Path:
    """The path of a shard that is not remote."""
    return Path(shard.removeprefix("file://")).expanduser()


class Storage:
    """Reads shards by byte range, with retries. Picklable; what it opens belongs to one process.

    Args:
        cache: the folder for blocks of remote files; by default one of the user's in the temporary folder.
        cache_bytes: what that folder may hold, over all processes that use it.
        retries: how often a read that failed is tried again. A missing file and a refused one are not.
        backoff: seconds before the first retry; doubled for each further one, and varied by half.
    """

    def __init__(
        self, cache: str | Path | None = None, cache_bytes: int = 64 * 2**30, retries: int = 4, backoff: float = 0.5
    ) -> None:
        if cache_bytes < BLOCK_BYTES:
            raise ValueError(f"cache_bytes is {cache_bytes}, and must hold at least one block of {BLOCK_BYTES} bytes")
        self.cache = cache
        self.cache_bytes = cache_bytes
        self.retries = retries
        self.backoff = backoff
        self._opened = _Opened()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_opened"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._opened = _Opened()

    def stat(self, shard: str) -> tuple[int, str]:
        """Bytes of a shard, and a text that is another one when the shard has changed.

        Raises OSError naming the shard (FileNotFoundError where there is none).
        """
        if not is_remote(shard):
            found = self._try(shard, local_path(shard).stat)
            return found.st_size, str(found.st_mtime_ns)
        opened = self._here()
        opened.stats[shard] = self._try(shard, opened.remote(shard).stat)
        return opened.stats[shard]

    def matches(self, pattern: str) -> list[str]:
        """URLs of the files that a URL stands for: itself, the `.tar` files of a folder, or a glob's; sorted.

        An empty list where there is nothing; raises OSError where that cannot be found out.
        """
        try:
            return self._try(pattern, Remote(pattern, TIMEOUT).matches)
        except FileNotFoundError:
            return []

    def read(self, shard: str, offset: int, size: int) -> bytes:
        """Bytes `[offset, offset + size)` of a shard; fewer where it ends before. Raises OSError naming it."""
        if not is_remote(shard):
            return self._try(shard, lambda: self._read_local(shard, offset, size))
        length = self._length_and_version(shard)[0]
        end = min(offset + size, length)
        parts = []
        for number in _blocks(offset, end):
            start = number * BLOCK_BYTES
            first, last = max(offset, start), min(end, start + BLOCK_BYTES)
            parts.append(self._read_block(shard, number, first - start, last - first))
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def advise(self, shard: str, spans: Iterable[tuple[int, int]]) -> None:
        """Say that these `(offset, size)` spans are read soon, so that they are fetched meanwhile.

        Nothing is raised: what is wrong with a shard is said by the read.
        """
        if is_remote(shard):
            for offset, size in spans:
                for number in _blocks(offset, offset + size):
                    self._here().prefetch(self, shard, number)
        elif hasattr(os, "posix_fadvise"):  # not on macOS
            try:
                file = self._here().file(shard)
                for offset, size in spans:
                    os.posix_fadvise(file.descriptor, offset, size, os.POSIX_FADV_WILLNEED)
            except OSError as error:
                log.debug("no read-ahead of %s: %s", shard, error)

    def open(self, shard: str) -> BinaryIO:
        """A seekable reader of a whole shard, for scanning it."""
        raw = _Reader(self, shard, self.stat(shard)[0])
        return io.BufferedReader(raw, REMOTE_BUFFER if is_remote(shard) else LOCAL_BUFFER)

    def _here(self) -> "_Opened":
        """What this process has opened; a forked one starts with nothing of its parent's."""
        if self._opened.pid != os.getpid():
            self._opened = _Opened()
        return self._opened

    def _read_local(self, shard: str, offset: int, size: int) -> bytes:
        file = self._here().file(shard)
        try:
            return file.read(offset, size)
        except OSError:
            self._here().forget(shard)  # a stale handle of a network filesystem is cured by opening it again
            raise

    def _length_and_version(self, shard: str) -> tuple[int, str]:
        """As `stat`, but asked once in a process: the parts of one shard that are read belong together."""
        return self._here().stats.get(shard) or self.stat(shard)

    def _read_block(self, shard: str, number: int, offset: int, size: int) -> bytes:
        """`size` bytes at `offset` of a block, out of the cache or fetched."""
        length, version = self._length_and_version(shard)
        start = number * BLOCK_BYTES
        whole = min(BLOCK_BYTES, length - start)
        cache, name = self._here().cache(self), block_name(shard, version, number, BLOCK_BYTES)
        part = cache.read(name, offset, size, whole)
        if part is None and cache.broken:
            return self._fetch(shard, start + offset, size)
        if part is None:
            with cache.turn(name):
                part = cache.read(name, offset, size, whole)
                if part is None:
                    data = self._fetch(shard, start, whole)
                    cache.write(name, data)
                    part = data[offset : offset + size]
        return part

    def _fetch(self, shard: str, start: int, size: int) -> bytes:
        remote = self._here().remote(shard)
        return self._try(shard, lambda: remote.fetch(start, size))

    def _try(self, shard: str, action: Callable[[], T]) -> T:
        """What `action` returns, at the first or a later try.

        When all tries have failed, the shard gets but one try a read for a while: a server that is down must not cost
        all the waiting once a sample.
        """
        failed = self._here().failed
        retries = 0 if time.monotonic() < failed.get(shard, 0.0) else self.retries
        for attempt in range(retries + 1):
            try:
                done = action()
                failed.pop(shard, None)
                return done
            except Exception as caught:  # the libraries behind fsspec have errors of their own
                error = cause_of(caught)
                if attempt == retries or not is_transient(error):
                    if is_transient(error):
                        failed[shard] = time.monotonic() + GIVE_UP_SECONDS
                    raise as_os_error(error, shard) from caught
                wait = self.backoff * 2**attempt * self._here().random.uniform(0.5, 1.5)
                level = logging.WARNING if attempt == 0 and wait > 0.1 else logging.DEBUG
                log.log(level, "%s: %s; trying again, up to %d times", shard, error, retries)
                time.sleep(wait)
        raise AssertionError("unreachable: the last attempt returns or raises")


def _blocks(start: int, end: int) -> range:
    """Numbers of the blocks that bytes `[start, end)` lie in."""
    return range(start // BLOCK_BYTES, -(-end // BLOCK_BYTES)) if start < end else range(0)


class _LocalFile:
    """An open descriptor, closed when nobody uses it any more (a read may go on while it is evicted)."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self.descriptor)

    def read(self, offset: int, size: int) -> bytes:
        """Bytes `[offset, offset + size)`, fewer only at the end of the file (one call gives 2 GiB at most)."""
        data = os.pread(self.descriptor, size, offset)
        while len(data) < size and (more := os.pread(self.descriptor, size - len(data), offset + len(data))):
            data += more
        return data


class _Opened:
    """What one process has opened: files, connections, the block cache, and threads that fetch ahead."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.random = random.Random()
        self.stats: dict[str, tuple[int, str]] = {}
        self.failed: dict[str, float] = {}  # shard -> until when it is not waited for
        self._lock = threading.Lock()
        self._files: OrderedDict[str, _LocalFile] = OrderedDict()
        self._remotes: dict[str, Remote] = {}
        self._cache: BlockCache | None = None
        self._advised: queue.Queue[tuple[Storage, str, int]] = queue.Queue()
        self._waiting: set[tuple[str, int]] = set()
        self._fetchers: list[threading.Thread] = []

    def file(self, shard: str) -> _LocalFile:
        with self._lock:
            file = self._files.get(shard) or _LocalFile(local_path(shard))
            self._files[shard] = file
            self._files.move_to_end(shard)
            if len(self._files) > MAX_DESCRIPTORS:
                self._files.popitem(last=False)
        return file

    def forget(self, shard: str) -> None:
        with self._lock:
            self._files.pop(shard, None)

    def remote(self, shard: str) -> Remote:
        if shard not in self._remotes:
            self._remotes[shard] = Remote(shard, TIMEOUT)
        return self._remotes[shard]

    def cache(self, storage: Storage) -> BlockCache:
        with self._lock:
            if self._cache is None:
                self._cache = BlockCache(storage.cache, storage.cache_bytes)
            return self._cache

    def prefetch(self, storage: Storage, shard: str, number: int) -> None:
        """Have a thread read one byte of the block, which brings the whole block into the cache."""
        if (shard, number) in self._waiting or len(self._waiting) >= MAX_ADVISED:
            return
        self._waiting.add((shard, number))
        self._advised.put((storage, shard, number))
        if len(self._fetchers) < FETCHERS:
            thread = threading.Thread(target=self._fetch_ahead, name="kimivl-read-ahead", daemon=True)
            self._fetchers.append(thread)
            thread.start()

    def _fetch_ahead(self) -> None:
        while True:
            storage, shard, number = self._advised.get()
            try:
                if not self.cache(storage).broken:
                    storage.read(shard, number * BLOCK_BYTES, 1)
            except (OSError, ValueError) as error:
                log.debug("no read-ahead of %s: %s", shard, error)
            finally:
                self._waiting.discard((shard, number))


class _Reader(io.RawIOBase):
    """A shard as a raw stream over `Storage.read`."""

    def __init__(self, storage: Storage, shard: str, length: int) -> None:
        super().__init__()
        self.storage = storage
        self.shard = shard
        self.length = length
        self.position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.length}[whence]
        return self.position

    def readinto(self, buffer: Any) -> int:
        data = self.storage.read(self.shard, self.position, len(buffer))
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)
