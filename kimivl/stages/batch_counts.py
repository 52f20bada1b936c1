"""Lightning counts the batches of a rank; a run that goes on with other ranks has other batches of the same packs."""

from __future__ import annotations

from typing import Any


def recount_batches(checkpoint: dict[str, Any], world_size: int) -> None:
    """Make the batch counts in ``checkpoint``, of the ranks that saved it, those of ``world_size`` ranks, in place.

    An optimiser step has as many packs as before (the datamodules check that). Example: 3 steps of 2 packs are 3
    batches on each of 2 ranks, and 6 of a single one; counts left as they are would put the next step's end between
    its packs. What was begun and not yet completed is that one batch whose end hook saved the checkpoint.
    """
    before = checkpoint.get("world_size", world_size)
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    for counts in (progress["total"], progress["current"]) if before != world_size else ():
        unfinished = counts["processed"] - counts["completed"]
        for name in ("ready", "started", "processed"):
            counts[name] = counts[name] * before // world_size
        counts["completed"] = counts["processed"] - unfinished
