"""The benchmark of a training step: both sides compute the same, and the command shows, compares and survives."""

import json

import numpy as np
import pytest
import torch

from benchmarks import device, kernel_cases, kernels, plain, sides, train_step, turns
from benchmarks.packs import ready_packs, real_packs
from benchmarks.realistic_set import realistic_set
from benchmarks.sides import Ours, Settings, Window
from kimivl.data.pack import IGNORE

TORCHS_OWN = torch.optim._muon._zeropower_via_newtonschulz  # before a side replaces it
MINI = [
    "model=tiny",
    "model.text_config.num_hidden_layers=2",
    "model.vision_config.num_hidden_layers=1",
    "model.text_config.hidden_size=32",
    "model.text_config.intermediate_size=64",
    "model.vocab_size=512",
    "model.text_config.vocab_size=512",
]
WINDOW = Window(length=400, pictures=True, packs=2)


@pytest.fixture(scope="module")
def settings():
    return Settings(MINI)


@pytest.fixture(scope="module")
def ours(settings):
    return Ours(settings)


@pytest.fixture(scope="module")
def plainly(settings):
    return plain.Plain(settings)


def test_ready_packs_are_full_the_same_each_time_and_have_pictures_on_request(settings):
    first, again = (ready_packs(settings.config, 3000, True, 3) for _ in range(2))
    for pack, other in zip(first, again, strict=True):
        assert pack.num_tokens == 3000
        assert torch.equal(pack.input_ids, other.input_ids) and torch.equal(pack.pixel_values, other.pixel_values)
        media = pack.input_ids == settings.config.media_placeholder_token_id
        assert int(media.sum()) * 4 == len(pack.pixel_values) == int(pack.image_grid_hws.prod(1).sum())
        assert not (media & (pack.targets != IGNORE)).roll(1).any() or int(media.sum()) == 0
        assert pack.cu_seqlens.diff().diff().min() >= 0
    assert sum(len(pack.pixel_values) for pack in first) > 0
    supervised = [int((pack.targets != IGNORE).sum()) for pack in first]
    assert {pack.step_targets for pack in first} == {sum(supervised)}
    assert not any(len(pack.pixel_values) for pack in ready_packs(settings.config, 3000, False, 3))


@pytest.mark.parametrize("layout", plain.LAYOUTS)
@pytest.mark.parametrize("pictures", [False, True])
def test_the_plain_side_computes_what_ours_does(ours, plainly, layout, pictures):
    window = Window(WINDOW.length, pictures, WINDOW.packs)
    mine, theirs = ours.measure(window, "packed"), plainly.measure(window, layout)
    assert mine.loss == pytest.approx(theirs.loss, rel=1e-5)
    assert mine.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-4)
    assert mine.tokens == theirs.tokens == 800
    assert mine.flops == theirs.flops > 0


def test_steps_leave_the_weights_as_they_are(ours):
    first, second = (ours.measure(WINDOW, "packed") for _ in range(2))
    assert first.loss == pytest.approx(second.loss, rel=1e-6)
    assert ours.optimizer.state  # it did update


def test_an_optimiser_in_the_backward_pass_has_the_same_norm_and_refuses_more_packs(ours):
    overrides = [*MINI, "optimizer=muon_in_backward", "trainer.gradient_clip_val=null"]
    single = Window(256, False, 1)
    within = Ours(Settings(overrides))
    inside, outside = within.measure(single, "packed"), ours.measure(single, "packed")
    assert inside.grad_norm == pytest.approx(outside.grad_norm, rel=1e-4)
    assert 0 < inside.muon_s < inside.seconds
    with pytest.raises(ValueError, match="--packs 1"):
        within.measure(WINDOW, "packed")


def test_samples_of_a_pack_have_their_own_pictures(settings):
    [pack] = ready_packs(settings.config, 3000, True, 1)
    media = settings.config.media_placeholder_token_id
    parts = [plain.sample_of(pack, number, media) for number in range(pack.num_samples)]
    for ids, _, pixels, grids in parts:
        assert int((ids == media).sum()) * 4 == len(pixels) == int(grids.prod(1).sum())
    for column, whole in enumerate((pack.input_ids, pack.targets, pack.pixel_values, pack.image_grid_hws)):
        assert torch.equal(torch.cat([part[column] for part in parts]), whole)


def test_newton_schulz_in_float32_is_torchs_own_but_for_rounding():
    grad = torch.from_numpy(np.random.default_rng(0).normal(size=(24, 16))).float()
    arguments = ((3.4445, -4.7750, 2.0315), 5, 1e-7)
    found, wanted = plain.newton_schulz_float32(grad, *arguments), TORCHS_OWN(grad, *arguments).float()
    torch.testing.assert_close(found, wanted, atol=0.05, rtol=0.1)


class InProcess:
    """In the place of ``turns.Remote``: a process of its own would take seconds to begin."""

    alive = True

    def __init__(self, make, *arguments):
        self.thing = make(*arguments)

    def call(self, method, *arguments):
        kind, value = turns._attempt(lambda: getattr(self.thing, method)(*arguments))
        if kind == "memory":
            raise turns.OutOfMemory(value)
        assert kind == "result", value
        return value

    def close(self):
        pass


@pytest.fixture
def in_process(monkeypatch):
    monkeypatch.setattr(train_step, "Remote", InProcess)


def test_the_command_measures_compares_shows_and_writes(in_process, tmp_path, capsys):
    options = ["--lengths", "256", "--repeats", "2", "--warmup", "0", "--json", str(tmp_path / "report.json")]
    assert train_step.main([*MINI, *options]) == 0
    shown = capsys.readouterr().out
    table = shown[shown.index("One step") :]
    assert all(len(line) <= 110 for line in table.splitlines()) and "256 images" in table
    report = json.loads((tmp_path / "report.json").read_text())
    rows = {(row["window"]["pictures"], row["side"]): row for row in report["rows"]}
    assert len(rows) == 8 and all(len(row["steps"]) == 2 for row in rows.values())
    assert len(rows[False, "masked"]["ours_is_faster"]) == 2
    assert report["about"]["torch"] == torch.__version__


def test_a_side_that_computes_something_else_is_named(in_process, monkeypatch, capsys):
    right = plain.Plain._masked
    monkeypatch.setattr(plain.Plain, "_masked", lambda self, pack: right(self, pack) * 1.01)
    options = ["--lengths", "256", "--repeats", "1", "--warmup", "0", "--content", "text", "--sides", "ours,masked"]
    assert train_step.main([*MINI, *options]) == 1
    assert "loss of masked and ours differ by 1.0e-02" in capsys.readouterr().out


def test_a_side_without_memory_says_so_and_the_others_go_on(in_process, monkeypatch, capsys):
    def starved(self, pack):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 64 GiB")

    monkeypatch.setattr(plain.Plain, "_masked", starved)
    options = ["--lengths", "256", "--repeats", "1", "--warmup", "0", "--content", "text"]
    assert train_step.main([*MINI, *options]) == 0
    shown = capsys.readouterr().out
    assert "out of memory: CUDA out of memory. Tried to allocate 64 GiB" in shown
    assert "at least 2.0x padded" in shown and "1.5x masked" not in shown


@pytest.mark.slow
def test_the_real_data_path_gives_full_packs_with_and_without_pictures(tmp_path, in_process, capsys):
    data = realistic_set(tmp_path, 40, shards=2)
    pictured, texts = (next(real_packs(data, 4096, pictures, 1, 0)) for pictures in (True, False))
    assert len(pictured.pixel_values) and not len(texts.pixel_values)
    options = ["--lengths", "4096", "--repeats", "1", "--warmup", "0", "--content", "text", "--data", "real"]
    assert train_step.main([*MINI, *options, "--samples", "40", "--out", str(tmp_path)]) == 0
    assert "real data path" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--lengths", "0"], "'0' is not a number of at least 1"),
        (["--sides", "theirs"], "there is no 'theirs', only ours, padded, sorted, masked"),
    ],
)
def test_a_wrong_option_is_named(arguments, said, capsys):
    with pytest.raises(SystemExit):
        train_step.main(arguments)
    assert said in capsys.readouterr().err


def test_a_precision_or_device_that_is_not_there_is_named(capsys):
    assert train_step.main(["trainer.precision=16-mixed"]) == 2
    assert "choose 32-true, bf16-mixed or bf16-true" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert train_step.main(["trainer=gpu"]) == 2
        assert "no CUDA device" in capsys.readouterr().err


class Counter:
    """Something to have in another process."""

    def __init__(self, start):
        if start < 0:
            raise ValueError("start is negative")
        self.value = start

    def add(self, number):
        self.value += number
        return self.value

    def starve(self):
        raise MemoryError("not enough memory: you tried to allocate 1 TB")


@pytest.mark.slow
def test_a_side_lives_in_a_process_of_its_own():
    remote = turns.Remote(Counter, 1)
    assert [remote.call("add", 1) for _ in range(2)] == [2, 3]
    with pytest.raises(turns.OutOfMemory, match="1 TB"):
        remote.call("starve")
    assert remote.call("add", 1) == 4
    remote.close()
    assert not remote.alive
    with pytest.raises(ValueError, match="start is negative"):
        turns.Remote(Counter, -1)


@pytest.mark.parametrize(
    ("parts", "versions"),
    [
        ("muon", {"torch.optim.Muon", "batched"}),
        pytest.param(
            "attention,experts,loss",
            {"dense mask", "sdpa", "eager", "sorted", "full logits", "chunked"},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_kernels_agree_with_their_plain_versions(tmp_path, capsys, parts, versions):
    assert kernels.main(["--cpu", "--only", parts, "--repeats", "1", "--json", f"{tmp_path}/k"]) == 0
    shown = capsys.readouterr().out
    assert all(len(line) <= 110 for line in shown[shown.index("Forward and backward") :].splitlines())
    rows = json.loads((tmp_path / "k").read_text())["rows"]
    assert versions <= {row["version"] for row in rows}
    assert all(row["difference"] is None or row["difference"] < 1e-3 for row in rows)


def test_a_wrong_kernel_is_named(monkeypatch, capsys):
    def broken(*given):
        case = kernel_cases.muon(*given)
        right = case.versions["batched"]
        case.versions["batched"] = lambda: [move * 1.1 for move in right()]
        return iter([case])

    monkeypatch.setitem(kernels.CASES, "muon", broken)
    assert kernels.main(["--cpu", "--only", "muon", "--repeats", "1"]) == 1
    assert "muon, batched: 1.0e-01 is more than rounding explains" in capsys.readouterr().out


def test_peak_memory_sees_what_was_there_for_a_moment():
    memory = device.PeakMemory(torch.device("cpu"))
    torch.ones(50_000_000).sum()
    read = memory.read()
    assert 150e6 < read["peak"] - read["before"] < 400e6


def test_running_out_of_memory_is_told_from_other_errors():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    assert device.is_out_of_memory(caught.value)
    assert not device.is_out_of_memory(RuntimeError("shapes do not match"))


def test_a_configuration_without_a_vocabulary_gets_one():
    config = Settings(["model=tiny"]).config
    assert config.vocab_size == config.text_config.vocab_size == sides.VOCABULARY
    assert config.media_placeholder_token_id < config.vocab_size
