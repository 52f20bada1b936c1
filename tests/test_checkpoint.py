"""Hand-over between stages, and what a run starts from."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate

from kimivl.checkpoint import LAST, build_model, check_init_from, export_model, load_processor, resume_path
from kimivl.config import compose_run
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


def test_a_failed_export_leaves_the_one_before(exported, processor, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(exported, folder)

    class Full:
        def save_pretrained(self, folder):
            raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        export_model(Full(), processor, folder)
    assert (folder / "model.safetensors").read_bytes() == (exported / "model.safetensors").read_bytes()


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
