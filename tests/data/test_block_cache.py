"""The block cache by itself; how it serves several processes is tested with the storage."""

import os
import stat
from pathlib import Path

import pytest

from kimivl.data import block_cache
from kimivl.data.block_cache import BlockCache, block_name

NAME = block_name("http://x/a.tar", "1", 0, 8)


def test_what_is_kept_is_read_back_in_parts(tmp_path: Path):
    cache = BlockCache(tmp_path / "new" / "folder", 100)
    assert cache.read(NAME, 0, 8, 8) is None
    with cache.turn(NAME):
        cache.write(NAME, b"01234567")
    assert cache.read(NAME, 2, 3, 8) == b"234"
    assert cache.read(NAME, 2, 3, 9) is None  # not as long as it should be: it was not written whole
    assert cache.read(NAME, 2, 3, 8) is None


def test_blocks_of_another_version_place_or_size_have_other_names():
    names = {block_name(*key) for key in (("u", "1", 0, 8), ("u", "2", 0, 8), ("u", "1", 1, 8), ("u", "1", 0, 9))}
    assert len(names) == 4


def test_what_an_interrupted_process_left_is_counted_and_removed(tmp_path: Path):
    (tmp_path / f".{NAME}.1.1").write_bytes(bytes(90))
    os.utime(tmp_path / f".{NAME}.1.1", ns=(1, 1))
    (tmp_path / "notes.txt").write_bytes(bytes(500))
    cache = BlockCache(tmp_path, 100)
    cache.write(NAME, bytes(20))
    assert cache.read(NAME, 0, 20, 20) == bytes(20)
    assert not (tmp_path / f".{NAME}.1.1").exists()
    assert (tmp_path / "notes.txt").exists()  # a folder may hold what is not ours


def test_a_folder_that_cannot_be_made_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "file").touch()
    cache = BlockCache(tmp_path / "file" / "cache", 100)
    for _ in range(3):
        with cache.turn(NAME):
            assert cache.read(NAME, 0, 8, 8) is None
            cache.write(NAME, b"01234567")
    assert cache.broken
    assert len([record for record in caplog.records if "not kept" in record.message]) == 1


def test_an_error_in_a_turn_is_not_taken_for_one_of_the_folder(tmp_path: Path):
    cache = BlockCache(tmp_path, 100)
    with pytest.raises(ConnectionError), cache.turn(NAME):
        raise ConnectionError("of the fetch")
    assert not cache.broken
    with cache.turn(NAME):  # and the turn was given back
        pass


def test_the_folder_of_the_user_is_closed_to_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(block_cache.tempfile, "gettempdir", lambda: str(tmp_path))
    folder = BlockCache(None, 100).folder
    assert folder.parent == tmp_path
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_folder_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(block_cache.tempfile, "gettempdir", lambda: str(tmp_path))
    (tmp_path / "theirs").mkdir()
    (tmp_path / f"kimivl-blocks-{os.getuid()}").symlink_to(tmp_path / "theirs")
    with pytest.raises(ValueError, match="another user"):
        BlockCache(None, 100)
