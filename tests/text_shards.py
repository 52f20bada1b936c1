"""Shards of which some samples have lost their pictures."""

import json
import tarfile
from io import BytesIO
from pathlib import Path


def without_images(source: Path, target: Path, of: int) -> None:
    """The samples of a shard, one in ``of`` with its pictures taken away."""
    with tarfile.open(source) as read, tarfile.open(target, "w") as written:
        for member in read:
            content = read.extractfile(member).read()
            if int("".join(filter(str.isdigit, member.name.split(".")[0]))) % of == 0:
                if not member.name.endswith(".json"):
                    continue
                sample = json.loads(content)
                for message in sample["messages"]:
                    if not isinstance(message["content"], str):
                        message["content"] = [part for part in message["content"] if part["type"] != "image"]
                content = json.dumps(sample).encode()
            member.size = len(content)
            written.addfile(member, BytesIO(content))
