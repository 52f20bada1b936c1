"""Runs with adapters, as a user types them: the checkpoint leaves the base out, and goes on exactly."""

from pathlib import Path

import pytest
import torch
from forked import train
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

SHORT = ["debug=miniature", "logger=none", "test=false", "trainer.check_val_every_n_epoch=100"]
STOP = ["+callbacks.stop._target_=stop_at.StopAt", "+callbacks.stop={step: 2, signal_name: SIGTERM}"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, and in `whole` a run with adapters on it."""
    root = tmp_path_factory.mktemp("lora")
    train("stage=sft", *SHORT, f"paths.root={root}")
    train(*adapters(root, "whole"))
    return root


def adapters(root: Path, name: str) -> list[str]:
    base = f"init_from={root}/miniature/sft/model"
    here = [f"paths.root={root}", f"paths.output_dir={root}/{name}"]
    options = ["lora=all", "activation_checkpointing=selective", "router.bias_update_rate=0.01"]
    return ["stage=sft", *options, base, *SHORT, *here]


def test_the_checkpoint_holds_the_adapters_and_the_folder_the_merged_model(root):
    """Beside the adapters the routing biases, which go on moving."""
    kept = torch.load(root / "whole/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    biases = {name.removeprefix("model."): tensor for name, tensor in kept.items() if "lora_" not in name}
    assert biases and all(name.endswith("e_score_correction_bias") for name in biases)
    base, model = (load_file(root / run / "model/model.safetensors") for run in ("miniature/sft", "whole"))
    assert base.keys() == model.keys()
    assert all(torch.equal(model[name], bias) for name, bias in biases.items())
    assert {name for name in base if not torch.equal(base[name], model[name])} == biases.keys() | {
        name for name in base if ".layers." in name and "_proj" in name
    }


def test_resumed_is_uninterrupted(root):
    stopped = train(*adapters(root, "resumed"), *STOP, check=False)
    assert stopped.returncode == 130 and "saved after step 3" in stopped.stderr
    train(*adapters(root, "resumed"), "ckpt_path=last")
    whole, resumed = (load_file(root / run / "model/model.safetensors") for run in ("whole", "resumed"))
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_another_base_and_other_adapters_are_refused(root):
    checkpoint = f"ckpt_path={root}/whole/checkpoints/last.ckpt"
    other = train(*adapters(root, "other"), f"init_from={root}/whole/model", checkpoint, check=False)
    assert other.returncode == 2 and "adapters of another base than init_from=" in other.stderr
    words = adapters(root, "other")
    for changed in ([*words, "lora.rank=8"], [word for word in words if word != "lora=all"]):
        refused = train(*changed, checkpoint, check=False)
        assert refused.returncode == 2 and "the checkpoint was made with lora=" in refused.stderr


def test_the_next_stage_starts_from_it_and_rl_learns_with_adapters(root):
    here = [*SHORT, f"paths.root={root}", "name=next"]
    train("stage=long_cot", f"init_from={root}/whole/model", *here)
    few = ["data.phases=[{epochs: 1, lr: [1e-3, 1e-3]}]", "data.problems=4", "data.responses=2", "data.updates=1"]
    train("stage=rl", "lora=experts", "activation_checkpointing=full", *few, "data.max_new_tokens=6", *here)
