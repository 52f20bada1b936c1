"""What runs inside vLLM's worker: takes over the policy's weights, and says what it has.

vLLM mixes this class into its worker (``worker_extension_cls``), in the process of training or in a server's. It
imports nothing of vLLM; ``self`` is the worker.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from kimivl.rl.weights import digests, official_parts

EXTENSION = "kimivl.rl.vllm_worker.PolicyWorker"
"""What ``--worker-extension-cls`` is given."""


class PolicyWorker:
    """Mixed into vLLM's worker."""

    model_runner: Any
    vllm_config: Any
    reload_weights: Any

    policy_token = ""

    def load_policy(self, source: str | Mapping[str, Tensor], token: str = "") -> dict[str, tuple[str, int]]:
        """Take over the weights in place: dtype and checksum of each official tensor as the engine now has it.

        Checksums are taken of what lies in the parameters after loading, before a kernel repacks it.

        Args:
            source: official name -> tensor, or a folder of safetensors files.
            token: names these weights, for ``held_policy``.

        Raises:
            ValueError: where the model is cut up over workers.
        """
        parallel = self.vllm_config.parallel_config
        if (
            parallel.tensor_parallel_size != 1
            or parallel.pipeline_parallel_size != 1
            or parallel.enable_expert_parallel
        ):
            raise ValueError(
                "weights are taken over by whole models: leave tensor, pipeline and expert parallelism at 1"
            )
        self.policy_token = ""
        model = self.model_runner.get_model()
        tensors = _read(Path(source)) if isinstance(source, str) else source.items()
        found: dict[str, tuple[str, int]] = {}
        _forget_cpu_kernels(model)
        with torch.no_grad(), _observed(model, found):
            self.reload_weights(weights_iterator=iter(tensors))
            for name, parameter in model.named_parameters():  # of tied ones the first name
                _observe(name, parameter, model.get_submodule(name.rpartition(".")[0]), found)
        self.policy_token = token
        return found

    def held_policy(self) -> list[str]:
        """The token of the weights that were taken over last; empty where none were."""
        return [self.policy_token]


def _read(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a folder, file after file."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no safetensors files: the server must see the trainer's files (sync_dir)")
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  not a dictionary
                yield name, opened.get_tensor(name)


def _forget_cpu_kernels(model: nn.Module) -> None:
    """Have the experts' kernels made anew on the CPU: vLLM repacks their weights the first time only, and says nothing.

    On a GPU weights are copied in place, and captured graphs hold the kernels.
    """
    if next(model.parameters()).device.type != "cpu":
        return
    for module in model.modules():
        if getattr(getattr(module, "quant_method", None), "moe_kernel", None) is not None:
            module.quant_method.moe_kernel = None  # type: ignore[union-attr]


@contextmanager
def _observed(model: nn.Module, found: dict[str, tuple[str, int]]) -> Iterator[None]:
    """Take the checksums of each layer when its weights are loaded, before they are repacked for a kernel."""
    names = {id(module): name for name, module in model.named_modules()}
    methods: dict[int, Any] = {
        id(m.quant_method): m.quant_method for m in model.modules() if hasattr(m, "quant_method")
    }
    for method in methods.values():
        method.process_weights_after_loading = _observing(method.process_weights_after_loading, names, found)
    try:
        yield
    finally:
        for method in methods.values():
            del method.process_weights_after_loading  # the class's own again


def _observing(process: Any, names: Mapping[int, str], found: dict[str, tuple[str, int]]) -> Any:
    def observe_and_process(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        for name, parameter in layer.named_parameters(prefix=names[id(layer)], recurse=False):
            if parameter.ndim > 1:  # vectors are not repacked, and may be loaded later
                _observe(name, parameter, layer, found)
        return process(layer, *args, **kwargs)

    return observe_and_process


def _observe(name: str, parameter: Tensor, module: nn.Module, found: dict[str, tuple[str, int]]) -> None:
    """Add the digests of the official tensors in a parameter, unless they are there."""
    parts = dict(official_parts(name, parameter.detach(), getattr(module, "org_vocab_size", None)))
    if next(iter(parts)) not in found:
        found.update(digests(parts))
