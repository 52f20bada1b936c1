"""A supervised run goes on bit for bit from the steps around the end of an epoch, whatever the next one's length."""

import pytest
import torch

from kimivl.callbacks import Checkpoint

SHORT, LONG = "{max_length: 192, epochs: 1, lr: [0.1, 0.1]}", "{max_length: 512, epochs: 1, lr: [0.1, 0.1]}"


@pytest.mark.parametrize("phases", [f"[{LONG}, {SHORT}]", f"[{SHORT}, {LONG}]"], ids=["more packs", "fewer packs"])
def test_resumed_around_the_end_of_an_epoch(fit, tmp_path, phases):
    keep = Checkpoint(dirpath=tmp_path / "steps", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    phases = f"data.phases={phases}"
    module, trainer = fit("sft", phases, accumulate=2, enable_checkpointing=True, callbacks=[keep])
    first = trainer.datamodule.plan(0).num_steps
    for step in (first - 1, first, first + 1):
        resumed, again = fit("sft", phases, accumulate=2, ckpt_path=tmp_path / f"steps/step={step}.ckpt")
        assert again.global_step == trainer.global_step, step
        for name, weight in module.model.named_parameters():
            assert torch.equal(resumed.model.get_parameter(name), weight), (step, name)
