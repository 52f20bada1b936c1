"""Ask an engine for responses and write each down when it is there, with a progress bar."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from kimivl.data.pack import EncodedSample
from kimivl.data.sample import SampleError
from kimivl.rl.rollout import RolloutEngine
from kimivl.rl.types import Request, Response, Sampling
from kimivl.synthesize.journal import Journal

NO_PROMPT = EncodedSample(
    torch.zeros(0, dtype=torch.long),
    torch.zeros(0, dtype=torch.long),
    torch.zeros(0, 3, 14, 14, dtype=torch.uint8),
    torch.zeros(0, 2, dtype=torch.long),
)
"""Of problems for engines that read text and pictures themselves."""

Place = tuple[int, int]
"""A problem and the number of a trajectory of it."""
Make = Callable[[Place], Request]


class Requests(Sequence[Request]):
    """The requests of some places; each is made when it is taken, so that their pictures are not all in memory."""

    def __init__(self, places: Sequence[Place], make: Make) -> None:
        self.places, self.make = places, make

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, number: int) -> Request: ...
    @overload
    def __getitem__(self, number: slice) -> Requests: ...
    def __getitem__(self, number: int | slice) -> Request | Requests:
        if isinstance(number, slice):
            return Requests(self.places[number], self.make)
        return self.make(self.places[number])


@dataclass(frozen=True, slots=True)
class Asking:
    """One round of questions.

    Args:
        engine: who is asked. sampling: how. make: place -> request.
        batch: requests that are made at a time; None makes each when the engine takes it.
        journal: where responses go. failures: the file where failed requests go.
        describe: place -> further fields of the record.
    """

    engine: RolloutEngine
    sampling: Sampling
    make: Make
    batch: int | None
    journal: Journal
    failures: Path
    describe: Callable[[Place], dict[str, Any]]

    def ask(self, places: Sequence[Place], title: str, earlier: int, console: Console) -> Counter[str]:
        """Ask for the responses of ``places``; returns the requests that failed, by reason.

        Raises:
            ValueError: the engine cannot go on; what was answered is in the journal.
        """
        failed: Counter[str] = Counter()
        columns = (TextColumn(title), BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"))
        figures = TextColumn("{task.fields[figures]}")
        with Progress(*columns, TimeRemainingColumn(), figures, console=console) as progress:
            task = progress.add_task(title, total=earlier + len(places), completed=earlier, figures="")
            tokens = 0
            for place, response in self._answers(places):
                if response.stop == "error":
                    self._note_failure(place, response.text, failed)
                else:
                    self.journal.append(self._record(place, response))
                    tokens += len(response)
                elapsed = progress.tasks[task].elapsed or 0.0
                said = f"{tokens / elapsed:,.0f} tok/s" if elapsed else ""
                said += f"  {failed.total()} failed" if failed else ""
                progress.update(task, advance=1, figures=said)
        return failed

    def _answers(self, places: Sequence[Place]) -> Iterator[tuple[Place, Response]]:
        if self.batch is None:
            for number, response in self.engine.stream(Requests(places, self.make), self.sampling):
                yield places[number], response
            return
        for first in range(0, len(places), self.batch):
            made: list[tuple[Place, Request]] = []
            for place in places[first : first + self.batch]:
                try:
                    made.append((place, self.make(place)))
                except SampleError as fault:
                    yield place, Response((), f"{fault.reason}: {fault}", "error")
            for number, response in self.engine.stream([request for _, request in made], self.sampling):
                yield made[number][0], response

    def _record(self, place: Place, response: Response) -> dict[str, Any]:
        known = {"problem": place[0], "sample": place[1], **self.describe(place)}
        return known | {"stop": response.stop, "tokens": len(response), "text": response.text}

    def _note_failure(self, place: Place, text: str, failed: Counter[str]) -> None:
        failed[text.partition(":")[0]] += 1
        known = {"problem": place[0], "sample": place[1], **self.describe(place)}
        with self.failures.open("a", encoding="utf-8") as file:
            file.write(json.dumps(known | {"error": text}, ensure_ascii=False) + "\n")
