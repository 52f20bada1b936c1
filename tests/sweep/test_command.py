"""What is told to be typed is read, by the shell and by Hydra, as it was meant."""

import shlex
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from kimivl.sweep.command import command_of


def asked(**more):
    return {"job": {"name": "train"}, "overrides": {"task": ["stage=rl"], "hydra": ["hydra.mode=MULTIRUN"]}} | more


FOLDERS = ["outputs/a", "my runs", "größe", "a,b", "a=b", "it's", "a\\b", "a\\", "a\\'b", "lr-1+~x", "(1)", "a:b", "5%"]


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_is_read_as_it_is(folder):
    words = shlex.split(command_of(asked(), Path(folder)))
    assert words[:4] == ["python", "train.py", "-m", "stage=rl"]
    [parsed] = OverridesParser.create().parse_overrides(words[4:])
    assert (parsed.key_or_group, parsed.value()) == ("hydra.sweep.dir", folder)


def test_a_configuration_of_the_users_own_is_told():
    sources = [{"provider": "main", "path": "/kimivl/conf"}, {"provider": "command-line", "path": "/my conf"}]
    hydra = asked(job={"name": "train", "config_name": "mine"}, runtime={"config_sources": sources})
    words = shlex.split(command_of(hydra, Path("sweep")))
    assert words[2:6] == ["-m", "--config-dir=/my conf", "--config-name=mine", "stage=rl"]
    assert "--config-name" not in command_of(asked(job={"name": "x", "config_name": "train"}), Path("sweep"))
