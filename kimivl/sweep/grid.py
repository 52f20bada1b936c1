"""A grid: every combination is run, and what failed is said at the end."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import CompactHydraException
from omegaconf import DictConfig, OmegaConf

from kimivl.sweep.command import begin, command_of
from kimivl.sweep.launching import PointLauncher, check_ranks, reason_of


def run_grid(sweeper: Any, overrides: list[str]) -> list[list[JobReturn]]:
    """Run the points that ``overrides`` ask for and that have not finished yet.

    Args:
        sweeper: Hydra's own, set up.

    Raises:
        CompactHydraException: after all points, naming those that failed.
    """
    parser = OverridesParser.create(sweeper.hydra_context.config_loader)  # which knows what glob(*) stands for
    parsed = last_of_each_key(parser.parse_overrides(overrides))
    fixed = fixed_keys(parsed)
    check_ranks(sweeper.launcher, sweeper.config, [one.get_key_element() for one in parsed if one.is_sweep_override()])
    batches = sweeper.split_arguments(parsed, sweeper.max_batch_size)
    launcher = PointLauncher(sweeper.launcher, sweeper.config, fixed)
    for batch in batches:
        sweeper.validate_batch_is_legal(batch)
        try:
            launcher.check(batch)
        except ValueError as error:
            raise CompactHydraException(f"error: {error}") from error
    folder = begin(sweeper.config)
    results: list[list[JobReturn]] = []
    with stopped_by_hand(sweeper.config, folder):
        for batch in batches:
            results.append(launcher.launch(batch, initial_job_idx=sum(map(len, results))))
    failed = [
        f"  {launcher.folder_of(point).name}: {reason_of(result)}"
        for batch, done in zip(batches, results, strict=True)
        for point, result in zip(batch, done, strict=True)
        if result.status == JobStatus.FAILED
    ]
    if failed:
        jobs = sum(map(len, batches))
        said = f"error: {len(failed)} of {jobs} jobs have not finished" + (", the others have" * (len(failed) < jobs))
        raise CompactHydraException("\n".join([f"\n{said}:", *failed, table_of(folder)]))
    print(f"\n{table_of(folder)}")
    return results


def table_of(folder: Path) -> str:
    return f"the table: kimivl sweep {shlex.quote(str(folder))}"


def last_of_each_key(overrides: Sequence[Override]) -> list[Override]:
    """What the command line says of a key wins over what a sweep's file says."""
    return list({override.get_key_element(): override for override in overrides}.values())


def fixed_keys(overrides: Sequence[Override]) -> list[str]:
    return [one.get_key_element().lstrip("+~") for one in overrides if not one.is_sweep_override()]


@contextmanager
def stopped_by_hand(config: DictConfig, folder: Path) -> Iterator[None]:
    """A sweep that is stopped says how it goes on: its folder may have been named by the time of its start."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stop:
        asked: dict[str, Any] = OmegaConf.to_container(config.hydra)  # type: ignore[assignment]
        print(f"\nthe sweep goes on with: {command_of(asked, folder)}", file=sys.stderr)
        sys.exit(stop.code if isinstance(stop, SystemExit) else 130)
