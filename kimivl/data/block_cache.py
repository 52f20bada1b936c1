"""Blocks of remote shards in a folder that all processes of a machine share, within a bound.

A block is a file that appears whole, under a name made of where it comes from. The least recently used ones make
room for new ones. Whatever other processes do meanwhile (make the same block, remove it), nothing fails here: a
block that is not there is fetched again.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger(__name__)

SUFFIX = ".block"
TURNS = 64  # lock files; two blocks that share one only wait for each other
PATIENCE = 120.0  # seconds to wait for another process before going on without the lock
POLL = 0.005
ROOM = 0.9  # share of the bound that eviction leaves filled, so that not every new block has to list the folder


class BlockCache:
    """A bounded folder of blocks. One object per process; the folder is shared.

    Args:
        folder: where the blocks are; None: a folder of the user's in the temporary folder of the machine.
        limit: bytes that the folder may hold, over all processes.
    """

    def __init__(self, folder: str | Path | None, limit: int) -> None:
        self.folder = _user_folder() if folder is None else Path(folder).expanduser()
        self.limit = limit
        self.broken = False
        self._turns = [threading.Lock() for _ in range(TURNS + 1)]

    def read(self, name: str, offset: int, size: int, whole: int) -> bytes | None:
        """`size` bytes at `offset` of a block that should have `whole` bytes; None when it is not here."""
        path = self.folder / name
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            if os.fstat(descriptor).st_size != whole:
                path.unlink(missing_ok=True)  # left by a machine that stopped before its disk was written
                return None
            os.utime(descriptor)
            return os.pread(descriptor, size, offset)
        except OSError:
            return None
        finally:
            os.close(descriptor)

    def write(self, name: str, data: bytes) -> None:
        """Keep a block. Where that cannot be (a full disk), say so once, and keep no more in this process."""
        if self.broken:
            return
        partial = self.folder / f".{name}.{os.getpid()}.{threading.get_ident()}"
        try:
            self._reserve(partial, len(data))
            with partial.open("r+b") as stream:
                stream.write(data)
            with self._lock(TURNS):  # a file that is renamed while another process lists the folder may not be seen
                partial.replace(self.folder / name)
        except FileNotFoundError:
            pass  # another process made room with it, or the folder was removed; it is made again for the next block
        except OSError as error:
            self._give_up(error)
            with contextlib.suppress(OSError):
                partial.unlink()

    @contextlib.contextmanager
    def turn(self, name: str) -> Iterator[None]:
        """Hold the right to fetch a block, so that processes that want it at once fetch it once."""
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(self._lock(int(name[:8], 16) % TURNS))
            except OSError as error:
                self._give_up(error)
            yield

    def _give_up(self, error: OSError) -> None:
        if not self.broken:
            log.warning("blocks of remote shards are not kept in %s: %s; free space there", self.folder, error)
        self.broken = True

    def _reserve(self, partial: Path, size: int) -> None:
        """Make room for a file of `size` bytes, and make it, so that other processes count it before it is written.

        The count in the lock file never says less than there is; it is made right when it reaches the bound.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._lock(TURNS) as descriptor:
            text = os.pread(descriptor, 32, 0)
            held = int(text) if text.isdigit() else self.limit
            if held + size > self.limit:
                held = self._evict(min(int(self.limit * ROOM), self.limit - size))
            with partial.open("wb") as stream:
                stream.truncate(size)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, b"%d" % (held + size), 0)

    def _evict(self, target: int) -> int:
        """Remove the least recently used files until at most `target` bytes are left; the bytes that are left."""
        found = []
        for entry in os.scandir(self.folder):
            if SUFFIX in entry.name:  # blocks, and what an interrupted process left of one
                with contextlib.suppress(FileNotFoundError):
                    found.append((entry.stat().st_mtime_ns, entry.stat().st_size, entry.path))
        held = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if held <= target:
                break
            Path(path).unlink(missing_ok=True)
            held -= size
        return held

    @contextlib.contextmanager
    def _lock(self, number: int) -> Iterator[int]:
        """Hold one of the folder's lock files; its descriptor.

        Record locks are not handed on by fork, which matters with worker processes, but hold for all threads of a
        process; hence the second lock. After `PATIENCE` the lock is not waited for any longer: at worst a block is
        fetched twice.
        """
        with self._turns[number]:
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.folder / f"lock-{number:02d}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                deadline = time.monotonic() + PATIENCE
                while time.monotonic() < deadline:
                    try:
                        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        break
                    except (BlockingIOError, PermissionError):  # held by another process
                        time.sleep(POLL)
                yield descriptor
            finally:
                os.close(descriptor)


def block_name(shard: str, version: str, number: int, size: int) -> str:
    """The file name of a block: of this shard in this version, and of this block size."""
    return hashlib.sha256(repr((shard, version, number, size)).encode()).hexdigest()[:40] + SUFFIX


def _user_folder() -> Path:
    """A folder in the machine's temporary one that only its user may enter. Raises ValueError if it is another's."""
    folder = Path(tempfile.gettempdir()) / f"kimivl-blocks-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.lstat().st_uid != os.getuid() or folder.is_symlink():
        raise ValueError(f"{folder} belongs to another user; give a cache folder for remote shards (data.cache)")
    return folder
