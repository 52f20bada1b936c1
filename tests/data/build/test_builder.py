"""From files on disk to shards: contents, sizes, refusals, and what is asked for wrongly."""

import argparse
import errno
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from chat_files import SHARD, contents, llava_row, picture, read_all, rejected, write_lines, write_llava

from kimivl.data.build import builder as build
from kimivl.data.build import convert
from kimivl.data.build.builder import build_shards
from kimivl.data.build.options import add_arguments
from kimivl.data.shards import scan_shard
from kimivl.data.storage import Storage


@pytest.fixture
def llava(tmp_path: Path) -> Path:
    return write_llava(tmp_path)


def test_built_shards_give_back_chats_and_image_bytes(llava: Path, tmp_path: Path) -> None:
    report = build_shards(llava, tmp_path / "out", shard_bytes=SHARD, source_name="noise")
    samples = read_all(tmp_path / "out")
    assert [sample.key for sample in samples] == [f"llava-{number:09d}" for number in range(60)]
    for number, sample in enumerate(samples):
        assert sample.messages[0]["content"] == [{"type": "image"}, {"type": "text", "text": f"What is {number}?"}]
        assert sample.messages[1]["content"] == [{"type": "text", "text": f"é {number}"}]
        assert sample.images == (picture(number, ("JPEG", "PNG", "WEBP")[number % 3]),)
        assert sample.source == "noise"
    assert (report.samples, report.rows, report.rejected) == (60, 60, {})

    paths = sorted(map(str, (tmp_path / "out").glob("*.tar")))
    others = list(webdataset.WebDataset(paths, shardshuffle=False))
    assert [other["__key__"] for other in others] == [sample.key for sample in samples]
    assert [next(other[name] for name in other if name.startswith("0.")) for other in others] == [
        sample.images[0] for sample in samples
    ]
    assert json.loads(others[7]["json"])["messages"] == samples[7].messages


def test_shards_are_dense_and_of_bounded_size(llava: Path, tmp_path: Path) -> None:
    (tmp_path / "pictures" / "5.webp").write_bytes(picture(5, "PNG") + bytes(3 * SHARD))
    report = build_shards(llava, tmp_path / "out", shard_bytes=SHARD)
    paths = sorted((tmp_path / "out").glob("*.tar"))
    assert [path.name for path in paths] == [f"llava-{number:06d}.tar" for number in range(report.shards)]
    large = [path for path in paths if path.stat().st_size > SHARD]
    assert len(large) == 1
    assert len(list(scan_shard(Storage(), str(large[0]), pytest.fail))) == 1
    rest = sum(path.stat().st_size for path in paths) - large[0].stat().st_size
    assert rest > 0.7 * SHARD * (len(paths) - 2), "shards are far from full"
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert [shard["bytes"] for shard in manifest["shards"]] == [path.stat().st_size for path in paths]
    assert sum(shard["samples"] for shard in manifest["shards"]) == manifest["samples"] == 60


def test_bytes_do_not_depend_on_workers(llava: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    rows = llava.read_text().splitlines(keepends=True)
    (folder / "a.jsonl").write_text("".join(rows[:25]))
    (folder / "b.json").write_text("[" + ",".join(rows[25:]) + "]")
    for workers in (1, 2):
        out = tmp_path / f"out{workers}"
        build_shards(folder, out, images=tmp_path, shard_bytes=SHARD, workers=workers)
    assert contents(tmp_path / "out1") == contents(tmp_path / "out2")
    assert [sample.key for sample in read_all(tmp_path / "out2")][24:26] == ["a-000000024", "b-000000000"]


def test_parquet_with_problems(tmp_path: Path) -> None:
    rows = [
        {
            "problem": f"<image>How many? {number}",
            "answer": str(number),
            "difficulty": number % 5,
            "images": [{"bytes": picture(number), "path": None}],
        }
        for number in range(70)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "dots.parquet", row_group_size=16)
    build_shards(tmp_path / "dots.parquet", tmp_path / "out", shard_bytes=SHARD)
    samples = read_all(tmp_path / "out")
    assert [(sample.answer, sample.difficulty, sample.images[0]) for sample in samples] == [
        (row["answer"], row["difficulty"], row["images"][0]["bytes"]) for row in rows
    ]
    assert all(message["role"] == "user" for sample in samples for message in sample.messages)


@pytest.fixture
def faulty(llava: Path, tmp_path: Path) -> tuple[Path, list[tuple[int, str]]]:
    """`llava` with one row of every fault behind it, and what is to be said of them."""
    (tmp_path.parent / f"{tmp_path.name}-secret.jpg").write_bytes(picture(0))
    pictures = tmp_path / "pictures"
    (pictures / "link.jpg").symlink_to(f"../../{tmp_path.name}-secret.jpg")
    (pictures / "inner.jpg").symlink_to("0.jpeg")  # stays below the root: taken
    (pictures / "cut.jpg").write_bytes(picture(1)[:-200])
    (pictures / "some.gif").write_bytes(picture(1, "GIF"))
    (pictures / "folder.jpg").mkdir()
    faults = [
        ("pictures/inner.jpg", ""),
        (f"../{tmp_path.name}-secret.jpg", "outside_root"),
        (str(tmp_path.parent / f"{tmp_path.name}-secret.jpg"), "outside_root"),
        ("pictures/link.jpg", "outside_root"),
        ("pictures/none.jpg", "missing_member"),
        ("pictures/folder.jpg", "missing_member"),
        ("pictures/0.jpeg/x", "missing_member"),
        ("pictures/\0.jpg", "missing_member"),
        ("pictures/cut.jpg", "bad_image"),
        ("pictures/some.gif", "bad_image"),
        ("https://host/a.jpg", "remote_image"),
        (str(pictures / "0.jpeg"), ""),
        ("x" * 3000, "missing_member"),
    ]
    rows: list[dict[str, Any]] = [llava_row(number, image) for number, (image, _) in enumerate(faults, 60)]
    rows.append({**llava_row(0, "pictures/0.jpeg"), "difficulty": -1})
    rows.append({**llava_row(0, "pictures/0.jpeg"), "answer": " "})
    rows.append({"conversations": [{"from": "human", "value": "half \ud800"}, {"from": "gpt", "value": "a"}]})
    rows.append({"caption": "none"})
    lines = llava.read_text() + "".join(json.dumps(row) + "\n" for row in rows) + '{"cut": \n'
    llava.write_text(lines)
    reasons = [reason for _, reason in faults] + ["bad_json", "empty_answer", "bad_json", "unknown_shape", "bad_json"]
    return llava, [(number, reason) for number, reason in enumerate(reasons, 60) if reason]


def test_refused_rows_are_told_by_reason(faulty: tuple[Path, list[tuple[int, str]]], tmp_path: Path) -> None:
    source, expected = faulty
    report = build_shards(source, tmp_path / "out", shard_bytes=SHARD, max_rejected=0.5)
    told = rejected(tmp_path / "out")
    assert [(entry["row"], entry["reason"]) for entry in told] == expected
    assert all(entry["file"] == "llava.jsonl" and entry["detail"] for entry in told)
    assert [entry["key"] for entry in told] == [f"llava-{row:09d}" for row, _ in expected]
    assert sum(report.rejected.values()) == len(expected)
    assert len(read_all(tmp_path / "out")) == report.samples == report.rows - len(expected) == 62


def test_huge_and_unreadable_images_are_refused(llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pictures" / "8.webp").write_bytes(bytes(100_000))
    monkeypatch.setattr(convert, "MAX_SAMPLE_BYTES", 90_000)
    read = Path.read_bytes

    def failing(path: Path) -> bytes:
        if path.name == "9.jpeg":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", failing)
    build_shards(llava, tmp_path / "out")
    assert [(entry["row"], entry["reason"]) for entry in rejected(tmp_path / "out")] == [
        (8, "too_large"),
        (9, "io_error"),
    ]


def test_too_many_refused_rows_publish_nothing(llava: Path, tmp_path: Path) -> None:
    for number in range(4):  # not to be seen before the images are read
        path = next((tmp_path / "pictures").glob(f"{number}.*"))
        path.write_bytes(path.read_bytes()[:-300])
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"4 of 60 rows are refused \(bad_image 4\), more than --max-rejected 0.05"):
        build_shards(llava, out, shard_bytes=SHARD)
    assert not list(out.glob("*.tar"))
    assert not (out / "manifest.json").exists()
    assert len(rejected(out)) == 4
    report = build_shards(llava, out, shard_bytes=SHARD, max_rejected=0.1)
    assert (report.samples, report.found_done) == (56, report.shards), "nothing needs to be written again"
    assert contents(out)


def test_a_wrong_image_folder_is_told_before_anything_is_written(llava: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"missing_member 60\), that is all of them"):
        build_shards(llava, tmp_path / "out", images=tmp_path / "empty")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["rejected.jsonl"]
    assert build_shards(llava, tmp_path / "out").samples == 60


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"source": "none.jsonl"}, "SOURCE .*none.jsonl does not exist"),
        ({"source": "file"}, "SOURCE .*file ends in ''"),
        ({"source": "empty.jsonl"}, "no rows"),
        ({"source": "captions.jsonl"}, r"keys \['caption', 'url'\]; accepted are conversations"),
        ({"source": "text.json"}, "not JSON: .*one object a line or, in a .json file, a list"),
        ({"source": "cut.json"}, r"cut\.json ends at byte \d+ without the list's '\]'"),
        ({"out": "file"}, "OUT .*file cannot be a folder"),
        ({"out": "file/below"}, "OUT .*below cannot be a folder"),
        ({"images": "none"}, "--images .*none is no folder"),
        ({"name": "a.b"}, "--name"),
        ({"shard_bytes": 100}, "--shard-size must be at least"),
        ({"workers": 0}, "--workers"),
        ({"max_rejected": 5.0}, "--max-rejected"),
    ],
)
def test_wrong_use(llava: Path, tmp_path: Path, options: dict[str, Any], told: str) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty.jsonl").write_text("\n")
    write_lines(tmp_path / "captions.jsonl", [{"caption": "A cat.", "url": "https://host/a.jpg"}])
    (tmp_path / "cut.json").write_text("[" + ",\n".join(llava.read_text().splitlines()))
    (tmp_path / "text.json").write_text('{\n "a": 1\n}')
    paths = {name: tmp_path / options[name] for name in ("source", "out", "images") if name in options}
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=told):
        build_shards(**{"source": llava, "out": tmp_path / "out", **options, **paths})
    assert sorted(tmp_path.rglob("*")) == before, "something half-written is left"


def test_command(llava: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    run = partial(build.run_build, parser.parse_args([str(llava), str(tmp_path / "out"), "--shard-size", "1.5MiB"]))
    assert run() == 0
    assert "60 samples in 1 shards" in capsys.readouterr().out
    assert run() == 0
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        parser.parse_args(["a", "b", "--shard-size", "big"])
