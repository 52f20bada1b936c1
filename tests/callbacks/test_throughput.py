"""Speed, waiting, utilisation, and the tokens seen: over all ranks, and over whatever a run is interrupted into."""

from dataclasses import astuple
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from in_ranks import in_ranks
from kept_rows import KeptRows
from lightning.pytorch.profilers import PassThroughProfiler
from small_fit import Case, small_fit

from kimivl.callbacks import Throughput
from kimivl.callbacks.throughput import NEXT, _Work
from kimivl.data.pack import IGNORE, PackedBatch
from kimivl.model import KimiVLConfig
from kimivl.model.flops import pack_flops
from kimivl.runtime import ranks
from kimivl.tasks.digits import write

ONE_PHASE = "data.phases=[{max_length: 256, epochs: 1, lr: [1, 1]}]"


def pack(*lengths: int, grids: tuple[tuple[int, int], ...] = (), targets: int = 2) -> PackedBatch:
    tokens = sum(lengths)
    supervised = torch.full((tokens,), IGNORE)
    supervised[:targets] = 1
    return PackedBatch(
        input_ids=torch.zeros(tokens, dtype=torch.int64),
        targets=supervised,
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(),
        pixel_values=torch.zeros(sum(h * w for h, w in grids), 3, 14, 14, dtype=torch.uint8),
        image_grid_hws=torch.tensor(grids, dtype=torch.int64).reshape(-1, 2),
        step_targets=targets,
    )


class Loop:
    """A training loop with a clock of its own, around one callback."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, every: int = 1, max_length: int | None = 20, **options) -> None:
        self.now, self.rows, self.shown, self.gathered = 0.0, [], {}, 0
        monkeypatch.setattr("time.perf_counter", lambda: self.now)
        monkeypatch.setattr(ranks, "gather", self._gather)
        self.others: list[_Work] = []
        phase = SimpleNamespace(max_length=max_length)
        self.trainer = SimpleNamespace(
            log_every_n_steps=every,
            global_step=0,
            current_epoch=0,
            profiler=PassThroughProfiler(),
            loggers=[SimpleNamespace(log_metrics=lambda metrics, step: self.rows.append((step, metrics)))],
            fit_loop=SimpleNamespace(_should_accumulate=lambda: self.accumulating),
            datamodule=SimpleNamespace(phase_of=lambda epoch: phase),
        )
        self.module = SimpleNamespace(
            device=torch.device("cpu"),
            freeze_parts=(),
            lora=None,
            model=SimpleNamespace(config=KimiVLConfig()),
            log=lambda name, value, **_: self.shown.__setitem__(name, value),
        )
        self.callback = Throughput(**options)
        self.callback.setup(self.trainer, self.module, "fit")

    def _gather(self, value):
        self.gathered += 1
        return [value, *map(astuple, self.others)] if isinstance(value, tuple) else [value]

    def batch(self, batch, seconds: float, wait: float = 0.0, accumulating: bool = False) -> None:
        with self.trainer.profiler.profile(NEXT):
            self.now += wait
        self.accumulating = accumulating
        self.callback.on_train_batch_start(self.trainer, self.module, batch, 0)
        self.now += seconds
        self.trainer.global_step += not accumulating
        self.callback.on_train_batch_end(self.trainer, self.module, None, batch, 0)


def test_steps_and_their_waits_count_and_nothing_else(monkeypatch):
    loop = Loop(monkeypatch, every=3)
    loop.now = 100.0
    loop.batch(pack(10, 6), 0.5, wait=7.0)  # the loader begins
    loop.batch(pack(16), 0.5, wait=0.5)
    loop.callback.on_validation_start(loop.trainer, loop.module)
    loop.now += 50
    loop.batch(pack(8, 4, 4), 0.5, wait=3.0)  # the clock stood, here too
    [(step, figures)] = loop.rows
    assert step == 2
    assert figures["perf/tokens_per_s"] == pytest.approx(48 / 2.0) == loop.shown["perf/tokens_per_s"]
    assert figures["perf/samples_per_s"] == pytest.approx(6 / 2.0)
    assert figures["perf/step_s"] == pytest.approx(2.0 / 3)
    assert figures["perf/data_wait"] == pytest.approx(0.25)
    assert figures["data/packing_efficiency"] == pytest.approx(48 / 60)
    assert figures["data/tokens_seen"] == 48 and isinstance(figures["data/tokens_seen"], int)
    assert "perf/mfu" not in figures


def test_accumulated_packs_are_one_step(monkeypatch):
    loop = Loop(monkeypatch)
    loop.batch(pack(16), 1.0, accumulating=True)
    assert not loop.rows
    loop.batch(pack(16), 1.0)
    [(_, figures)] = loop.rows
    assert figures["perf/step_s"] == 2.0 and figures["perf/tokens_per_s"] == 16.0


def test_ranks_add_up_and_the_slowest_has_the_time(monkeypatch):
    loop = Loop(monkeypatch)
    loop.others = [_Work(tokens=60, image_tokens=8, samples=3, room=80, steps=1, flops=0.0, seconds=4.0, waited=3.0)]
    loop.batch(pack(20, grids=((4, 4),)), 2.0)
    [(_, figures)] = loop.rows
    assert figures["perf/tokens_per_s"] == pytest.approx(80 / 4.0)
    assert figures["perf/image_tokens_per_s"] == pytest.approx((4 + 8) / 4.0)
    assert figures["perf/data_wait"] == pytest.approx(0.75) and figures["data/packing_efficiency"] == 0.8
    assert figures["data/tokens_seen"] == 80


def test_utilisation_is_of_the_packs_that_were_trained(monkeypatch):
    loop = Loop(monkeypatch, every=2, peak_tflops=1e-3)
    loop.batch(pack(10, 6, grids=((4, 6), (2, 2)), targets=5), 1.0)
    loop.batch(pack(16), 1.0)
    [(_, figures)] = loop.rows
    config = loop.module.model.config
    parts = [pack_flops(config, [10, 6], 5, [(4, 6), (2, 2)]), pack_flops(config, [16], 2)]
    flops = sum(part.training().total for part in parts)
    assert figures["perf/tflops"] == pytest.approx(flops / 2.0 / 1e12)
    assert figures["perf/mfu"] == pytest.approx(flops / 2.0 / 1e9)


def test_what_does_not_train_costs_less(monkeypatch):
    found = {}
    for name, change in {
        "all": {},
        "frozen": {"freeze_parts": ["vision_tower"]},
        "lora": {"lora": {"rank": 4}},
    }.items():
        loop = Loop(monkeypatch)
        vars(loop.module).update(change)
        loop.batch(pack(16, grids=((4, 4),)), 1.0)
        found[name] = loop.rows[0][1]["perf/tflops"]
    assert found["lora"] < found["frozen"] < found["all"]


def test_packs_of_trajectories_without_a_limit(monkeypatch):
    loop = Loop(monkeypatch, max_length=None)
    loop.batch(SimpleNamespace(pack=pack(10, 6)), 1.0)
    [(_, figures)] = loop.rows
    assert figures["perf/tokens_per_s"] == 16 and "data/packing_efficiency" not in figures


def test_ranks_meet_at_log_steps_only(monkeypatch):
    loop = Loop(monkeypatch, every=4)
    for _ in range(7):
        loop.batch(pack(16), 1.0)
    assert loop.gathered == 1
    assert loop.callback.state_dict() == {"tokens_seen": 7 * 16}  # with the three steps that no row has yet


def test_a_pack_is_not_kept_in_memory(monkeypatch):
    loop = Loop(monkeypatch, every=4)
    one = pack(10, 6, grids=((2, 2),))
    loop.batch(one, 1.0)
    kept = {tensor.untyped_storage().data_ptr() for shapes in loop.callback._shapes for tensor in shapes}
    assert not kept & {one.cu_seqlens.untyped_storage().data_ptr(), one.image_grid_hws.untyped_storage().data_ptr()}


def test_nothing_is_kept_where_no_step_logs(monkeypatch):
    loop = Loop(monkeypatch, every=0)
    loop.batch(pack(16), 1.0)
    assert not loop.callback._shapes and loop.callback.state_dict() == {"tokens_seen": 16}


@pytest.mark.parametrize("peak", [0, -1.0])
def test_a_peak_is_positive(peak):
    with pytest.raises(ValueError, match="peak_tflops"):
        Throughput(peak_tflops=peak)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write(root / "digits", sft=60, long_cot=4, rl=4, val=4, test=4, vocab_size=340)
    return root


def seen(data: Path, out: Path, save: Path | None = None, ckpt_path: Path | None = None) -> dict[int, int]:
    """Tokens seen by step; the save comes from a callback that stands before the one that counts."""
    rows = KeptRows(every=2, path=save, save_at=3)
    small_fit(data, out, Case("sft", [ONE_PHASE]), callbacks=[rows, Throughput()], ckpt_path=ckpt_path)
    return {step: row["data/tokens_seen"] for step, row in rows.rows.items() if "data/tokens_seen" in row}


def test_tokens_seen_are_the_same_on_ranks_and_after_a_resume(data, tmp_path):
    whole = seen(data, tmp_path / "one")
    assert len(whole) > 1 and sorted(whole) == list(range(1, 2 * len(whole), 2)) and whole[1] < whole[3]
    saved = tmp_path / "saved.ckpt"
    on_two = in_ranks(seen, data, tmp_path / "two", saved)
    assert on_two == [whole, whole]  # a real group, half of the packs on each
    resumed = seen(data, tmp_path / "three", ckpt_path=saved)
    assert 1 not in resumed and resumed == {step: count for step, count in whole.items() if step > 2}
