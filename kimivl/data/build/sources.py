"""The files that chats come in, read row by row: JSON lists, JSON lines, parquet and Hugging Face folders.

A row is a plain dict. Nothing is read whole: a file is walked from its start, or from a row whose place an earlier
walk has noted, so that several processes can share a large one.

    PATH.jsonl | PATH.ndjson      one JSON object a line
    PATH.json                     a list of objects, or lines as above
    PATH.parquet                  rows of a table
    FOLDER                        of JSON files, of parquet files (subfolders too), or written by `save_to_disk` of
                                  Hugging Face `datasets` (Arrow files that `state.json` lists, perhaps in splits)
"""

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

Kind = Literal["lines", "list", "parquet", "arrow"]

TEXT_SUFFIXES = (".json", ".jsonl", ".ndjson")
DESCRIPTIONS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
"""JSON files of Hugging Face folders that hold no rows."""

MAX_ROW_BYTES = 2**28
"""Of a row in JSON: more than this is a file of another kind, not a chat."""

_CHUNK = 2**20
_BATCH = 32  # rows of a table turned into Python at once; rows with photographs weigh megabytes
_BOM = codecs.BOM_UTF8
_BETWEEN = re.compile(r"[\s,\ufeff]*")
_SPLIT = re.compile(r"(?P<split>.+)-\d{5}-of-\d{5}(-[0-9a-f]+)?")  # train-00000-of-00002.parquet
_UNFIT = re.compile(r"[^A-Za-z0-9_-]+")


@dataclass(frozen=True, slots=True)
class RowFile:
    """One file of rows. `name` is its path below the source, `slug` what its sample keys start with."""

    path: Path
    name: str
    slug: str
    kind: Kind


@dataclass(frozen=True, slots=True)
class Row:
    """A row, or (with `fields` None) why its text is none. `number` counts from 0; a line's is its line number - 1.

    `offset` is where the row starts in a text file, in bytes; 0 in a table.
    """

    number: int
    offset: int
    fields: dict[str, Any] | None
    fault: str = ""


def find_files(source: Path, split: str | None = None) -> list[RowFile]:
    """The files of rows that `source` stands for, in a fixed order.

    Raises ValueError naming the path when there is none, when the files are of several kinds or splits, or when
    `split` is missing or unknown.
    """
    if not source.exists():
        raise ValueError(f"SOURCE {source} does not exist; check the path")
    root = source.parent if source.is_file() else source
    try:
        paths = _plain([source], split, source) if source.is_file() else _folder_files(source, split)
        kinds = [_kind(path) for path in paths]
    except (OSError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"SOURCE {source} cannot be read: {error!r}; copy or save it again") from error
    if not paths:
        accepted = ", ".join((*TEXT_SUFFIXES, ".parquet"))
        raise ValueError(f"SOURCE {source} holds no rows; it needs {accepted} files or a `save_to_disk` folder")
    names = [path.relative_to(root).as_posix() for path in paths]
    return [RowFile(*parts) for parts in zip(paths, names, _slugs(names), kinds, strict=True)]


def read_rows(file: RowFile, first: int = 0, offset: int = 0) -> Iterator[Row]:
    """The rows of `file` from row `first` on, which starts at byte `offset` of a text file.

    Raises ValueError naming the file where it is damaged in a way that hides the rows behind.
    """
    try:
        if file.kind == "lines":
            yield from _lines(file.path, first, offset)
        elif file.kind == "list":
            yield from _list_items(file.path, first, offset)
        elif file.kind == "parquet":
            yield from _parquet_rows(file.path, first)
        else:
            yield from _arrow_rows(file.path, first)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file.path} cannot be read as {file.kind}: {error}; write or copy it again") from error


def _folder_files(folder: Path, split: str | None) -> list[Path]:
    if (folder / "dataset_dict.json").is_file():
        splits = json.loads((folder / "dataset_dict.json").read_bytes())["splits"]
        return _saved_files(folder / _choose(split, splits, folder))
    if (folder / "state.json").is_file():
        return _plain(_saved_files(folder), split, folder)
    tables = sorted(path for path in folder.rglob("*.parquet") if path.is_file())
    texts = sorted(path for path in folder.iterdir() if path.suffix in TEXT_SUFFIXES and path.name not in DESCRIPTIONS)
    if tables and texts:
        raise ValueError(f"SOURCE {folder} holds {texts[0].name} beside {tables[0].name}; name the one to build from")
    named = {path: match["split"] for path in tables if (match := _SPLIT.fullmatch(path.stem))}
    if len(set(named.values())) < (2 if split is None else 1):
        return _plain(tables or texts, split, folder)
    chosen = _choose(split, sorted(set(named.values())), folder)
    return [path for path in tables if named.get(path) == chosen]


def _plain(paths: list[Path], split: str | None, source: Path) -> list[Path]:
    """The files of a source without splits."""
    if split is not None:
        raise ValueError(f"SOURCE {source} has no splits; leave --split {split} out")
    return paths


def _choose(split: str | None, splits: list[str], folder: Path) -> str:
    """`split`, when it is one of `splits`."""
    if split not in splits:
        asked = f"no split {split!r}" if split else "several splits"
        raise ValueError(f"SOURCE {folder} has {asked}; choose with --split out of {splits}")
    return split


def _saved_files(folder: Path) -> list[Path]:
    """The Arrow files of a dataset that `save_to_disk` wrote."""
    state = json.loads((folder / "state.json").read_bytes())
    if state.get("_indices_data_files"):
        raise ValueError(f"{folder} selects its rows by an index; save it again after `dataset.flatten_indices()`")
    return [folder / Path(entry["filename"]).name for entry in state["_data_files"]]


def _kind(path: Path) -> Kind:
    if path.suffix == ".parquet":
        return "parquet"
    if path.suffix == ".arrow":
        return "arrow"
    if path.suffix in TEXT_SUFFIXES:
        with path.open("rb") as stream:
            start = stream.read(_CHUNK).removeprefix(_BOM).lstrip()
        return "list" if path.suffix == ".json" and start.startswith(b"[") else "lines"
    accepted = ", ".join((*TEXT_SUFFIXES, ".parquet", ".arrow"))
    raise ValueError(f"SOURCE {path} ends in {path.suffix!r}, which is none of {accepted}; unpack or convert it")


def _slugs(names: list[str]) -> list[str]:
    """A short ASCII name without dots for each file, different for different files."""
    slugs: dict[str, None] = {}  # a set that keeps the order
    for name in names:
        slug = _UNFIT.sub("-", name.rpartition(".")[0])[-60:].strip("-_") or "rows"
        while slug in slugs:
            slug = f"{slug}-{len(slugs)}"
        slugs[slug] = None
    return list(slugs)


def _lines(path: Path, number: int, offset: int) -> Iterator[Row]:
    with path.open("rb") as stream:
        stream.seek(offset)
        while line := stream.readline(MAX_ROW_BYTES + 1):
            if len(line) > MAX_ROW_BYTES:
                raise ValueError(f"{path}: line {number + 1} has more than {MAX_ROW_BYTES} bytes; is this JSON lines?")
            content = line.removeprefix(_BOM).strip()
            if content:
                yield _row(number, offset, content)
            number, offset = number + 1, offset + len(line)


def _row(number: int, offset: int, content: bytes) -> Row:
    try:
        return _checked(number, offset, json.loads(content))
    except (ValueError, RecursionError) as error:  # covers JSONDecodeError and UnicodeDecodeError
        return Row(number, offset, None, f"the row is not JSON: {error}")


def _checked(number: int, offset: int, value: Any) -> Row:
    if not isinstance(value, dict):
        return Row(number, offset, None, f"a row must be an object, not {type(value).__name__}")
    return Row(number, offset, value)


def _list_items(path: Path, number: int, offset: int) -> Iterator[Row]:
    """Items of a JSON list, parsed one by one out of a window over the file."""
    decoder = json.JSONDecoder()
    with path.open("rb") as stream:
        stream.seek(offset)
        window = _Window(path, stream, offset)
        window.skip("[" if offset == 0 else "")
        while not window.ends_list():
            start = window.offset
            yield _checked(number, start, window.take(decoder))
            number += 1
            window.skip()


class _Window:
    """The part of a text file that is being parsed; `offset` is the byte where the text not yet taken starts."""

    def __init__(self, path: Path, stream: Any, offset: int) -> None:
        self.path, self.stream, self.offset = path, stream, offset
        # Bytes that are not UTF-8 become lone surrogates: the window keeps count of bytes, and the row is refused.
        self._decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
        self._text, self._place, self._ended = "", 0, False

    def skip(self, opening: str = "") -> None:
        """Over white space and commas, and over the `opening` bracket."""
        while True:
            match = _BETWEEN.match(self._text, self._place)
            self._advance(match.end() if match else self._place)
            if self._place < len(self._text) or not self._more(_CHUNK):
                break
        if opening and self._text.startswith(opening, self._place):
            self._advance(self._place + len(opening))
            self.skip()

    def ends_list(self) -> bool:
        """Whether the closing bracket is next. Raises ValueError at the end of a file that has none."""
        if self._place >= len(self._text):
            raise ValueError(f"{self.path} ends at byte {self.offset} without the list's ']'; copy it again")
        return self._text[self._place] == "]"

    def take(self, decoder: json.JSONDecoder) -> Any:
        """The value that starts here."""
        wanted = _CHUNK
        while True:
            try:
                value, end = decoder.raw_decode(self._text, self._place)
            except (json.JSONDecodeError, RecursionError) as error:
                # The value may go on behind the window; twice as much each time keeps the repeated work linear.
                if len(self._text) - self._place > MAX_ROW_BYTES or not self._more(wanted):
                    raise ValueError(f"{self.path} is not JSON in the item at byte {self.offset}: {error}") from error
                wanted *= 2
            else:
                self._advance(end)
                return value

    def _advance(self, place: int) -> None:
        self.offset += len(self._text[self._place : place].encode("utf-8", "surrogateescape"))
        self._place = place

    def _more(self, size: int) -> bool:
        data = b"" if self._ended else self.stream.read(size)
        self._text, self._place = self._text[self._place :] + self._decode(data, not data), 0
        self._ended = not data
        return bool(data)


def _parquet_rows(path: Path, first: int) -> Iterator[Row]:
    with pq.ParquetFile(path, buffer_size=_CHUNK, pre_buffer=False) as table:
        start = 0
        for group in range(table.num_row_groups):
            behind = start + table.metadata.row_group(group).num_rows
            if behind > first:
                batches = table.iter_batches(_BATCH, row_groups=[group], use_threads=False)
                yield from _batch_rows(batches, start, first)
            start = behind


def _arrow_rows(path: Path, first: int) -> Iterator[Row]:
    with pa.memory_map(str(path)) as stream, pa.ipc.open_stream(stream) as batches:
        yield from _batch_rows(iter(batches), 0, first)


def _batch_rows(batches: Iterator[pa.RecordBatch], start: int, first: int) -> Iterator[Row]:
    """Rows from number `first` on out of `batches`, of which the first starts at row `start`."""
    for batch in batches:
        for place in range(max(first - start, 0), batch.num_rows, _BATCH):
            for number, fields in enumerate(batch.slice(place, _BATCH).to_pylist(), start + place):
                yield Row(number, 0, fields)
        start += batch.num_rows
