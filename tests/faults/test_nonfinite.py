"""A step whose loss is not a number moves nothing, is counted and kept; too many of them end the run."""

import pytest
import torch
from fault_at import FaultAt
from lightning.pytorch import Callback

from kimivl.callbacks import NonFinite
from kimivl.callbacks.nonfinite import load_packs
from kimivl.optim import MuonAdamWInBackward

BALANCED = "router=balanced"
RL = [
    "stage=rl",
    "data.phases=[{epochs: 1, lr: [1e-2, 1e-2]}]",
    "data.problems=4",
    "data.responses=4",
    "data.updates=3",
    "data.max_new_tokens=8",
    "reward._target_=even_reward.EvenReward",
]


class Watcher(Callback):
    """All that may move, after each step, and the packs of each."""

    def __init__(self) -> None:
        self.after, self.packs, self.rates, self.counts = {}, {}, {}, {}

    def on_train_batch_start(self, trainer, module, batch, *args) -> None:
        self.packs.setdefault(trainer.global_step + 1, []).append(batch)

    def on_train_batch_end(self, trainer, module, *args) -> None:
        state = {name: value.detach().clone() for name, value in module.state_dict().items()}
        for number, values in enumerate(trainer.optimizers[0].state.values()):
            state |= {f"{number}/{name}": value.clone() for name, value in values.items() if torch.is_tensor(value)}
        self.after[trainer.global_step] = state
        self.rates[trainer.global_step] = trainer.optimizers[0].param_groups[0]["lr"]
        self.counts[trainer.global_step] = float(trainer.callback_metrics.get("train/nonfinite_steps", 0))


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    "overrides",
    [
        [BALANCED],
        [BALANCED, "optimizer=muon_in_backward"],
        ["optimizer=adamw"],
        ["lora=attention"],
        ["+trainer.gradient_clip_algorithm=value"],
        [*RL, BALANCED],
    ],
    ids=" ".join,
)
def test_a_bad_step_moves_nothing_and_the_run_goes_on(fit, tmp_path, overrides):
    watcher, judge = Watcher(), NonFinite(str(tmp_path / "bad"))
    trainer = fit(*overrides, callbacks=[judge, FaultAt("not_a_number", 2), watcher])
    assert trainer.global_step >= 3
    assert same(watcher.after[2], watcher.after[1]) and not same(watcher.after[3], watcher.after[2])
    assert all(torch.isfinite(value).all() for value in watcher.after[trainer.global_step].values())
    if "stage=rl" not in overrides:
        assert watcher.rates[2] < watcher.rates[1]  # the schedule goes on
    assert (judge.total, judge.row, watcher.counts[2]) == (1, 0, 1.0)
    [file] = (tmp_path / "bad").iterdir()
    assert file.name == "step-000002-rank0.pt"


def test_without_it_the_model_is_lost(fit):
    watcher = Watcher()
    fit(callbacks=[FaultAt("not_a_number", 2), watcher])
    assert not all(torch.isfinite(value).all() for value in watcher.after[2].values())


@pytest.mark.parametrize("pack", [0, 1])
def test_one_bad_pack_of_several_is_the_one_that_is_kept(fit, tmp_path, pack):
    watcher, judge = Watcher(), NonFinite(str(tmp_path / "bad"))
    trainer = fit(callbacks=[judge, FaultAt("not_a_number", 2, pack=pack), watcher], packs=2)
    assert same(watcher.after[2], watcher.after[1]) and judge.total == 1
    file = tmp_path / "bad" / "step-000002-rank0.pt"
    [kept], wanted = load_packs(file), watcher.packs[2][pack]
    assert torch.equal(kept.input_ids, wanted.input_ids) and torch.equal(kept.pixel_values, wanted.pixel_values)
    record = torch.load(file, weights_only=True)
    keys = [trainer.datamodule.index.key(number) for number in wanted.samples.tolist()]
    assert record["step"] == 2 and record["packs"][0]["keys"] == keys


def test_a_kept_pack_can_be_run_again_in_rl(fit, tmp_path):
    trainer = fit(*RL, callbacks=[NonFinite(str(tmp_path / "bad")), FaultAt("not_a_number", 1)])
    file = tmp_path / "bad" / "step-000001-rank0.pt"
    [batch] = load_packs(file)
    [entry] = torch.load(file, weights_only=True)["packs"]
    index, segments = trainer.datamodule.index, batch.pack.input_ids.split(batch.pack.cu_seqlens.diff().tolist())
    places = {index.key(number): number for number in range(len(index))}
    problems = trainer.datamodule.read_problems(index, [places[key] for key in entry["keys"]])
    for problem, segment in zip(problems, segments, strict=True):  # a prompt and a response
        assert torch.equal(segment[: len(problem.prompt)], problem.prompt.input_ids)
    module = trainer.lightning_module
    loss, _ = module.objective(module.log_probs(batch), batch.trajectories)
    assert torch.isfinite(loss)


def test_a_bad_gradient_of_finite_losses_is_seen_and_all_packs_are_kept(fit, tmp_path):
    class Spoil(Callback):
        def on_after_backward(self, trainer, module) -> None:
            if trainer.global_step == 1:
                next(module.parameters()).grad.fill_(float("inf"))

    judge, watcher = NonFinite(str(tmp_path / "bad")), Watcher()
    fit(callbacks=[judge, Spoil(), watcher], packs=2)
    assert same(watcher.after[2], watcher.after[1]) and judge.total == 1
    assert len(load_packs(tmp_path / "bad" / "step-000002-rank0.pt")) == 2


def test_more_in_a_row_or_in_all_than_allowed_end_the_run(fit, tmp_path):
    path = str(tmp_path / "bad")
    with pytest.raises(ValueError, match=r"step 3: the loss is not finite.*the 2\. in a row.*rank0\.pt.*optimizer\.lr"):
        fit(callbacks=[NonFinite(path, in_a_row=1), FaultAt("not_a_number", 2, steps=3)])
    counted = NonFinite(path, in_all=3)
    counted.load_state_dict({"row": 0, "total": 3})  # of the run that was interrupted
    with pytest.raises(ValueError, match=r"step 2: .*the 4\. of the run, and callbacks\.nonfinite\.in_all=3"):
        fit(callbacks=[counted, FaultAt("not_a_number", 2)])


@pytest.mark.parametrize("optimizer", ["muon", "muon_in_backward"])
def test_stop_ends_the_run_before_anything_moves(fit, tmp_path, optimizer):
    watcher = Watcher()
    with pytest.raises(ValueError, match=r"the run is stopped, as callbacks\.nonfinite\.policy=stop.*policy=skip"):
        callbacks = [NonFinite(str(tmp_path / "bad"), "stop"), FaultAt("not_a_number", 2), watcher]
        fit(f"optimizer={optimizer}", callbacks=callbacks)
    assert max(watcher.after) == 1 and (tmp_path / "bad" / "step-000002-rank0.pt").is_file()


def test_an_optimizer_that_has_moved_cannot_skip_but_stops(fit, tmp_path):
    one_pass = ["optimizer=muon_in_backward", "optimizer.clip=null"]
    with pytest.raises(ValueError, match=r"policy=skip: with optimizer\.clip=null parameters have moved"):
        fit(*one_pass, callbacks=[NonFinite(str(tmp_path / "bad"))])
    watcher = Watcher()
    with pytest.raises(ValueError, match="before a parameter moved"):
        fit(*one_pass, callbacks=[NonFinite(str(tmp_path / "bad"), "stop"), FaultAt("not_a_number", 2), watcher])
    assert max(watcher.after) == 1


def test_two_passes_ask_between_them():
    weight = torch.nn.Parameter(torch.ones(4, 4))
    optimizer = MuonAdamWInBackward([("a.weight", weight)], lr=0.1)
    asked: list[float] = []
    optimizer.may_step = lambda norm: bool(asked.append(float(norm)))

    def closure() -> torch.Tensor:
        loss = weight.sum()
        loss.backward()
        return loss

    assert float(optimizer.step(closure)) == 16.0
    assert asked == [4.0] and torch.equal(weight, torch.ones(4, 4)) and weight.grad is None


@pytest.mark.parametrize("settings", [{"policy": "hope"}, {"in_a_row": -1}, {"in_all": -1}])
def test_wrong_settings_are_named(settings):
    with pytest.raises(ValueError, match=f"callbacks.nonfinite.{next(iter(settings))}="):
        NonFinite("bad", **settings)
