"""The ``kimivl`` command: verbs, each a thin call into its room."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any


def main(argv: list[str] | None = None) -> int:
    """Entry point of the console script; returns the exit code."""
    parser = argparse.ArgumentParser(prog="kimivl", description="Tools beside train.py.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, add, summary in (
        ("build", _add_build, "make shards of chats in JSON, JSONL, parquet or datasets folders"),
        ("index", _add_index, "index shards: count tokens and patches, find what cannot be used"),
        ("synthesize", _add_synthesize, "long chains of thought for stage 2: ask a teacher, verify, check, choose"),
        ("assess", _add_assess, "how often a model solves each problem of a set, and which answers can be guessed"),
        ("memory", _add_memory, "where each GB of a training run goes on one device, before anything starts"),
        ("audit", _add_audit, "prove from a run's files that each sample was used as planned"),
        ("sync", _add_sync, "send to W&B what it does not have of a run that could not reach it"),
        ("workspace", _add_workspace, "a saved W&B workspace and a report that compare the runs of a project"),
        ("report", _add_report, "table, summary.json and summary.png of the stages in a run folder"),
        ("sweep", _add_sweep, "table, summary.json and sweep.png of a sweep, and the command for what is missing"),
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


def _compose(shards: str, overrides: list[str], groups: list[str]) -> tuple[Any, list[Any]]:
    """The configuration of ``train.py OVERRIDES`` on other shards, and the objects of some of its groups."""
    from hydra.errors import HydraException, InstantiationException
    from hydra.utils import instantiate
    from omegaconf.errors import OmegaConfBaseException

    from kimivl.config import compose_run, validate

    try:
        cfg = compose_run(*overrides)
        cfg.data.shards, cfg.data.prepare = shards, None
        validate(cfg)
        return cfg, [instantiate(cfg[group], _convert_="all") for group in groups]
    except InstantiationException as error:
        raise ValueError(str(error.__cause__ or error)) from error
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(" ".join(str(error).split())) from error


def _add_index(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shards", help="a folder of tars, a path with braces or globs, or a URL of one")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="as of train.py, for example stage=rl data.processor=/models/Kimi-VL-A3B-Instruct",
    )

    def call(arguments: argparse.Namespace) -> int:
        from rich.console import Console

        from kimivl.data.describe import print_index

        _, [datamodule] = _compose(arguments.shards, arguments.overrides, ["data"])
        datamodule.setup("fit")
        print_index(datamodule.index, Console())
        return 0

    parser.set_defaults(call=call)


def _add_synthesize(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "problems", help="problems with answers: a folder of tars, a path with braces or globs, or a URL"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the responses, the shards and the report")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="the teacher: init_from=MODEL, or rollout=openai rollout.url=https://host/v1 rollout.model=NAME with "
        "data.processor=MODEL of the student; synthesize.samples=8, synthesize.limit=100, "
        "synthesize/prompts=[planning,thorough], synthesize.selection.keep=shortest (conf/synthesize/default.yaml)",
    )
    parser.epilog = (
        "Every response is kept as it comes: interrupted, the same command asks for what is missing. With "
        "synthesize.ask=false it sifts the responses again, with other checks."
    )

    def call(arguments: argparse.Namespace) -> int:
        from rich.console import Console

        from kimivl.synthesize.teacher import make_teacher

        fixed = ["stage=rl", "sampler=uniform", "+synthesize=default"]
        groups = ["data", "reward", "rollout", "kernels", "synthesize"]
        cfg, objects = _compose(arguments.problems, fixed + arguments.overrides, groups)
        datamodule, reward, rollout, kernels, make = objects
        datamodule.setup("fit")
        student, trainer = datamodule.encoder, cfg.trainer
        settings = (rollout, cfg.init_from, student, kernels, trainer.get("precision"), trainer.get("accelerator"))
        teacher = partial(make_teacher, *settings)
        make(datamodule.index, student, teacher, reward, arguments.out, Console()).run()
        return 0

    parser.set_defaults(call=call)


def _add_assess(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shards", help="problems with answers: a folder of tars, a path with braces or globs, or a URL")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="as of train.py stage=rl (init_from, rollout, reward, trainer, ...), and assess.samples=10, "
        "assess.temperature=1.0, assess.guesses=8, assess.limit=1000, assess.anew=true (conf/assess/default.yaml)",
    )
    parser.epilog = (
        "What it finds lies beside the shards, in assessed.jsonl and assessed.png; stage=rl can choose by it "
        "(sampler.filter, sampler.curriculum.by=pass_rate). Interrupted, it goes on where it was."
    )

    def call(arguments: argparse.Namespace) -> int:
        from rich.console import Console

        from kimivl.assess.run import run_assess
        from kimivl.checkpoint import check_init_from
        from kimivl.inference import load_inference

        fixed = ["stage=rl", "sampler=uniform", "+assess=default"]
        groups = ["data", "reward", "rollout", "kernels", "assess"]
        cfg, objects = _compose(arguments.shards, fixed + arguments.overrides, groups)
        check_init_from(cfg.stage, cfg.init_from, cfg.name)
        datamodule, reward, rollout, kernels, make = objects
        datamodule.setup("fit")
        trainer = cfg.trainer
        inference = load_inference(
            cfg.init_from, rollout, kernels, trainer.get("precision"), trainer.get("accelerator")
        )
        read = partial(datamodule.read_problems, datamodule.index)
        run_assess(datamodule.index, read, inference, reward, make, cfg.init_from, Console())
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
        "--prompt-tokens",
        type=_count,
        default=1024,
        help="of a problem to be answered, with its images (default: 1024)",
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


def _add_sync(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder", type=Path, metavar="RUN_DIR", help="for example outputs/digits/sft, or a sweep's folder"
    )

    def call(arguments: argparse.Namespace) -> int:
        from kimivl.tracking.sync import sync

        return sync(arguments.folder)

    parser.set_defaults(call=call)


def _add_workspace(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("project", nargs="?", default="kimivl", help="PROJECT or ENTITY/PROJECT (default: kimivl)")
    parser.add_argument("--group", help="compare the runs of this sweep only")

    def call(arguments: argparse.Namespace) -> int:
        from kimivl.tracking.workspace import write_workspace

        return write_workspace(arguments.project, arguments.group)

    parser.set_defaults(call=call)


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="for example outputs/digits")

    def call(arguments: argparse.Namespace) -> int:
        from kimivl.report import write_report

        write_report(arguments.folder)
        return 0

    parser.set_defaults(call=call)


def _add_sweep(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="for example outputs/digits/sweeps/rl-length_penalty")
    parser.add_argument("--metric", metavar="NAME", help="of metrics.json; default: the optimized_metric of the runs")
    parser.add_argument(
        "--direction", choices=("max", "min"), help="of the metric; default: that of the search, or told from its name"
    )
    parser.epilog = "It ends with 0 when all that was asked for has finished, and with 1 when something is left."

    def call(arguments: argparse.Namespace) -> int:
        from rich.console import Console

        from kimivl.sweep.report import run_sweep

        return run_sweep(arguments.folder, arguments.metric, arguments.direction, Console())

    parser.set_defaults(call=call)
