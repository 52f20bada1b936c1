"""The loader: every sample exactly once, over any workers and ranks, from any position, whatever cannot be read."""

import collections
import contextlib
import itertools
import multiprocessing
import tarfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kimivl.data.loader import PackLoader
from kimivl.data.pack import IGNORE, pack_samples
from kimivl.data.shards import expand


def segments(batches):
    """Each sample of the packs as a tuple of its tokens."""
    return [
        tuple(piece.tolist())
        for batch in batches
        for piece in batch.input_ids.tensor_split(batch.cu_seqlens[1:-1].long())
    ]


@pytest.mark.parametrize(("workers", "ranks"), [(0, 1), (2, 1), (0, 2), (1, 2)])
def test_every_sample_once_over_workers_and_ranks(index, encoder, plan_of, workers, ranks):
    plan = plan_of(index)
    seen = collections.Counter()
    for rank in range(ranks):
        seen.update(segments(PackLoader(plan, index, encoder, rank=rank, world_size=ranks, num_workers=workers)))
    expected = collections.Counter(
        tuple(encoder.encode(index.read(number)).input_ids.tolist()) for number in range(len(index))
    )
    assert seen == expected


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_ranks_and_any_stops_give_the_plan(index, encoder, plan_of, data):
    """Stopped after any steps, and on with any number of ranks that divides a step: the packs of the plan, in order."""
    packs_per_step = data.draw(st.sampled_from([1, 2, 4, 8]))
    plan = plan_of(index, packs_per_step=packs_per_step, max_length=data.draw(st.sampled_from([192, 512, 2048])))
    stops = sorted(data.draw(st.sets(st.integers(0, plan.num_steps), max_size=3)) | {0, plan.num_steps})
    seen = []
    for start, stop in itertools.pairwise(stops):
        ranks = data.draw(st.sampled_from([r for r in range(1, 9) if packs_per_step % r == 0]))
        share = packs_per_step // ranks
        loaders = [
            iter(PackLoader(plan, index, encoder, rank=rank, world_size=ranks, start=start * share))
            for rank in range(ranks)
        ]
        for _ in range((stop - start) * share):
            seen += [next(loader) for loader in loaders]
    assert [pack.number for pack in seen] == list(range(len(plan)))
    samples = torch.cat([pack.samples for pack in seen])
    assert sorted(samples.tolist()) == list(range(len(index)))
    assert all(pack.samples.tolist() == plan.pack(pack.number).tolist() for pack in seen)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [1, 3, 4])
def test_workers_do_not_change_the_order_or_the_bytes(index, encoder, plan_of, workers):
    plan = plan_of(index)
    for one, other in zip(
        PackLoader(plan, index, encoder), PackLoader(plan, index, encoder, num_workers=workers), strict=True
    ):
        assert one.number == other.number
        for name, tensor in one.model_inputs().items():
            assert tensor is None or torch.equal(tensor, other.model_inputs()[name]), name


def test_starting_in_the_middle_gives_the_rest(index, encoder, plan_of):
    plan = plan_of(index)
    whole = segments(PackLoader(plan, index, encoder))
    head = segments(list(PackLoader(plan, index, encoder))[:2])
    rest = PackLoader(plan, index, encoder, start=2)
    assert head + segments(rest) == whole
    assert len(rest) == len(plan)


def test_counts_of_the_index_are_those_of_the_packs(index, encoder, plan_of):
    plan = plan_of(index)
    for number, batch in enumerate(PackLoader(plan, index, encoder)):
        members = plan.pack(number)
        assert batch.num_tokens == index.tokens[members].sum()
        assert len(batch.pixel_values) == index.patches[members].sum()
        assert (batch.targets != IGNORE).sum() == index.targets[members].sum()
        assert batch.step_targets == plan.step_targets[number // 2]


def test_packs_written_in_place_are_those_of_pack_samples(index, encoder, plan_of):
    plan = plan_of(index)
    for pack in PackLoader(plan, index, encoder):
        joined = pack_samples([encoder.encode(index.read(number)) for number in pack.samples.tolist()])
        for name, tensor in joined.model_inputs().items():
            assert tensor is None or torch.equal(tensor, pack.model_inputs()[name]), name


def test_targets_are_shifted_inside_each_sample(index, encoder):
    samples = [encoder.encode(index.read(number)) for number in range(3)]
    pack = pack_samples(samples)
    assert pack.target_segments.tolist() == [s for s, sample in enumerate(samples) for _ in range(sample.num_targets)]
    for start, end, sample in zip(pack.cu_seqlens[:-1], pack.cu_seqlens[1:], samples, strict=True):
        assert torch.equal(pack.targets[start : end - 1], sample.labels[1:])
        assert pack.targets[end - 1] == IGNORE


def test_ranks_that_do_not_divide_a_step_are_refused(index, encoder, plan_of):
    with pytest.raises(ValueError, match="2 packs per step cannot be dealt to 3 ranks.*accumulate_grad_batches"):
        PackLoader(plan_of(index), index, encoder, world_size=3)


# Faults that come up after the index was made.


@pytest.fixture
def changing(digits, make_index, tmp_path):
    """A copy of the shards whose files a test may damage, with its index: 120 samples in two shards."""
    with contextlib.ExitStack() as files:
        old = files.enter_context(tarfile.open(expand(str(digits / "sft-*.tar"))[0]))
        halves = [files.enter_context(tarfile.open(tmp_path / f"{half}.tar", "w")) for half in "ab"]
        for member in old:
            half = halves[int(member.name.split(".")[0].split("-")[1]) >= 60]
            half.addfile(member, old.extractfile(member))
    return make_index(f"{tmp_path}/*.tar")


def with_and_without(changing, encoder, plan_of, damage, **options):
    """The packs before and after ``damage``."""
    plan = plan_of(changing)
    before = list(PackLoader(plan, changing, encoder))
    damage()
    loader = PackLoader(plan, changing, encoder, max_dropped=1.0, **options)
    return before, list(loader), loader.dropped


@pytest.mark.parametrize("workers", [0, 2])
def test_a_changed_sample_is_a_hole_and_all_else_stays(changing, encoder, plan_of, workers):
    number = int(changing.images.argmax())

    def damage():
        with Path(changing.shard_of(number)).open("r+b") as shard:
            shard.seek(int(changing.offset[number]) + int(changing.size[number]) // 2)
            shard.write(b"\xff" * 64)

    before, after, dropped = with_and_without(changing, encoder, plan_of, damage, num_workers=workers)
    assert dropped == {"bad_shard": 1}
    for whole, pack in zip(before, after, strict=True):
        assert torch.equal(whole.cu_seqlens, pack.cu_seqlens) and whole.step_targets == pack.step_targets
        if number not in pack.samples:
            assert not pack.holes and torch.equal(whole.pixel_values, pack.pixel_values)
            continue
        [hole] = pack.holes
        assert (hole.sample, hole.key, hole.shard) == (number, changing.key(number), changing.shard_of(number))
        place = pack.samples.tolist().index(number)
        start, end = pack.cu_seqlens[place : place + 2].tolist()
        assert (pack.targets[start:end] == IGNORE).all()
        assert (pack.input_ids[start:end] == encoder.stop_id).all()  # no placeholder without an image
        kept = torch.ones(len(pack.targets), dtype=torch.bool)
        kept[start:end] = False
        assert torch.equal(pack.input_ids[kept], whole.input_ids[kept])
        assert torch.equal(pack.targets[kept], whole.targets[kept])
        assert len(pack.pixel_values) == len(whole.pixel_values) - changing.patches[number]
        assert len(pack.image_grid_hws) == len(whole.image_grid_hws) - changing.images[number]


def test_a_picture_damaged_behind_its_header_is_a_hole(digits, encoder, plan_of, make_index, tmp_path, monkeypatch):
    """The scan reads headers only: what is wrong with the pixels comes up when they are decoded."""
    from kimivl.data import chat

    index = make_index(str(digits / "sft-*.tar"))
    number = int(index.images.argmax())
    decode = chat.decode_image

    def failing(data, key, shard=None):
        if key == index.key(number):
            raise chat.SampleError("bad_image", key, shard, "the image does not decode")
        return decode(data, key, shard)

    monkeypatch.setattr(chat, "decode_image", failing)
    loader = PackLoader(plan_of(index), index, encoder)
    holes = [hole for pack in loader for hole in pack.holes]
    assert [hole.sample for hole in holes] == [number] and loader.dropped == {"bad_image": 1}


def test_a_shard_that_vanishes_leaves_holes(changing, encoder, plan_of):
    def damage():
        Path(changing.shards[1]).unlink()
        changing.storage = type(changing.storage)(retries=1, backoff=0.001)  # a process that had not opened it

    _, after, dropped = with_and_without(changing, encoder, plan_of, damage)
    assert dropped == {"io_error": 60}
    assert sum(pack.num_samples for pack in after) == 120
    assert {hole.shard for pack in after for hole in pack.holes} == {changing.shards[1]}


def test_above_the_share_it_stops_and_says_why(changing, encoder, plan_of):
    Path(changing.shards[1]).unlink()
    changing.storage = type(changing.storage)(retries=1, backoff=0.001)
    loader = PackLoader(plan_of(changing), changing, encoder, max_dropped=0.1)
    with pytest.raises(ValueError, match=r"1\d samples of this epoch.*io_error 1\d\).*data\.max_dropped.*b\.tar"):
        list(loader)
    resumed = PackLoader(
        plan_of(changing), changing, encoder, max_dropped=0.1, dropped=collections.Counter({"io_error": 12})
    )
    with pytest.raises(ValueError, match="io_error"):  # what an interrupted run has lost counts on
        list(resumed)


def test_workers_leave_no_processes_behind(index, encoder, plan_of):
    before = len(multiprocessing.active_children())
    packs = iter(PackLoader(plan_of(index), index, encoder, num_workers=2))
    next(packs)
    packs.close()
    assert len(multiprocessing.active_children()) <= before
