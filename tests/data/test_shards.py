"""Shards: what is written is read back; what is broken is named, and costs no more than it must."""

import io
import json
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from range_server import RangeServer

from kimivl.data import shards, storage
from kimivl.data.sample import Sample, SampleError
from kimivl.data.shards import Record, parse_span, read_sample, scan_shard, write_shard, write_shards
from kimivl.data.storage import Storage

LOCAL = Storage()


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
    return list(scan_shard(LOCAL, str(path), faults.append)), faults


def test_every_sample_comes_back_equal(samples: list[Sample], tmp_path: Path):
    paths = write_shards(samples, tmp_path / "deep" / "set", samples_per_shard=4)
    assert [path.name for path in paths] == ["set-000000.tar", "set-000001.tar", "set-000002.tar"]
    back = []
    for path in paths:
        records, faults = scan(path)
        assert not faults
        back += [read_sample(LOCAL, str(path), record.offset, record.size) for record in records]
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


def test_one_shard_is_written_whole_or_not_at_all(samples: list[Sample], tmp_path: Path):
    path = tmp_path / "one.tar"
    write_shard(iter(samples), path)
    assert path.read_bytes() == write_shards(samples, tmp_path / "set")[0].read_bytes()
    before = path.read_bytes()
    with pytest.raises(ValueError, match="twice"):
        write_shard([samples[0], samples[0]], path)
    assert path.read_bytes() == before
    assert {entry.name for entry in tmp_path.iterdir()} == {"one.tar", "set-000000.tar"}


@pytest.mark.parametrize("key", ["", "a.b", "__meta", "/a"])
def test_keys_that_cannot_name_members_are_refused(key: str, tmp_path: Path):
    with pytest.raises(ValueError, match="sample key"):
        write_shards([Sample(key, make_sample(0).messages)], tmp_path / "set")


def test_a_key_used_twice_is_refused(samples: list[Sample], tmp_path: Path):
    with pytest.raises(ValueError, match="set/s0000.*twice"):
        write_shards([samples[0], samples[0]], tmp_path / "set")


def test_a_remote_shard_gives_the_same_samples(samples: list[Sample], shard: Path, tmp_path: Path):
    with RangeServer(tmp_path) as server:
        url, store = f"{server.url}/{shard.name}", Storage(tmp_path / "cache", backoff=0.001)
        server.fail = 2
        records = list(scan_shard(store, url, lambda fault: pytest.fail(str(fault))))
        assert records == scan(shard)[0]
        assert [read_sample(store, url, record.offset, record.size) for record in records] == samples


def test_a_remote_shard_that_vanishes_in_mid_scan_is_told_once(
    samples: list[Sample], shard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(storage, "BLOCK_BYTES", 4096)
    monkeypatch.setattr(storage, "REMOTE_BUFFER", 1024)
    with RangeServer(tmp_path) as server:
        url, faults, keys = f"{server.url}/{shard.name}", list[SampleError](), list[str]()
        for record in scan_shard(Storage(tmp_path / "cache", backoff=0.001), url, faults.append):
            keys.append(record.key)
            server.gone = len(keys) >= 4
    assert 4 <= len(keys) < len(samples)
    assert [(fault.reason, fault.shard) for fault in faults] == [("io_error", url)]
    assert "does not exist" in str(faults[0])


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
                read_sample(LOCAL, str(cut), record.offset, record.size)


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
                read_sample(LOCAL, str(shard), record.offset, record.size)


def picture() -> bytes:
    return make_sample(0).images[0]


def text_of(parts: list[dict]) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": "hi"}]}]}).encode()


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


def test_neighbours_of_one_name_are_told(tmp_path: Path):
    path = tar_of(tmp_path / "twice.tar", ["a.json", "a.json"])
    ((record,), faults) = scan(path)
    assert not faults
    with pytest.raises(SampleError, match="two members") as caught:
        read_sample(LOCAL, str(path), record.offset, record.size)
    assert (caught.value.reason, caught.value.key) == ("duplicate_key", "a")


def test_what_lies_between_the_members_of_a_sample_is_left_out(tmp_path: Path):
    path = tmp_path / "mixed.tar"
    members = {"a.0.png": picture(), "folder/": None, "README": b"x", "__meta__.json": b"[]"}
    members["a.json"] = text_of([{"type": "image"}])
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size, info.type = (0, tarfile.DIRTYPE) if data is None else (len(data), tarfile.REGTYPE)
            tar.addfile(info, io.BytesIO(data or b""))
    ((record,), faults) = scan(path)
    assert not faults
    sample = read_sample(LOCAL, str(path), record.offset, record.size)
    assert (sample.key, sample.images) == ("a", (members["a.0.png"],))


def test_names_that_are_not_utf8_are_told_in_a_form_that_can_be_written(tmp_path: Path):
    path = tar_of(tmp_path / "odd.tar", ["a.json", "b\udcff.json", "c.json"])
    records, faults = scan(path)
    assert [record.key for record in records] == ["a", "c"]
    assert [fault.reason for fault in faults] == ["bad_shard"]
    str(faults[0]).encode(), faults[0].key.encode()


def test_a_sample_above_the_limit_is_told_and_not_read(shard: Path, monkeypatch: pytest.MonkeyPatch):
    records, _ = scan(shard)
    largest = max(record.size for record in records)
    monkeypatch.setattr(shards, "MAX_SAMPLE_BYTES", largest - 1)
    kept, faults = scan(shard)
    assert kept == [record for record in records if record.size < largest]
    assert {fault.reason for fault in faults} == {"too_large"}
    assert {fault.key for fault in faults} == {record.key for record in records if record.size == largest}


def test_a_header_that_promises_gigabytes_of_name_is_damage(tmp_path: Path):
    path = tmp_path / "bomb.tar"
    bomb = tarfile.TarInfo("bomb")
    bomb.type, bomb.size = tarfile.GNUTYPE_LONGNAME, 2**32
    tar_of(path, ["a.json"])
    path.write_bytes(bomb.tobuf(tarfile.GNU_FORMAT) + path.read_bytes())
    records, faults = scan(path)
    assert [record.key for record in records] == ["a"]
    assert [fault.reason for fault in faults] == ["bad_shard"]


def test_a_shard_that_vanished_is_told_once_and_the_others_are_read(samples: list[Sample], tmp_path: Path):
    paths = write_shards(samples, tmp_path / "set", samples_per_shard=4)
    record = scan(paths[1])[0][0]
    paths[1].unlink()
    faults: list[SampleError] = []
    keys = [record.key for path in paths for record in scan_shard(LOCAL, str(path), faults.append)]
    assert len(keys) == 6
    assert [(fault.reason, fault.shard) for fault in faults] == [("io_error", str(paths[1]))]
    with pytest.raises(SampleError) as caught:
        read_sample(Storage(), str(paths[1]), record.offset, record.size, key="k7")
    assert (caught.value.reason, caught.value.key, caught.value.shard) == ("io_error", "k7", str(paths[1]))


def test_bytes_that_changed_since_the_index_are_told(shard: Path):
    records, _ = scan(shard)
    record, data = records[2], bytearray(shard.read_bytes())
    crc32 = zlib.crc32(data[record.offset : record.offset + record.size])
    read_sample(LOCAL, str(shard), record.offset, record.size, crc32)
    data[record.offset + record.size // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(SampleError, match="changed since") as caught:
        read_sample(LOCAL, str(shard), record.offset, record.size, crc32, record.key)
    assert (caught.value.reason, caught.value.key) == ("bad_shard", record.key)


def test_the_images_of_a_verified_span_are_not_checked_again(tmp_path: Path):
    path = tmp_path / "half.tar"
    half = picture()[:100]
    with webdataset.TarWriter(str(path), encoder=False) as writer:
        writer.write({"__key__": "a", "0.png": half, "json": text_of([{"type": "image"}])})
    ((record,), _) = scan(path)
    span = path.read_bytes()[record.offset : record.offset + record.size]
    assert read_sample(LOCAL, str(path), record.offset, record.size, zlib.crc32(span)).images == (half,)
    with pytest.raises(SampleError, match="bad_image"):
        parse_span(span, str(path))


def test_something_that_is_no_tar_is_told(tmp_path: Path):
    path = tmp_path / "no.tar"
    path.write_bytes(b"hello " * 1000)
    records, faults = scan(path)
    assert not records
    assert faults[0].reason == "bad_shard"


def test_a_span_that_no_longer_fits_the_file_is_told(shard: Path):
    records, _ = scan(shard)
    with pytest.raises(SampleError, match="changed") as caught:
        read_sample(LOCAL, str(shard), records[-1].offset, 10**6)
    assert caught.value.reason == "truncated_shard"
    with pytest.raises(SampleError) as caught:
        read_sample(LOCAL, str(shard), records[1].offset + 512, records[1].size)
    assert str(shard) in str(caught.value)
