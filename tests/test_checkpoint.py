"""Hand-over between stages, and what a run starts from."""

import base64
import errno
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from in_ranks import in_ranks

from kimivl import checkpoint
from kimivl.checkpoint import LAST, build_model, check_init_from, export_model, load_processor, resume_path
from kimivl.config import compose_run
from kimivl.model import KimiVLForConditionalGeneration, KimiVLImageProcessor, KimiVLProcessor
from kimivl.runtime import interruption, ranks
from kimivl.tasks.digits import write


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    out = write(tmp_path_factory.mktemp("digits"), sft=40, long_cot=20, rl=8, val=8, test=8, vocab_size=340)
    return load_processor(out / "tokenizer")


@pytest.fixture(scope="module")
def exported(processor, tmp_path_factory) -> Path:
    torch.manual_seed(0)
    model = build_model(instantiate(compose_run("stage=sft").model), None, processor)
    folder = tmp_path_factory.mktemp("run") / "model"
    export_model(model, processor, folder)
    return folder


def test_exported_is_loaded(exported, processor):
    config = instantiate(compose_run("stage=sft").model)
    first, second = (build_model(config, str(exported), processor).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert load_processor(exported).tokenizer.get_vocab() == processor.tokenizer.get_vocab()


def test_an_export_replaces_the_one_before_whole(exported, processor, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(exported, folder)
    (folder / "stale.txt").touch()
    torch.manual_seed(1)
    export_model(build_model(instantiate(compose_run("stage=sft").model), None, processor), processor, folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in exported.iterdir())
    assert (folder / "model.safetensors").read_bytes() != (exported / "model.safetensors").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.fixture
def another(exported, processor):
    """A model that differs from the exported one."""
    torch.manual_seed(1)
    return build_model(instantiate(compose_run("stage=sft").model), None, processor)


@pytest.mark.parametrize("after", [0, 5, 11, 12])
def test_a_disk_that_fills_up_leaves_the_folder_of_before(exported, another, processor, tmp_path, monkeypatch, after):
    """Whichever file it is that does not fit."""
    folder = shutil.copytree(exported, tmp_path / "model")
    calls = 0

    def full(descriptor):
        nonlocal calls
        calls += 1
        if calls > after:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        export_model(another, processor, folder)
    assert contents(folder) == contents(exported)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_signal_ends_the_hand_over_and_leaves_the_folder_of_before(
    exported, another, processor, tmp_path, monkeypatch
):
    folder = tmp_path / "model"
    shutil.copytree(exported, folder)
    monkeypatch.setattr(checkpoint, "put_in_place", lambda *paths: signal.raise_signal(signal.SIGUSR2))
    with interruption.listening(tmp_path):
        interruption.wait_for_a_step()
        checkpoint.hand_over(another, processor, folder)
        assert interruption.agreed()  # the run asks, and stops there
    assert (folder / "model.safetensors").read_bytes() == (exported / "model.safetensors").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def _handed_over_while_one_is_asked(folder: Path) -> list[tuple[bool, bool]]:
    checkpoint.export_model = lambda model, processor, file: file.touch()
    found = []
    for asked in range(2):
        file = folder / f"rank-{asked}-was-asked"
        with interruption.listening(folder):
            interruption.wait_for_a_step()
            if ranks.rank() == asked:
                signal.raise_signal(signal.SIGTERM)
            checkpoint.hand_over(torch.nn.Linear(1, 1), None, file)
            found.append((file.exists(), interruption.agreed()))
    return found


def test_a_signal_that_one_rank_has_heard_already_keeps_no_rank_waiting_at_the_hand_over(tmp_path):
    assert in_ranks(_handed_over_while_one_is_asked, tmp_path) == [[(False, True), (True, True)]] * 2


@pytest.mark.parametrize("exchange", [True, False], ids=["exchanged at once", "renamed twice"])
def test_a_killed_export_leaves_one_of_the_two(exported, another, processor, tmp_path, monkeypatch, exchange):
    """Ended before each rename in turn: what the next stage finds in its place is the folder of before, or the new."""
    if not exchange:
        monkeypatch.setattr(checkpoint, "_exchange", lambda one, other: False)
    export_model(another, processor, tmp_path / "wanted")
    new, old, found, code = contents(tmp_path / "wanted"), contents(exported), [], 9
    while code == 9:
        folder = shutil.copytree(exported, tmp_path / f"{len(found)}/model")
        if (child := os.fork()) == 0:
            end_before_rename(len(found), folder.parent)
            export_model(another, processor, folder)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        check_init_from("long_cot", str(folder), "digits")
        found.append(contents(folder) == new)
        assert found[-1] or contents(folder) == old
        export_model(another, processor, folder)
        assert [path.name for path in folder.parent.iterdir()] == ["model"]
    assert code == 0 and found == sorted(found) and {*found} == {False, True}


def end_before_rename(number: int, folder: Path) -> None:
    """End this process at once, before the rename of this number (or the removal of a folder) in `folder`."""
    seen = 0

    def watch(event: str, arguments: tuple) -> None:
        nonlocal seen
        if event in ("os.rename", "os.rmdir") and str(folder) in str(arguments[0]):
            if seen == number:
                os._exit(9)
            seen += 1

    sys.addaudithook(watch)


def test_the_run_decides_the_precision_and_the_files_keep_theirs(exported, processor, tmp_path):
    """bf16 files: float32 in memory under 32-true, bf16 under bf16-true, and bf16 again when they are handed over."""
    config = instantiate(compose_run("stage=sft").model)
    model = build_model(config, str(exported), processor)
    model._stored_dtypes = dict.fromkeys(model.official_tensors(), torch.bfloat16)
    export_model(model, processor, tmp_path / "bf16")
    for dtype in (torch.float32, torch.bfloat16):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            model = build_model(config, str(tmp_path / "bf16"), processor)
        finally:
            torch.set_default_dtype(before)
        assert model.training and {parameter.dtype for parameter in model.parameters()} == {dtype}
        export_model(model, processor, tmp_path / "again")
        assert contents(tmp_path / "again") == contents(tmp_path / "bf16")


def test_image_settings_are_handed_over(exported, processor, tmp_path):
    images = KimiVLImageProcessor(in_token_limit=16384, resize="pil")
    KimiVLProcessor(images, processor.tokenizer).save_pretrained(tmp_path)
    for file in ("nothing", "preprocessor_config.json", "processor_config.json"):  # whichever is missing
        folder = shutil.copytree(tmp_path, tmp_path.with_name(f"without-{file}"))
        (folder / file).unlink(missing_ok=True)
        assert load_processor(folder).image_processor.settings() == images.settings()


OFFICIAL_PREPROCESSOR = {
    "auto_map": {
        "AutoImageProcessor": "image_processing_kimi_vl.KimiVLImageProcessor",
        "AutoProcessor": "processing_kimi_vl.KimiVLProcessor",
    },
    "image_processor_type": "KimiVLImageProcessor",
    "in_token_limit": 16384,
    "patch_size": 14,
    "num_pooled_tokens": 1024,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "pad_input": True,
    "merge_kernel_size": [2, 2],
    "processor_class": "KimiVLProcessor",
}
OFFICIAL_TOKENIZER = {
    "auto_map": {"AutoTokenizer": ["tokenization_moonshot.TikTokenTokenizer", None]},
    "tokenizer_class": "TikTokenTokenizer",
    "bos_token": "[BOS]",
    "eos_token": "[EOS]",
    "pad_token": "[PAD]",
    "model_max_length": 1048576,
    "chat_template": "{{ 'of the hub' }}",
}


def test_a_folder_as_of_thinking_2506_loads_and_is_handed_over(exported, processor, tmp_path):
    """Official files have more keys than are used, and name code that is not there."""
    official = tmp_path / "official"
    official.mkdir()
    shutil.copy(exported / "model.safetensors", official)
    config = json.loads((exported / "config.json").read_text()) | {"_name_or_path": "somewhere/else"}
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_kimi_vl.KimiVLForConditionalGeneration"}
    config["text_config"] |= {"ep_size": 1, "use_cache": True, "_attn_implementation_autoset": True}
    tokens = [bytes([byte]) for byte in range(256)] + [b"th", b"the"]
    ranks = "".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens))
    (official / "tiktoken.model").write_text(ranks)
    for name, fields in (
        ("config.json", config),
        (
            "generation_config.json",
            {"max_length": 131072, "eos_token_id": 163586, "temperature": 0.8, "do_sample": True},
        ),
        ("preprocessor_config.json", OFFICIAL_PREPROCESSOR),
        ("tokenizer_config.json", OFFICIAL_TOKENIZER),
    ):
        (official / name).write_text(json.dumps(fields))
    (official / "chat_template.jinja").write_text("{{ 'of the hub' }}")

    loaded = load_processor(official)
    assert loaded.image_processor.grid(1920, 1080) == (78, 138)
    assert loaded.tokenizer.convert_tokens_to_ids("<|media_pad|>") == 258 + 163605 - 163584
    chat = [{"role": "user", "content": "the"}]
    assert loaded.tokenizer.apply_chat_template(chat, tokenize=False).endswith(
        "<|im_user|>user<|im_middle|>the<|im_end|>"
    )
    model = KimiVLForConditionalGeneration.from_pretrained(official)
    export_model(model, loaded, tmp_path / "model")
    assert load_processor(tmp_path / "model").image_processor.settings() == loaded.image_processor.settings()
    assert load_processor(tmp_path / "model").tokenizer.get_vocab() == loaded.tokenizer.get_vocab()
    assert (tmp_path / "model/model.safetensors").read_bytes() == (official / "model.safetensors").read_bytes()
    assert model.generation_config.eos_token_id == 163586
    for file in (tmp_path / "model").glob("*.json"):
        for named in json.loads(file.read_text()).get("auto_map", {}).values():  # our code, which is there
            assert (tmp_path / "model" / f"{named.split('.')[0]}.py").is_file(), file


def test_a_model_of_another_size_is_refused(exported, processor):
    config = instantiate(compose_run("stage=sft", "model.text_config.num_hidden_layers=3").model)
    with pytest.raises(
        ValueError, match="text_config.num_hidden_layers=4, but model.text_config.num_hidden_layers is 3"
    ):
        build_model(config, str(exported), processor)


def test_missing_weights_name_the_file(exported, processor, tmp_path):
    shutil.copytree(exported, tmp_path / "model")
    (tmp_path / "model/model.safetensors").unlink()
    with pytest.raises(ValueError, match="model.safetensors"):
        build_model(instantiate(compose_run("stage=sft").model), str(tmp_path / "model"), processor)


def test_init_from_names_the_command(tmp_path):
    with pytest.raises(ValueError, match="python train.py stage=long_cot name=mine$"):
        check_init_from("rl", str(tmp_path / "nothing"), "mine")
    with pytest.raises(ValueError, match="init_from is null.*python train.py stage=sft$"):
        check_init_from("long_cot", None, "digits")
    (tmp_path / "config.json").write_text("{not json")
    with pytest.raises(ValueError, match=r"config.json is not JSON.*python train.py stage=sft$"):
        check_init_from("long_cot", str(tmp_path), "digits")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_vl"}))
    with pytest.raises(ValueError, match="'qwen2_vl'"):
        check_init_from("long_cot", str(tmp_path), "digits")
    check_init_from("sft", None, "digits")


def test_resume_precedence(tmp_path):
    own, other = tmp_path / LAST, tmp_path / "other.ckpt"
    assert resume_path(tmp_path, None, unfinished=True) is None
    with pytest.raises(ValueError, match="ckpt_path=last: there is no checkpoint"):
        resume_path(tmp_path, "last", unfinished=False)
    own.parent.mkdir()
    own.touch()
    other.touch()
    assert resume_path(tmp_path, str(other), unfinished=True) == own
    assert resume_path(tmp_path, str(other), unfinished=False) == other
    assert resume_path(tmp_path, "last", unfinished=False) == own
    assert resume_path(tmp_path, None, unfinished=False) is None
