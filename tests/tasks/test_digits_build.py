"""Writing: the same settings give the same bytes, a finished folder is kept, and anything else is rebuilt whole."""

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest

from kimivl.model.tokenizer import load_tokenizer
from kimivl.tasks.digits import write
from kimivl.tasks.digits.scans import draw_splits

from .conftest import read_all

SMALL = {"sft": 40, "long_cot": 24, "rl": 16, "val": 8, "test": 8, "vocab_size": 300}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def state(folder: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module", autouse=True)
def scans_drawn_once():
    """Drawing takes a second; that it repeats itself is seen by the pixels in the tests of the scans."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kimivl.tasks.digits.build.draw_splits", cache(draw_splits))
        yield


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("small"), seed=3, **SMALL)


def test_the_folder_holds_what_was_promised(small: Path):
    names = {name for name in contents(small) if not name.startswith(("tokenizer/", "."))}
    sets = ("sft", "long_cot", "rl", "val", "test")
    assert names == {f"{name}-000000.tar" for name in sets} | {"digits.json"}
    assert len(load_tokenizer(small / "tokenizer")) == 300


def test_two_writes_give_equal_bytes_and_another_seed_others(small: Path, tmp_path: Path):
    assert contents(write(tmp_path / "a", seed=3, **SMALL)) == contents(small)
    assert contents(write(tmp_path / "b", seed=4, **SMALL)) != contents(small)


def test_a_larger_set_begins_with_the_smaller_one(small: Path, tmp_path: Path):
    """Samples depend on (seed, set, index) alone, so that a set can grow without changing."""
    more = write(tmp_path, seed=3, **(SMALL | {"rl": 32}))
    spans = (small / "rl-000000.tar").read_bytes(), (more / "rl-000000.tar").read_bytes()
    assert spans[1].startswith(spans[0].rstrip(b"\0"))


def test_a_finished_folder_is_left_alone(small: Path):
    before = state(small)
    write(small, seed=3, **SMALL)
    assert state(small) == before


@pytest.mark.parametrize("loss", ["digits.json", "rl-000000.tar", "tokenizer/tokenizer.json"])
def test_an_unfinished_folder_is_built_anew(loss: str, small: Path):
    whole = contents(small)
    (small / loss).unlink()
    write(small, seed=3, **SMALL)
    assert contents(small) == whole


def test_a_broken_manifest_and_a_cut_shard_are_mended(small: Path):
    whole = contents(small)
    (small / "digits.json").write_text("{")
    write(small, seed=3, **SMALL)
    (small / "sft-000000.tar").write_bytes(b"cut")
    write(small, seed=3, **SMALL)
    assert contents(small) == whole


def test_writers_at_the_same_moment_do_not_disturb_one_another(small: Path, tmp_path: Path):
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: write(tmp_path, seed=3, **SMALL), range(3)))
    assert contents(tmp_path) == contents(small)


def test_other_settings_rebuild_and_leave_nothing_stale(tmp_path: Path):
    write(tmp_path, seed=3, **(SMALL | {"sft": 2001}))
    (tmp_path / "notes.txt").write_text("mine")
    write(tmp_path, seed=3, **SMALL)
    assert not (tmp_path / "sft-000001.tar").exists()
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_the_numbers_of_digits_of_a_set_can_be_chosen_and_leave_the_others_as_they_are(small: Path, tmp_path: Path):
    skewed = write(tmp_path, seed=3, **SMALL, digits={"rl": [1, 1, 8]})
    assert [sample.difficulty for sample in read_all(skewed, "rl")] == [1, 1, 8] * 5 + [1]
    assert [sample.difficulty for sample in read_all(small, "rl")] == [*range(1, 9)] * 2
    for name in ("sft", "long_cot", "val", "test"):
        assert (skewed / f"{name}-000000.tar").read_bytes() == (small / f"{name}-000000.tar").read_bytes()


@pytest.mark.parametrize("digits", [{"rl": [0]}, {"rl": [9]}, {"rl": []}, {"train": [1]}])
def test_numbers_of_digits_that_there_are_not_are_refused(digits: dict[str, list[int]], tmp_path: Path):
    with pytest.raises(ValueError, match="data.prepare.digits"):
        write(tmp_path, **SMALL, digits=digits)


def test_how_chains_are_written_changes_the_chains_alone(small: Path, tmp_path: Path):
    short = write(tmp_path, seed=3, **SMALL, redundant=0.0, hasty=1.0)
    assert (short / "rl-000000.tar").read_bytes() == (small / "rl-000000.tar").read_bytes()
    replies = [sample.messages[-1]["content"][0]["text"] for sample in read_all(short, "long_cot")]
    assert not any("=" in reply for reply in replies)
