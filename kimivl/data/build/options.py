"""The options of `kimivl build`, apart from the work itself, so that `--help` is quick."""

import argparse
import os
import re
from pathlib import Path

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

NOTES = """\
SOURCE is a .json, .jsonl, .ndjson or .parquet file, a folder of these, or a `save_to_disk` folder of Hugging Face
datasets. Its rows are told by their keys:

  conversations + image       LLaVA: {"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>?"}, ...]}
  messages / conversations    ShareGPT, LLaMA-Factory: "images": ["a.jpg", ...], "system": "..."
  messages                    OpenAI: contents are texts or lists of text, image and image_url parts
  problem / question / prompt + answer    for reinforcement learning
  answer, difficulty, source, task        kept, beside any of them

Images keep their bytes (PNG, JPEG, WebP). A row that makes no sound sample goes to OUT/rejected.jsonl with the reason.
A build that was stopped goes on when the same command is run again.

  kimivl build llava.jsonl shards/llava --images coco/ --shard-size 512MB --workers 16
  python train.py stage=sft data.shards=shards/llava
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options that `kimivl.data.build.builder.run_build` reads."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = NOTES
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("source", type=Path, metavar="SOURCE", help="the file or folder with the chats")
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder that the shards go to")
    parser.add_argument("--images", type=Path, help="folder that image paths start from (default: SOURCE's folder)")
    parser.add_argument("--name", help="what shard names start with (default: the name of SOURCE)")
    parser.add_argument("--split", help="the split to build, where SOURCE has several")
    parser.add_argument("--shard-size", type=_size, default=_size("512MB"), help="at most (default: 512MB)")
    parser.add_argument("--workers", type=int, default=cores, help=f"processes (default: {cores}, one a core)")
    parser.add_argument("--source", dest="source_name", default="", help="`source` of the samples whose row has none")
    parser.add_argument("--max-rejected", type=float, default=0.05, help="share above which to stop (default: 0.05)")
    parser.add_argument("--overwrite", action="store_true", help="start anew, and replace what a build left in OUT")


def _size(text: str) -> int:
    """Bytes of a size such as 512MB, 1.5GB or 64MiB."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Z]*)", text.strip().upper())
    if match is None or match[2] not in UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write it like 512MB or 1GiB")
    return int(float(match[1]) * UNITS[match[2]])
