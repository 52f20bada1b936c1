"""A tiny model trained for a few steps under a real trainer, with what an exactness test compares."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from hydra.utils import instantiate
from in_ranks import in_ranks
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from omegaconf import open_dict

from kimivl.callbacks import CheckpointFiles
from kimivl.checkpoint import build_model
from kimivl.config import compose_run
from kimivl.data.loader import PackMaker
from kimivl.data.sample import SampleError
from kimivl.runtime import ranks


@dataclass(frozen=True)
class Case:
    """``packs`` of a step are dealt to the ranks. ``unreadable``: numbers of packs whose samples all are holes.
    ``double``: in float64, where what remains of a difference is no rounding."""

    stage: str
    overrides: Sequence[str] = ()
    packs: int = 2
    lr: float = 0.1
    unreadable: Sequence[int] = ()
    double: bool = False


@dataclass
class Fitted:
    """Of each step: gradients, the figures that were logged, and of its packs on this rank (number, samples, images).
    At the end: weights, biases of the routers, the state of the data, the figures of the evaluation."""

    gradients: list[dict[str, torch.Tensor]] = field(default_factory=list)
    figures: list[dict[str, float]] = field(default_factory=list)
    packs: dict[int, list[tuple[int, list[int], int]]] = field(default_factory=lambda: defaultdict(list))
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)


Fits = dict[str, Fitted]


def on_one_and_on_two(
    data: Path, out: Path, cases: Mapping[str, Case], as_on_one: Callable[[Case], Case] = lambda case: case
) -> Callable[..., tuple[Fits, list[Fits]]]:
    """Names of ``cases`` -> each by one process, and by each of two ranks. A group of processes does several."""

    @cache
    def made(*names: str) -> tuple[Fits, list[Fits]]:
        shared = {name: cases[name] for name in names}
        alone = {name: as_on_one(case) for name, case in shared.items()}
        return in_ranks(_fit_all, data, out, alone, ranks=1)[0], in_ranks(_fit_all, data, out, shared)

    return made


def _fit_all(data: Path, out: Path, cases: Mapping[str, Case]) -> Fits:
    return {name: small_fit(data, out, case) for name, case in cases.items()}


class _Look(Callback):
    def __init__(self) -> None:
        self.seen = Fitted()

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, *args: Any) -> None:
        pack = getattr(batch, "pack", batch)
        self.seen.packs[trainer.global_step].append((pack.number, pack.samples.tolist(), len(pack.image_grid_hws)))

    def on_before_optimizer_step(self, trainer: Any, module: Any, *args: Any) -> None:
        named = module.model.named_parameters()
        self.seen.gradients.append({n: _whole(w.grad) for n, w in named if w.grad is not None})

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        if not trainer.fit_loop._should_accumulate():
            figures = {name: float(value) for name, value in trainer.callback_metrics.items()}
            figures |= {f"load/{n}": float(value) for n, value in enumerate(module.router.step_load().flatten())}
            self.seen.figures.append(figures)

    def on_train_end(self, trainer: Any, module: Any) -> None:
        self.seen.data = trainer.datamodule.state_dict()
        self.seen.dropped = trainer.datamodule.dropped


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def small_fit(
    data: Path,
    out: Path,
    case: Case,
    prepare: Callable[[Any], None] = lambda module: None,
    callbacks: Sequence[Callback] = (),
    ckpt_path: Path | None = None,
) -> Fitted:
    """Train as ``case`` says on the ranks there are, with plain SGD.

    Args:
        data: what ``kimivl.tasks.digits.write`` made. prepare: may change the module. ckpt_path: to go on from.
    """
    cfg = compose_run(f"stage={case.stage}", f"paths.data={data}", f"paths.output_dir={out}", *case.overrides)
    with open_dict(cfg):
        cfg.init_from, cfg.data.prepare, cfg.data.val_shards, cfg.data.test_shards = None, None, None, None
        cfg.data.processor = str(data / "digits/tokenizer")
    seed_everything(1, verbose=False)
    datamodule = instantiate(cfg.data, _convert_="all")
    module = instantiate(cfg.module, _convert_="all")
    module.make_optimizer = partial(torch.optim.SGD, lr=case.lr)
    prepare(module)
    look, world = _Look(), ranks.world_size()
    trainer = Trainer(
        max_epochs=datamodule.max_epochs,
        accumulate_grad_batches=case.packs // world,
        devices=world,
        accelerator="cpu",
        precision=cfg.trainer.precision,
        strategy="auto" if cfg.trainer.strategy == "auto" else instantiate(cfg.trainer.strategy),
        plugins=[
            LightningEnvironment() if world == 1 else TorchElasticEnvironment(),
            *([CheckpointFiles()] if cfg.trainer.strategy == "auto" else []),
        ],
        use_distributed_sampler=False,
        reload_dataloaders_every_n_epochs=1,
        callbacks=[look, *callbacks],
        logger=False,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=out,
    )

    def build(*of: Any) -> Any:
        return build_model(*of).double() if case.double else build_model(*of)

    with _unreadable(case.unreadable), patch("kimivl.stages.base.build_model", build):
        trainer.fit(module, datamodule, ckpt_path=ckpt_path, weights_only=True)
    look.seen.weights = {name: _whole(weight) for name, weight in module.model.state_dict().items()}
    return look.seen


class _unreadable:
    """No sample of these packs can be read."""

    def __init__(self, packs: Sequence[int]) -> None:
        self.packs, self.encode = packs, PackMaker._encode

    def __enter__(self) -> None:
        packs, encode = self.packs, self.encode

        def failing(maker: PackMaker, sample: int, patches: torch.Tensor) -> Any:
            if any(sample in maker.plan.pack(number) for number in packs):
                raise SampleError("bad_image", maker.index.key(sample), maker.index.shard_of(sample), "put there")
            return encode(maker, sample, patches)

        PackMaker._encode = failing

    def __exit__(self, *args: Any) -> None:
        PackMaker._encode = self.encode
