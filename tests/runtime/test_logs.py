"""Log lines of several ranks."""

import io
import logging

import pytest

from kimivl.runtime.logs import Console, RunFile


@pytest.mark.parametrize("rank", ["0", "1"])
def test_rank_0_logs_and_the_others_warn(tmp_path, monkeypatch, rank):
    for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    stream, logger = io.StringIO(), logging.getLogger(f"rank {rank}")
    logger.setLevel(logging.INFO)
    logger.handlers = [Console(stream), RunFile(str(tmp_path / "train.log"))]
    logger.info("all is well")
    logger.warning("a disk is slow")
    file = tmp_path / "train.log"
    if rank == "0":
        assert stream.getvalue() == file.read_text() == "all is well\na disk is slow\n"
    else:
        assert stream.getvalue() == "[rank 1] a disk is slow\n" and not file.exists()


def test_a_full_disk_is_said_once(monkeypatch, capsys):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    file = RunFile("/dev/full")
    for line in ("one", "two"):
        file.handle(logging.makeLogRecord({"msg": line}))
    assert capsys.readouterr().err == "\n/dev/full lacks lines from here on: No space left on device\n"
