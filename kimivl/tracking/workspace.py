"""``kimivl workspace``: a saved W&B workspace with a section for each namespace, and a report that compares runs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import wandb
from wandb_workspaces import expr
from wandb_workspaces.reports import v2 as reports
from wandb_workspaces.workspaces import RunsetSettings, Section, Workspace, WorkspaceSettings

from kimivl.tracking.names import METRICS, STEP, TOKENS, Metric, axis
from kimivl.tracking.wandb_run import has_key

SECTIONS = ("val", "train", "rollout", "reward", "policy", "sampler", "data", "perf", "experts", "test")
OPEN = {"val", "train", "rollout"}
TABLES = ("val/transcripts", "test/transcripts", "sampler/hardest", "data/rejected")
MAIN = ("val/accuracy", "train/loss", "rollout/accuracy", "rollout/length", "perf/tokens_per_s", "train/grad_norm")
"""What a report compares."""
OVER_TOKENS = ("val/accuracy", "train/loss")
"""What is drawn over the tokens trained on as well: steps of runs with other batches are not the same work."""


def write_workspace(project: str, group: str | None) -> int:
    """Save both under ``project``, ``NAME`` or ``ENTITY/NAME``; returns the exit code.

    Args:
        group: compare the runs of this sweep; None compares all.

    Raises:
        ValueError: without a key, or where W&B does not answer.
    """
    if not has_key():
        raise ValueError("a workspace lives in W&B, and there is no key: set WANDB_API_KEY, or type: wandb login")
    os.environ.setdefault("WANDB_SILENT", "true")
    entity, _, name = project.rpartition("/")
    try:
        entity = entity or wandb.Api(timeout=20).default_entity or ""
        saved = make_workspace(entity, name, group).save()
        report = make_report(entity, name, group).save()
    except Exception as error:
        raise ValueError(
            f"W&B did not save the workspace: {' '.join(str(error).split())[:300]}; try again later"
        ) from error
    print(f"workspace: {saved.url}\nreport: {report.url}")
    return 0


def make_workspace(entity: str, project: str, group: str | None) -> Workspace:
    """A section for each namespace, with the metric's unit on the axis; runs in groups, and in them by stage."""
    return Workspace(
        entity=entity,
        project=project,
        name=f"kimivl {group}" if group else "kimivl",
        sections=[
            Section(name=room, panels=list(_panels(room)), is_open=room in OPEN, pinned=room == "val")
            for room in SECTIONS
        ],
        settings=WorkspaceSettings(x_axis=STEP, group_by_prefix="first", max_runs=50),
        runset_settings=RunsetSettings(
            filters=_of_group(group),
            groupby=[expr.Metric("Group"), expr.Metric("JobType")],
            pinned_columns=["run:displayName", "run:state", "summary:val/accuracy.max", "summary:train/loss.last"],
        ),
    )


def make_report(entity: str, project: str, group: str | None) -> reports.Report:
    """The main curves over each other, the best figures beside each other, and in which settings the runs differ."""
    runs = reports.Runset(
        entity=entity,
        project=project,
        name=group or "all runs",
        filters=_of_group(group),
        order=[reports.OrderBy(name=reports.SummaryMetric("val/accuracy.max"), ascending=False)],
    )
    panels: list[Any] = [_line(name, METRICS[name], axis(name)) for name in MAIN]
    panels += [_line(name, METRICS[name], TOKENS) for name in OVER_TOKENS]
    panels += [
        reports.BarPlot(title="val/accuracy, the best of each run", metrics=["val/accuracy.max"], orientation="h"),
        reports.RunComparer(diff_only=True),
    ]
    return reports.Report(
        entity=entity,
        project=project,
        title=f"kimivl: the runs of {group}" if group else "kimivl: all runs",
        description="Curves, best figures and settings of the runs of a sweep.",
        blocks=[
            reports.H2("What the runs reach, and what sets them apart"),
            reports.P("A run is a folder; its curve goes on over interruptions. Hide a run on the left of the grid."),
            reports.PanelGrid(runsets=[runs], panels=panels),
            reports.H2("What the metrics mean"),
            reports.MarkdownBlock(text=as_markdown()),
        ],
        width="fluid",
    )


def as_markdown() -> str:
    """The table of all metrics, their units and meanings."""
    rows = [f"| `{name}` | {metric.unit} | {metric.meaning} |" for name, metric in METRICS.items()]
    return "\n".join(["| metric | unit | meaning |", "| --- | --- | --- |", *rows])


def _of_group(group: str | None) -> Any:
    return [expr.Metric("Group") == group] if group else []


def _panels(room: str) -> Iterator[Any]:
    for pattern, metric in METRICS.items():
        name = pattern.replace("*/", f"{room}/", 1) if room in ("val", "test") else pattern
        inside = "train" if name.startswith("lr-") else name.partition("/")[0]
        if inside == room and metric.unit not in ("table", "histogram", "as named"):
            yield _line(name, metric, axis(name))
            if name in OVER_TOKENS:
                yield _line(name, metric, TOKENS)
    for name in TABLES:
        if name.startswith(f"{room}/"):
            yield reports.WeavePanelSummaryTable(table_name=name)


def _line(name: str, metric: Metric, over: str) -> Any:
    title = name.rstrip("*/-_") + " over tokens" * (over == TOKENS)
    about: dict[str, Any] = {"title": title, "x": over, "title_y": metric.unit}
    if "*" in name:
        # reward/* is no reward/failures/x, which has another unit; experts/dead* is experts/dead/layer_01 too
        pattern = name.replace("/*", "/[^/]+").replace("*", ".*")
        return reports.LinePlot(metric_regex=f"^{pattern}$", **about)
    return reports.LinePlot(y=[name], **about)
