"""An epoch over shards behind a web server: that of local ones, whatever the server does."""

import collections
import shutil

import pytest
import torch
from range_server import RangeServer

from kimivl.data.loader import PackLoader
from kimivl.data.scan import build_index
from kimivl.data.shards import expand
from kimivl.data.storage import Storage


@pytest.fixture
def server(digits):
    with RangeServer(digits) as server:
        yield server


@pytest.fixture
def remote(server, encoder, tmp_path):
    """The index of the digits set as the server has it, kept in the cache folder."""
    storage = Storage(tmp_path / "cache", retries=3, backoff=0.01)
    shards = expand(f"{server.url}/sft-{{000000..000000}}.tar", storage)
    return build_index(shards, encoder, storage, folder=tmp_path / "cache")


def same_packs(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        for name, tensor in one.model_inputs().items():
            assert tensor is None or torch.equal(tensor, other.model_inputs()[name]), name


@pytest.mark.parametrize("workers", [0, 2])
def test_it_is_the_epoch_of_local_shards(server, remote, index, encoder, plan_of, workers):
    assert remote.path.parent.name == "cache" and remote.shards == [f"{server.url}/sft-000000.tar"]
    plan = plan_of(remote)
    assert plan.hash == plan_of(index).hash
    gets = len(server.gets)
    packs = list(PackLoader(plan, remote, encoder, num_workers=workers))
    same_packs(packs, PackLoader(plan, index, encoder))
    assert len(server.gets) == gets  # the scan has left all blocks in the cache


@pytest.mark.parametrize("fault", [{"fail": 2}, {"cut": 2}, {"delay": 0.2}])
def test_a_slow_or_failing_server_is_asked_again(server, remote, index, encoder, plan_of, tmp_path, fault):
    forget_blocks(tmp_path)
    for name, value in fault.items():
        setattr(server, name, value)
    asked = len(server.gets)
    packs = list(PackLoader(plan_of(remote), remote, encoder, num_workers=1))
    same_packs(packs, PackLoader(plan_of(index), index, encoder))
    assert len(server.gets) > asked and not server.fail and not server.cut


def test_a_server_that_stays_away_leaves_holes(server, remote, encoder, plan_of, tmp_path):
    forget_blocks(tmp_path)
    server.gone = True
    loader = PackLoader(plan_of(remote), remote, encoder, max_dropped=1.0)
    holes = [hole for pack in loader for hole in pack.holes]
    assert collections.Counter(hole.reason for hole in holes) == {"io_error": 120}
    assert server.url in holes[0].detail or server.url in holes[0].shard


def forget_blocks(folder):
    """Take away the cached blocks, and leave the index."""
    for path in (folder / "cache").iterdir():
        if not path.name.startswith(".index-"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
