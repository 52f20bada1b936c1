"""Which shards paths, URLs, braces, globs and folders stand for, and what is said where there are none."""

from pathlib import Path

import fsspec
import pytest
from range_server import RangeServer

from kimivl.data.shards import expand
from kimivl.data.storage import Storage


def test_braces_and_globs_expand_sorted_and_once(tmp_path: Path):
    names = [f"rl-{i:03d}.tar" for i in range(4)]
    for name in [*reversed(names), "odd[1].tar"]:
        (tmp_path / name).touch()
    wanted = [str(tmp_path / name) for name in names]
    assert expand(f"{tmp_path}/rl-{{000..003}}.tar") == wanted
    assert expand([f"{tmp_path}/rl-*.tar", str(tmp_path / names[1])]) == wanted
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "rl-001.tar").touch()
    assert expand(f"{tmp_path}/*/rl-00[12].tar") == [str(tmp_path / "deep" / "rl-001.tar")]
    assert expand(f"{tmp_path}/odd[1].tar") == [str(tmp_path / "odd[1].tar")]


@pytest.mark.parametrize("pattern", ["rl-{000..004}.tar", "none-*.tar", "gone.tar"])
def test_a_pattern_without_a_file_is_named(pattern: str, tmp_path: Path):
    for i in range(4):
        (tmp_path / f"rl-{i:03d}.tar").touch()
    missing = pattern.replace("{000..004}", "004")
    with pytest.raises(ValueError) as caught:
        expand([f"{tmp_path}/rl-000.tar", f"{tmp_path}/{pattern}"])
    assert missing in str(caught.value)


def test_a_folder_means_its_tars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    paths = [tmp_path / f"set-{number}.tar" for number in range(3)]
    for path in paths:
        path.touch()
    (tmp_path / "manifest.json").touch()
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "other.tar").touch()
    assert expand(str(tmp_path)) == expand(f"file://{tmp_path}/") == [str(path) for path in paths]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expand("~/set-*.tar") == [str(path) for path in paths]
    with pytest.raises(ValueError, match="empty"):
        (tmp_path / "empty").mkdir()
        expand(f"{tmp_path}/empty")


REMOTE_PATTERNS = ["web/{a,b}-{0..1}.tar", "web/*.tar", "web", "web/"]


@pytest.mark.parametrize(
    ("where", "pattern"),  # in a web address, a question mark begins the query
    [(where, pattern) for where in ("http", "memory") for pattern in REMOTE_PATTERNS] + [("memory", "web/?-*.tar")],
)
def test_remote_patterns_expand_as_local_ones(where: str, pattern: str, tmp_path: Path):
    names = ["web/a-0.tar", "web/a-1.tar", "web/b-0.tar", "web/b-1.tar"]
    (tmp_path / "web").mkdir()
    memory = fsspec.filesystem("memory")
    for name in [*names, "web/manifest.json"]:
        (tmp_path / name).write_bytes(b"x")
        memory.pipe_file(f"/{name}", b"x")
    with RangeServer(tmp_path) as server:
        root = server.url if where == "http" else "memory:/"
        assert expand(f"{root}/{pattern}", Storage(tmp_path / "cache")) == [f"{root}/{name}" for name in names]


def test_a_remote_pattern_without_a_file_is_named(tmp_path: Path):
    (tmp_path / "a-0.tar").write_bytes(b"x")
    with RangeServer(tmp_path) as server:
        for pattern, missing in (("a-{0..1}.tar", "a-1.tar"), ("b-*.tar", "b-*.tar"), ("none.tar", "none.tar")):
            with pytest.raises(ValueError) as caught:
                expand(f"{server.url}/{pattern}", Storage(tmp_path / "cache", retries=0))
            assert f"{server.url}/{missing}" in str(caught.value)


def test_a_server_that_is_down_is_not_taken_for_a_missing_shard(tmp_path: Path):
    with RangeServer(tmp_path) as server:
        url = server.url
    for name in ("a.tar", "*.tar"):
        with pytest.raises(ValueError, match=r"data\.shards=.*cannot be read.*try again later"):
            expand(f"{url}/{name}", Storage(tmp_path / "cache", retries=1, backoff=0.001))


def test_unbalanced_braces_are_named():
    with pytest.raises(ValueError, match=r"data\.shards='rl-\{0"):
        expand("rl-{0..1.tar")


def test_no_pattern_at_all_is_an_error():
    with pytest.raises(ValueError, match=r"data\.shards"):
        expand([])
