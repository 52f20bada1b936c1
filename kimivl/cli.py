"""The ``kimivl`` command: verbs, each a thin call into its room."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    """Entry point of the console script; returns the exit code."""
    parser = argparse.ArgumentParser(prog="kimivl", description="Tools beside train.py.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    report = verbs.add_parser("report", help="table, summary.json and summary.png of the stages in a run folder")
    report.add_argument("folder", type=Path, help="for example outputs/digits")
    arguments = parser.parse_args(argv)
    from kimivl.report import write_report  # matplotlib takes seconds to import: --help does not wait for it

    try:
        write_report(arguments.folder)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
