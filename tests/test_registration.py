"""After `import kimivl`, transformers' Auto classes read an exported folder, in whatever order things are imported."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kimivl.checkpoint import export_model, load_processor
from kimivl.model import KimiVLConfig, KimiVLForConditionalGeneration, KimiVLImageProcessor, KimiVLProcessor
from kimivl.model.tokenizer import train_tokenizer

ROOT = Path(__file__).parents[1]
AUTO = "from transformers import AutoModelForImageTextToText"
DEEP = "from transformers.models.auto.modeling_auto import AutoModelForImageTextToText"
ORDERS = {
    "kimivl before transformers": f"import kimivl; {AUTO}",
    "kimivl after transformers": f"{AUTO}; import kimivl",
    "kimivl after the root only": f"import transformers, kimivl; {AUTO}",
    "a deep module first": f"import kimivl; {DEEP}",
    "kimivl after a deep module": f"{DEEP}; import kimivl",
    "kimivl.model at once": f"import kimivl.model; {AUTO}",
    "modules that lie on the way": f"import kimivl, transformers.generation.utils, transformers.modeling_utils; {AUTO}",
}
CLASSES = {
    "AutoConfig": "KimiVLConfig",
    "AutoModel": "KimiVLForConditionalGeneration",
    "AutoModelForCausalLM": "KimiVLForConditionalGeneration",
    "AutoModelForImageTextToText": "KimiVLForConditionalGeneration",
    "AutoImageProcessor": "KimiVLImageProcessor",
    "AutoProcessor": "KimiVLProcessor",
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    text = sizes | {"moe_intermediate_size": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "kv_lora_rank": 8}
    text |= {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 2}
    tokenizer = train_tokenizer(["one two 3"] * 4, 300)
    config = KimiVLConfig(text_config=text, vision_config=sizes).with_tokenizer(tokenizer)
    folder = tmp_path_factory.mktemp("run") / "model"
    processor = KimiVLProcessor(KimiVLImageProcessor(in_token_limit=16384), tokenizer)
    export_model(KimiVLForConditionalGeneration(config), processor, folder)
    return folder


def fresh(script: str, folder: Path) -> str:
    """What a new interpreter prints last."""
    run = subprocess.run([sys.executable, "-c", script, str(folder)], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()[-1]


# kimivl before transformers: the test of all classes
QUICK = "kimivl after transformers"


@pytest.mark.parametrize(
    "order", [order if order == QUICK else pytest.param(order, marks=pytest.mark.slow) for order in ORDERS]
)
def test_the_order_of_imports_does_not_matter(order, exported):
    script = (
        f"import sys; {ORDERS[order]}\nprint(type(AutoModelForImageTextToText.from_pretrained(sys.argv[1])).__name__)"
    )
    assert fresh(script, exported) == "KimiVLForConditionalGeneration"


def test_all_auto_classes_read_an_exported_folder(exported):
    names = [*CLASSES, "AutoTokenizer"]
    script = f"""
import json, sys, kimivl
assert "transformers" not in sys.modules
import transformers
from transformers.models.auto.image_processing_auto import AutoImageProcessor
found = {{}}
for name in {names}:
    auto = AutoImageProcessor if name == "AutoImageProcessor" else getattr(transformers, name)
    found[name] = auto.from_pretrained(sys.argv[1])
processor = found["AutoProcessor"]
text = processor.apply_chat_template([dict(role="user", content="one")], tokenize=False)
print(json.dumps([{{name: type(thing).__name__ for name, thing in found.items()}},
    processor.image_processor.in_token_limit, len(found["AutoTokenizer"]), text]))
"""
    classes, limit, size, text = json.loads(fresh(script, exported))
    assert {name: classes[name] for name in CLASSES} == CLASSES
    assert (limit, size) == (16384, len(load_processor(exported).tokenizer))
    assert text.endswith("<|im_user|>user<|im_middle|>one<|im_end|>")


@pytest.mark.slow
def test_a_spawned_process_has_them_too(exported):
    script = """
import multiprocessing, sys
import kimivl
from transformers import AutoConfig
if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(type(pool.apply(AutoConfig.from_pretrained, sys.argv[1:])).__name__)
"""
    path = exported.parent / "spawns.py"
    path.write_text(script)
    run = subprocess.run([sys.executable, path, exported], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.strip() == "KimiVLConfig", run.stderr


def test_the_exported_model_is_the_model(exported):
    from transformers import AutoModelForImageTextToText

    ours = KimiVLForConditionalGeneration.from_pretrained(exported).state_dict()
    theirs = AutoModelForImageTextToText.from_pretrained(str(exported)).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
