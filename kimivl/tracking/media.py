"""Tables of examples and histograms, for the loggers that show them."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from PIL import Image

LONGEST_SIDE = 448
"""Pixels of a picture in a table at most; larger ones are made smaller."""
MOST_TEXT = 20_000
"""Characters of a cell at most; what is left out is counted there."""


@dataclass(frozen=True, slots=True)
class Picture:
    """An encoded image (PNG, JPEG, WebP) as a cell of a table."""

    data: bytes

    def small(self) -> Image.Image | None:
        """The picture in at most ``LONGEST_SIDE`` pixels a side; None where it cannot be read."""
        try:
            image = Image.open(io.BytesIO(self.data)).convert("RGB")
        except (OSError, ValueError, Image.DecompressionBombError):
            return None
        image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
        return image


class Shows(ABC):
    """A logger that shows more than numbers."""

    @abstractmethod
    def show_table(self, name: str, rows: Sequence[dict[str, Any]], step: int | None) -> None:
        """``rows`` have the same keys; a ``Picture`` is shown as one."""

    @abstractmethod
    def show_histogram(self, name: str, values: np.ndarray, span: tuple[float, float], step: int | None) -> None:
        """(n,) values between the ends of ``span``, in 20 bins."""


def shows_media(loggers: Sequence[Logger]) -> bool:
    """Whether any logger shows tables, histograms and pictures; without one there is no need to make them."""
    return any(isinstance(logger, Shows) for logger in loggers)


@rank_zero_only
def log_table(loggers: Sequence[Logger], name: str, rows: Sequence[dict[str, Any]], step: int | None = None) -> None:
    """A table of examples, to the loggers that show tables."""
    for logger in loggers:
        if isinstance(logger, Shows) and rows:
            logger.show_table(name, [{key: _bounded(value) for key, value in row.items()} for row in rows], step)


def _bounded(value: Any) -> Any:
    if isinstance(value, str) and len(value) > MOST_TEXT:
        return f"{value[:MOST_TEXT]} ... and {len(value) - MOST_TEXT:,} characters more"
    return value


@rank_zero_only
def log_histogram(
    loggers: Sequence[Logger], name: str, values: np.ndarray, span: tuple[float, float], step: int | None = None
) -> None:
    """(n,) values between the ends of ``span`` as a histogram, to the loggers that show histograms."""
    for logger in loggers:
        if isinstance(logger, Shows):
            logger.show_histogram(name, values, span, step)
