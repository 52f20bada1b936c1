"""Storage: the same bytes from a disk and from a network, through whatever the network does."""

import contextlib
import multiprocessing
import os
import pickle
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
from range_server import RangeServer

from kimivl.data import block_cache, storage
from kimivl.data.block_cache import BlockCache
from kimivl.data.storage import Storage

BLOCK = 64 * 1024
LENGTH = 10 * BLOCK + 777
SPANS = [(0, 10), (BLOCK - 5, 10), (BLOCK, BLOCK), (3, 5 * BLOCK), (LENGTH - 7, 100), (LENGTH, 5), (5, 0)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "BLOCK_BYTES", BLOCK)


@pytest.fixture
def content() -> bytes:
    return np.random.default_rng(0).bytes(LENGTH)


@pytest.fixture
def server(tmp_path: Path, content: bytes) -> Iterator[RangeServer]:
    folder = tmp_path / "web"
    folder.mkdir()
    (folder / "a.tar").write_bytes(content)
    with RangeServer(folder) as running:
        yield running


@pytest.fixture
def store(tmp_path: Path) -> Storage:
    return Storage(tmp_path / "cache", cache_bytes=100 * BLOCK, retries=3, backoff=0.001)


@pytest.fixture
def shard(server: RangeServer) -> str:
    return f"{server.url}/a.tar"


def held(folder: Path) -> int:
    """Bytes of all blocks, at a moment when no process makes room or takes it (they may rename)."""
    sizes = {}
    with BlockCache(folder, 0)._lock(block_cache.TURNS):
        for path in list(folder.iterdir()):
            with contextlib.suppress(FileNotFoundError):
                if ".block" in path.name:
                    sizes[path.stat().st_ino] = path.stat().st_size
    return sum(sizes.values())


def in_child(work) -> object:
    """What `work` returns in a forked process (None if it died)."""
    receive, send = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=lambda: send.send(work()))
    child.start()
    try:
        return receive.recv() if receive.poll(120) else None
    finally:
        child.join(120)


@pytest.mark.parametrize(("offset", "size"), SPANS)
def test_every_span_is_the_same_from_disk_web_and_memory(
    offset: int, size: int, store: Storage, server: RangeServer, content: bytes
):
    fsspec.filesystem("memory").pipe_file("/storage/a.tar", content)
    local = server.folder / "a.tar"
    for shard in (str(local), f"file://{local}", f"{server.url}/a.tar", "memory://storage/a.tar"):
        assert store.read(shard, offset, size) == content[offset : offset + size], shard
        assert store.stat(shard)[0] == LENGTH


@pytest.mark.parametrize("where", ["disk", "web"])
def test_the_version_changes_with_the_file(where: str, store: Storage, server: RangeServer):
    path = server.folder / "a.tar"
    shard = str(path) if where == "disk" else f"{server.url}/a.tar"
    before = store.stat(shard)
    assert store.stat(shard) == before
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(1, 1))
    assert store.stat(shard)[1] != before[1]


def test_a_changed_file_is_not_read_out_of_old_blocks(store: Storage, server: RangeServer, shard: str):
    store.read(shard, 0, 10)
    (server.folder / "a.tar").write_bytes(b"new" * BLOCK)
    os.utime(server.folder / "a.tar", ns=(1, 1))
    assert pickle.loads(pickle.dumps(store)).read(shard, 0, 6) == b"newnew"


def test_a_block_is_fetched_once_for_all_who_share_the_cache(store: Storage, server: RangeServer, shard: str):
    for reader in (store, pickle.loads(pickle.dumps(store))):
        for offset in range(0, 2 * BLOCK, 5000):
            reader.read(shard, offset, 100)
    assert server.gets == [("a.tar", 0), ("a.tar", BLOCK)]


def test_many_processes_at_once_fetch_a_block_once(store: Storage, server: RangeServer, shard: str, content: bytes):
    server.delay = 0.2
    context = multiprocessing.get_context("fork")
    readers = [context.Process(target=store.read, args=(shard, 0, 100)) for _ in range(4)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(120)
    assert [reader.exitcode for reader in readers] == [0] * 4
    assert len(server.gets) == 1


@pytest.mark.parametrize("fault", ["fail", "cut"])
def test_what_fails_twice_is_right_the_third_time(
    fault: str, store: Storage, server: RangeServer, shard: str, content: bytes
):
    setattr(server, fault, 2)
    assert store.read(shard, 100, 50) == content[100:150]
    assert len(server.gets) == 3


@pytest.mark.parametrize(("status", "requests"), [(503, 4), (429, 4), (400, 1)])
def test_giving_up_names_the_address_and_what_is_final_is_not_retried(
    status: int, requests: int, store: Storage, server: RangeServer, shard: str
):
    server.fail, server.status = 1000, status
    with pytest.raises(OSError, match=f"{shard} cannot be read.*{status}"):
        store.read(shard, 0, 10)
    assert len(server.gets) == requests


@pytest.mark.parametrize(("status", "kind"), [(404, FileNotFoundError), (403, PermissionError)])
def test_missing_and_refused_are_said_at_once(status: int, kind: type, store: Storage, server: RangeServer, shard: str):
    server.fail, server.status = 1000, status
    with pytest.raises(kind, match=shard):
        store.read(shard, 0, 10)
    assert len(server.gets) == 1


def test_waits_grow_and_differ(server: RangeServer, shard: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    waits: list[float] = []
    monkeypatch.setattr(storage.time, "sleep", waits.append)
    store = Storage(tmp_path / "cache", retries=4, backoff=0.5)
    store.stat(shard)
    server.fail = 1000
    with pytest.raises(OSError):
        store.read(shard, 0, 10)
    waits = [wait for wait in waits if wait >= 0.25]  # the server sleeps too, for no time
    assert len(waits) == 4
    for attempt, wait in enumerate(waits):
        assert 0.5 <= wait / (0.5 * 2**attempt) <= 1.5


def test_a_dead_server_costs_a_limited_time(
    store: Storage, server: RangeServer, shard: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(storage, "TIMEOUT", 1.0)
    store.stat(shard)
    server.delay = 30
    start = time.monotonic()
    with pytest.raises(OSError, match=shard):
        store.read(shard, 0, 10)
    assert time.monotonic() - start < 20
    server.delay = 0


def test_a_server_without_byte_ranges_is_refused(store: Storage, server: RangeServer, shard: str):
    server.ranges = False
    with pytest.raises(OSError, match=f"{shard}.*ranges"):
        store.read(shard, 0, 10)


def test_a_file_that_is_gone_is_missing_even_if_it_was_open(store: Storage, server: RangeServer, shard: str):
    store.read(shard, 0, 10)
    server.gone = True
    assert store.read(shard, 20, 10)  # of a block that is kept
    with pytest.raises(FileNotFoundError, match=shard):
        store.read(shard, 5 * BLOCK, 10)
    with pytest.raises(FileNotFoundError):
        store.stat(shard)


def test_a_local_file_that_is_gone_is_read_while_it_is_open(store: Storage, server: RangeServer, content: bytes):
    path = server.folder / "a.tar"
    assert store.read(str(path), 0, 10) == content[:10]
    path.unlink()
    assert store.read(str(path), BLOCK, 10) == content[BLOCK : BLOCK + 10]
    with pytest.raises(FileNotFoundError, match=str(path)):
        pickle.loads(pickle.dumps(store)).read(str(path), 0, 10)


def test_an_input_error_of_the_disk_is_retried_with_the_file_opened_anew(
    store: Storage, server: RangeServer, content: bytes, monkeypatch: pytest.MonkeyPatch
):
    pread, faults = os.pread, [OSError(5, "Input/output error"), OSError(116, "Stale file handle")]
    used: set[object] = set()

    def faulty(descriptor: int, size: int, offset: int) -> bytes:
        used.add(store._here().file(str(server.folder / "a.tar")))
        if faults:
            raise faults.pop()
        return pread(descriptor, size, offset)

    monkeypatch.setattr(storage.os, "pread", faulty)
    assert store.read(str(server.folder / "a.tar"), 5, 10) == content[5:15]
    assert len(used) == 3


def test_more_files_than_descriptors_may_be_open(store: Storage, tmp_path: Path):
    before = len(list(Path("/proc/self/fd").iterdir()))
    for number in range(storage.MAX_DESCRIPTORS + 20):
        (tmp_path / f"{number}.tar").write_bytes(b"%d" % number)
        assert store.read(str(tmp_path / f"{number}.tar"), 0, 10) == b"%d" % number
    assert len(list(Path("/proc/self/fd").iterdir())) - before <= storage.MAX_DESCRIPTORS
    assert store.read(str(tmp_path / "0.tar"), 0, 10) == b"0"


def test_a_forked_process_reads_on_with_connections_of_its_own(
    store: Storage, server: RangeServer, shard: str, content: bytes
):
    local = str(server.folder / "a.tar")
    store.read(shard, 0, 10)
    store.read(local, 0, 10)
    for _ in range(3):
        assert in_child(lambda: store.read(shard, 3 * BLOCK, 9)) == content[3 * BLOCK : 3 * BLOCK + 9]
    assert in_child(lambda: store.read(local, 77, 9)) == content[77:86]
    assert store.read(shard, 4 * BLOCK, 9) == content[4 * BLOCK : 4 * BLOCK + 9]


def test_a_process_forked_while_blocks_are_fetched_ahead_reads_on(
    store: Storage, server: RangeServer, shard: str, content: bytes
):
    store.stat(shard)
    server.delay = 0.1
    store.advise(shard, [(0, LENGTH)])
    time.sleep(0.02)
    for number in (9, 10):
        offset = number * BLOCK
        assert in_child(lambda at=offset: store.read(shard, at, 50)) == content[offset : offset + 50]


def read_at_random(store: Storage, shard: str, content: bytes, seed: int, folder: Path, limit: int) -> None:
    for offset in np.random.default_rng(seed).integers(0, LENGTH - 100, 60).tolist():
        assert store.read(shard, offset, 100) == content[offset : offset + 100]
        assert held(folder) <= limit


def test_the_cache_stays_within_its_bound_under_two_processes(shard: str, content: bytes, tmp_path: Path):
    folder, limit = tmp_path / "small", 4 * BLOCK
    folder.mkdir()
    store = Storage(folder, cache_bytes=limit, backoff=0.001)
    context = multiprocessing.get_context("fork")
    arguments = [(store, shard, content, seed, folder, limit) for seed in range(3)]
    readers = [context.Process(target=read_at_random, args=entry) for entry in arguments]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(120)
    assert [reader.exitcode for reader in readers] == [0, 0, 0]
    assert 0 < held(folder) <= limit


def test_the_block_used_longest_ago_makes_room(server: RangeServer, shard: str, tmp_path: Path):
    store = Storage(tmp_path / "cache", cache_bytes=4 * BLOCK)
    for number in (0, 1, 2, 0, 3, 0):
        store.read(shard, number * BLOCK, 10)
        time.sleep(0.01)
    fetched = [first // BLOCK for _, first in server.gets]
    assert fetched == [0, 1, 2, 3]
    store.read(shard, 4 * BLOCK, 10)
    store.read(shard, 0, 10)
    assert len(server.gets) == 5
    store.read(shard, BLOCK, 10)
    assert len(server.gets) == 6


def test_a_damaged_block_or_a_removed_folder_only_costs_a_fetch(
    store: Storage, server: RangeServer, shard: str, content: bytes, tmp_path: Path
):
    store.read(shard, 0, 10)
    (block,) = (tmp_path / "cache").glob("*.block")
    block.write_bytes(b"half")
    assert store.read(shard, 0, 10) == content[:10]
    for path in (tmp_path / "cache").iterdir():
        path.unlink()
    (tmp_path / "cache").rmdir()
    assert store.read(shard, 0, 10) == content[:10]
    assert len(server.gets) == 3


def test_a_full_disk_is_said_once_and_read_past(
    store: Storage,
    server: RangeServer,
    shard: str,
    content: bytes,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(BlockCache, "_reserve", full)
    for offset in (0, BLOCK, 2 * BLOCK - 3):
        assert store.read(shard, offset, 10) == content[offset : offset + 10]
    assert len([record for record in caplog.records if "No space left" in record.message]) == 1


def test_advised_blocks_are_there_before_they_are_read(store: Storage, server: RangeServer, shard: str, content: bytes):
    store.advise(shard, [(0, 10), (3 * BLOCK - 5, 10)])
    deadline = time.monotonic() + 10
    while len(server.gets) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert store.read(shard, 3 * BLOCK, 10) == content[3 * BLOCK : 3 * BLOCK + 10]
    assert sorted(first // BLOCK for _, first in server.gets) == [0, 2, 3]


def test_advice_about_what_is_missing_is_no_error(store: Storage, server: RangeServer, tmp_path: Path):
    store.advise(str(server.folder / "a.tar"), [(0, BLOCK)])
    store.advise(str(tmp_path / "none.tar"), [(0, 10)])
    store.advise(f"{server.url}/none.tar", [(0, 10)])


@pytest.mark.parametrize("where", ["disk", "web"])
def test_an_opened_shard_is_a_seekable_file(where: str, store: Storage, server: RangeServer, content: bytes):
    shard = str(server.folder / "a.tar") if where == "disk" else f"{server.url}/a.tar"
    with store.open(shard) as stream:
        assert stream.read(5) == content[:5]
        stream.seek(-9, os.SEEK_END)
        assert (stream.tell(), stream.read()) == (LENGTH - 9, content[-9:])
        stream.seek(0)
        assert stream.read() == content


def test_a_cache_smaller_than_a_block_is_refused():
    with pytest.raises(ValueError, match="cache_bytes"):
        Storage(cache_bytes=BLOCK - 1)
