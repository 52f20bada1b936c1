"""The watch hears of each batch and response, and is patient where nothing of the kind is to be expected."""

import pytest
from lightning.pytorch import Callback

from kimivl.callbacks import Watchdog

STEP, GENERATION = 120.0, 600.0


class Heard:
    """In the place of a watch."""

    def __init__(self) -> None:
        self.marks: list[tuple[float | None, str]] = []

    def mark(self, limit: float | None, doing: str, key: str) -> None:
        assert key == {STEP: "step_minutes", GENERATION: "generation_minutes"}[limit]
        self.marks.append((limit, doing))


def watchdog() -> tuple[Watchdog, Heard]:
    one, heard = Watchdog(STEP / 60, GENERATION / 60), Heard()
    one.watch = heard
    return one, heard


def test_each_batch_is_a_sign_and_set_up_and_end_may_take_longer(fit):
    one, heard = watchdog()
    trainer = fit(callbacks=[one])
    starts = [doing for limit, doing in heard.marks if doing and doing.startswith("training") and limit == STEP]
    assert len(starts) == trainer.global_step and starts[2].startswith("training, step 3, on a pack of")
    assert heard.marks[0] == (GENERATION, "setting up") and heard.marks[-1] == (GENERATION, "ending")


def test_each_response_is_a_sign_and_rollouts_have_their_own_limit(fit):
    one, heard = watchdog()

    class Between(Callback):
        """What holds when the rollouts are over, and the reference is made."""

        def on_train_start(self, *args) -> None:
            self.limit = heard.marks[-1][0]

    between = Between()
    rl = ["stage=rl", "data.phases=[{epochs: 1, lr: [1e-2, 1e-2]}]", "data.problems=4", "data.responses=4"]
    fit(*rl, "data.updates=2", "data.max_new_tokens=8", callbacks=[one, between])
    told = [doing for limit, doing in heard.marks if doing and doing.startswith("drawing") and limit == GENERATION]
    assert told[0] == "drawing responses" and "drawing responses (16 of 16 are there)" in told
    assert between.limit == GENERATION


@pytest.mark.parametrize("settings", [{"step_minutes": 0}, {"generation_minutes": -1.0}])
def test_wrong_limits_are_named(settings):
    with pytest.raises(ValueError, match=f"callbacks.watchdog.{next(iter(settings))}="):
        Watchdog(**settings)
