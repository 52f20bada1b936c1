"""The experts' load in the loggers."""

from types import SimpleNamespace

import pytest
import torch

from kimivl.callbacks import Experts


def make(load: list[list[int]], step: int = 10, every: int = 5, accumulating: bool = False):
    logged: list[tuple[int, dict[str, float]]] = []
    reads: list[int] = []
    router = SimpleNamespace(layers=len(load), step_load=lambda: (reads.append(step), torch.tensor(load))[1])
    text = SimpleNamespace(first_k_dense_replace=1)
    module = SimpleNamespace(router=router, model=SimpleNamespace(config=SimpleNamespace(text_config=text)))
    logger = SimpleNamespace(log_metrics=lambda metrics, step: logged.append((step, metrics)))
    trainer = SimpleNamespace(
        loggers=[logger],
        global_step=step,
        log_every_n_steps=every,
        fit_loop=SimpleNamespace(_should_accumulate=lambda: accumulating),
    )
    return trainer, module, logged, reads


def run(callback: Experts, trainer, module) -> None:
    callback.on_train_batch_end(trainer, module, None, None, 0)


def test_each_layer_and_the_worst():
    trainer, module, logged, _ = make([[4, 4, 4, 4], [16, 0, 0, 0], [8, 8, 0, 0]])
    run(Experts(), trainer, module)
    [(step, metrics)] = logged
    assert step == 9
    assert metrics == pytest.approx(
        {
            "experts/max_over_mean": 4.0,
            "experts/entropy": 0.0,
            "experts/dead": 3.0,
            "experts/max_over_mean/layer_01": 1.0,
            "experts/max_over_mean/layer_02": 4.0,
            "experts/max_over_mean/layer_03": 2.0,
            "experts/entropy/layer_01": 1.0,
            "experts/entropy/layer_02": 0.0,
            "experts/entropy/layer_03": 0.5,
            "experts/dead/layer_01": 0.0,
            "experts/dead/layer_02": 3.0,
            "experts/dead/layer_03": 2.0,
        },
        abs=1e-6,
    )


def test_the_worst_alone():
    trainer, module, logged, _ = make([[1, 0]] * 26)
    run(Experts(layers=False), trainer, module)
    assert set(logged[0][1]) == {"experts/max_over_mean", "experts/entropy", "experts/dead"}


@pytest.mark.parametrize(("step", "accumulating"), [(11, False), (10, True)])
def test_between_log_steps_nothing_is_read(step, accumulating):
    trainer, module, logged, reads = make([[1, 1]], step=step, accumulating=accumulating)
    run(Experts(), trainer, module)
    assert not logged and not reads


def test_a_model_without_experts_logs_nothing():
    trainer, module, logged, reads = make([])
    run(Experts(), trainer, module)
    assert not logged and not reads
