"""Runs a function in several real processes that form a gloo group, as the ranks of a run do."""

import os
import socket
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from fork_server import SERVER

from kimivl.runtime.launch import find_place, joined

HANG_S = 1200
"""Many callers run all their cases in one call, which is minutes on a busy machine: only a real hang waits so long."""


def in_ranks(function: Callable[..., Any], *arguments: Any, ranks: int = 2) -> list[Any]:
    """What ``function(*arguments)`` returns on each rank; all must be picklable. A failure shows all tracebacks."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        started = [
            SERVER.Process(target=_rank, args=(rank, ranks, port, Path(folder), function, arguments), daemon=True)
            for rank in range(ranks)
        ]
        for process in started:
            process.start()
        for process in started:
            process.join(HANG_S)
        late = [process for process in started if process.is_alive()]
        for process in late:
            process.kill()
        wrong = [path.read_text() for path in sorted(Path(folder).glob("*.txt"))]
        assert not wrong and not late, "\n".join([*wrong, f"{len(late)} of {ranks} ranks hang"])
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


def _rank(
    rank: int, ranks: int, port: int, folder: Path, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in own.items()} | {"MASTER_ADDR": "127.0.0.1"})
    try:
        with joined(find_place(), "cpu", timedelta(minutes=10)):
            torch.save(function(*arguments), folder / f"{rank}.pt")
    except BaseException:
        (folder / f"{rank}.txt").write_text(f"rank {rank}:\n{traceback.format_exc()}")
