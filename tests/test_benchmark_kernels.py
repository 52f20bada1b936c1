"""The benchmark of the kernels: a kernel that breaks must not take the others' figures along."""

import json

import torch

from benchmarks import kernels
from benchmarks.kernel_cases import Case


def test_a_kernel_that_breaks_says_so_in_its_row_and_fails_the_command(tmp_path, monkeypatch, capsys):
    def broken() -> list[torch.Tensor]:
        raise RuntimeError("out of resource: shared memory\nand more")

    versions = {"plain": lambda: [torch.ones(3)], "broken": broken, "last": lambda: [torch.ones(3)]}
    monkeypatch.setitem(kernels.CASES, "loss", lambda *given: [Case("loss", "small", versions)])
    assert kernels.main(["--cpu", "--only", "loss", "--repeats", "1", "--json", str(tmp_path / "rows.json")]) == 1
    rows = {row["version"]: row for row in json.loads((tmp_path / "rows.json").read_text())["rows"]}
    assert rows["broken"]["failed"] == "RuntimeError: out of resource: shared memory"
    assert rows["last"]["difference"] == 0 and len(rows["last"]["seconds"]) == 1
    assert "RuntimeError" in capsys.readouterr().out
