"""``kimivl memory``: the estimate as a table of 80 columns, and the verdict."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from kimivl.memory.devices import GB, GIB, Device
from kimivl.memory.estimate import Estimate, estimate
from kimivl.memory.remedies import remedies
from kimivl.memory.setup import Setup

_ROWS = {
    "weights": "weights",
    "gradients": "gradients at that moment",
    "weights gathered": "weights gathered from all",
    "gradient buckets": "gradient buckets of DDP",
    "weights in half": "weights in half precision",
}


def run_memory(cfg: Mapping[str, Any], gpu: str | None, patches: int | None, prompt_tokens: int) -> int:
    """Print where the memory goes; 0 where it fits or no device is known, 2 where it does not.

    Raises:
        ValueError: for a device or a config that cannot be read.
    """
    device = Device.of(gpu) if gpu else Device.found()
    found = estimate(Setup.of(cfg, patches, prompt_tokens))
    console = Console()
    print_estimate(found, device, console)
    if device is None:
        console.print("no device to compare with: give --gpu 80GB, or a name such as H200", highlight=False)
        return 0
    if found.peak <= device.capacity:
        return 0
    print(f"error: {verdict(found, device)}", file=sys.stderr)
    return 2


def verdict(found: Estimate, device: Device) -> str:
    """Why it does not fit, and what does, in one sentence."""
    need, have = found.peak / GB, device.capacity / GB
    changes = remedies(found, device.capacity)
    if changes is None:
        return f"needs {need:,.1f} GB of {have:,.1f}, and no single setting makes it fit: take a larger device or model"
    return f"needs {need:,.1f} GB of {have:,.1f}; what fits: {' '.join(change.override for change in changes)}"


def print_estimate(found: Estimate, device: Device | None, console: Console) -> None:
    """The peak row by row, then the other moments, then what it was reckoned from."""
    console.print(_summary(found), highlight=False)
    console.print(_peak_table(found, device))
    console.print(_moments_table(found))
    console.print(_notes(found, device), highlight=False, style="dim")


def _summary(found: Estimate) -> str:
    setup, parameters = found.setup, found.parameters
    bits = {(4, 4): "float32", (2, 2): "bf16", (4, 2): "float32, products in bf16"}
    trained = parameters.trained / parameters.numel
    share = "all train" if trained == 1 else f"{trained:.2%} train"
    name = setup.optimizer["_target_"].rpartition(".")[2]
    return (
        f"[bold]{_count(parameters.numel)} parameters[/] in "
        f"{bits[setup.numbers.parameter, setup.numbers.compute]}, {share}; {name}; "
        f"checkpointing {setup.checkpointing}" + f"; cut up over {setup.devices} devices" * setup.sharded
    )


def _peak_table(found: Estimate, device: Device | None) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_footer=False)
    unit, power, size = _unit(found)
    table.add_column(f"{unit} ({power} bytes) at the peak", no_wrap=True)
    for pack in found.packs:
        table.add_column(pack.pack.label, justify="right", no_wrap=True)
    peaks = [pack.peak for pack in found.packs]
    for row in dict.fromkeys(row for peak in peaks for row in peak.rows):
        # the rows of all columns in the order of the first that has them; the purposes of workspaces differ
        table.add_row(_ROWS.get(row, row), *(_figure(peak.rows.get(row), size) for peak in peaks))
    table.add_section()
    table.add_row("[bold]peak[/]", *(f"[bold]{_figure(peak.total, size)}[/]" for peak in peaks))
    table.add_row("  in", *(peak.name for peak in peaks), style="dim")
    if device is not None:
        room = [device.capacity - peak.total for peak in peaks]
        table.add_row(f"{device.name}", *(_figure(device.capacity, size) for _ in peaks))
        marks = [
            f"[green]fits, {_figure(left, size)} free[/]" if left >= 0 else f"[red]{_figure(-left, size)} too much[/]"
            for left in room
        ]
        table.add_row("", *marks)
    return table


def _moments_table(found: Estimate) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    unit, _, size = _unit(found)
    table.add_column(f"{unit} in all, moment by moment", no_wrap=True)
    for pack in found.packs:
        table.add_column(pack.pack.label, justify="right", no_wrap=True)
    table.add_column("workspace of", no_wrap=True, style="dim")
    for number, moment in enumerate(found.packs[0].moments):
        totals = [pack.moments[number].total for pack in found.packs]
        table.add_row(moment.name, *(_figure(total, size) for total in totals), moment.workspace)
    return table


def _notes(found: Estimate, device: Device | None) -> str:
    packs = "; ".join(f"{pack.pack.tokens:,} tokens, {pack.pack.patches:,} image patches" for pack in found.packs)
    notes = [f"largest packs: {packs}"]
    notes += _asked(found.setup)
    if found.setup.on_cpu and device is not None:
        notes.append("trainer.accelerator=cpu: with the kernels of a CPU; for a GPU's, and its bf16, add trainer=gpu")
    elif not found.setup.on_cpu:
        notes.append("CUDA context and allocator's scraps are allowances, not measured")
    if device is not None:
        notes.append(f"{device.name}: {device.capacity / GIB:.1f} GiB that torch sees = {device.capacity / GB:.1f} GB")
    return "\n".join(notes)


def _asked(setup: Setup) -> list[str]:
    """What the moments of answering were reckoned from."""
    passes = setup.held_out.passes if setup.held_out is not None else ()
    asked = [("rollouts", setup.rollouts)] if setup.rollouts is not None else []
    if passes:
        asked.append(("evaluation", max(passes, key=lambda one: one.rows)))
    if setup.engine.kind == "elsewhere":
        return [f"{name}: by an engine that is not on this device" for name, _ in asked]
    return [f"{name}: {one.rows} rows of {one.tokens:,} tokens" for name, one in asked]


def _unit(found: Estimate) -> tuple[str, str, int]:
    """Of all figures of the tables: its name, its power of ten and its bytes."""
    return ("GB", "10⁹", GB) if found.peak >= 10 * GB else ("MB", "10⁶", 10**6)


def _figure(size: float | None, unit: int) -> str:
    if size is None:
        return "–"
    if unit < GB:
        return f"{size / unit:,.0f}"
    return f"{size / unit:,.2f}" if size < unit / 10 else f"{size / unit:,.1f}"


def _count(numel: int) -> str:
    return f"{numel / 1e9:.2f} B" if numel >= 1e9 else f"{numel / 1e6:.2f} M"
