"""Counts of batches when a run goes on with other ranks."""

import pytest

from kimivl.stages.batch_counts import recount_batches


def counts(processed: int, unfinished: int) -> dict[str, int]:
    return dict.fromkeys(("ready", "started", "processed"), processed) | {"completed": processed - unfinished}


def checkpoint(total: int, current: int, unfinished: int, **world: int) -> dict:
    progress = {"total": counts(total, unfinished), "current": counts(current, unfinished), "is_last_batch": False}
    return {"loops": {"fit_loop": {"epoch_loop.batch_progress": progress}}} | world


@pytest.mark.parametrize("unfinished", [0, 1])  # saved between batches; by the hook at the end of one
@pytest.mark.parametrize("before, after", [(2, 1), (1, 2), (4, 2), (2, 4), (3, 3)])
def test_the_same_steps_on_other_ranks(before, after, unfinished):
    packs = 12  # of a step
    saved = checkpoint(7 * packs // before, 3 * packs // before, unfinished, world_size=before)
    recount_batches(saved, after)
    assert saved["loops"] == checkpoint(7 * packs // after, 3 * packs // after, unfinished)["loops"]


def test_a_checkpoint_that_does_not_say_is_left_alone():
    saved = checkpoint(8, 4, 1)
    recount_batches(saved, 2)
    assert saved == checkpoint(8, 4, 1)
