"""Requests to a server, a bounded number of them under way."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable


async def in_lanes(count: int, lane: Callable[[], Awaitable[None]]) -> None:
    """Run ``lane`` ``count`` times beside one another. When one fails the others are stopped, and have ended when its
    error is raised."""
    workers = [asyncio.ensure_future(lane()) for _ in range(count)]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
