"""The ``kimivl`` command: verbs, each a thin call into its room."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    """Entry point of the console script; returns the exit code."""
    parser = argparse.ArgumentParser(prog="kimivl", description="Tools beside train.py.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, add, summary in (
        ("build", _add_build, "make shards of chats in JSON, JSONL, parquet or datasets folders"),
        ("index", _add_index, "index shards: count tokens and patches, find what cannot be used"),
        ("memory", _add_memory, "where each GB of a training run goes on one device, before anything starts"),
        ("audit", _add_audit, "prove from a run's files that each sample was used as planned"),
        ("report", _add_report, "table, summary.json and summary.png of the stages in a run folder"),
    ):
        add(verbs.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}."))
    arguments, more = parser.parse_known_args(argv)
    if more and (not hasattr(arguments, "overrides") or any(word.startswith("-") for word in more)):
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    if more:  # overrides that stand behind an option
        arguments.overrides += more
    try:
        return arguments.call(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130


# Each verb imports its room when it is called: --help does not wait for it.


def _add_build(parser: argparse.ArgumentParser) -> None:
    from kimivl.data.build.options import add_arguments

    add_arguments(parser)

    def call(arguments: argparse.Namespace) -> int:
        from kimivl.data.build.builder import run_build

        return run_build(arguments)

    parser.set_defaults(call=call)


def _add_index(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shards", help="a folder of tars, a path with braces or globs, or a URL of one")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="as of train.py, for example stage=rl data.processor=/models/Kimi-VL-A3B-Instruct",
    )

    def call(arguments: argparse.Namespace) -> int:
        from hydra.errors import HydraException, InstantiationException
        from hydra.utils import instantiate
        from rich.console import Console

        from kimivl.config import compose_run, validate
        from kimivl.data.describe import print_index

        try:
            cfg = compose_run(*arguments.overrides)
            cfg.data.shards, cfg.data.prepare = arguments.shards, None
            validate(cfg)
            datamodule = instantiate(cfg.data, _convert_="all")
        except InstantiationException as error:
            raise ValueError(str(error.__cause__ or error)) from error
        except HydraException as error:
            raise ValueError(str(error)) from error
        datamodule.setup("fit")
        print_index(datamodule.index, Console())
        return 0

    parser.set_defaults(call=call)


def _add_memory(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="as of train.py, for example stage=sft experiment=kimi_vl_a3b activation_checkpointing=full",
    )
    parser.add_argument("--gpu", metavar="SIZE", help="80GB, 79.1GiB or a name such as H200; default: this machine's")
    parser.add_argument("--patches", type=_count, help="image patches of a pack; default: the most the config allows")
    parser.add_argument(
        "--prompt-tokens", type=_count, default=1024, help="of a problem of stage rl, with its images (default: 1024)"
    )

    def call(arguments: argparse.Namespace) -> int:
        from hydra.errors import HydraException
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException

        from kimivl.config import compose_run, validate
        from kimivl.memory.report import run_memory

        try:
            cfg = compose_run(*arguments.overrides)
            validate(cfg)
        except (HydraException, OmegaConfBaseException) as error:
            raise ValueError(" ".join(str(error).split())) from error
        config = OmegaConf.to_container(cfg, resolve=True)
        return run_memory(config, arguments.gpu, arguments.patches, arguments.prompt_tokens)  # type: ignore[arg-type]

    parser.set_defaults(call=call)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text}: give a whole number of at least 0")
    return int(text)


def _add_audit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="RUN_DIR", help="a run, ended or not: outputs/digits/sft")

    def call(arguments: argparse.Namespace) -> int:
        from kimivl.data.audit.report import run_audit

        return run_audit(arguments)

    parser.set_defaults(call=call)


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="for example outputs/digits")

    def call(arguments: argparse.Namespace) -> int:
        from kimivl.report import write_report

        write_report(arguments.folder)
        return 0

    parser.set_defaults(call=call)
