"""What is handed to a launcher, and what is made of the results: with a launcher that only writes down."""

import json
import math
import subprocess
import sys

import pytest
import yaml
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import CompactHydraException
from omegaconf import OmegaConf

from kimivl.sweep.launching import PointLauncher
from kimivl.sweep.points import note_failure


class Launcher:
    """Returns what ``outcomes`` say of each point: a metric, or an error."""

    def __init__(self, outcomes):
        self.outcomes, self.batches = outcomes, []

    def launch(self, job_overrides, initial_job_idx):
        self.batches.append([list(overrides) for overrides in job_overrides])
        results = []
        for overrides in job_overrides:
            outcome = self.outcomes[overrides[0]]
            failed = isinstance(outcome, Exception)
            results.append(JobReturn(overrides, status=JobStatus.FAILED if failed else JobStatus.COMPLETED))
            results[-1].return_value = outcome
        return results


def points(folder, outcomes, worst=None, hydra=()):
    config = OmegaConf.create({"hydra": {"sweep": {"dir": str(folder)}, "overrides": {"hydra": list(hydra)}}})
    inner = Launcher(outcomes)
    return inner, PointLauncher(inner, config, ["stage"], worst)


def write_finished(folder, overrides, metric):
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(overrides))
    (folder / "run.json").write_text('{"status": "finished", "config": {"optimized_metric": "m"}}')
    (folder / "metrics.json").write_text(json.dumps({"m": metric}))


def test_what_has_finished_is_not_launched_and_keeps_its_place(tmp_path):
    write_finished(tmp_path / "seed-2", ["seed=2", "stage=rl"], 0.2)
    inner, launcher = points(tmp_path, {"seed=1": 0.1, "seed=3": 0.3})
    results = launcher.launch([[f"seed={seed}", "stage=rl"] for seed in (1, 2, 3)], initial_job_idx=0)
    assert [result.return_value for result in results] == [0.1, 0.2, 0.3]
    place = f"hydra.sweep.dir={tmp_path}"
    assert inner.asked == 3  # so that the two have as many threads as they would have had beside the third
    assert inner.batches == [
        [
            ["seed=1", "stage=rl", place, "hydra.sweep.subdir=seed-1"],
            ["seed=3", "stage=rl", place, "hydra.sweep.subdir=seed-3"],
        ]
    ]


@pytest.mark.parametrize(
    ("outcome", "worst", "state"),
    [
        (math.nan, None, JobStatus.FAILED),
        (math.nan, -math.inf, -math.inf),
        (math.inf, -math.inf, -math.inf),
        (ValueError("step 3: the loss is not finite"), -math.inf, -math.inf),
        (ValueError("step 3: the loss is not finite"), None, JobStatus.FAILED),
        (ValueError("the disk is full"), -math.inf, JobStatus.FAILED),
        (0.5, -math.inf, 0.5),
        (None, -math.inf, None),
    ],
)
def test_diverging_is_the_worst_of_a_search_and_a_failure_of_a_grid(tmp_path, outcome, worst, state):
    _, launcher = points(tmp_path, {"seed=1": outcome}, worst)
    [result] = launcher.launch([["seed=1"]], initial_job_idx=0)
    assert (result.status if result.status == JobStatus.FAILED else result.return_value) == state


def test_a_run_that_finished_with_nan_before_is_judged_as_a_new_one(tmp_path):
    write_finished(tmp_path / "seed-1", ["seed=1"], math.nan)
    inner, launcher = points(tmp_path, {}, worst=math.inf)
    assert [result.return_value for result in launcher.launch([["seed=1"]], 0)] == [math.inf]
    assert inner.batches == []


def test_a_run_that_is_under_way_is_left_alone(tmp_path):
    folder = tmp_path / "seed-1"
    folder.mkdir()
    (folder / "run.json").write_text('{"status": "running", "config": {}}')
    hold = f"import fcntl; f = open({str(folder / '.lock')!r}, 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(); input()"
    inner, launcher = points(tmp_path, {"seed=2": 0.2})
    with subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        left, done = launcher.launch([["seed=1"], ["seed=2"]], initial_job_idx=0)
        note_failure(folder, ["seed=1"], "another job of the same point could not begin")
        process.communicate(b"\n")
    assert left.status == JobStatus.FAILED and "is running already" in str(left._return_value)
    assert done.return_value == 0.2 and len(inner.batches) == 1
    assert json.loads((folder / "run.json").read_text())["status"] == "running"


def test_a_failure_that_cannot_be_written_down_does_not_end_the_sweep(tmp_path, caplog):
    (tmp_path / "seed-1").touch()  # as good as a full disk, or a folder of somebody else's
    _, launcher = points(tmp_path, {"seed=1": ValueError("no such model"), "seed=2": 0.2})
    failed, done = launcher.launch([["seed=1"], ["seed=2"]], initial_job_idx=0)
    assert failed.status == JobStatus.FAILED and done.return_value == 0.2
    assert "seed-1: what became of it cannot be written down: [Errno" in caplog.text
    assert "seed-1: no such model" in caplog.text


def test_a_failure_does_not_hold_on_to_what_the_job_had(tmp_path):
    class Model:
        alive = 0

        def __init__(self):
            Model.alive += 1

        def __del__(self):
            Model.alive -= 1

    def job():
        model = Model()  # noqa: F841
        raise RuntimeError("no kernel")

    try:
        job()
    except RuntimeError as caught:
        error = caught
    assert Model.alive == 1
    _, launcher = points(tmp_path, {"seed=1": error})
    launcher.launch([["seed=1"]], initial_job_idx=0)
    assert Model.alive == 0
    assert json.loads((tmp_path / "seed-1" / "run.json").read_text())["error"] == "RuntimeError: no kernel"


def test_folders_of_the_users_own_are_refused(tmp_path):
    with pytest.raises(CompactHydraException, match="hydra.sweep.subdir: a job's folder is named by the values"):
        points(tmp_path, {}, hydra=["hydra.sweep.subdir=x"])
