"""Tars of other writers and damaged ones: what tarfile would find is found, and nothing else comes out."""

import contextlib
import functools
import io
import json
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from kimivl.data.sample import SampleError
from kimivl.data.shards import Record, read_sample, scan_shard
from kimivl.data.storage import Storage
from kimivl.data.tar import read_members, walk

LOCAL = Storage()


def scan(path: Path) -> tuple[list[Record], list[SampleError]]:
    faults: list[SampleError] = []
    return list(scan_shard(LOCAL, str(path), faults.append)), faults


@functools.cache
def picture() -> bytes:
    stream = io.BytesIO()
    Image.linear_gradient("L").save(stream, "png")
    return stream.getvalue()


def text_of(parts: list[dict]) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": "hi"}]}]}).encode()


@functools.cache
def mixed_tar() -> bytes:
    """Four samples: two with plain headers, one with a pax and one with a GNU long name."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for key in ("a", "x" * 130, "b", "y" * 140):
            tar.format = tarfile.GNU_FORMAT if key[0] == "y" else tarfile.PAX_FORMAT
            for extension, data in (("json", text_of([{"type": "image"}])), ("0.png", picture()[:700])):
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def test_tars_of_the_tar_command_are_read(tmp_path: Path):
    folder = tmp_path / "files"
    (folder / "名").mkdir(parents=True)
    for key in ("a", "b" * 120, "名/c"):
        (folder / f"{key}.json").write_bytes(text_of([{"type": "image"}]))
        (folder / f"{key}.0.png").write_bytes(picture())
    for form in ("gnu", "posix", "ustar"):
        path = tmp_path / f"{form}.tar"
        command = ["tar", f"--format={form}", "--sort=name", "-cf", path, "-C", folder, "."]
        assert subprocess.run(command, capture_output=True).returncode == (2 if form == "ustar" else 0)
        records, faults = scan(path)
        assert not faults
        long = [] if form == "ustar" else ["./" + "b" * 120]  # which that format cannot hold
        assert [record.key for record in records] == ["./a", *long, "./名/c"]
        for record in records:
            assert read_sample(LOCAL, str(path), record.offset, record.size).images == (picture(),)


@settings(max_examples=60)
@given(data=st.data())
def test_whatever_is_damaged_only_faults_of_samples_come_out(data: st.DataObject):
    """Damage in some bytes of a tar with plain, pax and GNU headers: no other error, and no sample made up."""
    sound, folder = mixed_tar(), Path(tempfile.mkdtemp())
    damaged = bytearray(sound)
    for _ in range(data.draw(st.integers(1, 6))):
        damaged[data.draw(st.integers(0, len(sound) - 1))] = data.draw(st.integers(0, 255))
    path = folder / "damaged.tar"
    path.write_bytes(damaged[: data.draw(st.integers(0, len(damaged)))])
    try:
        records, faults = scan(path)
        assert len(records) <= 4
        assert len(records) == 4 or faults
        for record in records:
            with contextlib.suppress(SampleError):
                read_sample(LOCAL, str(path), record.offset, record.size)
    finally:
        shutil.rmtree(folder)


@settings(max_examples=100)
@given(
    names=st.lists(
        st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=120), max_size=4
    ),
    form=st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_the_fast_reader_finds_what_tarfile_finds(names: list[str], form: int):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form) as tar:
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = number * 300
            with contextlib.suppress(ValueError):  # a name too long for the format
                tar.addfile(info, io.BytesIO(bytes([number]) * info.size))
        length = tar.offset
    data = stream.getvalue()
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        wanted = [(info.name, tar.extractfile(info).read(), info.offset) for info in tar if info.isreg()]
    members = list(walk(io.BytesIO(data), len(data), lambda *fault: pytest.fail(str(fault))))
    assert [(member.name, member.start) for member in members] == [(name, start) for name, _, start in wanted]
    assert read_members(data[:length]) == [(name, content) for name, content, _ in wanted]


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
        assert read_sample(LOCAL, str(path), record.offset, record.size).key == key
