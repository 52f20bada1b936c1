"""Rows out of files of every kind, from the start and from any row on."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimivl.data.build import sources
from kimivl.data.build.sources import find_files, read_rows

ROWS = [{"id": number, "text": 'é\n"]},[{' * (number % 5), "parts": [{"deep": [number]}]} for number in range(70)]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """`rows` in the format that the name asks for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=11)
    elif path.suffix == ".arrow":
        table = pa.Table.from_pylist(rows)
        with pa.ipc.new_stream(path, table.schema) as stream:
            stream.write_table(table, max_chunksize=9)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "a.parquet", "a.arrow"])
def test_rows_from_any_place(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_CHUNK", 16)  # items, characters and escapes go over the edges of chunks
    (file,) = find_files(write_rows(tmp_path / name, ROWS))
    rows = list(read_rows(file))
    assert [row.fields for row in rows] == ROWS
    assert [row.number for row in rows] == list(range(len(ROWS)))
    for place in (1, 10, 11, 37, 69):
        rest = read_rows(file, rows[place].number, rows[place].offset)
        assert [row.fields for row in rest] == ROWS[place:]


@settings(max_examples=40)
@given(
    rows=st.lists(st.dictionaries(st.text(), st.text() | st.integers() | st.lists(st.text()))), seed=st.integers(1, 9)
)
def test_json_lists_are_walked_as_json_reads_them(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], seed: int
) -> None:
    path = tmp_path_factory.mktemp("list") / "rows.json"
    path.write_text(json.dumps(rows, ensure_ascii=seed % 2 == 0, indent=seed % 3 or None), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "_CHUNK", seed)
        (file,) = find_files(path)
        assert [row.fields for row in read_rows(file)] == rows


def test_lines_with_faults_are_rows_with_a_fault(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n{"a": \n[3]\n{"a": "\xff"}\n{"a": 5}')
    found = [(row.number, row.fields) for row in read_rows(find_files(path)[0])]
    assert found == [(0, {"a": 1}), (2, None), (3, None), (4, None), (5, {"a": 5})]


def test_lines_under_the_name_json(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", ROWS).rename(tmp_path / "a.json")
    assert [row.fields for row in read_rows(find_files(path)[0])] == ROWS


@pytest.mark.parametrize("text", ['[{"a": 1}, {"a": 2', '[{"a": 1}, {"a" 2}]', '[{"a": 1}'])
def test_a_damaged_list_is_told_with_its_byte(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"a\.json .*byte \d+"):
        list(read_rows(find_files(path)[0]))


def test_a_damaged_table_is_told(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.parquet", ROWS)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"a\.parquet cannot be read as parquet"):
        list(read_rows(find_files(path)[0]))


def test_a_folder_of_text_files(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.json", "a.jsonl", "state of things.ndjson"):
        write_rows(tmp_path / name, ROWS[:3])
    (tmp_path / "dataset_infos.json").write_text("{}")
    files = find_files(tmp_path)
    assert [file.name for file in files] == ["a.json", "a.jsonl", "b.jsonl", "state of things.ndjson"]
    assert len({file.slug for file in files}) == 4
    assert not any("." in file.slug or " " in file.slug for file in files)


def test_splits_of_parquet_folders(tmp_path: Path) -> None:
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        write_rows(tmp_path / "data" / f"{name}.parquet", ROWS[:3])
    with pytest.raises(ValueError, match=r"--split out of \['test', 'train'\]"):
        find_files(tmp_path)
    with pytest.raises(ValueError, match=r"no split 'val'"):
        find_files(tmp_path, "val")
    names = [file.name for file in find_files(tmp_path, "train")]
    assert names == ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"]


def save_to_disk(folder: Path, rows: list[dict[str, Any]]) -> None:
    """A folder as Hugging Face `datasets` writes it."""
    files = [f"data-{number:05d}-of-00002.arrow" for number in range(2)]
    for number, name in enumerate(files):
        write_rows(folder / name, rows[number::2])
    state = {"_data_files": [{"filename": name} for name in files], "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")


def test_saved_datasets(tmp_path: Path) -> None:
    save_to_disk(tmp_path / "one", ROWS)
    read = [row.fields for file in find_files(tmp_path / "one") for row in read_rows(file)]
    assert read == ROWS[::2] + ROWS[1::2]

    save_to_disk(tmp_path / "many" / "train", ROWS)
    (tmp_path / "many" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(ValueError, match="several splits; choose with --split"):
        find_files(tmp_path / "many")
    assert [file.name for file in find_files(tmp_path / "many", "train")] == [
        "train/data-00000-of-00002.arrow",
        "train/data-00001-of-00002.arrow",
    ]


@pytest.mark.parametrize("asked", [".", "a.jsonl"])
def test_a_split_of_a_source_that_has_none(tmp_path: Path, asked: str) -> None:
    write_rows(tmp_path / "a.jsonl", ROWS[:1])
    with pytest.raises(ValueError, match="has no splits; leave --split train out"):
        find_files(tmp_path / asked, "train")


@pytest.mark.parametrize(
    ("names", "asked", "told"),
    [
        ([], "nothing", "does not exist"),
        (["a.csv"], "a.csv", r"'\.csv'"),
        (["a.csv"], ".", "holds no rows"),
        (["a.jsonl", "b.parquet"], ".", "beside"),
    ],
)
def test_wrong_sources(tmp_path: Path, names: list[str], asked: str, told: str) -> None:
    for name in names:
        write_rows(tmp_path / name, ROWS[:1])
    with pytest.raises(ValueError, match=told):
        find_files(tmp_path / asked)


def test_rows_selected_by_an_index_are_refused(tmp_path: Path) -> None:
    save_to_disk(tmp_path, ROWS)
    state = json.loads((tmp_path / "state.json").read_text()) | {"_indices_data_files": [{"filename": "indices.arrow"}]}
    (tmp_path / "state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match="flatten_indices"):
        find_files(tmp_path)
