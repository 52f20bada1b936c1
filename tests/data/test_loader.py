"""Index and loader: every sample exactly once, over any workers and ranks, from any position."""

import collections
import io
import tarfile

import pytest
import torch

from kimivl.data.index import build_index
from kimivl.data.loader import PackLoader
from kimivl.data.pack import IGNORE, pack_samples
from kimivl.data.plan import plan_epoch
from kimivl.data.sample import SampleError
from kimivl.data.shards import expand


@pytest.fixture(scope="module")
def index(digits, encoder):
    return build_index(expand(str(digits / "sft-*.tar")), encoder)


def plan_of(index, packs_per_step=2, epoch=0):
    return plan_epoch(
        index.tokens,
        index.patches,
        index.targets,
        max_length=512,
        max_patches=512,
        packs_per_step=packs_per_step,
        seed=3,
        epoch=epoch,
    )


def segments(batches):
    """Each sample of the packs as a tuple of its tokens."""
    return [
        tuple(piece.tolist())
        for batch in batches
        for piece in batch.input_ids.tensor_split(batch.cu_seqlens[1:-1].long())
    ]


@pytest.mark.parametrize(("workers", "ranks"), [(0, 1), (2, 1), (0, 2), (1, 2)])
def test_every_sample_once_over_workers_and_ranks(index, encoder, workers, ranks):
    plan = plan_of(index)
    seen = collections.Counter()
    for rank in range(ranks):
        seen.update(segments(PackLoader(plan, index, encoder, rank=rank, world_size=ranks, num_workers=workers)))
    expected = collections.Counter(
        tuple(encoder.encode(index.read(number)).input_ids.tolist()) for number in range(len(index))
    )
    assert seen == expected


def test_starting_in_the_middle_gives_the_rest(index, encoder):
    plan = plan_of(index)
    whole = segments(PackLoader(plan, index, encoder))
    head = segments(list(PackLoader(plan, index, encoder))[:2])
    rest = PackLoader(plan, index, encoder, start=2)
    assert head + segments(rest) == whole
    assert len(rest) == len(plan)


def test_counts_of_the_index_are_those_of_the_packs(index, encoder):
    plan = plan_of(index)
    for number, batch in enumerate(PackLoader(plan, index, encoder)):
        members = plan.pack(number)
        assert batch.num_tokens == index.tokens[members].sum()
        assert len(batch.pixel_values) == index.patches[members].sum()
        assert (batch.targets != IGNORE).sum() == index.targets[members].sum()
        assert batch.step_targets == plan.step_targets[number // 2]


def test_the_index_is_kept_and_a_stale_one_is_not_used(digits, encoder, index, monkeypatch):
    shards = expand(str(digits / "sft-*.tar"))
    monkeypatch.setattr("kimivl.data.index.scan_shard", lambda *_: pytest.fail("scanned again"))
    assert build_index(shards, encoder).key.tolist() == index.key.tolist()
    monkeypatch.undo()
    shards[0].touch()
    made_again = []
    build_index(shards, encoder, track=lambda paths: made_again.extend(paths) or paths)
    assert made_again == shards


def test_targets_are_shifted_inside_each_sample(index, encoder):
    samples = [encoder.encode(index.read(number)) for number in range(3)]
    pack = pack_samples(samples)
    assert pack.target_segments.tolist() == [s for s, sample in enumerate(samples) for _ in range(sample.num_targets)]
    for start, end, sample in zip(pack.cu_seqlens[:-1], pack.cu_seqlens[1:], samples, strict=True):
        assert torch.equal(pack.targets[start : end - 1], sample.labels[1:])
        assert pack.targets[end - 1] == IGNORE


def damaged_copy(digits, folder, damage):
    """Copy the first shard with one member of its first sample replaced or, for None, left out."""
    source = expand(str(digits / "sft-*.tar"))[0]
    target = folder / "sft-000000.tar"
    with tarfile.open(source) as old, tarfile.open(target, "w") as new:
        first_image = next(member.name for member in old if member.name.endswith(".png"))
        first_json = first_image.replace(".0.png", ".json")
        for member in old:
            content = old.extractfile(member).read()
            suffix = ".png" if member.name == first_image else ".json" if member.name == first_json else ""
            if suffix in damage:
                if damage[suffix] is None:
                    continue
                content = damage[suffix](content)
                member.size = len(content)
            new.addfile(member, io.BytesIO(content))
    return target, first_json.removesuffix(".json")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ({".png": lambda data: data[:40]}, "bad_image"),
        ({".json": lambda data: data[:-5]}, "bad_json"),
        ({".png": None}, "image_count"),
        (
            {".json": lambda data: data.replace(b'{"type": "image"}, ', b"").replace(b'{"type":"image"},', b"")},
            "image_count",
        ),
        ({".json": None}, "missing_member"),
    ],
)
def test_a_damaged_sample_is_dropped_under_its_reason(digits, encoder, tmp_path, caplog, damage, reason):
    shard, key = damaged_copy(digits, tmp_path, damage)
    index = build_index([shard], encoder, max_dropped=0.1)
    assert index.dropped == {reason: 1}
    assert key not in index.key
    assert key in caplog.text and shard.name in caplog.text


def test_too_much_damage_stops_with_the_reasons(digits, encoder, tmp_path):
    shard, _ = damaged_copy(digits, tmp_path, {".png": lambda data: data[:40]})
    with pytest.raises(ValueError, match="bad_image 1.*data.max_dropped"):
        build_index([shard], encoder, max_dropped=0.001)


def test_a_check_can_drop_samples(digits, encoder):
    def refuse_sums(sample):
        if sample.task == "sum":
            raise SampleError("no_sums", sample.key, None, "a sum")

    index = build_index(expand(str(digits / "sft-*.tar")), encoder, check=refuse_sums, max_dropped=0.9)
    assert index.dropped["no_sums"] == 120 - len(index)
