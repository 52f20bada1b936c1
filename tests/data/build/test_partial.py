"""Builds that are stopped, replaced, or that find OUT in use: nothing half-written is seen, nothing is done twice."""

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
from chat_files import SHARD, contents, picture, read_all, write_llava

from kimivl.data.build import builder as build
from kimivl.data.build.builder import build_shards
from kimivl.data.sample import Sample


@pytest.fixture
def llava(tmp_path: Path) -> Path:
    return write_llava(tmp_path)


def main(source: Path, out: Path) -> str:
    """A program that builds two shards and stays in the third, to be killed."""
    return (
        "import signal, time; from pathlib import Path; from kimivl.data.build import builder as build\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background process would ignore it\n"
        "write = build.write_shard\n"
        "build.write_shard = lambda samples, path: (write(samples, path), '000002' in path.name and time.sleep(600))\n"
        f"build.build_shards(Path({str(source)!r}), Path({str(out)!r}), shard_bytes={SHARD})"
    )


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_build_goes_on(llava: Path, tmp_path: Path, stop: signal.Signals) -> None:
    (tmp_path / "pictures" / "0.jpeg").unlink()  # one row is refused
    whole, out = tmp_path / "whole", tmp_path / "out"
    build_shards(llava, whole, shard_bytes=SHARD)
    process = subprocess.Popen([sys.executable, "-c", main(llava, out)], stderr=subprocess.DEVNULL)
    while len(list(out.glob(".partial/llava-*.json"))) < 2:
        assert process.poll() is None, "it ended before it had written two shards"
        time.sleep(0.02)
    process.send_signal(stop)
    assert process.wait() != 0
    assert [path.name for path in out.iterdir()] == [".partial"], "nothing may be seen before all is done"
    (out / ".partial" / ".llava-000003.tar.99.partial").write_bytes(b"left by a kill")
    report = build_shards(llava, out, shard_bytes=SHARD)
    assert report.found_done == 2 < report.shards
    assert contents(out) == contents(whole)


@pytest.mark.parametrize("kill_at", range(1, 14, 2))
def test_a_build_stopped_while_publishing_goes_on(
    llava: Path, tmp_path: Path, kill_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    build_shards(llava, whole, name="n", shard_bytes=SHARD)
    build_shards(llava, out, name="n", shard_bytes=SHARD // 2)  # to be replaced by the next
    moves = 0
    move = Path.replace

    def killed(self: Path, target: Path) -> Path:
        nonlocal moves
        moves += target.parent == out
        if moves == kill_at:
            raise KeyboardInterrupt
        return move(self, target)

    monkeypatch.setattr(Path, "replace", killed)
    stopped = False
    try:
        build_shards(llava, out, name="n", shard_bytes=SHARD, overwrite=True)
    except KeyboardInterrupt:
        stopped = True
    monkeypatch.undo()
    report = build_shards(llava, out, name="n", shard_bytes=SHARD)
    assert stopped or kill_at > report.shards
    assert contents(out) == contents(whole)


def test_a_finished_build_is_left_alone(llava: Path, tmp_path: Path) -> None:
    first = build_shards(llava, tmp_path / "out", shard_bytes=SHARD)
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    again = build_shards(llava, tmp_path / "out", shard_bytes=SHARD)
    assert (again.samples, again.found_done) == (first.samples, first.shards)
    assert times == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}


def test_another_set_is_only_replaced_when_asked(llava: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    build_shards(llava, out, shard_bytes=SHARD)
    with pytest.raises(ValueError, match=r"finished with another shard_bytes; .* --overwrite"):
        build_shards(llava, out, shard_bytes=2 * SHARD)
    lines = llava.read_text().splitlines(keepends=True)
    llava.write_text("".join(lines[:20]))
    with pytest.raises(ValueError, match=r"another state of SOURCE; .* --overwrite"):
        build_shards(llava, out, shard_bytes=SHARD)
    build_shards(llava, out, name="other", shard_bytes=SHARD, overwrite=True)
    assert len(read_all(out)) == 20
    assert all(path.name.startswith("other-") for path in out.glob("*.tar"))


def test_a_replacement_that_was_stopped_goes_on(llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    build_shards(llava, out, shard_bytes=SHARD)
    before = contents(out)
    (tmp_path / "pictures" / "0.jpeg").write_bytes(picture(99))  # not seen in the settings
    write = build.write_shard

    def stopped(samples: Iterable[Sample], path: Path) -> None:
        if path.name == "llava-000002.tar":
            raise KeyboardInterrupt
        write(samples, path)

    monkeypatch.setattr(build, "write_shard", stopped)
    with pytest.raises(KeyboardInterrupt):
        build_shards(llava, out, shard_bytes=SHARD, overwrite=True)
    assert {path.name: path.read_bytes() for path in out.glob("*.tar")}.items() <= before.items()
    monkeypatch.undo()
    assert build_shards(llava, out, shard_bytes=SHARD).found_done == 2
    assert read_all(out)[0].images == (picture(99),)


def test_shards_of_others_are_not_touched(llava: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "llava-000007.tar").write_bytes(b"precious")
    with pytest.raises(ValueError, match=r"llava-000007\.tar of an unknown build; .*--overwrite"):
        build_shards(llava, out)
    assert (out / "llava-000007.tar").read_bytes() == b"precious"


def test_a_full_disk(llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = build.write_shard
    written: list[Path] = []

    def full(samples: Iterable[Sample], path: Path) -> None:
        if len(written) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(path)
        write(samples, path)

    out = tmp_path / "out"
    monkeypatch.setattr(build, "write_shard", full)
    with pytest.raises(ValueError, match=f"disk of OUT {out} is full; free some space and run the same command again"):
        build_shards(llava, out, shard_bytes=SHARD)
    assert [path.name for path in out.iterdir()] == [".partial"]
    monkeypatch.undo()
    assert build_shards(llava, out, shard_bytes=SHARD).found_done == 3
    assert len(read_all(out)) == 60


def test_two_builds_at_once(llava: Path, tmp_path: Path) -> None:
    def second(phase: str, done: int, total: int | None) -> None:
        with pytest.raises(ValueError, match="another build is writing"):
            build_shards(llava, tmp_path / "out")

    build_shards(llava, tmp_path / "out", report=second)
