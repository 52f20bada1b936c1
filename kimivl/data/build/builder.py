"""`kimivl build SOURCE OUT`: chats with images become size-bounded WebDataset shards.

A first pass over the rows sums up what each will take in a tar, without reading image files, and cuts the rows into
shards (`layout.py`); then worker processes write the shards. So the bytes of every shard depend on the input alone,
and a build that was stopped goes on with the shards that are missing (`partial.py`).
"""

import argparse
import contextlib
import errno
import hashlib
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from kimivl.data.build.convert import Converter
from kimivl.data.build.layout import GRAINS, RECORD, Run, Span, capacity, count_reasons, cut, measure, note_rejected
from kimivl.data.build.partial import REJECTED, PartialBuild, ShardCounts, claim, totals
from kimivl.data.build.shapes import Refusal, draft
from kimivl.data.build.sources import RowFile, find_files, read_rows
from kimivl.data.sample import Sample, SampleError
from kimivl.data.shards import write_shard
from kimivl.data.workers import run_parallel

SHARD_BYTES = 512 * 10**6
MAX_REJECTED = 0.05
_NAME = re.compile(r"[A-Za-z0-9_-]+")
_AGAIN = "run the same command again, it goes on with the shards that are missing"

Report = Callable[[str, int, int | None], None]
"""Told of progress: the phase, how many rows are done, and out of how many (None: not known)."""


@dataclass(frozen=True, slots=True)
class BuildReport:
    """What is in OUT after a build. `found_done` shards were made before: all of them, if nothing was to do."""

    out: Path
    shards: int
    bytes: int
    rows: int
    samples: int
    rejected: dict[str, int]
    found_done: int


def build_shards(
    source: Path,
    out: Path,
    *,
    images: Path | None = None,
    name: str | None = None,
    split: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    workers: int = 1,
    source_name: str = "",
    max_rejected: float = MAX_REJECTED,
    overwrite: bool = False,
    report: Report = lambda phase, done, total: None,
) -> BuildReport:
    """Write `OUT/NAME-000000.tar`, ..., `rejected.jsonl` and, last, `manifest.json`.

    Args:
        source: a file or folder of rows (`sources.py`) in one of the shapes of `shapes.py`.
        images: the folder below which image paths must lie; the folder of `source` if None.
        name: what shard names start with; the name of `source` if None.
        split: which split of a folder that has several.
        shard_bytes: no shard is larger, unless a single sample is.
        workers: processes that write shards.
        source_name: the `source` of samples whose row has none.
        max_rejected: the share of refused rows above which nothing is published.
        overwrite: start anew, and replace a set that is in OUT.
        report: called with the progress.

    Raises ValueError naming the path or the option, and the remedy.
    """
    source, out = Path(source).absolute(), Path(out).absolute()
    _check_numbers(shard_bytes, workers, max_rejected)
    files = find_files(source, split)
    root = Path(images) if images else source if source.is_dir() else source.parent
    name = name or "-".join(_NAME.findall(source.stem)).strip("-_") or "samples"
    _check_places(source, out, root, name)
    _check_shape(source, files)
    converter = Converter(root.resolve(), source_name)
    settings: dict[str, Any] = {"source": str(source), "images": str(converter.images), "name": name, "split": split}
    settings |= {"shard_bytes": shard_bytes, "source_name": source_name, "fingerprint": _fingerprint(files)}
    with claim(out), _failures_told(out):
        return _Build(PartialBuild(out, name), settings, files, converter, workers, max_rejected, report).run(overwrite)


def _check_numbers(shard_bytes: int, workers: int, max_rejected: float) -> None:
    if shard_bytes < 2 * RECORD:
        raise ValueError(f"--shard-size must be at least {2 * RECORD} bytes, got {shard_bytes}")
    if workers < 1:
        raise ValueError(f"--workers must be at least 1, got {workers}")
    if not 0 <= max_rejected <= 1:
        raise ValueError(f"--max-rejected is a share from 0 to 1, got {max_rejected}")


def _check_places(source: Path, out: Path, images: Path, name: str) -> None:
    if not images.is_dir():
        raise ValueError(f"--images {images} is no folder; give the folder that the image paths start from")
    if out.resolve() == source.resolve():
        raise ValueError(f"OUT {out} is SOURCE itself; choose another folder")
    if not _NAME.fullmatch(name):
        raise ValueError(f"--name may have letters, digits, '-' and '_', got {name!r}")


def _check_shape(source: Path, files: list[RowFile]) -> None:
    """One of the first rows must be in a known shape: a wrong file is told at once, not row by row."""
    fault = "there are no rows; check that it is the right file"
    for row in islice(chain.from_iterable(map(read_rows, files)), 50):
        try:
            if row.fields is not None:
                draft(row.fields)
                return
            fault = f"{row.fault}; rows are one object a line or, in a .json file, a list of objects"
        except Refusal as refusal:
            if refusal.reason != "unknown_shape":
                return
            fault = refusal.detail
    raise ValueError(f"SOURCE {source}: {fault}")


def _fingerprint(files: list[RowFile]) -> str:
    """Of the files of rows: names, sizes and times of change."""
    states = [(file.name, file.kind, file.path.stat().st_size, file.path.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr(states).encode()).hexdigest()[:16]


@contextlib.contextmanager
def _failures_told(out: Path) -> Iterator[None]:
    """Failures of the disk or of a worker process, as one sentence with the remedy."""
    try:
        yield
    except BrokenProcessPool as error:
        raise ValueError(f"a worker process died (out of memory?); use fewer --workers and {_AGAIN}") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ValueError(f"the disk of OUT {out} is full; free some space and {_AGAIN}") from error
        raise ValueError(f"OUT {out} cannot be written ({error}); repair that and {_AGAIN}") from error


@dataclass(frozen=True, slots=True)
class _Build:
    """One call of `build_shards`: its folder, its settings, and what it works with."""

    folder: PartialBuild
    settings: dict[str, Any]
    files: list[RowFile]
    converter: Converter
    workers: int
    max_rejected: float
    report: Report

    def run(self, overwrite: bool) -> BuildReport:
        """Plan or go on, write what is missing, publish."""
        manifest = self.folder.manifest()
        # A plan beside a manifest is a build that is to replace the set, or had all but ended: that one goes on.
        if not overwrite and manifest and not self.folder.plan() and self.settings.items() <= manifest.items():
            self.folder.discard()
            return self._reported(manifest, len(manifest["shards"]))
        shards = None if overwrite else self._begun(manifest)
        if shards is None:
            shards = self._planned()
        self.folder.clear_leftovers()
        counts, found_done = self._written(shards)
        whole = totals(counts)
        if whole["samples"] == 0 or sum(whole["rejected"].values()) > self.max_rejected * whole["rows"]:
            self.folder.write_rejected([self.folder.ledger(number) for number in range(len(counts))])
            raise self._too_many(whole["rejected"], whole["rows"], "build with --overwrite")
        return self._reported(self.folder.publish(counts, self.settings), found_done)

    def _begun(self, manifest: dict[str, Any] | None) -> list[list[Span]] | None:
        """The plan of a build that was begun with these settings; None where OUT holds nothing of the kind.

        Raises ValueError where it holds another build.
        """
        plan = self.folder.plan()
        if plan and plan["settings"] == self.settings:
            named = {file.name: file for file in self.files}
            return [[Span(named[name], *numbers) for name, *numbers in spans] for spans in plan["shards"]]
        earlier = plan["settings"] if plan else manifest
        if earlier:
            changed = [name for name, value in self.settings.items() if earlier.get(name) != value]
            told = ", ".join("state of SOURCE" if name == "fingerprint" else name for name in changed)
            held = f"a build {'begun' if plan else 'finished'} with another {told}"
        elif foreign := self.folder.published():
            held = f"{foreign[0]} of an unknown build"
        else:
            return None
        raise ValueError(f"OUT {self.folder.out} holds {held}; choose another folder, or start anew with --overwrite")

    def _planned(self) -> list[list[Span]]:
        """Measure all rows, cut them into shards, and note that down."""
        self.folder.begin()
        room = capacity(self.settings["shard_bytes"])
        ledgers = [self.folder.folder / f"rows-{place:06d}.jsonl" for place in range(len(self.files))]
        try:
            runs = self._measured(ledgers, room // GRAINS)
        except ValueError:  # a damaged source: nothing is begun
            self.folder.discard()
            raise
        rows, refused = sum(run.rows for run in runs), sum(run.refused for run in runs)
        if refused == rows or refused > self.max_rejected * rows:
            reasons = count_reasons(ledgers)
            self.folder.write_rejected(ledgers)
            self.folder.discard()
            raise self._too_many(reasons, rows, "run again")
        shards = list(cut(iter(runs), room))
        self.folder.note_plan(
            self.settings, [[(s.file.name, s.first, s.stop, s.offset) for s in spans] for spans in shards]
        )
        return shards

    def _measured(self, ledgers: list[Path], grain: int) -> list[Run]:
        """The runs of all files, in order."""
        found: list[list[Run]] = [[] for _ in self.files]
        rows = 0
        if len(self.files) == 1:  # in this process, so that the progress of a large file is seen
            for run in measure(self.files[0], ledgers[0], self.converter, grain):
                found[0].append(run)
                rows += run.rows
                self.report("reading rows", rows, None)
        else:
            work = partial(_measure_file, converter=self.converter, grain=grain)
            for place, runs in run_parallel(work, list(zip(self.files, ledgers, strict=True)), self.workers):
                found[place] = runs
                rows += sum(run.rows for run in runs)
                self.report("reading rows", rows, None)
        return list(chain.from_iterable(found))

    def _written(self, shards: list[list[Span]]) -> tuple[list[ShardCounts], int]:
        """Counts of all shards, the missing ones written now; and how many were there before."""
        done = {number: counts for number in range(len(shards)) if (counts := self.folder.finished(number))}
        found_done = len(done)
        missing = [number for number in range(len(shards)) if number not in done]
        total = sum(span.stop - span.first for spans in shards for span in spans)
        rows = sum(counts.rows for counts in done.values())
        self.report("writing shards", rows, total)
        work = partial(_write, folder=self.folder, converter=self.converter)
        for place, counts in run_parallel(work, [(number, shards[number]) for number in missing], self.workers):
            done[missing[place]] = counts
            rows += counts.rows
            self.report("writing shards", rows, total)
        return [done[number] for number in range(len(shards))], found_done

    def _too_many(self, reasons: dict[str, int], rows: int, remedy: str) -> ValueError:
        refused = sum(reasons.values())
        told = ", ".join(f"{reason} {count}" for reason, count in sorted(reasons.items()))
        limit = f"more than --max-rejected {self.max_rejected:g}" if refused < rows else "that is all of them"
        return ValueError(
            f"{refused} of {rows} rows are refused ({told}), {limit}; nothing is published: "
            f"see {self.folder.out / REJECTED}, repair the rows and {remedy}, or raise --max-rejected"
        )

    def _reported(self, manifest: dict[str, Any], found_done: int) -> BuildReport:
        rows, samples, rejected = (manifest[name] for name in ("rows", "samples", "rejected"))
        size = sum(shard["bytes"] for shard in manifest["shards"])
        return BuildReport(self.folder.out, len(manifest["shards"]), size, rows, samples, rejected, found_done)


def _measure_file(item: tuple[RowFile, Path], converter: Converter, grain: int) -> list[Run]:
    """In a worker: the runs of one file."""
    return list(measure(*item, converter, grain))


def _write(item: tuple[int, list[Span]], folder: PartialBuild, converter: Converter) -> ShardCounts:
    """In a worker: make one shard with its ledger of refused rows, and note that it is complete."""
    number, spans = item
    path, reasons = folder.shard(number), Counter[str]()
    with folder.ledger(number).open("w", encoding="utf-8") as ledger:
        write_shard(_samples(spans, converter, ledger, reasons), path)
    samples = reasons.pop("", 0)
    if not samples:
        path.unlink()
    counts = ShardCounts(samples + reasons.total(), samples, path.stat().st_size if samples else 0, dict(reasons))
    folder.finish(number, counts)
    return counts


def _samples(spans: list[Span], converter: Converter, ledger: TextIO, reasons: Counter[str]) -> Iterator[Sample]:
    """The samples of a shard; `reasons` counts the refused rows, and the others under the empty name."""
    for span in spans:
        for row in read_rows(span.file, span.first, span.offset):
            if row.number >= span.stop:
                break
            try:
                sample = converter.sample(row, span.file)
            except SampleError as error:
                note_rejected(ledger, row, span.file, error)
                reasons[error.reason] += 1
            else:
                reasons[""] += 1
                yield sample


def run_build(arguments: argparse.Namespace) -> int:
    """`kimivl build` with the options of `build_options.py`; returns the exit code."""
    console = Console(stderr=True, soft_wrap=True)
    columns = ("[bold]{task.description}", BarColumn(24), TextColumn("{task.completed:,.0f} rows"), TimeElapsedColumn())
    shown = Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal)
    named = ("images", "name", "split", "workers", "source_name", "max_rejected", "overwrite")
    options = {name: getattr(arguments, name) for name in named}
    started = time.perf_counter()
    try:
        with shown as bar:
            task = bar.add_task("looking at SOURCE", total=None)
            built = build_shards(
                arguments.source,
                arguments.out,
                shard_bytes=arguments.shard_size,
                report=lambda phase, done, total: bar.update(task, description=phase, completed=done, total=total),
                **options,
            )
    except KeyboardInterrupt:
        console.print(f"stopped; {_AGAIN}")
        return 130
    _summarize(built, time.perf_counter() - started)
    return 0


def _summarize(built: BuildReport, seconds: float) -> None:
    """What was built, on standard output."""
    if built.shards == built.found_done:
        print(f"{built.out}: nothing to do, it holds this set already")
    print(
        f"{built.out}: {built.samples:,} samples in {built.shards} shards, {built.bytes / 1e6:,.1f} MB, {seconds:.1f} s"
    )
    if built.rejected:
        told = ", ".join(f"{reason} {count:,}" for reason, count in built.rejected.items())
        print(f"{sum(built.rejected.values()):,} of {built.rows:,} rows refused ({told}): {built.out / REJECTED}")
