"""The three stages in miniature, through ``train.py`` as a user types it."""

import json
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
from command import ROOT, history
from command import train as train_afresh
from forked import train
from safetensors.torch import load_file

from kimivl.tracking import names

MINIATURE = "debug=miniature"
QUIET = [MINIATURE, "logger=none", "test=false"]
RL = ["stage=rl", "data.phases=[{epochs: 2, lr: [1e-3, 1e-3]}]", "data.problems=8", "data.responses=4"]
RL += ["data.updates=2", "trainer.check_val_every_n_epoch=1"]


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output folder in which all three stages have run."""
    root = tmp_path_factory.mktemp("outputs")
    for stage in (["stage=sft"], ["stage=long_cot"], RL):
        train(*stage, MINIATURE, f"paths.root={root}")
    return root


@pytest.mark.parametrize("stage", ["sft", "long_cot", "rl"])
def test_a_stage_leaves_model_metrics_and_history(root, stage):
    run = root / "miniature" / stage
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["test/problems"] == 16
    assert 0 <= metrics["test/accuracy"] <= 1 and 0 < metrics["test/sampled_length"] <= 12
    assert json.loads((run / "run.json").read_text())["status"] == "finished"
    assert (run / "model" / "tokenizer.json").is_file()
    assert len(history(run, "train/loss")) >= 2
    assert list(run.glob("wandb/offline-run-*"))


def test_each_stage_starts_from_the_one_before_and_moves(root):
    weights = [load_file(root / "miniature" / stage / "model/model.safetensors") for stage in ("sft", "long_cot", "rl")]
    assert weights[0].keys() == weights[1].keys() == weights[2].keys()
    vision = next(name for name in weights[0] if name.startswith("vision_tower") and name.endswith("wqkv.weight"))
    assert not torch.equal(weights[0][vision], weights[1][vision])
    assert torch.equal(weights[1][vision], weights[2][vision])  # frozen in RL
    head = "language_model.lm_head.weight"
    assert not torch.equal(weights[1][head], weights[2][head])


def test_checkpoints_hold_tensors_and_primitives_only(root):
    for stage in ("sft", "rl"):
        torch.load(root / "miniature" / stage / "checkpoints/last.ckpt", weights_only=True)


def test_rl_logs_rollouts_rewards_and_speed(root):
    run = root / "miniature" / "rl"
    phases = [f"perf/{phase}_s" for phase in ("generate", "score", "reference", "sync")]
    for name in ("rollout/accuracy", "rollout/length", "reward/total", "perf/rollout_tokens_per_s", "sampler/ceiling"):
        assert len(history(run, name)) == 2, name
    assert all(len(history(run, name)) == 2 for name in phases)
    for iteration in range(2):
        rows = [json.loads(row) for row in (run / f"rollouts/{iteration:06d}.jsonl").read_text().splitlines()]
        assert len(rows) == 8 and all(len(row["responses"]) == 4 for row in rows)
    assert history(run, "policy/log_ratio_squared")[0] == pytest.approx(0, abs=1e-6)  # the policy is its own reference


@pytest.mark.parametrize("stage", ["sft", "long_cot", "rl"])
def test_every_logged_metric_has_a_unit_and_a_meaning(root, stage):
    lines = (root / "miniature" / stage / "history.jsonl").read_text().splitlines()
    assert names.unknown({name for line in lines for name in json.loads(line)} - {"step"}) == []


def test_report_writes_summary_and_picture(root, capsys):
    from kimivl.cli import main

    assert main(["report", str(root / "miniature")]) == 0
    summary = json.loads((root / "miniature/summary.json").read_text())["stages"]
    keys = {"accuracy", "sampled_accuracy", "length", "sampled_length", "problems", "seconds", "by_difficulty"}
    assert list(summary) == ["sft", "long_cot", "rl"] and all(set(figures) == keys for figures in summary.values())
    assert summary["rl"]["by_difficulty"].keys() == {str(level) for level in range(1, 9)}
    assert (root / "miniature/summary.png").stat().st_size > 10_000
    assert "Long-CoT SFT" in capsys.readouterr().out


def test_report_of_nothing_says_what_to_run(tmp_path, capsys):
    from kimivl.cli import main

    assert main(["report", str(tmp_path)]) == 2
    assert "python train.py stage=sft" in capsys.readouterr().err


def audit(run: Path) -> int:
    """The exit code of ``kimivl audit``."""
    from kimivl.cli import main

    return main(["audit", str(run)])


def test_audit_proves_the_epochs_and_draws_them(root, capsys):
    run = root / "miniature/sft"
    assert audit(run) == 0
    assert "verified" in capsys.readouterr().out
    assert sorted(path.name for path in (run / "audit").glob("*.parquet")) == ["epoch-000.parquet", "epoch-001.parquet"]
    assert (run / "audit/audit.png").stat().st_size > 10_000


def test_index_says_what_is_in_the_shards(root, capsys):
    from kimivl.cli import main

    digits = root / "data/miniature/digits"
    assert main(["index", f"{digits}/sft-*.tar", f"data.processor={digits}/tokenizer"]) == 0
    printed = capsys.readouterr().out
    assert "160 samples in 1 shard" in printed and "digits" in printed and "index: " in printed
    assert main(["index", f"{digits}/none-*.tar", f"data.processor={digits}/tokenizer"]) == 2
    assert "none-*.tar" in capsys.readouterr().err
    assert main(["index", f"{digits}/sft-*.tar", "data.processr=x"]) == 2
    assert "processr" in capsys.readouterr().err


SIX_STEPS = {"sft": ["stage=sft"], "rl": [*RL, "data.updates=3"]}  # epochs of 4 + 2 and of 3 + 3 steps


def stop_at(step: int, signal_name: str) -> list[str]:
    """Overrides that send the run a signal when its step ``step`` begins."""
    return ["+callbacks.stop._target_=stop_at.StopAt", f"+callbacks.stop={{step: {step}, signal_name: {signal_name}}}"]


@pytest.fixture(scope="session")
def uninterrupted(root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    runs = {stage: tmp_path_factory.mktemp(stage) for stage in SIX_STEPS}
    for stage, run in runs.items():
        train(*SIX_STEPS[stage], *QUIET, f"paths.root={root}", f"paths.output_dir={run}")
    return runs


@pytest.mark.parametrize(
    ("stage", "signal_name", "step"),
    [
        ("sft", "SIGTERM", 1),
        ("sft", "SIGINT", 3),  # at the end of an epoch
        ("sft", "SIGKILL", 3),
        ("rl", "SIGTERM", 2),  # at the end of an iteration
        ("rl", "SIGINT", 3),
        ("rl", "SIGKILL", 4),  # at the last periodic checkpoint but one
    ],
)
def test_resumed_is_uninterrupted(root, uninterrupted, tmp_path, stage, signal_name, step):
    """Stopped in good order (a signal) or killed in the middle of a step, the run goes on bit for bit."""
    overrides = [*SIX_STEPS[stage], *QUIET, f"paths.root={root}", f"paths.output_dir={tmp_path}"]
    stopped = train(*overrides, *stop_at(step, signal_name), check=False)
    if signal_name == "SIGKILL":
        assert stopped.returncode == -9
    else:
        assert stopped.returncode == 130
        assert f"saved after step {step + 1}" in stopped.stderr and "the same command goes on" in stopped.stderr
        assert "Traceback" not in stopped.stderr
    train(*overrides)
    assert audit(tmp_path) == (0 if stage == "sft" else 2)  # RL draws its problems, there is no epoch to prove
    whole = uninterrupted[stage]
    for name in ("train/loss", "rollout/length") if stage == "rl" else ("train/loss",):
        assert history(tmp_path, name) == history(whole, name)
    assert len(history(whole, "train/loss")) == 6
    assert (tmp_path / "model/model.safetensors").read_bytes() == (whole / "model/model.safetensors").read_bytes()


def test_killed_right_after_the_checkpoint_of_an_epochs_end(root, uninterrupted, tmp_path):
    """Lightning leaves hooks out after such a checkpoint: the optimiser must be reset all the same."""
    every_iteration = "callbacks.checkpoint.every_n_train_steps=3"
    overrides = [*SIX_STEPS["rl"], *QUIET, every_iteration, f"paths.root={root}", f"paths.output_dir={tmp_path}"]
    train(*overrides, *stop_at(4, "SIGKILL"), check=False)
    train(*overrides)
    for name in ("train/loss", "rollout/length"):
        assert history(tmp_path, name) == history(uninterrupted["rl"], name)


def test_a_finished_run_can_be_gone_on_from(root, tmp_path):
    """As one is that was killed in its last test: nothing is trained again, the rest is done."""
    overrides = ["stage=sft", *QUIET, f"paths.root={root}", f"paths.output_dir={tmp_path}"]
    train(*overrides)
    losses = history(tmp_path, "train/loss")
    again = train(*overrides, "ckpt_path=last")
    assert "sft: model in" in again.stdout and json.loads((tmp_path / "run.json").read_text())["status"] == "finished"
    assert history(tmp_path, "train/loss") == losses and audit(tmp_path) == 0


def test_a_signal_to_all_processes_saves_too(root, tmp_path):
    """A scheduler signals the loader's workers along with the run."""
    overrides = ["stage=sft", *QUIET, "data.num_workers=2", f"paths.root={root}", f"paths.output_dir={tmp_path}"]
    stopped = train(*overrides, *stop_at(1, "SIGTERM"), "+callbacks.stop.group=true", check=False)
    assert stopped.returncode == 130 and "saved after step 2" in stopped.stderr and "Traceback" not in stopped.stderr
    train(*overrides, "data.num_workers=1", "data.max_dropped=0.5")  # neither changes what is trained
    assert sorted(history(tmp_path, "train/loss")) == list(range(6)) and audit(tmp_path) == 0


def test_a_finished_run_typed_again_starts_anew(root, tmp_path):
    overrides = ["stage=sft", *QUIET, f"paths.root={root}", f"paths.output_dir={tmp_path}"]
    train(*overrides)
    changed = [*overrides, "optimizer.momentum=0.9", "callbacks.checkpoint.every_n_train_steps=100"]
    train(*changed, *stop_at(1, "SIGKILL"), check=False)
    train(*changed)
    assert sorted(history(tmp_path, "train/loss")) == list(range(6))


def test_a_checkpoint_from_elsewhere_takes_the_place_of_what_the_folder_held(root, tmp_path):
    """A finished run's own checkpoint must not be gone on from by the run that replaces it."""
    overrides = ["stage=sft", *QUIET, f"paths.root={root}"]
    here = [*overrides, f"paths.output_dir={tmp_path / 'here'}"]
    train(*here)
    train(*overrides, f"paths.output_dir={tmp_path / 'there'}", *stop_at(1, "SIGTERM"), check=False)
    begun = [*here, f"ckpt_path={tmp_path / 'there/checkpoints/last.ckpt'}"]
    train(*begun, "callbacks.checkpoint.every_n_train_steps=100", *stop_at(3, "SIGKILL"), check=False)
    train(*begun)
    assert sorted(history(tmp_path / "here", "train/loss")) == [2, 3, 4, 5]
    assert audit(tmp_path / "here") == 0  # with the steps that the other run had made


def test_a_checkpoint_does_not_go_on_with_steps_cut_otherwise(root, tmp_path):
    overrides = ["stage=sft", *QUIET, f"paths.root={root}"]
    train(*overrides, *stop_at(1, "SIGTERM"), f"paths.output_dir={tmp_path / 'a'}", check=False)
    checkpoint = tmp_path / "a/checkpoints/last.ckpt"
    refused = train(*overrides, f"ckpt_path={checkpoint}", "trainer.accumulate_grad_batches=2",
                    f"paths.output_dir={tmp_path / 'b'}", check=False)  # fmt: skip
    assert refused.returncode == 2 and "the checkpoint was made on other data" in refused.stderr


@pytest.mark.parametrize("damage", ["image", "truncated"])
def test_a_damaged_shard_is_named_and_counted(root, tmp_path, damage):
    source = root / "data/miniature/digits"
    shutil.copytree(source, tmp_path / "digits")
    shard = tmp_path / "digits/sft-000000.tar"
    content = shard.read_bytes()
    if damage == "image":
        start = content.index(b"\x89PNG") + 60
        content = content[:start] + b"\0" * 20 + content[start + 20 :]
    else:
        content = content[: len(content) * 9 // 10]
    shard.write_bytes(content)
    overrides = ["stage=sft", *QUIET, "data.prepare=null", f"paths.root={root}", f"paths.output_dir={tmp_path / 'run'}"]
    overrides += [f"paths.data={tmp_path}"]
    refused = train(*overrides, "data.max_dropped=0.001", check=False)
    assert refused.returncode == 2 and "data.max_dropped" in refused.stderr and "Traceback" not in refused.stderr
    accepted = train(*overrides, "data.max_dropped=0.2", "trainer.accumulate_grad_batches=2")
    reason = "bad_image" if damage == "image" else "truncated_shard"
    assert "sft-000000.tar" in refused.stdout and reason in refused.stdout
    [listed] = [path.read_text() for path in (tmp_path / "digits").glob(".index-*.dropped.jsonl")]
    assert json.loads(listed)["shard"] == str(shard)
    assert reason in accepted.stdout and ".dropped.jsonl" in accepted.stdout
    assert history(tmp_path / "run", f"data/dropped/{reason}") == {0: 1}


def test_a_picture_that_does_not_decode_becomes_a_hole(root, tmp_path):
    """Its header and checksum are sound, so that it comes up in training: the run goes on without it, and says so."""
    shutil.copytree(root / "data/miniature/digits", tmp_path / "digits")
    shard = tmp_path / "digits/sft-000000.tar"
    content = bytearray(shard.read_bytes())
    chunk = content.index(b"IDAT")
    (length,) = struct.unpack(">I", content[chunk - 4 : chunk])
    content[chunk + 4 : chunk + 4 + length] = bytes(length)
    checksum = zlib.crc32(content[chunk : chunk + 4 + length])
    content[chunk + 4 + length : chunk + 8 + length] = struct.pack(">I", checksum)
    shard.write_bytes(content)
    overrides = ["stage=sft", *QUIET, "data.prepare=null", f"paths.root={root}", f"paths.data={tmp_path}"]
    run = tmp_path / "run"
    train(*overrides, "data.max_dropped=0.2", f"paths.output_dir={run}")
    assert list(history(run, "data/dropped/bad_image").values()) == [1, 2]  # once in each epoch
    assert audit(run) == 0
    [first, _] = map(json.loads, (run / "audit/quarantine.jsonl").read_text().splitlines())
    assert first["reason"] == "bad_image" and first["shard"] == str(shard) and first["key"].startswith("sft-")
    refused = train(*overrides, "data.max_dropped=0.001", f"paths.output_dir={tmp_path / 'strict'}", check=False)
    assert refused.returncode == 2 and "bad_image 1" in refused.stderr and first["key"] in refused.stderr
    assert "Traceback" not in refused.stderr


def test_mixture_and_moved_samples(root, tmp_path):
    """Half of the digits in each of two epochs; what the short packs cannot hold waits for the long ones."""
    lr = "epochs: 1, lr: [1e-3, 1e-3]"
    phases = f"data.phases=[{{max_length: 128, {lr}}}, {{max_length: 2048, {lr}}}]"
    overrides = ["stage=sft", *QUIET, phases, "data.too_long=move", f"paths.root={root}"]
    train(*overrides, "data.mixture={digits: 0.5}", f"paths.output_dir={tmp_path / 'half'}")
    assert audit(tmp_path / "half") == 0
    unknown = train(*overrides, "data.mixture={digit: 2}", f"paths.output_dir={tmp_path / 'typo'}", check=False)
    assert unknown.returncode == 2 and "data.mixture" in unknown.stderr and "digits" in unknown.stderr


def test_an_unfinished_run_typed_again_goes_on_but_not_with_other_settings(root, tmp_path):
    overrides = ["stage=sft", *QUIET, f"paths.root={root}", f"paths.output_dir={tmp_path}"]
    train(*overrides, *stop_at(1, "SIGTERM"), check=False)
    refused = train(*overrides, "optimizer.momentum=0.5", check=False)
    assert refused.returncode == 2 and "another optimizer.momentum (0.95, now 0.5)" in refused.stderr
    train(*overrides)
    steps = list(history(tmp_path, "train/loss"))
    assert steps == sorted(set(steps)) and steps[0] == 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stage=pretrain"], "Available options in 'stage':\n\tlong_cot\n\trl\n\tsft"),
        (["stage=sft", "optimizer.lrr=1"], "Key 'lrr' is not in struct"),
        (["stage=sft", "seed=many"], "could not be converted to Integer"),
        (["stage=sft", "optimizer.momentum=high"], "error: optimizer.momentum: 'high' is not a float"),
        (["stage=rl"], "no model there (config.json is missing); make it with: python train.py stage=long_cot"),
        (["stage=rl", "init_from=null"], "init_from is null; make it with: python train.py stage=long_cot"),
        (["stage=sft", "ckpt_path=last"], "ckpt_path=last: there is no checkpoint"),
        (["stage=sft", "+trainer.max_steps=5"], "trainer.max_steps: the length of a run is planned from data.phases"),
        (["stage=sft", MINIATURE, "data.phases=[{epoch: 1, lr: [1, 1]}]"], "a phase takes epochs, lr, max_length"),
        (["-m", "stage=rl"], "make it with: python train.py stage=long_cot"),
        (["stage=sft", "reward.length.weight=-1"], "error: reward.length needs weight >= 0"),
        (["stage=sft", "experiment=kimi_vl_a3b", "trainer=cpu"], "error: data.processor is null"),
        (["stage=sft", "trainer.devices=2", "trainer.num_nodes=2"], "one process cannot start ranks on other nodes"),
        (["-m", "stage=sft", "trainer.devices=2"], "in a multirun: its jobs need a launcher that starts their ranks"),
        (["stage=sft", "data.prepare=null"], "data/digits/tokenizer: there is no such folder"),
        (["stage=sft", MINIATURE, "data.shards=/nowhere/x-*.tar"], "/nowhere/x-*.tar"),
        (["stage=sft", MINIATURE, "data.shards=[]"], "data.shards"),
        (["stage=sft", MINIATURE, "data.phases=[{max_length: 8, epochs: 1, lr: [1, 1]}]"], "data.phases"),
        (["stage=sft", MINIATURE, "data.phases=[{max_length: a, epochs: 1, lr: [1, 1]}]"], "data.phases: max_length"),
        (["stage=sft", MINIATURE, "data.phases=[{max_length: 9, epochs: 1.5, lr: [1, 1]}]"], "data.phases: epochs"),
        (["stage=sft", MINIATURE, "data.mixture={digits: many}"], "data.mixture.digits"),
        (["stage=sft", MINIATURE, "data.max_dropped=2"], "data.max_dropped=2"),
        (["stage=sft", MINIATURE, "data.shards=http://127.0.0.1:1/a.tar"], "data.shards='http://127.0.0.1:1/a.tar'"),
        (["stage=sft", MINIATURE, "data.too_long=cut"], "data.too_long"),
        (["stage=sft", MINIATURE, "data.window=0"], "data.window"),
        (["stage=sft", MINIATURE, "data.mixture={digits: -1}"], "data.mixture"),
        (["stage=sft", MINIATURE, "kernels.attention=varlen"], "error: kernels.attention=varlen needs a CUDA device"),
        (["stage=sft", MINIATURE, "kernels.attention=flex"], "error: kernels.attention=flex has no gradients on a CPU"),
    ],
)
def test_bad_input_is_one_clear_sentence(root, tmp_path, overrides, message):
    data = [f"paths.data={root}/data/miniature"] if MINIATURE in overrides else []
    done = train(*overrides, *data, f"paths.root={tmp_path}", check=False)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_foreign_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    done = train("stage=rl", f"init_from={tmp_path}", f"paths.root={tmp_path}", check=False)
    assert done.returncode == 2 and "a 'llama' model" in done.stderr


def test_config_shows_without_data_or_gpu(tmp_path):
    done = train("stage=rl", "model=kimi_vl_a3b", "trainer=gpu", f"paths.root={tmp_path}", "--cfg", "job", "--resolve")
    assert "hidden_size: 2048" in done.stdout and "accelerator: gpu" in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [[], ["hydra/launcher=local"]])
def test_a_sweep_runs_each_job_in_its_own_folder_and_wandb_run(root, tmp_path, launcher):
    short = ["data.phases=[{epochs: 1, lr: [1e-3, 1e-3]}]", "data.problems=4", "data.responses=2", "data.updates=1"]
    train_afresh("-m", "stage=rl", MINIATURE, *short, "reward.length.weight=0,0.3", "seed=1,2", f"paths.root={root}",
          f"hydra.sweep.dir={tmp_path}", "test=false", "trainer.check_val_every_n_epoch=1", *launcher)  # fmt: skip
    jobs = sorted(path.parent for path in tmp_path.glob("*/metrics.json"))
    settings = [json.loads((job / "run.json").read_text())["config"] for job in jobs]
    assert sorted((job["reward"]["length"]["weight"], job["seed"]) for job in settings) == [
        (0, 1),
        (0, 2),
        (0.3, 1),
        (0.3, 2),
    ]
    assert {job["logger"]["wandb"]["group"] for job in settings} == {f"miniature-{tmp_path.name}"}
    assert all("val/sampled_accuracy" in json.loads((job / "metrics.json").read_text()) for job in jobs)
    runs = [path.name.split("-")[-1] for job in jobs for path in job.glob("wandb/offline-run-*")]
    assert len(runs) == len(set(runs)) == 4


def test_help_does_not_wait_for_torch():
    command = [sys.executable, "-X", "importtime", "train.py", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert "stage: long_cot, rl, sft" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "hydra" in imported and not imported & {"torch", "transformers", "lightning"}


def test_readme_commands_are_those_of_the_makefile():
    readme, makefile = (ROOT / "README.md").read_text(), (ROOT / "Makefile").read_text()
    for target in ("demo", "test", "check"):
        assert f"make {target}" in readme and f"\n{target}:" in makefile
