"""The audit proves what was trained: kills and resumes leave it whole, and no change to the deliveries escapes it."""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_run import MAX_LENGTH, MAX_PATCHES, SimulatedRun, StandInIndex, make_pack, make_plan

from kimivl.data.audit.delivery import DeliveryLog, History, next_attempt
from kimivl.data.audit.epochs import SCHEMA, write_epoch_audit
from kimivl.data.audit.report import run_audit
from kimivl.data.audit.verify import verify
from kimivl.data.mixture import Uses


@pytest.fixture
def run(tmp_path: Path) -> SimulatedRun:
    return SimulatedRun(tmp_path)


def rows_of(run: SimulatedRun, epoch: int = 0) -> dict[str, list]:
    return pq.read_table(run.folder / f"epoch-{epoch:03d}.parquet").to_pydict()


def edit_log(path: Path, change) -> None:
    """Rewrite a log file after ``change`` of the list of its rows, one record batch per row."""
    with pa.OSFile(str(path)) as source, pa.ipc.open_stream(source) as reader:
        table = reader.read_all()
    rows = table.to_pylist()
    change(rows)
    with path.open("wb") as file:
        file.write(table.schema.serialize())
        for row in rows:
            file.write(pa.RecordBatch.from_pylist([row], table.schema).serialize())


# What a run leaves


def test_an_undisturbed_run_is_verified(run):
    run.train(ranks=2)
    run.write_audits()
    report = verify(run.run_dir)
    assert report.verified, report.all_problems
    figures = report.epochs[0].figures
    assert figures.planned == figures.trained == len(run.index) and report.epochs[0].steps == run.steps
    assert figures.tokens == run.index.tokens.sum()
    assert figures.efficiency == pytest.approx(run.index.tokens.sum() / (len(run.plans[0]) * MAX_LENGTH))
    assert sum(count.sum() for count in figures.lengths.values()) == len(run.index)
    assert {share.name: share.samples for share in figures.sources} == dict(
        zip(run.index.sources, np.bincount(run.index.source).tolist(), strict=True)
    )


def test_rows_say_where_each_sample_went(run):
    run.train(ranks=2)
    run.write_audits()
    rows, plan = rows_of(run), run.plans[0]
    assert rows["sample"] == list(range(60)) and set(rows["status"]) == {"trained"}
    assert rows["key"] == [run.index.key(number) for number in range(60)]
    assert rows["source"] == [run.index.sources[code] for code in run.index.source]
    for sample, pack, rank, step in zip(rows["sample"], rows["pack"], rows["rank"], rows["step"], strict=True):
        assert sample in plan.pack(pack)
        assert (rank, step) == (pack % run.packs_per_step % 2, pack // run.packs_per_step + 1)
    for name in ("tokens", "patches", "targets"):
        assert rows[name] == getattr(run.index, name).tolist()


def test_a_mixture_has_a_row_for_each_use(tmp_path):
    uses = np.array([2, 0, 1, 3] * 10, np.uint8)
    run = SimulatedRun(tmp_path, count=40, uses=uses)
    run.train()
    run.write_audits()
    assert verify(tmp_path).verified
    rows = rows_of(run)
    assert np.bincount(rows["sample"]).tolist() == np.maximum(uses, 1).tolist()
    assert verify(tmp_path).epochs[0].figures.left_out == {"not_drawn": 10}


def test_holes_are_quarantined_under_their_reason(tmp_path):
    run = SimulatedRun(tmp_path, holes=[7, 30])
    run.train(ranks=2)
    run.write_audits()
    report = verify(tmp_path)
    assert report.verified and report.epochs[0].figures.quarantined == {"bad_image": 2}
    assert report.epochs[0].figures.trained == 58
    lines = [json.loads(line) for line in (run.folder / "quarantine.jsonl").read_text().splitlines()]
    assert {line["sample"] for line in lines} == {7, 30}
    rows = rows_of(run)
    for line in lines:
        row = rows["sample"].index(line["sample"])
        assert rows["status"][row] == line["reason"] == "bad_image"
        assert (line["epoch"], line["step"], line["rank"]) == (0, rows["step"][row], rows["rank"][row])
        assert (line["key"], line["shard"], line["detail"]) == (rows["key"][row], "a.tar", "torn")


@pytest.mark.parametrize("moved", [False, True])
def test_what_does_not_fit_is_named_by_its_limit(run, moved):
    run.index.tokens[5], run.index.patches[6] = 200, 500
    uses = run.uses.copy()
    uses[[5, 6, 7]] = 0
    run.plans = [make_plan(uses, run.packs_per_step)]
    run.train()
    # Limits are the epoch's business: the uses that come from the mixture still count a sample that does not fit.
    counted = run.uses.copy()
    counted[7] = 0
    counted[[5, 6]] = 0 if moved else 1
    away = np.zeros_like(counted)
    away[[5, 6]] = moved
    planned = Uses(counted, away)
    write_epoch_audit(run.folder, 0, run.index, planned, run.plans[0], max_length=MAX_LENGTH, max_patches=MAX_PATCHES)
    figures = verify(run.run_dir).epochs[0].figures
    assert figures.left_out == {"not_drawn": 1} | ({"moved": 2} if moved else {"too_long": 1, "too_many_patches": 1})
    assert figures.planned == figures.trained == 57


def test_an_epoch_in_progress_says_so(run):
    run.train(ranks=2, stop=3, last_rank=1)
    report = verify(run.run_dir)
    (epoch,) = report.epochs
    assert report.verified and epoch.figures is None
    assert (epoch.steps, epoch.packs) == (3, 3 * run.packs_per_step)


def test_a_torn_tail_is_read_up_to_the_last_whole_batch(tmp_path):
    log = DeliveryLog(tmp_path, attempt=0, rank=0, world_size=1, packs_per_step=1, resumed_at=0)
    sizes = [log.path.stat().st_size]
    for step in range(1, 4):
        log.write(step, 0, [make_pack(step - 1, np.array([step]))], np.ones(9, np.uint8))
        sizes.append(log.path.stat().st_size)
    log.close()
    whole = log.path.read_bytes()
    for cut in sorted({*range(0, len(whole), 17), *sizes, *(size - 1 for size in sizes), len(whole)}):
        log.path.write_bytes(whole[:cut])
        history = History(tmp_path)
        batches = [size for size in sizes[1:] if size <= cut]
        assert history.epoch(0).sample.tolist() == list(range(1, len(batches) + 1)), cut
        assert history.attempts == (cut >= sizes[0])


# Kills and resumes


@st.composite
def lives(draw: st.DrawFn) -> tuple[int, list[dict[str, int]]]:
    """(epochs, attempts): each goes on from a step that an earlier one reached; the last one reaches the end."""
    epochs = draw(st.integers(1, 2))
    steps, attempts, reached = 8 * epochs, [], 0
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, reached))
        ranks = draw(st.sampled_from([1, 2, 4]))
        stop = draw(st.integers(start, steps))
        life = {"ranks": ranks, "start": start, "stop": stop, "last_rank": draw(st.integers(0, ranks - 1))}
        attempts.append(life | {"torn": draw(st.integers(0, 200))})
        reached = stop
    attempts.append({"ranks": draw(st.sampled_from([1, 2, 4])), "start": draw(st.integers(0, reached))})
    return epochs, attempts


@settings(max_examples=40)
@given(lives())
def test_kills_resumes_and_other_ranks_leave_every_sample_used_once(tmp_path_factory, life):
    epochs, attempts = life
    run = SimulatedRun(tmp_path_factory.mktemp("run"), epochs=epochs)
    for number, attempt in enumerate(attempts):
        run.train(**attempt)
        report = verify(run.run_dir)
        if number < len(attempts) - 1 and attempt.get("stop", 0) < 8:  # no epoch has ended without its file
            assert report.verified, report.all_problems
    run.write_audits()
    report = verify(run.run_dir)
    assert report.verified, report.all_problems
    assert report.attempts == len(attempts) == next_attempt(run.folder)
    assert [epoch.steps for epoch in report.epochs] == [plan.num_steps for plan in run.plans]


def test_a_resume_from_before_a_finished_epoch_needs_a_new_file(tmp_path):
    run = SimulatedRun(tmp_path, epochs=2)
    run.train(ranks=2, stop=10)
    run.write_audits(1)
    run.train(ranks=1, start=6)
    assert not verify(tmp_path).verified  # the steps 7 and 8 were done anew, by other ranks
    run.write_audits()
    assert verify(tmp_path).verified


# What must not escape


def swap(one: dict, other: dict) -> None:
    one["sample"], other["sample"] = other["sample"], one["sample"]


CHANGES = {
    "a deleted sample": lambda rows, one, other: rows.pop(one),
    "a doubled sample": lambda rows, one, other: rows.insert(one, dict(rows[one])),
    "a sample in another's place": lambda rows, one, other: rows[one].update(sample=rows[other]["sample"]),
    "two samples swapped": lambda rows, one, other: swap(rows[one], rows[other]),
    "a sample that is not in the index": lambda rows, one, other: rows[one].update(sample=10**6),
    "a negative sample": lambda rows, one, other: rows[one].update(sample=-1),
    "another pack": lambda rows, one, other: rows[one].update(pack=rows[one]["pack"] + 1),
    "another step": lambda rows, one, other: rows[one].update(step=rows[one]["step"] + 1),
    "a step out of reach": lambda rows, one, other: rows[one].update(step=2**30),
    "a hole": lambda rows, one, other: rows[one].update(hole="bad_image"),
}


CONSISTENT = ("two samples swapped", "another pack", "a hole")
"""Changes after which the log alone may make sense: only a file made before them tells."""


@pytest.mark.parametrize("change", CHANGES)
@settings(max_examples=8)
@given(ranks=st.sampled_from([1, 2]), data=st.data())
def test_no_change_of_a_delivery_escapes(tmp_path_factory, change, ranks, data):
    run = SimulatedRun(tmp_path_factory.mktemp("run"))
    run.train(ranks=2, stop=4)
    run.train(ranks=ranks, start=3)
    run.write_audits()
    assert verify(run.run_dir).verified
    path = data.draw(st.sampled_from(sorted(run.folder.glob("deliveries-0001-*.arrows"))))

    def edit(rows):
        one = data.draw(st.integers(0, len(rows) - 1))
        elsewhere = [number for number, row in enumerate(rows) if row["pack"] != rows[one]["pack"]]
        CHANGES[change](rows, one, data.draw(st.sampled_from(elsewhere)))

    edit_log(path, edit)
    assert not verify(run.run_dir).verified
    if change not in CONSISTENT:  # a file made from what the log now says cannot hide it either
        run.write_audits()
        assert not verify(run.run_dir).verified


def test_a_step_that_was_logged_twice_is_found_in_an_epoch_in_progress(run):
    run.train(stop=3)
    path = next(run.folder.glob("*.arrows"))
    edit_log(path, lambda rows: rows.append(rows[-1]))
    assert "more often than planned" in verify(run.run_dir).all_problems[0]


def test_missing_files_are_named(tmp_path):
    run = SimulatedRun(tmp_path, epochs=2)
    run.train(ranks=2, stop=10)
    assert any("epoch-000.parquet is missing" in problem for problem in verify(tmp_path).all_problems)
    run.write_audits(1)
    assert verify(tmp_path).verified
    (run.folder / "deliveries-0000-rank0001.arrows").unlink()
    assert verify(tmp_path).problems == ["deliveries-0000-rank0001.arrows is missing"]
    (run.folder / "epoch-000.parquet").write_bytes(b"PAR1 torn")
    assert any("cannot be read" in problem for problem in verify(tmp_path).all_problems)


def test_steps_of_another_folder_are_not_proven(run):
    run.train(start=2)
    run.write_audits()
    report = verify(run.run_dir)
    assert "steps 1 to 2 are in no delivery log" in report.problems
    assert any("samples missing: key-" in problem for problem in report.epochs[0].problems)


@pytest.mark.parametrize("column", ["pack", "step", "rank", "uses", "sample"])
def test_a_changed_file_is_found(run, column):
    run.train(ranks=2)
    run.write_audits()
    path = run.folder / "epoch-000.parquet"
    table = pq.read_table(path)
    values = table[column].to_numpy().copy()
    values[20] += 1
    number = SCHEMA.names.index(column)
    pq.write_table(table.set_column(number, SCHEMA.field(column), pa.array(values)), path)
    assert not verify(run.run_dir).verified


def test_two_writers_of_one_file_are_refused(tmp_path):
    options = {"attempt": 0, "rank": 0, "world_size": 1, "packs_per_step": 1, "resumed_at": 0}
    DeliveryLog(tmp_path, **options)
    with pytest.raises(ValueError, match="another process"):
        DeliveryLog(tmp_path, **options)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_names_the_file(tmp_path):
    log = DeliveryLog(tmp_path, attempt=0, rank=0, world_size=1, packs_per_step=1, resumed_at=0)
    log._file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115, PTH123
    with pytest.raises(ValueError, match="rank0000.arrows cannot be written .*; make room"):
        log.write(1, 0, [make_pack(0, np.array([0]))], np.ones(1, np.uint8))


# The command


def test_the_command_prints_draws_and_tells_by_its_exit_code(run, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    run.train(ranks=2)
    run.write_audits()
    arguments = argparse.Namespace(folder=run.run_dir)
    assert run_audit(arguments) == 0
    printed = capsys.readouterr().out
    assert "verified" in printed and "charts" in printed and max(map(len, printed.splitlines()[:-2])) <= 100
    assert (run.folder / "audit.png").read_bytes().startswith(b"\x89PNG")
    edit_log(run.folder / "deliveries-0000-rank0001.arrows", lambda rows: rows.pop())
    assert run_audit(arguments) == 1
    assert "not as planned" in capsys.readouterr().out


def test_a_folder_without_an_audit_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        run_audit(argparse.Namespace(folder=tmp_path))


# Size


def test_a_million_samples_take_seconds_and_a_step_takes_little(tmp_path):
    run = SimulatedRun(tmp_path, count=1, packs_per_step=64)
    index = StandInIndex(1_000_000)
    index.keys = lambda: pa.array(np.char.add("k", np.arange(1_000_000).astype(str)), pa.large_string())
    run.index, run.uses = index, np.ones(len(index), np.uint8)
    run.plans = [make_plan(run.uses, packs_per_step=64, per_pack=5)]
    started = time.perf_counter()
    run.train(ranks=4)
    per_step = (time.perf_counter() - started) / (4 * run.steps)
    started = time.perf_counter()
    run.write_audits()
    written = time.perf_counter()
    report = verify(tmp_path)
    assert [problem for problem in report.all_problems if "longer than" not in problem] == []
    assert per_step < 0.01 and written - started < 20 and time.perf_counter() - written < 20
    print(
        f"{per_step * 1e6:.0f} us a step, write {written - started:.1f} s, verify {time.perf_counter() - written:.1f} s"
    )
