"""What watches a run."""

import signal
from types import SimpleNamespace

import pytest

from kimivl.callbacks import Preemption, Throughput
from kimivl.config import Interrupted


def test_throughput_counts_the_time_of_steps_only(monkeypatch):
    now, logged = [0.0], {}
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    trainer = SimpleNamespace(world_size=2)
    module = SimpleNamespace(log=lambda name, value, **_: logged.__setitem__(name, value))
    throughput = Throughput(window=1)
    for _ in range(3):
        throughput.on_train_batch_start(trainer)
        now[0] += 0.5
        throughput.on_train_batch_end(trainer, module, None, SimpleNamespace(num_tokens=100), 0)
        now[0] += 10  # an evaluation in between
    assert logged == {"perf/tokens_per_s": pytest.approx(400), "perf/step_s": 0.5}


@pytest.fixture
def preemption():
    callback = Preemption("last.ckpt")
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    callback.on_train_start(None, None)
    yield callback
    callback.on_exception(None, None, RuntimeError())
    assert {number: signal.getsignal(number) for number in before} == before


def test_a_signal_is_only_remembered(preemption):
    signal.raise_signal(signal.SIGTERM)
    assert preemption.received == signal.SIGTERM


def test_a_second_ctrl_c_stops_at_once(preemption, capsys):
    signal.raise_signal(signal.SIGINT)
    assert "stopping when this step is done" in capsys.readouterr().err
    with pytest.raises(Interrupted, match="stopped at once"):
        signal.raise_signal(signal.SIGINT)


def test_rollouts_are_left_at_once(preemption):
    preemption.on_rollouts_start()
    with pytest.raises(Interrupted, match="the rollouts so far are kept"):
        signal.raise_signal(signal.SIGUSR1)
    preemption.on_rollouts_end()
    signal.raise_signal(signal.SIGUSR1)  # after them it is only remembered
