"""No answer can stop a run, end it, or cost more than its timeout, and no worker outlives its parent."""

import copy
import math
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from rl_misbehaving import HangsWhileStarting, UnableToStart, misbehave

import kimivl.rl.workers as workers_module
from kimivl.rl.verifiers import Mathematics
from kimivl.rl.verifiers.worker import Case
from kimivl.rl.workers import VerifierPool

TIMEOUT = 1.5
ROOT = Path(__file__).parents[2]


@pytest.fixture
def pool():
    pool = VerifierPool(misbehave, workers=2, timeout=TIMEOUT)
    yield pool
    pool.close()


def judged(pool: VerifierPool, *texts: str) -> list[float | str]:
    """The mark or the reason of the failure, for each text."""
    return [verdict.failure or verdict.correct for verdict in pool.judge([Case(text, "right") for text in texts])]


def test_every_way_to_fail_is_counted_under_its_reason_and_the_others_are_judged(pool):
    said = judged(pool, "right", "segfault", "wrong", "exit", "kill", "memory", "raise", "nonsense", "nan", "print")
    assert said == [1.0, "crash", 0.0, "crash", "crash", "memory", "error", "error", "error", 0.0]
    assert judged(pool, "right", "sys.exit", "wrong") == [1.0, "crash", 0.0]


@pytest.mark.parametrize("text", ["sleep", "hang in C", "swallow"])
def test_a_hanging_verifier_costs_its_timeout_once(pool, text):
    judged(pool, "right")
    started = time.monotonic()
    assert judged(pool, text, *["right", "wrong"] * 10, text) == ["timeout", *[1.0, 0.0] * 10, "timeout"]
    assert TIMEOUT <= time.monotonic() - started < TIMEOUT + 10  # and the start of another worker
    started = time.monotonic()
    assert judged(pool, text, "right") == ["timeout", 1.0]
    assert time.monotonic() - started < TIMEOUT, "the pair is known, and not tried again"


def test_a_failed_answer_is_asked_once_in_a_run(pool, tmp_path):
    text = f"count {tmp_path / 'calls'}"
    assert judged(pool, text, text) == ["timeout", "timeout"]
    assert judged(pool, text) == ["timeout"]
    assert (tmp_path / "calls").read_text() == "called\n"


def test_the_detail_says_what_happened(pool):
    verdicts = pool.judge([Case(text, "") for text in ("segfault", "exit", "raise", "sleep")])
    assert [verdict.detail for verdict in verdicts] == [
        "it was ended by signal 11",
        "it left with exit code 3",
        "KeyError: 'no such thing'",
        f"longer than {TIMEOUT:g} s",
    ]
    assert all(math.isnan(verdict.correct) for verdict in verdicts)


def test_a_worker_that_died_while_idle_is_replaced_and_no_answer_is_blamed(pool):
    assert judged(pool, "right", "wrong") == [1.0, 0.0]
    for worker in pool._pool:
        os.kill(worker.process.pid, signal.SIGKILL)
        worker.process.wait()
    assert judged(pool, "right", "wrong", "other") == [1.0, 0.0, 0.0]


def test_without_workers_an_error_is_counted_too():
    pool = VerifierPool(misbehave)
    assert judged(pool, "right", "raise", "nonsense") == [1.0, "error", "error"]
    assert pool._pool == []


def test_nothing_starts_before_it_is_needed():
    pool = VerifierPool(Mathematics(), workers=2)
    assert judged(pool, "right", "\\boxed{right}") == [1.0, 1.0]
    assert pool.judge([]) == []
    assert pool._pool == []


def test_a_verifier_that_cannot_start_says_why(monkeypatch):
    with pytest.raises(ValueError, match="ImportError: some package is missing.*reward.workers=0"):
        judged(VerifierPool(UnableToStart(), workers=2), "x")
    with pytest.raises(ValueError, match="define it at the top of a module"):
        judged(VerifierPool(lambda text, expected: True, workers=1), "x")
    monkeypatch.setattr(workers_module, "START_S", 0.5)
    with pytest.raises(ValueError, match="it said nothing"):
        judged(VerifierPool(HangsWhileStarting(), workers=1), "x")


def test_a_pool_whose_workers_no_longer_start_keeps_what_it_has(pool, monkeypatch):
    assert judged(pool, "right") == [1.0]
    monkeypatch.setattr(workers_module, "_COMMAND", "import sys; sys.exit(1)  # {path} {handle}")
    said = judged(pool, "exit", "right", "kill", "wrong")
    assert set(said) <= {"crash", 1.0, 0.0} and said[0] == "crash"
    assert len(said) == 4


def test_a_case_that_nobody_could_judge_is_tried_again(pool, monkeypatch):
    assert judged(pool, "right") == [1.0]
    with monkeypatch.context() as broken:
        broken.setattr(workers_module, "_COMMAND", "import sys; sys.exit(1)  # {path} {handle}")
        said = judged(pool, "exit", "kill", "wrong", "other")
        assert said.count("crash") >= 2
    assert judged(pool, "wrong", "other") == [0.0, 0.0]


def test_a_process_that_cannot_be_made_costs_no_answer_while_another_works(monkeypatch):
    pool = VerifierPool(misbehave, workers=1, timeout=TIMEOUT)
    assert judged(pool, "right") == [1.0]
    tries = []

    def no_process(*args, **settings):
        tries.append(1)
        raise OSError("Cannot allocate memory")

    monkeypatch.setattr(workers_module.subprocess, "Popen", no_process)
    pool.workers = 2
    assert judged(pool, *(f"other {number}" for number in range(40))) == [0.0] * 40
    assert 1 <= len(tries) <= workers_module.ATTEMPTS
    pool.close()
    with pytest.raises(ValueError, match="OSError: Cannot allocate memory"):
        judged(VerifierPool(misbehave, workers=1), "x")


def test_what_a_verifier_has_started_ends_with_it(pool, tmp_path):
    assert judged(pool, f"child {tmp_path / 'pid'}") == ["timeout"]
    assert_gone([int((tmp_path / "pid").read_text())], 6)


def test_to_close_waits_for_what_another_thread_asked(pool):
    judged(pool, "right")
    said: list[float | str] = []
    thread = threading.Thread(target=lambda: said.extend(judged(pool, "slow", "right")))
    thread.start()
    time.sleep(0.3)
    pool.close()
    assert pool._pool == []
    thread.join(30)
    assert said == [0.0, 1.0]


def test_a_copy_has_workers_of_its_own(pool):
    judged(pool, "right")
    other = copy.deepcopy(pool)
    assert other._pool == [] and other.timeout == TIMEOUT


def test_bad_settings_name_the_keys():
    for setting in ({"workers": -1}, {"timeout": 0}, {"memory_gb": 0}):
        with pytest.raises(ValueError, match="workers >= 0, timeout > 0 and memory_gb > 0"):
            VerifierPool(misbehave, **setting)


def run_script(body: str) -> subprocess.Popen:
    """A parent process in a session of its own, whose output is the process ids of its workers."""
    head = """
        import os, sys, time, threading
        sys.path[:0] = [{tests!r}]
        from rl_misbehaving import misbehave
        from kimivl.rl.verifiers.worker import Case
        from kimivl.rl.workers import VerifierPool
        pool = VerifierPool(misbehave, workers=2, timeout=2)
        pool.judge([Case("right", ""), Case("wrong", "")])
        print(*[worker.process.pid for worker in pool._pool], flush=True)
        hang = [Case("hang in C", ""), Case("sleep", "")]
    """
    script = textwrap.dedent(head).format(tests=str(ROOT / "tests")) + textwrap.dedent(body)
    return subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    )


def assert_gone(pids: list[int], within: float) -> None:
    deadline = time.monotonic() + within
    while left := [pid for pid in pids if _is_running(pid)]:
        assert time.monotonic() < deadline, f"still running: {left}"
        time.sleep(0.1)


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_the_interpreter_ends_while_workers_wait_or_hang():
    parent = run_script("threading.Thread(target=pool.judge, args=(hang,), daemon=True).start(); time.sleep(1)")
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert parent.wait(60) == 0
    assert len(pids) == 2
    assert_gone(pids, 6)


@pytest.mark.slow
def test_workers_end_when_their_parent_is_killed():
    parent = run_script("pool.judge(hang)")
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    time.sleep(0.5)
    parent.kill()
    parent.wait(10)
    assert_gone(pids, 2 + 5 + 5)  # a hang in C is ended by the worker's own alarm


def test_ctrl_c_ends_the_judging_and_its_workers():
    parent = run_script("""
        import signal
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell runs in the background
        try:
            # By itself: from here it could come before the judging, or after its timeout.
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
            pool.judge(hang)
        except KeyboardInterrupt:
            print([verdict.correct for verdict in pool.judge([Case("right", "right")])], flush=True)
    """)
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert parent.stdout.readline().strip() == "[1.0]"
    assert parent.wait(60) == 0
    assert_gone(pids, 6)


def test_a_worker_imports_no_torch_and_does_not_run_the_main_file(tmp_path):
    main = tmp_path / "main.py"
    main.write_text(
        textwrap.dedent(f"""
        print("main runs")
        import sys
        sys.path[:0] = [{str(ROOT / "tests")!r}]
        from rl_heavy import has_torch
        from kimivl.rl.verifiers.worker import Case
        from kimivl.rl.workers import VerifierPool
        print(VerifierPool(has_torch, workers=1).judge([Case("", "")])[0].correct)
        """)
    )
    run = subprocess.run([sys.executable, main], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.stdout.split("\n")[:2] == ["main runs", "0.0"], run.stderr
