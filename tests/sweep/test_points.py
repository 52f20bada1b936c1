"""A point has one folder, whenever it is asked for; what has finished there is known."""

import json

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser

from kimivl.sweep.points import finished_metric, folder_name, folder_of, has_diverged, note_failure


def write_run(folder, overrides, status="finished", **metrics):
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(overrides))
    run = {"status": status, "config": {"optimized_metric": "val/accuracy"}}
    (folder / "run.json").write_text(json.dumps(run))
    (folder / "metrics.json").write_text(json.dumps(metrics))


def test_a_folder_is_named_by_what_varies():
    overrides = ["stage=rl", "+reward.length.weight=0.2", "seed=1"]
    assert folder_name(overrides, fixed=["stage"]) == "reward.length.weight-0.2_seed-1"
    assert folder_name(overrides[::-1], fixed=["stage"]) == folder_name(overrides, fixed=["stage"])
    assert folder_name(["stage=rl"], fixed=["stage"]) == "0"


AWKWARD = ["[1,2]", "[1,3]", "(1,2)", "/models/a", "../a", "a b", "a,b", "'x=y'", "${seed}", "ü", "x" * 400, "x" * 401]


def test_awkward_values_have_names_of_their_own():
    names = [folder_name([f"init_from={value}"]) for value in AWKWARD]
    assert len(set(names)) == len(AWKWARD)
    for name in names:
        assert "/" not in name and len(name) < 200 and not name.startswith(".")
        [parsed] = OverridesParser.create().parse_overrides([f"init_from=outputs/{name}/model"])
        assert parsed.value() == f"outputs/{name}/model"


def test_what_has_finished_is_known_with_its_metric(tmp_path):
    overrides = ["stage=sft", "seed=1"]
    assert finished_metric(tmp_path / "none", overrides) == (False, None)
    write_run(tmp_path / "done", overrides, **{"val/accuracy": 0.5})
    assert finished_metric(tmp_path / "done", overrides) == (True, 0.5)
    other = ["logger=none", "callbacks.samples=null", "activation_checkpointing=full", "data.max_dropped=0.1"]
    other += ["test=false", "kernels=auto", "strategy=fsdp", "rollout.max_rows=8"]
    assert finished_metric(tmp_path / "done", [*overrides, *other]) == (True, 0.5)
    write_run(tmp_path / "stopped", overrides, status="interrupted", **{"val/accuracy": 0.5})
    assert finished_metric(tmp_path / "stopped", overrides) == (False, None)


@pytest.mark.parametrize("key", ["optimizer.weight_decay", "trainer.accumulate_grad_batches", "ckpt_path"])
def test_a_finished_run_of_another_sweep_is_not_taken_for_this_one(tmp_path, key):
    write_run(tmp_path / "seed-1", [f"{key}=2", "seed=1"], **{"val/accuracy": 0.5})
    with pytest.raises(ValueError, match=f"{key}=2, and this sweep has no {key}: "):
        finished_metric(tmp_path / "seed-1", ["seed=1"])


def test_a_number_is_one_point_however_it_is_typed(tmp_path):
    assert folder_name(["lr=1.0"]) == folder_name(["lr=1"]) == "lr-1"
    assert len({folder_name([f"lr={value}"]) for value in ("1", "10.0", "1.05", "'1.0'", "v1.0", "1.0.0")}) == 6
    write_run(tmp_path / "lr-3", ["lr=3", "decay=1.0"], **{"val/accuracy": 0.5})
    assert finished_metric(folder_of(tmp_path, ["lr=3.0", "decay=1"], ["decay"]), ["lr=3.0", "decay=1"]) == (True, 0.5)
    (tmp_path / "lr-1.0").mkdir()  # from a time when this was another
    assert folder_of(tmp_path, ["lr=1.0"]) == tmp_path / "lr-1.0"


def test_a_failure_is_written_down_where_the_run_could_not(tmp_path):
    note_failure(tmp_path / "a", ["seed=1"], "killed by signal 9")
    assert json.loads((tmp_path / "a" / "run.json").read_text())["error"] == "killed by signal 9"
    assert yaml.safe_load((tmp_path / "a" / ".hydra" / "overrides.yaml").read_text()) == ["seed=1"]
    for status, after in (("finished", None), ("interrupted", None), ("running", "late")):
        write_run(tmp_path / status, ["seed=1"], status=status)
        note_failure(tmp_path / status, ["seed=1"], "late")
        run = json.loads((tmp_path / status / "run.json").read_text())
        assert run.get("error") == after and run["config"]


@pytest.mark.parametrize(
    ("reason", "diverged"),
    [
        ("the policy's logits are NaN: its weights have diverged", True),
        ("step 3: the loss is not finite", True),
        ("the metric is nan", True),
        ("the disk is full", False),
        ("out of memory in the info queue", False),
    ],
)
def test_diverging_is_told_from_other_failures(reason, diverged):
    assert has_diverged(reason) is diverged
