"""Shards: what is written is read back; what is broken is named, and costs no more than it must."""

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from kimivl.data.sample import Sample, SampleError
from kimivl.data.shards import Record, expand, read_sample, scan_shard, write_shards


def make_sample(number: int, images: int = 1) -> Sample:
    noise = np.random.default_rng(number).integers(0, 256, (28, 28, 3), dtype=np.uint8)
    encoded = []
    for form in ("png", "jpeg")[:images]:
        stream = io.BytesIO()
        Image.fromarray(noise).save(stream, form)
        encoded.append(stream.getvalue())
    parts = [{"type": "image"}] * images + [{"type": "text", "text": f"质问 {number}?"}]
    messages = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": [{"type": "text", "text": str(number)}]},
    ]
    return Sample(f"set/s{number:04d}", messages, tuple(encoded), str(number), number % 8 + 1, "made", "noise")


@pytest.fixture
def samples() -> list[Sample]:
    return [make_sample(number, images=number % 3) for number in range(10)]


@pytest.fixture
def shard(samples: list[Sample], tmp_path: Path) -> Path:
    return write_shards(samples, tmp_path / "set")[0]


def scan(path: Path) -> tuple[list[Record], list[SampleError]]:
    faults: list[SampleError] = []
    return list(scan_shard(path, faults.append)), faults


def test_every_sample_comes_back_equal(samples: list[Sample], tmp_path: Path):
    paths = write_shards(samples, tmp_path / "deep" / "set", samples_per_shard=4)
    assert [path.name for path in paths] == ["set-000000.tar", "set-000001.tar", "set-000002.tar"]
    back = []
    for path in paths:
        records, faults = scan(path)
        assert not faults
        back += [read_sample(path, record.offset, record.size) for record in records]
    assert back == samples


def test_spans_are_disjoint_and_in_order(shard: Path):
    records, _ = scan(shard)
    for before, after in zip(records, records[1:], strict=False):
        assert before.offset + before.size == after.offset


def test_webdataset_itself_reads_the_shards(samples: list[Sample], shard: Path):
    found = list(webdataset.WebDataset(str(shard), shardshuffle=False))
    assert [entry["__key__"] for entry in found] == [sample.key for sample in samples]
    assert [entry.get("1.jpg") for entry in found] == [dict(enumerate(s.images)).get(1) for s in samples]
    assert json.loads(found[3]["json"])["answer"] == "3"


def test_bytes_depend_on_the_samples_alone(samples: list[Sample], shard: Path, tmp_path: Path):
    again = write_shards(samples, tmp_path / "again" / "set")[0]
    assert again.read_bytes() == shard.read_bytes()


def test_an_interrupted_write_leaves_no_unfinished_shard(samples: list[Sample], tmp_path: Path):
    bad = Sample("last", samples[0].messages, (b"GIF89a",))
    with pytest.raises(SampleError, match="last"):
        write_shards([*samples, bad], tmp_path / "set", samples_per_shard=6)
    assert [path.name for path in tmp_path.iterdir()] == ["set-000000.tar"]


def test_shards_of_a_longer_earlier_set_are_removed(samples: list[Sample], tmp_path: Path):
    write_shards(samples, tmp_path / "set", samples_per_shard=2)
    (tmp_path / "set-extra.tar").touch()
    write_shards(samples, tmp_path / "set", samples_per_shard=5)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["set-000000.tar", "set-000001.tar", "set-extra.tar"]


@pytest.mark.parametrize("key", ["", "a.b", "__meta", "/a"])
def test_keys_that_cannot_name_members_are_refused(key: str, tmp_path: Path):
    with pytest.raises(ValueError, match="sample key"):
        write_shards([Sample(key, make_sample(0).messages)], tmp_path / "set")


def test_a_key_used_twice_is_refused(samples: list[Sample], tmp_path: Path):
    with pytest.raises(ValueError, match="set/s0000.*twice"):
        write_shards([samples[0], samples[0]], tmp_path / "set")


def test_braces_and_globs_expand_sorted_and_once(tmp_path: Path):
    names = [f"rl-{i:03d}.tar" for i in range(4)]
    for name in [*reversed(names), "odd[1].tar"]:
        (tmp_path / name).touch()
    wanted = [tmp_path / name for name in names]
    assert expand(f"{tmp_path}/rl-{{000..003}}.tar") == wanted
    assert expand([f"{tmp_path}/rl-*.tar", str(tmp_path / names[1])]) == wanted
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "rl-001.tar").touch()
    assert expand(f"{tmp_path}/*/rl-00[12].tar") == [tmp_path / "deep" / "rl-001.tar"]
    assert expand(f"{tmp_path}/odd[1].tar") == [tmp_path / "odd[1].tar"]


@pytest.mark.parametrize("pattern", ["rl-{000..004}.tar", "none-*.tar", "gone.tar"])
def test_a_pattern_without_a_file_is_named(pattern: str, tmp_path: Path):
    for i in range(4):
        (tmp_path / f"rl-{i:03d}.tar").touch()
    missing = pattern.replace("{000..004}", "004")
    with pytest.raises(ValueError) as caught:
        expand([f"{tmp_path}/rl-000.tar", f"{tmp_path}/{pattern}"])
    assert missing in str(caught.value)


def test_no_pattern_at_all_is_an_error():
    with pytest.raises(ValueError, match=r"data\.shards"):
        expand([])


def test_wherever_a_shard_is_cut_whole_samples_survive_and_the_loss_is_told(shard: Path, tmp_path: Path):
    records, _ = scan(shard)
    data, end = shard.read_bytes(), records[-1].offset + records[-1].size
    cut = tmp_path / "cut.tar"
    for length in range(0, end + 1, 256):
        cut.write_bytes(data[:length])
        survivors, faults = scan(cut)
        whole = [record for record in records if record.offset + record.size <= length]
        assert survivors[: len(whole)] == whole
        assert len(survivors) <= len(whole) + 1
        assert {fault.reason for fault in faults} <= {"truncated_shard", "missing_member"}
        assert any(fault.reason == "truncated_shard" and str(cut) in str(fault) for fault in faults)
        for record in survivors[len(whole) :]:  # its text is there, and its images are found missing
            with pytest.raises(SampleError):
                read_sample(cut, record.offset, record.size)


def test_a_cut_inside_a_member_names_its_sample(shard: Path, tmp_path: Path):
    records, _ = scan(shard)
    cut = tmp_path / "cut.tar"
    cut.write_bytes(shard.read_bytes()[: records[5].offset + 520])
    assert scan(cut)[1][0].key == records[5].key


def test_a_damaged_header_costs_only_its_own_sample(shard: Path):
    records, _ = scan(shard)
    data = bytearray(shard.read_bytes())
    data[records[4].offset + 150] ^= 0x5A  # in the checksum of its first header, that of an image
    shard.write_bytes(data)
    survivors, faults = scan(shard)
    assert [fault.reason for fault in faults] == ["bad_shard"]
    others = [record for record in survivors if record.key != records[4].key]
    assert others == records[:4] + records[5:]
    for record in survivors:
        if record not in others:  # its text alone
            with pytest.raises(SampleError, match="image_count"):
                read_sample(shard, record.offset, record.size)


def tar_of(path: Path, names: Iterator[str] | list[str]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = 2
            tar.addfile(info, io.BytesIO(b"{}"))
    return path


def test_keys_that_come_back_and_samples_without_text_are_told(tmp_path: Path):
    path = tar_of(tmp_path / "odd.tar", ["a.json", "b.0.png", "c.json", "a.0.png", "README", "__x__.json"])
    records, faults = scan(path)
    assert [record.key for record in records] == ["a", "c"]
    assert [(fault.reason, fault.key) for fault in faults] == [("missing_member", "b"), ("duplicate_key", "a")]


def test_long_names_of_other_writers_are_read(tmp_path: Path):
    key = "x" * 150 + "/" + "y" * 120
    for number, form in enumerate((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)):
        path = tmp_path / f"{number}.tar"
        with tarfile.open(path, "w", format=form) as tar:
            info = tarfile.TarInfo(f"{key}.json")
            text = json.dumps({"messages": [{"role": "user", "content": "hi"}]}).encode()
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text))
        (record,), faults = scan(path)
        assert not faults
        assert read_sample(path, record.offset, record.size).key == key


def test_something_that_is_no_tar_is_told(tmp_path: Path):
    path = tmp_path / "no.tar"
    path.write_bytes(b"hello " * 1000)
    records, faults = scan(path)
    assert not records
    assert faults[0].reason == "bad_shard"


def test_a_span_that_no_longer_fits_the_file_is_told(shard: Path):
    records, _ = scan(shard)
    with pytest.raises(SampleError, match="changed") as caught:
        read_sample(shard, records[-1].offset, 10**6)
    assert caught.value.reason == "truncated_shard"
    with pytest.raises(SampleError) as caught:
        read_sample(shard, records[1].offset + 512, records[1].size)
    assert str(shard) in str(caught.value)
