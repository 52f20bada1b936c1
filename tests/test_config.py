"""Every configuration that a user can compose is right: it resolves, its targets import, its keys match signatures."""

import pytest
from omegaconf import OmegaConf, open_dict

from kimivl.config import CONF, check_targets, compose_run, validate

STAGES = ["sft", "long_cot", "rl"]


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("experiment", [None, *options("experiment")])
def test_stage_and_experiment(stage, experiment):
    cfg = compose_run(f"stage={stage}", *([f"experiment={experiment}"] if experiment else []))
    OmegaConf.resolve(cfg)
    assert cfg.stage == stage
    assert list(check_targets(cfg)) == []
    assert not OmegaConf.missing_keys(cfg)


GROUPS = ["kernels", "router", "lora", "model", "optimizer", "trainer", "logger", "callbacks", "debug", "sweep"]
GROUPS += ["reward", "rollout", "objective", "sampler"]


@pytest.mark.parametrize("choice", [f"{group}={option}" for group in GROUPS for option in options(group)])
def test_every_group_option(choice):
    cfg = compose_run("stage=rl", choice)
    OmegaConf.resolve(cfg)
    assert list(check_targets(cfg)) == []


ADDED = [f"reward/length={option}" for option in options("reward/length")]
ADDED += [f"+reward/parts={option}" for option in options("reward/parts")]
ADDED += [f"+{verb}={option}" for verb in ("assess", "synthesize") for option in options(verb)]


@pytest.mark.parametrize("choice", ADDED)
def test_every_option_of_a_part(choice):
    cfg = compose_run("stage=rl", choice)
    OmegaConf.resolve(cfg)
    assert list(check_targets(cfg)) == []


@pytest.mark.parametrize("group", ["prompts", "judge"])
def test_every_option_of_synthesis(group):
    for option in options(f"synthesize/{group}"):
        value = f"synthesize/prompts=[{option}]" if group == "prompts" else f"+synthesize/judge={option}"
        cfg = compose_run("stage=rl", "+synthesize=default", value)
        OmegaConf.resolve(cfg)
        assert list(check_targets(cfg)) == []


def test_data_on_the_command_line_wins_over_the_stage():
    assert compose_run("stage=rl", "data=sft").data["_target_"].endswith("SFTDataModule")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("optimizer.learning_rate", 1.0, "optimizer.learning_rate: kimivl.optim.MuonAdamW takes no such key"),
        ("optimizer.weight_decay", "high", "optimizer.weight_decay: 'high' is not a float"),
        ("data.problems", 1.5, "data.problems: 1.5 is not a int"),
        ("trainer.max_epochz", 3, "trainer.max_epochz: lightning.pytorch.Trainer takes no such key"),
        ("module._target_", "kimivl.stages.rl.Nothing", "module._target_: kimivl.stages.rl.Nothing cannot be imported"),
        ("data.phases", [], "data.phases is empty"),
        ("router.aux_loss_weight", "much", "router.aux_loss_weight: 'much' is not a float"),
        ("activation_checkpointing", "some", "activation_checkpointing: 'some' is not one of none, full, selec"),
        ("optimizer.state_dtype", "int8", "optimizer.state_dtype: 'int8' is not one of float32, bfloat16 or null"),
        ("trainer.precision", "16-true", "trainer.precision=16-true: fp16 has not the range"),
        ("trainer.gradient_clip_val", 0, "trainer.gradient_clip_val=0: give a number above 0, or null"),
        ("trainer.gradient_clip_val", -1.0, "trainer.gradient_clip_val=-1.0: give a number above 0, or null"),
        ("trainer.gradient_clip_val", "much", "trainer.gradient_clip_val: 'much' is not a"),
        ("trainer.accumulate_grad_batches", 0, "trainer.accumulate_grad_batches=0: give 1 or more"),
        ("trainer.check_val_every_n_epoch", 0, "trainer.check_val_every_n_epoch=0: give 1 or more; data.val_shards="),
        ("trainer.fast_dev_run", True, "trainer.fast_dev_run ends as if all was trained; debug=miniature"),
        ("trainer.strategy", "fsdp", "trainer.strategy=fsdp: type strategy=fsdp (without trainer.) for FSDP2"),
        ("trainer.strategy", "ddp_spawn", "trainer.strategy=ddp_spawn: type strategy=fsdp"),
    ],
)
def test_mistakes_are_named(key, value, message):
    cfg = compose_run("stage=rl")
    with open_dict(cfg):
        OmegaConf.update(cfg, key, value)
    with pytest.raises(ValueError) as error:
        validate(cfg)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("setting", ["trainer.gradient_clip_val=null", "trainer.strategy=ddp", "strategy=fsdp"])
def test_what_turns_something_off_or_names_another_way_is_taken(setting):
    validate(compose_run("stage=rl", setting))
