"""Loggers that write to the run's folder: CSV and TensorBoard. A run that is gone on with continues their files."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from kimivl.tracking.folder import CSV_FILE, TENSORBOARD_FOLDER, append, cut_half_a_row, write_whole
from kimivl.tracking.media import Picture, Shows


def fresh(metrics: Mapping[str, Any], step: int | None, logged: Mapping[str, int]) -> dict[str, Any]:
    """Those of ``metrics`` that no earlier process of the run has logged for ``step``.

    A run that was killed goes on from its last checkpoint and repeats the steps after it, bit for bit; in a curve they
    stand once.

    Args:
        logged: the last step that each metric was logged for.
    """
    return {name: value for name, value in metrics.items() if step is None or step > logged.get(name, -1)}


class CsvRun(CSVLogger):
    """``metrics.csv``, a row for each time that something is logged.

    Lightning's own removes the file when a run goes on.

    Args:
        output_dir: folder of the run.
    """

    def __init__(self, output_dir: str) -> None:
        super().__init__(output_dir, name="", version="", flush_logs_every_n_steps=1)
        self._logged: dict[str, int] | None = None

    @property
    @rank_zero_only
    def experiment(self) -> Any:
        if self._experiment is None:
            self._experiment = _ContinuedCsv(self.log_dir)
        return self._experiment

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        _ = self.experiment  # which takes away half a row
        if self._logged is None:
            self._logged = _last_steps(Path(self.log_dir) / CSV_FILE)
        if new := fresh(metrics, step, self._logged):
            super().log_metrics(new, step)


class _ContinuedCsv(ExperimentWriter):
    def _check_log_dir_exists(self) -> None:
        """Where Lightning removes the file of an earlier process: take over its columns, and what it has in full."""
        path = Path(self.metrics_file_path)
        if not path.is_file():
            return
        cut_half_a_row(path)
        self.metrics_keys, _ = _read(path)
        if not self.metrics_keys:
            path.unlink()

    def save(self) -> None:
        """Rows that the disk has no room for wait for the next time. Lightning would leave half a row, and for a new
        column empty the file before it writes all of it again."""
        path, columns = Path(self.metrics_file_path), sorted({*self.metrics_keys, *chain(*self.metrics)})
        if columns == self.metrics_keys:
            append(path, _as_csv(self.metrics, columns))
        else:
            earlier = _read(path)[1] if path.is_file() else []
            write_whole(path, _as_csv([dict(zip(columns, columns, strict=True)), *earlier, *self.metrics], columns))
        self.metrics, self.metrics_keys = [], columns


def _as_csv(rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> str:
    text = io.StringIO(newline="")
    csv.DictWriter(text, columns).writerows(rows)
    return text.getvalue()


def _read(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and rows."""
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        return list(reader.fieldnames or []), list(reader)


def _last_steps(path: Path) -> dict[str, int]:
    """The last step of each column of a file that may not be there."""
    last: dict[str, int] = {}
    if path.is_file():
        for row in _read(path)[1]:
            step = int(row.pop("step") or -1)
            last |= {name: max(step, last.get(name, -1)) for name, value in row.items() if value}
    return last


class TensorBoardRun(TensorBoardLogger, Shows):
    """TensorBoard's files in ``tensorboard/``: scalars, histograms, and tables as text with their pictures.

    Args:
        output_dir: folder of the run; see it with ``tensorboard --logdir FOLDER``.
    """

    def __init__(self, output_dir: str) -> None:
        super().__init__(output_dir, name=TENSORBOARD_FOLDER, version="", flush_secs=5)
        self._logged: dict[str, int] | None = None

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """As a text: TensorBoard's table of hyperparameters takes single values only."""
        if not self._earlier():
            lines = [f"    {name}: {value}" for name, value in _flat(params)]
            self.experiment.add_text("config", "\n".join(lines), 0)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        if new := fresh(metrics, step, self._earlier()):
            super().log_metrics(new, step)

    def _earlier(self) -> dict[str, int]:
        if self._logged is None:
            self._logged = _last_events(Path(self.log_dir))
        return self._logged

    def show_table(self, name: str, rows: Sequence[dict[str, Any]], step: int | None) -> None:
        if not fresh({f"{name}/text_summary": rows}, step, self._earlier()):
            return
        columns = [key for key, value in rows[0].items() if not isinstance(value, Picture | None)]
        lines = [[_in_a_cell(row[column]) for column in columns] for row in rows]
        table = [columns, ["---"] * len(columns), *lines]
        self.experiment.add_text(name, "\n".join(f"| {' | '.join(line)} |" for line in table), step)
        for number, row in enumerate(rows):
            images = [value.small() for value in row.values() if isinstance(value, Picture)]
            for image in filter(None, images):
                self.experiment.add_image(f"{name}/{number}", np.asarray(image), step, dataformats="HWC")

    def show_histogram(self, name: str, values: np.ndarray, span: tuple[float, float], step: int | None) -> None:
        if len(values) and fresh({name: values}, step, self._earlier()):
            self.experiment.add_histogram(name, values, step, bins=np.linspace(*span, 21))


def _last_events(folder: Path) -> dict[str, int]:
    """The last step of each tag in TensorBoard's files of earlier processes."""
    if not any(folder.glob("events.*")):
        return {}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 1, "tensors": 1, "histograms": 1, "images": 1})
    events.Reload()
    tags = events.Tags()
    last = {tag: events.Scalars(tag)[-1].step for tag in tags["scalars"]}
    last |= {tag: events.Tensors(tag)[-1].step for tag in tags["tensors"]}
    return last | {tag: events.Histograms(tag)[-1].step for tag in tags["histograms"]}


def _in_a_cell(value: Any) -> str:
    return " ".join(str(value).replace("|", "\\|").split())


def _flat(params: Any, path: str = "") -> list[tuple[str, Any]]:
    if not isinstance(params, Mapping):
        return [(path.removesuffix("."), params)]
    return [pair for name, inner in params.items() for pair in _flat(inner, f"{path}{name}.")]
