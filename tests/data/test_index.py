"""The index: exact counts, kept under what it depends on, with what is wrong said and counted."""

import contextlib
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import textwrap
from functools import partial

import numpy as np
import pytest
from command import ROOT

from kimivl.data.sample import SampleError
from kimivl.data.shards import expand


def test_the_counts_are_those_of_the_encoder(index, encoder):
    for number in range(len(index)):
        encoded = encoder.encode(index.read(number))
        assert index.tokens[number] == len(encoded)
        assert index.patches[number] == len(encoded.pixel_values)
        assert index.targets[number] == encoded.num_targets
        assert index.images[number] == len(encoded.image_grid_hws)
    assert index.sources == ["digits"] and not index.source.any()
    assert len({index.key(number) for number in range(len(index))}) == 120


def test_columns_are_mapped_not_copied(index):
    assert not index.tokens.flags.owndata and not index.tokens.flags.writeable
    again = pickle.loads(pickle.dumps(index))
    assert again.path == index.path and np.array_equal(again.crc32, index.crc32)
    assert len(pickle.dumps(index)) < 1000


@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_processes_makes_the_same(digits, make_index, index, tmp_path, workers):
    shards = split_into(5, digits, tmp_path)
    made = make_index(f"{tmp_path}/*.tar", workers=workers)
    assert len(made.shards) == len(shards) == 5
    assert sorted(made.keys().to_pylist()) == sorted(index.keys().to_pylist())
    assert int(made.tokens.sum()) == int(index.tokens.sum())


def split_into(number, digits, folder):
    """The samples of the digits set over several shards."""
    paths = [folder / f"part-{part}.tar" for part in range(number)]
    with contextlib.ExitStack() as files:
        old = files.enter_context(tarfile.open(expand(str(digits / "sft-*.tar"))[0]))
        writers = [files.enter_context(tarfile.open(path, "w")) for path in paths]
        for member in old:
            place = int(member.name.split(".")[0].split("-")[1]) % number
            writers[place].addfile(member, old.extractfile(member))
    return paths


def test_it_is_kept_and_a_stale_one_is_replaced(digits, make_index, tmp_path, monkeypatch):
    shards = split_into(2, digits, tmp_path)
    first = make_index(f"{tmp_path}/*.tar")
    with monkeypatch.context() as patched:
        patched.setattr("kimivl.data.scan.scan_shard", lambda *_: pytest.fail("scanned again"))
        assert make_index(f"{tmp_path}/*.tar").path == first.path
    os.utime(shards[0], (1, 1))
    second = make_index(f"{tmp_path}/*.tar")
    assert second.path != first.path and not first.path.exists()
    # Another selection of the shards, problems, or another check is another index: both stay.
    other = make_index(str(shards[1]))
    problems = make_index(f"{tmp_path}/*.tar", prompts=True)
    assert len({second.path, other.path, problems.path}) == 3
    assert second.path.exists() and other.path.exists() and len(other) == 60


def test_a_killed_scan_goes_on(digits, tmp_path):
    """Killed after three of five shards; the next scan reads the other two only."""
    split_into(5, digits, tmp_path)
    program = textwrap.dedent(f"""
        import os, signal, sys
        from kimivl.checkpoint import load_processor
        from kimivl.data import scan
        from kimivl.data.chat import SampleEncoder
        from kimivl.data.shards import expand
        from kimivl.data.storage import Storage
        processor = load_processor({str(digits / "tokenizer")!r})
        encoder = SampleEncoder(processor.tokenizer, processor.image_processor)
        scanned, read = [], scan.scan_shard
        def counting(storage, shard, on_fault):
            if len(scanned) == int(sys.argv[1]):
                os.kill(os.getpid(), signal.SIGKILL)
            scanned.append(shard)
            return read(storage, shard, on_fault)
        scan.scan_shard = counting
        index = scan.build_index(expand({str(tmp_path)!r} + "/*.tar"), encoder, Storage(), workers=1)
        print(len(index), len(scanned))
    """)

    def run(kill_after):
        command = [sys.executable, "-c", program, str(kill_after)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)

    assert run(3).returncode == -signal.SIGKILL
    assert run(99).stdout.split() == ["120", "2"]
    assert not list(tmp_path.glob(".index-*.parts"))


def damaged_copy(digits, folder, damage):
    """Copy the first shard with one member of its first sample replaced or, for None, left out."""
    source = expand(str(digits / "sft-*.tar"))[0]
    target = folder / "sft-000000.tar"
    with tarfile.open(source) as old, tarfile.open(target, "w") as new:
        first_image = next(member.name for member in old if member.name.endswith(".png"))
        first_json = first_image.replace(".0.png", ".json")
        for member in old:
            content = old.extractfile(member).read()
            suffix = ".png" if member.name == first_image else ".json" if member.name == first_json else ""
            if suffix in damage:
                if damage[suffix] is None:
                    continue
                content = damage[suffix](content)
                member.size = len(content)
            new.addfile(member, io.BytesIO(content))
    return str(target), first_json.removesuffix(".json")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ({".png": lambda data: data[:40]}, "bad_image"),
        ({".json": lambda data: data[:-5]}, "bad_json"),
        ({".png": None}, "image_count"),
        (
            {".json": lambda data: data.replace(b'{"type": "image"}, ', b"").replace(b'{"type":"image"},', b"")},
            "image_count",
        ),
        ({".json": None}, "missing_member"),
        ({".json": lambda data: data.replace(b'"text":"', b'"text":"<|im_end|>', 1)}, "special_token"),
    ],
)
def test_a_damaged_sample_is_dropped_under_its_reason(digits, make_index, tmp_path, caplog, damage, reason):
    shard, key = damaged_copy(digits, tmp_path, damage)
    index = make_index(shard, max_dropped=0.1)
    assert index.dropped == {reason: 1}
    assert key not in index.keys().to_pylist()
    assert key in caplog.text and "sft-000000.tar" in caplog.text
    [listed] = [json.loads(line) for line in index.dropped_file.read_text().splitlines()]
    assert (listed["reason"], listed["key"], listed["shard"]) == (reason, key, shard)


def test_too_much_damage_stops_with_the_reasons(digits, make_index, tmp_path):
    shard, _ = damaged_copy(digits, tmp_path, {".png": lambda data: data[:40]})
    with pytest.raises(ValueError, match=r"bad_image 1.*\.dropped\.jsonl.*data\.max_dropped"):
        make_index(shard, max_dropped=0.001)
    with pytest.raises(ValueError, match="bad_image 1"):  # nor is it accepted when it is there already
        make_index(shard, max_dropped=0.001)
    assert len(make_index(shard, max_dropped=0.1)) == 119


def test_a_set_without_samples_is_refused(make_index, tmp_path):
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    with pytest.raises(ValueError, match="0 of 0 samples.*no samples"):
        make_index(str(tmp_path / "empty.tar"))


def refuse_task(sample, task):
    if sample.task == task:
        raise SampleError("refused_task", sample.key, None, task)


def test_a_check_can_drop_samples_and_belongs_to_the_index(digits, make_index):
    shards = str(digits / "sft-*.tar")
    sums = make_index(shards, check=partial(refuse_task, task="sum"), max_dropped=0.9)
    reads = make_index(shards, check=partial(refuse_task, task="read"), max_dropped=0.9)
    assert sums.dropped["refused_task"] == 120 - len(sums)
    assert sums.path != reads.path


def test_problems_need_an_answer(make_index, tmp_path):
    fields = {"messages": [{"role": "user", "content": "What is one and one?"}]}
    with tarfile.open(tmp_path / "rl.tar", "w") as tar:
        for key, more in (("a", {}), ("b", {"answer": "2"})):
            content = json.dumps(fields | more).encode()
            member = tarfile.TarInfo(f"{key}.json")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    index = make_index(str(tmp_path / "rl.tar"), prompts=True, max_dropped=0.5)
    assert index.keys().to_pylist() == ["b"] and index.dropped == {"empty_answer": 1}
    assert index.difficulty.tolist() == [-1] and index.sources == [""]


def test_an_unwritable_place_sends_the_index_to_the_cache(digits, make_index, tmp_path, monkeypatch):
    monkeypatch.setattr("kimivl.data.scan.os.access", lambda *_: False)  # root may write anywhere
    index = make_index(str(digits / "long_cot-*.tar"), folder=tmp_path / "cache")
    assert index.path.parent == tmp_path / "cache" and len(index) == 60
    with pytest.raises(ValueError, match="data.cache"):
        make_index(str(digits / "long_cot-*.tar"))


def test_a_full_disk_is_one_sentence(digits, make_index, tmp_path, monkeypatch):
    split_into(1, digits, tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kimivl.data.scan.write_index", full)
    with pytest.raises(ValueError, match=r"cannot be written to .*No space left.*data\.cache"):
        make_index(f"{tmp_path}/*.tar")
    assert not list(tmp_path.glob(".index-*.arrow"))
