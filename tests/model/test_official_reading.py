"""Reading: what is wrong with a checkpoint is found from its headers, named, and told with a remedy."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from kimivl.model import KimiVLForConditionalGeneration, official
from kimivl.model.official_reading import read_headers

EXPERT = "language_model.model.layers.2.mlp.experts.5.up_proj.weight"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def sharded(golden, tmp_path_factory):
    """The golden checkpoint in five files. Tests change copies of it."""
    folder = tmp_path_factory.mktemp("sharded")
    KimiVLForConditionalGeneration.from_pretrained(golden).save_pretrained(folder, max_shard_size="300KB")
    return folder


@pytest.fixture
def folder(sharded, tmp_path):
    return shutil.copytree(sharded, tmp_path / "model")


@pytest.fixture
def broken(golden, tmp_path):
    """broken(change): the golden checkpoint in one file, its tensors changed in place by `change`."""

    def make(change):
        shutil.copytree(golden, tmp_path / "broken")
        tensors = load_file(golden / "model.safetensors")
        change(tensors)
        save_file(tensors, tmp_path / "broken/model.safetensors")
        return tmp_path / "broken"

    return make


@pytest.fixture(autouse=True)
def nothing_is_copied(request, monkeypatch):
    """A checkpoint that is refused is refused before memory is taken for it."""
    if "refused" in request.node.name:
        monkeypatch.setattr(official, "copy_tensors", lambda *arguments: pytest.fail("tensors were copied"))


def refusal(folder) -> str:
    with pytest.raises(ValueError) as caught:
        KimiVLForConditionalGeneration.from_pretrained(folder)
    message = str(caught.value)
    assert "\n" not in message and str(folder) in message
    return message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(EXPERT), f"{EXPERT} is missing (1 in all)"),
        (lambda t: t.pop("multi_modal_projector.linear_2.bias"), "multi_modal_projector.linear_2.bias is missing"),
        (lambda t: t.update(stray=torch.zeros(2)), "model.safetensors: tensor stray is not in this model"),
        (
            lambda t: t.update({EXPERT: torch.zeros(16, 31)}),
            f"model.safetensors: {EXPERT} has shape (16, 31), not (16, 32)",
        ),
        (
            lambda t: t.update({EXPERT: t[EXPERT].to(torch.float8_e4m3fn)}),
            f"model.safetensors: {EXPERT} is stored as F8_E4M3, kimivl reads F16, BF16, F32, F64",
        ),
        (
            lambda t: [t.pop(name) for name in list(t) if ".experts.7." in name],
            "experts: 7 in the files, 8 in config.json",
        ),
        (
            lambda t: [t.pop(name) for name in list(t) if ".layers.2." in name],
            "language model layers: 2 in the files, 3 in config.json",
        ),
        (
            lambda t: [t.pop(name) for name in list(t) if ".blocks.2." in name],
            "vision tower blocks: 2 in the files, 3 in config.json",
        ),
    ],
)
def test_wrong_tensors_are_refused_by_name(broken, change, message):
    assert message in refusal(broken(change))


def test_a_checkpoint_without_stale_frequencies_loads(broken):
    model = KimiVLForConditionalGeneration.from_pretrained(
        broken(lambda t: [t.pop(name) for name in list(t) if name.endswith("inv_freq")])
    )
    assert sum(name.endswith("inv_freq") for name in model.official_tensors()) == 3


def test_a_cut_file_is_refused_with_its_first_cut_tensor(folder):
    file = folder / "model-00003-of-00005.safetensors"
    length = int.from_bytes(file.read_bytes()[:8], "little")
    header = json.loads(file.read_bytes()[8 : 8 + length])
    header.pop("__metadata__")
    whole = file.read_bytes()
    for name in [*header][::9]:
        begin, end = header[name]["data_offsets"]
        for held in {begin, end - 1}:
            file.write_bytes(whole[: 8 + length + held])
            message = refusal(folder)
            assert f"first tensor that is not whole is {name}: copy or download" in message
            assert f"{file} is cut short, it has {8 + length + held:,} bytes of {len(whole):,}" in message
    for held in (0, 5, 8, 8 + length - 1):
        file.write_bytes(whole[:held])
        assert f"{file} is cut inside its header" in refusal(folder)


def spoil_header(file):
    file.write_bytes(file.read_bytes()[:8] + b"}" + file.read_bytes()[9:])


def pointer(file):
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")


def longer(file):
    file.write_bytes(file.read_bytes() + b"\0")


def other_shape(file):
    file.write_bytes(re.sub(rb'"shape":\[\d', b'"shape":[9', file.read_bytes(), count=1))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_header, "00002-of-00005.safetensors has a broken header"),
        (pointer, "00002-of-00005.safetensors is a pointer of Git LFS, not the weights: run `git lfs pull`"),
        (longer, "00002-of-00005.safetensors is longer than its header says"),
        (other_shape, "bytes for F32 [9"),
        (lambda file: file.write_bytes(b"\xff" * 4000), "no safetensors file"),
        (lambda file: file.unlink(), "00002-of-00005.safetensors does not exist"),
    ],
)
def test_a_spoilt_file_is_refused(folder, spoil, message):
    spoil(folder / "model-00002-of-00005.safetensors")
    assert message in refusal(folder)


def edit(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def test_an_index_that_does_not_fit_its_files_is_refused(folder):
    whole = (folder / INDEX).read_text()
    first, other = (f"model-0000{i}-of-00005.safetensors" for i in (1, 2))
    name = next(name for name, file in json.loads(whole)["weight_map"].items() if file == first)
    for change, message in (
        (lambda m: m.update({name: other}), f"says that {name} is in {other}, which does not have it"),
        (lambda m: m.update(stray=first), f"says that stray is in {first}, which does not have it"),
        (lambda m: m.pop(name), f"{first} holds {name}, which"),
        (lambda m: m.update(stray="model-00009-of-00005.safetensors"), f"({INDEX} names it)"),
    ):
        (folder / INDEX).write_text(whole)
        edit(folder, change)
        assert message in refusal(folder)
    for text in ("{", "[]", "{}", '{"weight_map": 3}', ""):
        (folder / INDEX).write_text(text)
        assert f"{folder / INDEX} is not an index" in refusal(folder)


def test_files_of_two_checkpoints_are_refused(folder, golden):
    tensors = load_file(folder / "model-00002-of-00005.safetensors")
    doubled = next(iter(load_file(folder / "model-00001-of-00005.safetensors")))
    save_file(tensors | {doubled: torch.zeros(2)}, folder / "model-00002-of-00005.safetensors")
    assert f"{doubled} is in {folder / 'model-00001-of-00005.safetensors'} and in" in refusal(folder)
    shutil.copy(golden / "model.safetensors", folder)
    assert f"holds both model.safetensors and {INDEX}" in refusal(folder)


def test_headers_say_what_the_files_hold(sharded):
    stored = read_headers(sharded)
    held = {name: (file, t) for file in sharded.glob("*.safetensors") for name, t in load_file(file).items()}
    assert stored.keys() == held.keys()
    for name, (file, tensor) in held.items():
        assert (stored[name].file, stored[name].dtype, stored[name].shape) == (file, tensor.dtype, tuple(tensor.shape))


MEASURED = """
import json, sys, torch
from kimivl.model import KimiVLConfig, KimiVLForConditionalGeneration as Model

def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

def from_here():
    open("/proc/self/clear_refs", "w").write("5")
    return peak()

folder, golden, fields = sys.argv[1:]
Model.from_pretrained(golden).save_pretrained(folder + "/warm")
from transformers.initialization import no_init_weights
with no_init_weights():
    model = Model(KimiVLConfig(**json.loads(fields)))
for parameter in model.parameters():
    parameter.data.fill_(0.5)
size = sum(tensor.nbytes for tensor in model.state_dict().values())
start = from_here()
model.save_pretrained(folder + "/model", max_shard_size="50MB")
saving = peak() - start
del model
start = from_here()
model = Model.from_pretrained(folder + "/model", dtype="float32")
print(json.dumps({"size": size, "saving": saving, "loading": peak() - start}))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of its memory from /proc")
def test_memory_of_loading_is_the_model_and_one_file(recipe, golden, tmp_path):
    """A checkpoint of 600 MB in 12 files, of 64 experts a layer."""
    fields = recipe("tiny")
    fields |= {"vocab_size": 2000, "media_placeholder_token_id": 5}
    fields["text_config"] |= {"hidden_size": 512, "moe_intermediate_size": 512, "n_routed_experts": 64}
    fields["text_config"] |= {"num_hidden_layers": 4, "vocab_size": 2000}
    script = [sys.executable, "-c", MEASURED, str(tmp_path), str(golden), json.dumps(fields)]
    run = subprocess.run(script, capture_output=True, text=True, check=True)
    measured = json.loads(run.stdout.splitlines()[-1])
    files = [file.stat().st_size for file in (tmp_path / "model").glob("*.safetensors")]
    assert len(files) >= 12 and sum(files) > 590e6
    small = 8e6
    assert measured["loading"] < measured["size"] + 1.1 * max(files) + small
    assert measured["saving"] < 1.1 * max(files) + small
