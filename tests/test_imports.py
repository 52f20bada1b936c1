"""Who may import whom: the rooms of kimivl stay usable without Hydra, Lightning or a GPU.

Every file of the package is parsed, not imported, so that an import inside a function counts too.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# third-party package -> the only modules (or rooms) that may import it
ONLY_IN = {
    "hydra": {"train", "kimivl.runtime.beforehand", "kimivl.run", "kimivl.config", "kimivl.cli", "kimivl.sweep"},
    "lightning": {"kimivl.stages", "kimivl.callbacks", "kimivl.run", "kimivl.tracking"},
    "wandb": {"kimivl.tracking"},
    "webdataset": {"kimivl.data.shards"},
    "vllm": {"kimivl.rl.vllm"},
    "peft": {"kimivl.model.lora"},
}
ALIASES = {"pytorch_lightning": "lightning", "lightning_fabric": "lightning"}

# room -> third-party packages that it may import at most (a room not named here may import any)
BACKENDS = {"torch", "transformers", "numpy", "PIL", "tokenizers", "safetensors", "tiktoken", "peft", "liger_kernel"}
THIRD_PARTY_OF = {"kimivl.model": BACKENDS, "kimivl.optim": BACKENDS}

# what every room may import
LEAVES = ("kimivl.runtime.ranks", "kimivl.history")

# room -> other rooms that it may import at most
ROOMS_OF = {
    "kimivl.model": set(),
    "kimivl.optim": set(),
    "kimivl.memory": {"kimivl.model", "kimivl.optim"},
    "kimivl.stages": {"kimivl.model", "kimivl.data", "kimivl.rl", "kimivl.optim", "kimivl.checkpoint"}
    | {"kimivl.checkpoint_folder", "kimivl.runtime.interruption"},
    "kimivl.inference": {"kimivl.model", "kimivl.data", "kimivl.rl", "kimivl.checkpoint"},
    "kimivl.synthesize": {"kimivl.model", "kimivl.data", "kimivl.rl", "kimivl.inference"},
    "kimivl.assess": {"kimivl.data", "kimivl.rl", "kimivl.inference"},
    "kimivl.sweep": {"kimivl.config", "kimivl.runtime.launch", "kimivl.runtime.lock"},
    "kimivl.run": {"kimivl.config", "kimivl.runtime", "kimivl.memory", "kimivl.tracking", "kimivl.checkpoint"}
    | {"kimivl.callbacks", "kimivl.model", "kimivl.resume"},
    "kimivl.runtime": {"kimivl.config"},
}
# room -> rooms that it must not import
NEVER = {
    "kimivl.data": {"kimivl.model", "kimivl.stages"},
    "kimivl.rl": {"kimivl.model", "kimivl.stages"},
    "kimivl.tasks": {"kimivl.stages", "kimivl.run", "kimivl.callbacks"},
}


def module_name(path: Path, root: Path) -> str:
    """``root/kimivl/rl/types.py`` -> ``kimivl.rl.types``; a package's ``__init__.py`` -> the package."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_in(module: str, room: str) -> bool:
    return module == room or module.startswith(room + ".")


def imported(path: Path, root: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of all imports of a file, wherever they stand; relative ones made absolute."""
    name = module_name(path, root)
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(), filename=str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            # `from kimivl import data` imports a room: the names count, not only the package
            yield from ((node.lineno, f"{source}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and _is_dynamic_import(node):
            yield node.lineno, str(ast.literal_eval(node.args[0]))


def _is_dynamic_import(call: ast.Call) -> bool:
    function = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    return function in {"import_module", "__import__"} and bool(call.args) and isinstance(call.args[0], ast.Constant)


def complaint(module: str, target: str) -> str | None:
    """Why ``module`` must not import ``target``; None where it may."""
    top = target.split(".")[0]
    package = ALIASES.get(top, top)
    if package in ONLY_IN and not any(is_in(module, place) for place in ONLY_IN[package]):
        return f"{package} belongs in {', '.join(sorted(ONLY_IN[package]))} only"
    own_rooms = [room for room in {*THIRD_PARTY_OF, *ROOMS_OF, *NEVER} if is_in(module, room)]
    for room in own_rooms:
        if top != "kimivl":
            outside = top not in sys.stdlib_module_names and top not in THIRD_PARTY_OF.get(room, {top})
            if outside:
                return f"{room} may import {', '.join(sorted(THIRD_PARTY_OF[room]))} only"
        elif is_in(target, room) or target.startswith(LEAVES):
            continue
        elif room in ROOMS_OF and not any(is_in(target, other) for other in ROOMS_OF[room]):
            return f"{room} may import {', '.join(sorted(ROOMS_OF[room])) or 'no other room'} only"
        elif any(is_in(target, other) for other in NEVER.get(room, ())):
            return f"{room} must not know {', '.join(sorted(NEVER[room]))}"
    return None


def violations(root: Path) -> list[str]:
    """One line per forbidden import of ``root/train.py`` and ``root/kimivl``."""
    files = [*root.glob("train.py"), *sorted((root / "kimivl").rglob("*.py"))]
    found = []
    for path in files:
        for line, target in imported(path, root):
            if reason := complaint(module_name(path, root), target):
                found.append(f"{path.relative_to(root)}:{line} imports {target}: {reason}")
    return found


def test_every_import_of_the_package_keeps_to_its_room():
    assert violations(ROOT) == []


def test_importing_the_package_imports_nothing_heavy():
    found = {target for _, target in imported(ROOT / "kimivl" / "__init__.py", ROOT)}
    assert found == {"types.ModuleType", "wrapt.when_imported", "kimivl.model"}  # the last inside a function
    script = "import sys, kimivl; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "kimivl" in run.stdout.split()
    assert not {"torch", "numpy", "transformers", "hydra", "kimivl.model"} & set(run.stdout.split())


PLANTED = {
    "hydra in a stage, inside a function": (
        "kimivl/stages/sft/module.py",
        "def f():\n    import hydra.utils",
    ),
    "lightning in data": ("kimivl/data/loader.py", "from lightning.pytorch import LightningDataModule"),
    "lightning under its old name": ("kimivl/rl/sampler.py", "import pytorch_lightning as pl"),
    "wandb in a callback": ("kimivl/callbacks/samples.py", "import wandb"),
    "webdataset beside shards": ("kimivl/data/index.py", "import webdataset as wds"),
    "vllm outside its file": ("kimivl/rl/rollout.py", "import importlib\nimportlib.import_module('vllm')"),
    "a foreign package in model": ("kimivl/model/vision.py", "import omegaconf"),
    "a room in model": ("kimivl/model/modeling.py", "from kimivl.data.pack import PackedBatch"),
    "a room by its package": ("kimivl/optim/muon.py", "from kimivl import data"),
    "model in data, relative": ("kimivl/data/chat.py", "from ..model import processor"),
    "stages in rl": ("kimivl/rl/rollout.py", "if True:\n    from kimivl.stages import base"),
    "run in a stage": ("kimivl/stages/base.py", "import kimivl.run"),
}


@pytest.mark.parametrize(("file", "source"), PLANTED.values(), ids=PLANTED.keys())
def test_a_planted_violation_is_found(tmp_path: Path, file: str, source: str):
    planted = tmp_path / file
    planted.parent.mkdir(parents=True)
    planted.write_text(source)

    [line] = violations(tmp_path)

    assert line.startswith(file)


ALLOWED = {
    "train.py": "import hydra\nfrom kimivl.run import run",
    "kimivl/stages/rl/module.py": (
        "import lightning as L\nfrom kimivl.rl.types import Rollout\nfrom . import datamodule"
    ),
    "kimivl/model/modeling.py": "import math\nimport torch.nn as nn\nfrom .vision import MoonViT",
    "kimivl/data/shards.py": "import webdataset\nfrom kimivl.data import sample",
    "kimivl/rl/vllm.py": "def f():\n    import vllm",
}


def test_what_the_table_allows_is_not_reported(tmp_path: Path):
    for file, source in ALLOWED.items():
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)

    assert violations(tmp_path) == []
