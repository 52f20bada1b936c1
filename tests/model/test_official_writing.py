"""Writing: the files that safetensors would write, in the room of one tensor, and whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kimivl.model import KimiVLForConditionalGeneration, official_writing
from kimivl.model.official_writing import parse_size, write_weights


def test_sizes():
    assert parse_size("5GB") == 5 * 10**9
    assert parse_size("1.5 MiB") == 3 * 2**19
    assert parse_size(1000) == parse_size("1KB") == 1000
    for wrong in ("many", "0GB", "-1", "1.2.3GB", 0):
        with pytest.raises(ValueError, match="max_shard_size"):
            parse_size(wrong)


def test_files_are_those_of_safetensors_byte_by_byte(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"part.{place}.Straße": torch.randn(shape, generator=generator).to(dtype)
        for place, (shape, dtype) in enumerate(
            [
                ((3, 5), torch.float32),
                ((7,), torch.bfloat16),
                ((), torch.float64),
                ((0, 4), torch.float32),
                ((2, 3, 4), torch.float16),
                ((9,), torch.float32),
                ((1,), torch.bfloat16),
            ]
        )
    }
    write_weights(tensors, {name: tensor.dtype for name, tensor in tensors.items()}, tmp_path)
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_views_are_written_in_the_dtype_that_is_asked_for(tmp_path):
    whole = torch.randn(4, 6)
    tensors = {"rows": whole[1:3], "columns": whole[:, 2:4], "turned": whole.T}
    write_weights(tensors, dict.fromkeys(tensors, torch.bfloat16), tmp_path)
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        assert torch.equal(tensor, tensors[name].bfloat16())


def test_shards_keep_to_their_size(tmp_path):
    tensors = {f"t{i}": torch.full((10 * i,), float(i)) for i in range(1, 9)}
    write_weights(tensors, dict.fromkeys(tensors, torch.float32), tmp_path, 400)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(tmp_path.glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == [file.name for file in files]
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    for file in files:
        held = load_file(file)
        assert sum(t.nbytes for t in held.values()) <= 400
        assert {name for name, of in index["weight_map"].items() if of == file.name} == held.keys()


def test_a_disk_without_room_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
    with pytest.raises(ValueError, match="takes 0.0 GB, and the disk has 0.0 GB left"):
        write_weights({"a": torch.zeros(3)}, {"a": torch.float32}, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def model(golden):
    return KimiVLForConditionalGeneration.from_pretrained(golden)


def test_a_second_save_leaves_no_stale_shard_and_no_other_file_is_touched(model, tmp_path):
    for name in ("model-notes.safetensors", "tokenizer.json"):
        (tmp_path / name).write_text("mine")
    for size in ("200KB", "400KB", "5GB", "200KB"):
        model.save_pretrained(tmp_path, max_shard_size=size)
        head = "model.safetensors" if size == "5GB" else "model.safetensors.index.json"
        shards = json.loads((tmp_path / head).read_text())["weight_map"].values() if size != "5GB" else ()
        named = {head, *shards}
        mine = {"model-notes.safetensors", "tokenizer.json"}
        assert {file.name for file in tmp_path.iterdir()} == named | mine | {"config.json", "generation_config.json"}


def die_at(event: int, folder: Path) -> None:
    """End this process at once, before the given file operation in `folder`; where there are fewer, do nothing."""
    seen = 0

    def watch(name: str, arguments: tuple) -> None:
        nonlocal seen
        if name in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.scandir") and str(folder) in str(
            arguments[0]
        ):
            if seen == event:
                os._exit(9)
            seen += 1

    sys.addaudithook(watch)


@pytest.mark.parametrize(
    ("before", "after", "every"),
    [
        ("300KB", "300KB", 3),
        pytest.param("300KB", "300KB", 1, marks=pytest.mark.slow),
        pytest.param("5GB", "5GB", 1, marks=pytest.mark.slow),
        pytest.param("300KB", "5GB", 1, marks=pytest.mark.slow),
        pytest.param("5GB", "300KB", 1, marks=pytest.mark.slow),
    ],
)
def test_killed_at_any_moment_a_folder_is_old_refused_or_new(golden, tmp_path, before, after, every):
    old, new = (KimiVLForConditionalGeneration.from_pretrained(golden) for _ in range(2))
    with torch.no_grad():
        for weight in new.parameters():
            weight += 1  # every shard is another
    old.save_pretrained(tmp_path / "old", max_shard_size=before)
    found, event, code = [], 0, 9
    while code == 9:
        folder = tmp_path / f"killed-{event}"
        shutil.copytree(tmp_path / "old", folder)
        if (child := os.fork()) == 0:
            try:
                die_at(event, folder)
                new.save_pretrained(folder, max_shard_size=after)
                os._exit(0)
            finally:
                os._exit(1)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        found.append(what_loads(folder, old, new))
        new.save_pretrained(folder, max_shard_size=after)  # and a later save is not in the way of an earlier one
        assert what_loads(folder, old, new) == "new" and not (folder / ".saving").exists()
        event += every
    assert code == 0 and event > 15
    assert list(dict.fromkeys(found)) == ["old", "refused", "new"]


def what_loads(folder: Path, old: torch.nn.Module, new: torch.nn.Module) -> str:
    try:
        loaded = KimiVLForConditionalGeneration.from_pretrained(folder).state_dict()
    except ValueError as error:
        assert "writing one there was interrupted; save again" in str(error)
        return "refused"
    return next(name for name, model in (("old", old), ("new", new)) if same(loaded, model.state_dict()))


def same(ours: dict, theirs: dict) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_everything_is_on_the_disk_before_the_old_weights_go_and_before_the_new_ones_hold(model, tmp_path, monkeypatch):
    """Else a machine that loses its power could keep the names and lose what they stand for."""
    model.save_pretrained(tmp_path, max_shard_size="300KB")
    index = "model.safetensors.index.json"
    events: list[tuple[str, str]] = []

    def watch(owner: object, name: str) -> None:
        real = getattr(owner, name)
        monkeypatch.setattr(
            owner, name, lambda path, *a, **k: (events.append((name, Path(path).name)), real(path, *a, **k))[1]
        )

    monkeypatch.setattr(official_writing, "sync", lambda path: events.append(("sync", path.name)))
    watch(Path, "unlink")
    watch(Path, "replace")
    model.save_pretrained(tmp_path, max_shard_size="300KB")
    shards = set(json.loads((tmp_path / index).read_text())["weight_map"].values())
    gone = events.index(("unlink", index))
    assert {("sync", name) for name in shards | {index, "config.json"}} <= set(events[:gone])
    moves = [name for event, name in events if event == "replace"]
    assert moves[-1] == index and shards < set(moves)
    first, last = events.index(("replace", moves[0])), events.index(("replace", index))
    folder = ("sync", tmp_path.name)
    assert folder in events[gone:first] and events[last - 1] == folder and folder in events[last:]
