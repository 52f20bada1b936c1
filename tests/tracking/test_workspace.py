"""The saved workspace and report, as W&B gets them."""

import json
import re

import pytest
from wandb_workspaces.reports import v2 as reports

from kimivl.cli import main
from kimivl.tracking import names
from kimivl.tracking.workspace import make_workspace


def texts(node, key):
    """All values under ``key`` in a JSON tree."""
    if isinstance(node, dict):
        if key in node:
            yield node[key]
        for inner in node.values():
            yield from texts(inner, key)
    elif isinstance(node, list):
        for inner in node:
            yield from texts(inner, key)


def drawn_over(axis, view):
    """The metrics of the panels with this axis."""
    panels = [panel for panel in texts(view, "config") if isinstance(panel, dict) and panel.get("xAxis") == axis]
    return {name for panel in panels for name in panel.get("metrics", [])}


def test_workspace_and_report_reach_the_server(server, capsys):
    assert main(["workspace", "me/kimivl", "--group", "lr"]) == 0
    said = capsys.readouterr().out
    assert said.count(server.url) == 2
    workspace, report = server.views
    assert (workspace["entityName"], workspace["projectName"], workspace["displayName"]) == (
        "me",
        "kimivl",
        "kimivl lr",
    )
    spec = json.loads(workspace["spec"])
    sections = {section["name"]: section for section in spec["section"]["panelBankConfig"]["sections"]}
    assert list(sections)[:3] == ["val", "train", "rollout"] and sections["val"]["pinned"]
    assert [y for metrics in texts(sections["val"], "metrics") for y in metrics if y == "val/accuracy"]
    assert next(texts(sections["rollout"]["panels"], "xAxis")) == names.ITERATION
    assert drawn_over(names.TOKENS, sections["val"]) == {"val/accuracy"} <= drawn_over(names.STEP, sections["val"])
    assert drawn_over(names.TOKENS, sections["train"]) == {"train/loss"} <= drawn_over(names.STEP, sections["train"])
    assert drawn_over(names.TOKENS, json.loads(report["spec"])) == {"val/accuracy", "train/loss"}
    grouping = spec["section"]["runSets"][0]["grouping"]
    assert [key["name"] for key in grouping] == ["group", "jobType"]
    assert '"lr"' in json.dumps(spec["section"]["runSets"][0]["filters"])
    assert report["type"] == "runs" and report["displayName"] == "kimivl: the runs of lr"
    blocks = json.dumps(json.loads(report["spec"]))
    assert "val/accuracy" in blocks and "runset" in blocks.lower() and METER in blocks


def panels(room):
    [section] = [section for section in make_workspace("me", "kimivl", None).sections if section.name == room]
    return [panel for panel in section.panels if isinstance(panel, reports.LinePlot)]


def shows(panel, name):
    return re.fullmatch(panel.metric_regex, name) is not None if panel.metric_regex else panel.y == [name]


@pytest.mark.parametrize(
    ("name", "room"),
    [
        ("lr-MuonAdamW/pg1", "train"),
        ("train/grad_norm/vision", "train"),
        ("reward/format", "reward"),
        ("reward/failures/timeout", "reward"),
        ("perf/memory_gb", "perf"),
        ("perf/rollout_balance", "perf"),
        ("experts/dead", "experts"),
        ("experts/dead/layer_01", "experts"),
        ("test/accuracy_difficulty_3", "test"),
    ],
)
def test_a_panel_has_figures_of_one_unit(name, room):
    """And each figure one."""
    found = [panel for panel in panels(room) if shows(panel, name)]
    assert [(panel.title_y, panel.x) for panel in found] == [(names.describe(name).unit, names.axis(name))]


METER = names.METRICS["policy/kl"].meaning


def test_without_a_key_it_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert main(["workspace"]) == 2
    assert "wandb login" in capsys.readouterr().err


def test_a_server_that_fails_is_one_sentence(server, capsys):
    server.mood = "refusing"
    assert main(["workspace", "me/kimivl"]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: W&B did not save the workspace") and "\n" not in said
