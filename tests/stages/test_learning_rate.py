"""One factor moves the learning rates of all phases: what sweep=lr varies."""

import pytest

from kimivl.config import compose_run
from kimivl.stages.sft import SFTDataModule

PHASES = [
    {"max_length": 8, "epochs": 1, "lr": [0.01, 0.002]},
    {"max_length": 16, "epochs": 2, "lr": [0.006, 0.0]},
]


def phases(lr_scale):
    paths = {"processor": "tokenizer", "shards": "sft-*.tar", "val_shards": None, "test_shards": None}
    return SFTDataModule(**paths, phases=PHASES, lr_scale=lr_scale).phases


def test_the_factor_moves_all_rates_and_nothing_else():
    plain, scaled = phases(1.0), phases(3.0)
    assert [list(phase.lr) for phase in plain] == [[0.01, 0.002], [0.006, 0.0]]
    for before, after in zip(plain, scaled, strict=True):
        assert list(after.lr) == [pytest.approx(3 * rate) for rate in before.lr]
        assert (after.epochs, after.max_length) == (before.epochs, before.max_length)


def test_a_factor_of_zero_is_refused():
    with pytest.raises(ValueError, match="data.lr_scale=0.0: give a factor above 0"):
        phases(0.0)


@pytest.mark.parametrize("stage", ["sft", "long_cot", "rl"])
@pytest.mark.parametrize("experiment", [[], ["experiment=kimi_vl_a3b"]])
def test_every_stage_has_it(stage, experiment):
    assert compose_run(f"stage={stage}", *experiment).data.lr_scale == 1.0
