"""Proof from the files of a run that each sample was used exactly as often as planned, over ranks, kills and resumes.

The delivery logs say what the ranks took, ``epoch-000.parquet`` what each epoch was to use; both must agree, and with
each other. Neither the data nor the config of the run is needed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kimivl.data.audit.delivery import Deliveries, History
from kimivl.data.audit.epochs import LEFT_OUT, MISSING, TRAINED, epoch_file

AUDIT_FOLDER = "audit"
LENGTH_EDGES = 2.0 ** np.arange(0, 20.5, 0.5)
"""Bins of sample lengths in tokens: two to the octave."""
SHOWN = 3
"""Samples, packs or steps that a problem names."""

_COLUMNS = ["sample", "source", "tokens", "patches", "uses", "status", "pack", "rank", "step"]


@dataclass(frozen=True, slots=True)
class SourceShare:
    """What an epoch trained of one source; ``share`` is of the epoch's tokens."""

    name: str
    samples: int
    tokens: int
    share: float


@dataclass(frozen=True, slots=True)
class EpochFigures:
    """What a finished epoch did.

    ``samples`` are those of the index, ``planned`` and ``trained`` count uses; ``quarantined`` (uses) and ``left_out``
    (samples) are counted by reason, as is ``index_dropped``: what is not in the index. ``efficiency`` is trained
    tokens / (packs x ``max_length``), ``fills (packs,)`` the same of each pack, ``lengths`` a histogram of trained
    samples over ``LENGTH_EDGES``, of those with images and those without.
    """

    samples: int
    max_length: int
    planned: int
    trained: int
    quarantined: dict[str, int]
    left_out: dict[str, int]
    index_dropped: dict[str, int]
    tokens: int
    efficiency: float
    fills: np.ndarray
    sources: list[SourceShare]
    lengths: dict[str, np.ndarray]


@dataclass(slots=True)
class EpochReport:
    """An epoch: the steps and packs that its logs prove, what is wrong with them, and figures once it is finished."""

    epoch: int
    first_step: int = 0
    last_step: int = 0
    packs_per_step: int = 0
    packs: int = 0
    delivered: int = 0
    world_sizes: list[int] = field(default_factory=list)
    figures: EpochFigures | None = None
    problems: list[str] = field(default_factory=list)

    @property
    def steps(self) -> int:
        return self.last_step - self.first_step + 1 if self.last_step else 0


@dataclass(slots=True)
class AuditReport:
    """All epochs of a run; ``attempts`` are process starts, ``problems`` those of no single epoch."""

    run_dir: Path
    attempts: int
    epochs: list[EpochReport]
    problems: list[str]

    @property
    def all_problems(self) -> list[str]:
        of_epochs = [f"epoch {report.epoch}: {problem}" for report in self.epochs for problem in report.problems]
        return self.problems + of_epochs

    @property
    def verified(self) -> bool:
        return not self.all_problems


def verify(run_dir: Path) -> AuditReport:
    """Check a run that ended, was killed or still goes on.

    Raises:
        ValueError: when ``run_dir`` holds no audit.
    """
    folder = run_dir / AUDIT_FOLDER
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; name the output folder of a supervised stage that has trained")
    history = History(folder)
    written = {int(path.stem.split("-")[1]) for path in folder.glob("epoch-*.parquet")}
    epochs = sorted(written.union(history.epochs))
    reports = [_verify_epoch(folder, history, epoch, in_progress=epoch == epochs[-1]) for epoch in epochs]
    return AuditReport(run_dir, history.attempts, reports, [*history.problems, *_gaps(history, reports)])


def _gaps(history: History, reports: list[EpochReport]) -> Iterator[str]:
    """Steps between epochs, or before the first one, that no log has."""
    last = 0
    for report in reports:
        if report.steps and report.first_step > last + 1:
            yield f"steps {last + 1} to {report.first_step - 1} are in no delivery log"
        if report.steps and report.first_step <= last:
            yield f"epoch {report.epoch} begins at step {report.first_step}, inside the epoch before it"
        last = max(last, report.last_step)


def _verify_epoch(folder: Path, history: History, epoch: int, in_progress: bool) -> EpochReport:
    delivered, path = history.epoch(epoch), epoch_file(folder, epoch)
    report = EpochReport(epoch, delivered=len(delivered), world_sizes=history.settings(epoch, "world_size"))
    in_progress = in_progress and not path.exists()
    if len(delivered):
        _check_packs(report, delivered, history.settings(epoch, "packs_per_step"), in_progress)
    if in_progress:
        _check_uses_so_far(report, delivered)
    elif not path.exists():
        report.problems.append(f"{path.name} is missing, though a later epoch has begun")
    else:
        try:
            table = pq.read_table(path, columns=_COLUMNS)
        except (pa.ArrowInvalid, pa.ArrowKeyError, OSError) as error:
            report.problems.append(f"{path.name} cannot be read: {str(error).splitlines()[0]}")
        else:
            _check_finished(report, delivered, table, path)
    return report


def _check_packs(report: EpochReport, delivered: Deliveries, packs_per_step: list[int], in_progress: bool) -> None:
    """Each step has its packs, each of them once; the last step of a run that was killed may lack some."""
    if len(packs_per_step) > 1:
        report.problems.append(f"its attempts took different numbers of packs per step: {packs_per_step}")
    per_step = report.packs_per_step = packs_per_step[0]
    report.first_step, report.last_step = int(delivered.step.min()), int(delivered.step.max())
    stray = delivered.pack // per_step != delivered.step - report.first_step
    if stray.any():
        report.problems.append(f"packs in steps that are not theirs: {_some(np.unique(delivered.pack[stray]))}")
    # A pack that two ranks took shows here, one that a rank took twice in the uses of its samples.
    taken = np.unique(delivered.pack.astype(np.int64) << 32 | delivered.rank) >> 32
    packs, times = np.unique(taken, return_counts=True)
    if (times > 1).any():
        report.problems.append(f"packs taken more than once: {_some(packs[times > 1])}")
    # Beyond the deliveries made there is no need to look, whatever a damaged log says of its steps.
    absent = np.setdiff1d(np.arange(min(report.steps * per_step, len(delivered) + 1)), packs)
    torn = absent // per_step == report.steps - 1
    if in_progress and torn.any():  # the process was killed before all ranks had logged the step
        absent = absent[~torn]
        report.last_step -= 1
    report.packs = len(packs) if not in_progress else int((packs < report.steps * per_step).sum())
    if len(absent):
        report.problems.append(f"packs that no rank took: {_some(absent)}")


def _check_uses_so_far(report: EpochReport, delivered: Deliveries) -> None:
    samples, first, times = np.unique(delivered.sample, return_index=True, return_counts=True)
    doubled = samples[times > delivered.uses[first]]
    if len(doubled):
        report.problems.append(f"{len(doubled)} samples used more often than planned: numbers {_some(doubled)}")


def _check_finished(report: EpochReport, delivered: Deliveries, table: pa.Table, path: Path) -> None:
    about: dict[str, Any] = json.loads(pq.read_schema(path).metadata[b"kimivl"])
    rows = _Rows(table)
    owners, first = np.unique(rows.sample, return_index=True)
    if not np.array_equal(owners, np.arange(about["samples"])) or (np.diff(rows.sample) < 0).any():
        report.problems.append(f"{path.name} does not have the {about['samples']} samples of the index, in order")
        return
    if (report.steps, report.packs, report.packs_per_step) != (about["steps"], about["packs"], about["packs_per_step"]):
        report.problems.append(
            f"{report.steps} steps of {report.packs_per_step} packs are logged, {report.packs} packs in all; "
            f"planned were {about['steps']} of {about['packs_per_step']}, {about['packs']} in all"
        )
    report.problems += _use_problems(delivered, rows.uses[first], path)
    report.problems += _row_problems(delivered, rows, path.name)
    report.figures = _figures(rows, int(rows.uses[first].sum()), about)
    if (report.figures.fills > 1).any():
        full = np.flatnonzero(report.figures.fills > 1)
        report.problems.append(f"packs longer than {about['max_length']} tokens: {_some(full)}")


class _Rows:
    """The columns of an epoch's file; ``status`` and ``source`` as codes of ``statuses`` and ``sources``."""

    sample: np.ndarray
    tokens: np.ndarray
    patches: np.ndarray
    uses: np.ndarray
    pack: np.ndarray
    rank: np.ndarray
    step: np.ndarray

    def __init__(self, table: pa.Table) -> None:
        for name in ("sample", "tokens", "patches", "uses", "pack", "rank", "step"):
            setattr(self, name, table[name].to_numpy())
        self.status, self.statuses = _codes(table, "status")
        self.source, self.sources = _codes(table, "source")
        self.delivered = (self.step >= 0) & (self.pack >= 0)

    def has(self, *statuses: str) -> np.ndarray:
        """(rows,) which of them have one of these statuses."""
        return np.isin(self.status, [code for code, name in enumerate(self.statuses) if name in statuses])

    def count(self, chosen: np.ndarray) -> dict[str, int]:
        """Statuses of the chosen rows, counted."""
        counts = np.bincount(self.status[chosen], minlength=len(self.statuses)).tolist()
        return {name: count for name, count in zip(self.statuses, counts, strict=True) if count}


def _codes(table: pa.Table, name: str) -> tuple[np.ndarray, list[str]]:
    column = table[name].unify_dictionaries().combine_chunks()
    if isinstance(column, pa.ChunkedArray):
        column = column.chunk(0)
    return column.indices.to_numpy(), column.dictionary.to_pylist()


def _use_problems(delivered: Deliveries, planned: np.ndarray, path: Path) -> Iterator[str]:
    """Samples that the log has more or less often than planned."""
    known = (delivered.sample >= 0) & (delivered.sample < len(planned))
    if not known.all():
        yield f"samples that the index does not have: {_some(np.unique(delivered.sample[~known]))}"
    more = np.bincount(delivered.sample[known], minlength=len(planned)) - planned
    for what, wrong in (("missing", more < 0), ("used more often than planned", more > 0)):
        if wrong.any():
            yield f"{wrong.sum():,} samples {what}: {_keys(path, np.flatnonzero(wrong)[:SHOWN], int(wrong.sum()))}"


def _row_problems(delivered: Deliveries, rows: _Rows, name: str) -> Iterator[str]:
    """Rows that the log does not bear out."""
    made, codes = rows.delivered, {name: code for code, name in enumerate(rows.statuses)}
    expected = np.array([codes.get(status, -1) for status in (*delivered.reasons, TRAINED)])[delivered.hole]
    same = made.sum() == len(delivered) and all(
        np.array_equal(getattr(rows, column)[made], getattr(delivered, column))
        for column in ("sample", "pack", "rank", "step", "uses")
    )
    if not same or not np.array_equal(rows.status[made], expected):
        yield f"{name} and the delivery logs differ"
    unexplained = ~made & ~np.where(rows.uses > 0, rows.has(MISSING), rows.has(*LEFT_OUT))
    if unexplained.any():
        yield f"{name} does not say what became of samples {_some(np.unique(rows.sample[unexplained]))}"


def _figures(rows: _Rows, planned: int, about: dict[str, Any]) -> EpochFigures:
    made, trained = rows.delivered, rows.has(TRAINED)
    max_length, packs = about["max_length"], about["packs"]
    tokens = np.bincount(rows.pack[trained], rows.tokens[trained], minlength=packs)
    lengths, with_images = np.clip(rows.tokens, LENGTH_EDGES[0], LENGTH_EDGES[-1]), rows.patches > 0
    return EpochFigures(
        samples=about["samples"],
        max_length=max_length,
        planned=planned,
        trained=int(trained.sum()),
        quarantined=rows.count(made & ~trained),
        left_out=rows.count(~made & ~rows.has(MISSING)),
        index_dropped=about["index_dropped"],
        tokens=int(rows.tokens[trained].sum(dtype=np.int64)),
        efficiency=float(tokens.sum() / (packs * max_length)),
        fills=tokens / max_length,
        sources=_shares(rows, trained),
        lengths={
            "text": np.histogram(lengths[trained & ~with_images], LENGTH_EDGES)[0],
            "with images": np.histogram(lengths[trained & with_images], LENGTH_EDGES)[0],
        },
    )


def _shares(rows: _Rows, trained: np.ndarray) -> list[SourceShare]:
    """The mixture, largest source first."""
    source = rows.source[trained]
    samples = np.bincount(source, minlength=len(rows.sources))
    tokens = np.bincount(source, rows.tokens[trained], minlength=len(rows.sources))
    shares = [
        SourceShare(name, int(samples[code]), int(tokens[code]), float(tokens[code] / max(1, tokens.sum())))
        for code, name in enumerate(rows.sources)
    ]
    return sorted(shares, key=lambda share: -share.tokens)


def _keys(path: Path, samples: np.ndarray, count: int) -> str:
    table = pq.read_table(path, columns=["sample", "key"], filters=[("sample", "in", samples.tolist())])
    keys = dict(zip(table["sample"].to_pylist(), table["key"].to_pylist(), strict=True))
    return ", ".join(keys.values()) + (" ..." if count > len(samples) else "")


def _some(numbers: np.ndarray) -> str:
    return ", ".join(map(str, numbers[:SHOWN].tolist())) + (f" ... ({len(numbers)})" if len(numbers) > SHOWN else "")
