"""``kimivl assess`` as it is typed: what it composes, and its errors in one sentence."""

import pytest

from kimivl.cli import main
from kimivl.config import compose_run, validate


def test_its_settings_fit_the_assessment():
    cfg = compose_run("stage=rl", "+assess=default", "init_from=somewhere", "assess.samples=4")
    validate(cfg)
    assert cfg.assess.samples == 4
    assert cfg.assess.max_new_tokens == cfg.data.max_new_tokens
    assert cfg.assess.thinking == cfg.reward.thinking


def test_help_says_what_it_leaves(capsys):
    with pytest.raises(SystemExit) as done:
        main(["assess", "--help"])
    said = capsys.readouterr().out
    assert done.value.code == 0
    assert "assessed.jsonl" in said and "sampler.filter" in said and "assess.samples=10" in said


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["init_from=/nowhere"], "error: init_from=/nowhere: no model there"),
        (["assess.sampels=3"], "assess.sampels"),
        (["assess.samples=many"], "error: assess.samples: 'many' is not a int"),
        (["rollout=nothing"], "nothing"),
    ],
)
def test_errors_are_one_sentence(capsys, tmp_path, overrides, said):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "kimi_vl"}')
    assert main(["assess", str(tmp_path), f"init_from={folder}", *overrides]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
