"""One run at a time in a folder."""

import fcntl
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from kimivl.runtime.lock import LOCK_FILE, is_alive, only_run_in

HOLD = """
import os, sys, time
from pathlib import Path
from kimivl.runtime.lock import only_run_in
with only_run_in(Path(sys.argv[1])):
    if os.fork() == 0:  # as a loader worker: it has no part in the lock
        time.sleep(60)
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_a_second_run_is_refused_while_the_first_lives(holder, tmp_path):
    message = f"in use by process {holder.pid} on .*paths.output_dir=FOLDER"
    with pytest.raises(ValueError, match=message), only_run_in(tmp_path, patience=0.0):
        pass
    os.kill(holder.pid, signal.SIGKILL)  # its children live on
    with only_run_in(tmp_path):
        assert str(os.getpid()) in (tmp_path / LOCK_FILE).read_text()


def test_the_lock_is_given_back(tmp_path):
    for _ in range(2):
        with only_run_in(tmp_path / "run", patience=0.0):
            pass
    again = (
        "import sys, pathlib\n"
        "from kimivl.runtime.lock import only_run_in\n"
        "with only_run_in(pathlib.Path(sys.argv[1]), 0): pass"
    )
    subprocess.run([sys.executable, "-c", again, tmp_path / "run"], check=True)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / LOCK_FILE).mkdir()
    message = f"{LOCK_FILE} cannot be written .Is a directory.: .*paths.output_dir=FOLDER"
    with pytest.raises(ValueError, match=message), only_run_in(tmp_path):
        pass


def test_a_file_system_without_locks_is_said_and_used(tmp_path, monkeypatch, caplog):
    def refuse(*args: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with only_run_in(tmp_path):
        assert "see to it yourself that no second run" in caplog.text


@pytest.fixture
def of_another_user():
    """A folder, and a function that takes this process its rights on a file there: all but reading, or all."""
    with tempfile.TemporaryDirectory() as folder:  # not tmp_path, where another user does not even get to
        Path(folder).chmod(0o755)

        def leave(file: Path, readable: bool) -> None:
            if os.geteuid() == 0:
                file.chmod(0o644 if readable else 0o600)
                os.seteuid(65534)
            else:
                file.chmod(0o400 if readable else 0)

        root = os.geteuid()
        yield Path(folder), leave
        os.seteuid(root)


@pytest.mark.parametrize(("readable", "held", "alive"), [(True, True, True), (True, False, False), (False, True, None)])
def test_whether_a_run_of_another_user_is_alive(of_another_user, readable, held, alive):
    """Its lock can be tried by whoever can read it; where that is not allowed, nothing is known."""
    folder, leave = of_another_user
    lock = folder / ".lock"
    hold = f"import fcntl; f = open({str(lock)!r}, 'w'); {held} and fcntl.lockf(f, fcntl.LOCK_EX); print(); input()"
    with subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        leave(lock, readable)
        try:
            assert is_alive(folder) is alive
        finally:
            process.communicate(b"\n")
