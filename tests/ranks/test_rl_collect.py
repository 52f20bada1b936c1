"""Ranks that collect together have what one process has, and leave together when one of them must."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from fake_rollouts import SET, FakeEngine, SumReward, read, same
from in_ranks import in_ranks

from kimivl.config import Interrupted
from kimivl.rl.advantages import advantages
from kimivl.rl.collect import Collected, Collector, Plan
from kimivl.rl.gates import Gates
from kimivl.rl.sampler import ProblemSampler
from kimivl.rl.types import Sampling
from kimivl.runtime import ranks


@dataclass
class Setting:
    """A run of some iterations; ``engine`` for each rank."""

    plan: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    unreadable: tuple[int, ...] = ()
    iterations: int = 3
    gates: bool = False
    broken: int = -1


SETTINGS = {
    "plain": Setting(),
    "rounds": Setting({"rounds": 4, "responses": 2}, gates=True),
    "partial": Setting({"budget": 4}, {"mean": 12}, iterations=6),
    "partial, with rounds": Setting({"budget": 3, "rounds": 3, "responses": 2}, {"mean": 12}, gates=True),
    "a verifier that fails": Setting(broken=3),
    "no log-probabilities": Setting(engine={"logp": False}),
    "unreadable": Setting(unreadable=(3, 11, 17, 18, 30)),
    "fewer groups than ranks": Setting({"problems": 1}),
}


def collector(setting: Setting, rollouts: Path | None = None) -> Collector:
    def readable(numbers):
        return [problem for problem in read(numbers) if problem.number not in setting.unreadable]

    plan = Plan(**({"problems": 8, "responses": 4, "seed": 5} | setting.plan))
    sampler = ProblemSampler(SET, seed=3, priority="variance", gates=Gates(zero_advantage=setting.gates))
    return Collector(sampler, readable, Sampling(40), advantages, plan, rollouts)


def collected(settings: dict[str, Setting], folder: Path) -> dict[str, tuple[list[Collected], list[int], list[Any]]]:
    """Of each setting: what was collected, the problems whose responses this rank drew, and the lines written."""
    found = {}
    for name, setting in settings.items():
        rollouts = folder / name.replace(" ", "_")
        maker, engine = collector(setting, rollouts), FakeEngine(**setting.engine)
        reward = SumReward(setting.broken)
        all_of = [maker.collect(engine, reward, number, number / 10) for number in range(setting.iterations)]
        ranks.gather(None)  # the lines of the last iteration are there
        lines = [path.read_text() for path in sorted(rollouts.glob("*.jsonl"))]
        found[name] = (all_of, [request.problem.number for request in engine.requests], lines)
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """By one process, by each of two ranks, and by each of three."""
    folder = tmp_path_factory.mktemp("rollouts")
    few = {name: SETTINGS[name] for name in ("partial, with rounds", "fewer groups than ranks")}
    two = in_ranks(collected, SETTINGS, folder / "2")
    return collected(SETTINGS, folder / "1"), two, in_ranks(collected, few, folder / "3", ranks=3)


def is_same(one: Collected, other: Collected) -> bool:
    def of_work(name: str) -> bool:
        return name.startswith("perf/")

    figures = [{name: value for name, value in made.figures.items() if not of_work(name)} for made in (one, other)]
    assert figures[0] == pytest.approx(figures[1], nan_ok=True)
    assert repr(one.state) == repr(other.state)
    return same(one.experience, other.experience)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_iterations_of_several_ranks_are_those_of_one(runs, name):
    alone, several = runs[0][name], [rank[name] for of in runs[1:] for rank in of if name in rank]
    for made, _, lines in several:
        assert all(is_same(*pair) for pair in zip(made, alone[0], strict=True))
        assert lines == alone[2] and len(lines) == SETTINGS[name].iterations
    for of in runs[1:]:  # each response is drawn once, on one rank
        asked = sorted(number for rank in of if name in rank for number in rank[name][1])
        assert not asked or asked == sorted(alone[1])


def test_each_rank_answers_about_as_much(runs):
    first, second = (len(rank["plain"][1]) for rank in runs[1])
    assert first == second == 3 * 8 * 4 / 2
    first, second = (set(rank["plain"][1]) for rank in runs[1])
    assert first and second and all(found.figures["perf/rollout_balance"] <= 1 for found in runs[1][0]["plain"][0])
    for found, alone in zip(runs[1][0]["plain"][0], runs[0]["plain"][0], strict=True):
        assert len(found.problems) == len(alone.problems) / 2  # read by the rank that had them answered


# When one of them must leave.


class SlowEngine(FakeEngine):
    """On one rank it fails, or is told to stop, after some responses; on the others it takes its time."""

    def __init__(self, error: BaseException | None, slow: float = 0.1, at: int = 3) -> None:
        super().__init__()
        self.error, self.slow, self.at = error, slow, at

    def stream(self, requests, sampling):
        for given, found in enumerate(super().stream(requests, sampling)):
            if self.error is not None and given == self.at:
                raise self.error
            time.sleep(0 if self.error is not None else self.slow)
            yield found


class LongResponses(FakeEngine):
    """It gives nothing for a minute, but polls meanwhile, as engines do that draw long responses."""

    def stream(self, requests, sampling):
        for _ in range(600):
            self.poll()
            time.sleep(0.1)
        yield from super().stream(requests, sampling)


def leave(folder: Path, error: BaseException, which: int, long: bool = False) -> dict[str, Any]:
    """Collect with an engine that ends by ``error`` on rank ``which``; how it went here."""
    own = ranks.rank() == which
    engine = LongResponses() if long and not own else SlowEngine(error if own else None, slow=0.5)
    started = time.monotonic()
    try:
        collector(Setting(), folder).collect(engine, SumReward(), 0, 0.0, policy=lambda: "a")
    except BaseException as raised:
        left = {"kind": type(raised).__name__, "said": str(raised)}
    return left | {"seconds": time.monotonic() - started, "drawn": min(len(engine.requests), 3 if own else 32)}


ENDS = {
    "engine": (RuntimeError("the engine is gone"), "ValueError", "PeerFailed"),
    "signal": (Interrupted("kept"), "Interrupted", "Interrupted"),
    "Ctrl-C": (KeyboardInterrupt("by hand"), "KeyboardInterrupt", "KeyboardInterrupt"),
}


def leave_again_and_again(folder: Path) -> dict[str, dict[str, Any]]:
    left = {name: leave(folder / name, error, 1) for name, (error, *_) in ENDS.items()}
    return left | {"long": leave(folder / "long", Interrupted("kept"), 0, long=True)}


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ends")
    return folder, in_ranks(leave_again_and_again, folder)


@pytest.mark.parametrize("name", ENDS)
def test_all_leave_at_once_with_what_they_have(ends, name):
    error, own, others = ENDS[name]
    found = [rank[name] for rank in ends[1]]
    assert [rank["kind"] for rank in found] == [others, own]
    assert str(error) in found[0]["said"] and (others != "PeerFailed" or "rank 1: " in found[0]["said"])
    assert 1 <= found[0]["drawn"] < 16 and found[1]["drawn"] == 3  # rank 0 has not drawn all of its share
    # One process goes on with what both have drawn, and asks for nothing twice.
    engine = FakeEngine()
    again = collector(Setting(), ends[0] / name).collect(engine, SumReward(), 0, 0.0, policy=lambda: "a")
    assert len(engine.requests) == 32 - sum(rank["drawn"] for rank in found)
    assert same(again.experience, collector(Setting()).collect(FakeEngine(), SumReward(), 0, 0.0).experience)


def test_a_rank_in_the_middle_of_a_long_response_leaves(ends):
    found = [rank["long"] for rank in ends[1]]
    assert [rank["kind"] for rank in found] == ["Interrupted"] * 2
    assert max(rank["seconds"] for rank in found) < 30  # the response alone would have taken a minute


def interrupted_again_and_again(folder: Path) -> list[int]:
    """Three attempts that end after some responses, each rank in turn; then one that does not."""
    drawn = []
    for which in (0, 1, 0):
        drawn.append(leave(folder, RuntimeError("gone"), which)["drawn"])
    engine = FakeEngine()
    collector(Setting(), folder).collect(engine, SumReward(), 0, 0.0, policy=lambda: "a")
    return [*drawn, len(engine.requests)]


def test_files_of_ranks_and_of_attempts_do_not_collide(tmp_path):
    found = in_ranks(interrupted_again_and_again, tmp_path)
    assert sum(map(sum, found)) == 32
    assert len(list((tmp_path / "000000.partial").iterdir())) >= 5


def failing_parts(folder: Path) -> list[tuple[str, str]]:
    """Failures other than the engine's, on one rank each; how each went here."""

    def judge(groups, progress):
        raise ZeroDivisionError("division by zero")

    def unread(numbers):
        raise ValueError("too many problems could not be read")

    here = ranks.rank() == 1
    left = []
    for part in ("reward", "read", "disk", "policy"):
        maker, reward = collector(Setting(), folder / part), SumReward()
        if part == "reward" and here:
            reward.score = judge
        if part == "read" and here:
            maker.read = unread
        if part == "disk" and ranks.is_first():
            (folder / "disk").write_text("a file where the folder should be")
        try:
            maker.collect(FakeEngine(), reward, 0, 0.0, policy=lambda: "a")
        except Exception as raised:
            left.append((type(raised).__name__, str(raised)))
    return left


def test_whatever_fails_on_one_rank_fails_on_all(tmp_path):
    first, second = in_ranks(failing_parts, tmp_path)
    assert first[:2] == [
        ("PeerFailed", "rank 1: ZeroDivisionError: division by zero"),
        ("PeerFailed", "rank 1: too many problems could not be read"),
    ]
    assert second[0] == ("ValueError", "ZeroDivisionError: division by zero")
    assert len(first) == len(second) == 3  # the disk too, and the last one works


def another_policy(folder: Path) -> list[int]:
    leave(folder, RuntimeError("gone"), 0)
    engine = FakeEngine()
    collector(Setting(), folder).collect(engine, SumReward(), 0, 0.0, policy=lambda: "b")
    return [len(engine.requests), len(list((folder / "000000.partial").iterdir()))]


def test_responses_of_another_policy_are_removed_by_all(tmp_path):
    assert in_ranks(another_policy, tmp_path) == [[16, 2], [16, 2]]


def waiting_rank(folder: Path) -> tuple[str, float]:
    """Rank 0 is done long before rank 1, which is told to stop only then."""
    engine = SlowEngine(None, slow=0)
    if ranks.rank() == 1:
        engine = SlowEngine(Interrupted("kept"))
        engine.answer = lambda request, sampling: time.sleep(0.5) or FakeEngine.answer(engine, request, sampling)
    started = time.monotonic()
    try:
        collector(Setting(), folder).collect(engine, SumReward(), 0, 0.0, policy=lambda: "a")
    except Interrupted:
        return "Interrupted", time.monotonic() - started
    return "", 0.0


def test_a_rank_that_waits_for_the_others_leaves_with_them(tmp_path):
    found = in_ranks(waiting_rank, tmp_path)
    assert [kind for kind, _ in found] == ["Interrupted"] * 2


def silent(folder: Path) -> str:
    import kimivl.rl.exchange as exchange

    exchange.SILENT_S = 1.0
    engine = FakeEngine()
    if ranks.rank() == 1:
        engine.answer = lambda request, sampling: time.sleep(4) or FakeEngine.answer(engine, request, sampling)
    try:
        collector(Setting({"problems": 2, "responses": 2}), folder).collect(engine, SumReward(), 0, 0.0)
    except ValueError as error:
        return str(error)
    return ""


def test_a_rank_that_gives_no_sign_of_life_is_named(tmp_path):
    first, second = in_ranks(silent, tmp_path)
    assert "rank 1 has given no sign of life for 1 s" in first and "rank 0: rank 1 has given no sign" in second
