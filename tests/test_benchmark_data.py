"""The benchmark of the data layer measures what it says: equal work on all sides, every sample once."""

import collections
import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import data as command
from benchmarks import figures, throughput
from benchmarks.peers import webdataset_greedy
from benchmarks.realistic_set import _Corpus, _Photographs, _samples, realistic_set
from benchmarks.workload import Workload
from kimivl.data.shards import expand, read_sample, scan_shard
from kimivl.data.storage import Storage

SAMPLES = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("benchmark")


@pytest.fixture(scope="module")
def data(folder):
    return realistic_set(folder, SAMPLES, shards=3)


def stored(data):
    storage = Storage()
    shards = expand(data.shards)
    records = [(shard, record) for shard in shards for record in scan_shard(storage, shard, pytest.fail)]
    return [read_sample(storage, shard, record.offset, record.size) for shard, record in records]


def segments(packs):
    """Each sample of the packs as its tokens, counted."""
    return collections.Counter(
        tuple(piece.tolist()) for pack in packs for piece in pack.input_ids.tensor_split(pack.cu_seqlens[1:-1].long())
    )


def test_the_set_is_the_same_wherever_it_is_made(data):
    corpus, photographs = _Corpus(), _Photographs()
    assert list(_samples(SAMPLES, corpus, photographs)) == stored(data)
    assert photographs.made.images == data.images > SAMPLES / 2


def test_both_tokenizers_give_the_same_ids_and_special_tokens_lie_behind_the_ranks(data):
    fast, plain = (Workload(data, decode=False, tokens=tokens) for tokens in ("tiktoken", "transformers"))
    assert segments(throughput.SIDES["kimivl"].packs(fast)) == segments(throughput.SIDES["kimivl"].packs(plain))
    assert fast.encoder.stop_id >= len(fast.tokenizer) - 256


@pytest.mark.parametrize("decode", [False, True])
def test_a_peer_makes_the_same_samples_and_pixels(data, decode):
    workload = Workload(data, decode)
    ours, theirs = (list(packs(workload)) for packs in (throughput.kimivl_packs, webdataset_greedy.packs))
    assert segments(ours) == segments(theirs)
    assert segments(ours).total() == SAMPLES
    patches = {sum(len(pack.pixel_values) for pack in packs) for packs in (ours, theirs)}
    assert len(patches) == 1 and (patches != {0}) == decode


def test_the_path_of_transformers_has_float_pixels(data):
    [*packs] = throughput.transformers_images(Workload(data, decode=True))
    assert {str(pack.pixel_values.dtype) for pack in packs} == {"torch.float32"}
    assert sum(pack.num_samples for pack in packs) == SAMPLES


def test_greedy_packs_keep_the_limit_and_lose_nothing():
    lengths = np.random.default_rng(0).integers(1, 100, 200).tolist()
    buffer = [range(length) for length in lengths]
    packs = []
    while buffer:
        packs.append(webdataset_greedy.take_greedily(buffer, 100))
    assert all(sum(map(len, pack)) <= 100 for pack in packs)
    assert sorted(len(sample) for pack in packs for sample in pack) == sorted(lengths)


def test_cost_of_a_sample_grows_with_what_it_holds():
    columns = {"tokens": np.array([1000, 2000, 1000]), "patches": np.array([0, 0, 4000]), "images": np.array([0, 0, 1])}
    text, longer, pictured = figures.sample_flops(columns)
    assert 2 * text < longer < 2.1 * text  # attention is quadratic, and small here
    assert 0.6 < (pictured - text) / 4000 / (6 * 2.58e9 * 0.25) < 1.5  # about one text token for each image token


def test_memory_of_a_worker_holds_its_packs(data, folder):
    found = figures.worker_memory(str(folder), SAMPLES, times=2, max_length=32_768)
    assert found["samples"] == 2 * SAMPLES
    assert found["pack_bytes"] / 4 < found["bytes"] < 3 * found["pack_bytes"] + 300 * 10**6


@pytest.fixture
def in_process(monkeypatch):
    """The command's measurements in this process; their own would each take seconds to begin."""

    def run(module, *arguments):
        if module == "benchmarks.figures":
            return figures.FIGURES[arguments[0]](**json.loads(arguments[1]))
        return throughput.measure(arguments[0], Path(arguments[1]), int(arguments[2]), arguments[3] == "decode")

    monkeypatch.setattr(command, "_process", run)
    names = ("kimivl", "webdataset")
    sides = {name: throughput.SIDES[name]._replace(modes=(False,)) for name in names}
    monkeypatch.setattr(command, "SIDES", sides)


def test_the_command_measures_shows_and_writes(data, folder, tmp_path, in_process, capsys):
    options = ["--samples", str(SAMPLES), "--repeats", "1", "--out", str(folder), "--json", str(tmp_path / "report")]
    command.main(["--only", "speed,resume", *options])
    shown = capsys.readouterr().out
    assert all(len(line) <= 110 for line in shown.splitlines()[1:])
    report = json.loads((tmp_path / "report").read_text())
    assert set(report["speed"]) == {"kimivl", "webdataset"}
    by_name = {figure["name"]: figure for figure in report["figures"]}
    assert "no decoding, against webdataset" in by_name
    assert by_name["resume: state"]["met"]


def test_a_missing_peer_is_left_out_with_a_line(capsys):
    assert not command._installed("another", ("a-package-that-is-not-there",), command.Console())
    assert "another is left out: a-package-that-is-not-there is not installed" in capsys.readouterr().out


def test_an_unknown_part_is_named(capsys):
    with pytest.raises(SystemExit):
        command.main(["--only", "fil"])
    assert "'fil'" in capsys.readouterr().err


@pytest.mark.slow
def test_a_measurement_runs_in_a_process_of_its_own():
    found = command._figure("fill", max_length=32_768, samples=20_000)
    assert found["packs"] > 500
    assert found["fill"] > 0.99
