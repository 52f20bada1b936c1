"""What starts the ranks of a run on this machine, with small scripts in the place of training."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kimivl.runtime import signals, spawn

PREAMBLE = "import os, signal, sys, time\nrank = int(os.environ['RANK'])\n"


@pytest.fixture
def start(tmp_path):
    """Start ranks that run a script; ``files`` are in the folder they run in."""

    def started(script: str, ranks: int = 2, begins: Callable[[], None] | None = None) -> subprocess.Popen:
        (tmp_path / "script.py").write_text(PREAMBLE + textwrap.dedent(script))
        command = [sys.executable, "-P", spawn.__file__, str(ranks), "script.py", "word"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=tmp_path, start_new_session=True, preexec_fn=begins, **pipes)

    return started


def until(path: Path) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.02)


def test_ranks_have_torchruns_variables_and_rank_0_the_socket(start):
    process = start(
        """
        import socket
        names = "LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_RANK MASTER_ADDR"
        words = [str(rank), *(os.environ[name] for name in names.split()), sys.argv[1]]
        os.write(1, (" ".join(words) + "\\n").encode())  # in one piece
        if rank == 0:
            listener = socket.socket(fileno=int(os.environ["KIMIVL_STORE"]))
            assert listener.getsockname() == ("127.0.0.1", int(os.environ["MASTER_PORT"]))
            listener.accept()[0].send(b"welcome")
        else:
            assert os.environ["KIMIVL_STORE"] == ""
            there = socket.create_connection(("127.0.0.1", int(os.environ["MASTER_PORT"])))
            assert there.recv(7) == b"welcome"
        """
    )
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    assert sorted(out.splitlines()) == ["0 0 2 2 0 127.0.0.1 word", "1 1 2 2 0 127.0.0.1 word"]


def test_a_signal_before_there_are_ranks_waits_for_them(start):
    process = start(
        """
        signal.signal(signal.SIGUSR2, lambda *_: sys.exit(3))
        time.sleep(0.2)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR2])
        time.sleep(120)
        """,
        begins=signals.hold,
    )
    process.send_signal(signal.SIGUSR2)
    assert (process.wait(120), process.communicate()[1]) == (3, "")


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2"])
def test_a_signal_reaches_every_rank_once_and_the_exit_code_comes_back(start, tmp_path, number):
    process = start(
        f"""
        got = []
        signal.signal(signal.{number}, lambda *_: got.append(1))
        time.sleep(0.5)  # until what started it listens as well
        open(f"ready{{rank}}", "w").close()
        while not got:
            time.sleep(0.01)
        time.sleep(0.5)  # "saving"; a second signal would be seen
        open(f"{{len(got)}}-{{rank}}", "w").close()
        sys.exit(0 if rank else 130)
        """
    )
    for rank in (0, 1):
        until(tmp_path / f"ready{rank}")
    os.killpg(process.pid, getattr(signal, number))  # the whole job of a terminal, as Ctrl-C does
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out, err) == (130, "", "")
    assert (tmp_path / "1-0").exists() and (tmp_path / "1-1").exists()


def test_a_rank_that_is_killed_is_named_and_ends_the_others(start, monkeypatch):
    script = """
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)
        """
    monkeypatch.setattr(spawn, "GRACE", 0.3)
    pid = os.fork()  # in this interpreter, for the shorter patience
    if pid == 0:
        os._exit(_main_of(script))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 137
    process = start("sys.exit(3 if rank == 1 else 0)")
    assert process.communicate(timeout=120) == ("", "") and process.returncode == 3


def _main_of(script: str) -> int:
    os.chdir(os.environ.get("TMPDIR", "/tmp"))
    path = Path(f"spawned-{os.getpid()}.py")
    path.write_text(PREAMBLE + textwrap.dedent(script))
    try:
        return spawn.main(["2", str(path)])
    finally:
        path.unlink()


def test_a_killed_rank_is_named(start):
    process = start("os.kill(os.getpid(), signal.SIGKILL) if rank == 1 else None")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 137 and err.count("\n") == 2
    assert "error: rank 1 was ended by SIGKILL (the system does that when memory runs out); the same command" in err


def test_ranks_do_not_outlive_what_started_them(start, tmp_path):
    process = start(
        """
        def stop(*_):
            open(f"saved{rank}", "w").close()
            sys.exit(0)
        signal.signal(signal.SIGTERM, stop)
        open(f"ready{rank}", "w").close()
        time.sleep(60)
        """
    )
    for rank in (0, 1):
        until(tmp_path / f"ready{rank}")
    process.kill()
    for rank in (0, 1):
        until(tmp_path / f"saved{rank}")
