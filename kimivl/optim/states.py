"""What the optimiser stands on: states in the dtype asked for, float32 copies to compute with, the bits of rounding."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Generator, Tensor
from torch.optim import Optimizer

from kimivl.optim.matrices import Piece
from kimivl.optim.rounding import Wide, seed_of


class WideOptimizer(Optimizer):
    """An optimiser that computes in float32, whatever the dtype of parameters and states.

    The states of a parameter that is cut up over ranks are cut up as it is. ``steps`` of the first group counts the
    steps of the whole optimiser; it seeds the random bits and is never reset.
    """

    _rounding: str
    _state_dtype: torch.dtype | None
    _shards: Any = None
    """The group of ranks that the parameters are cut up over."""
    _generators: dict[torch.device, Generator]

    def _begin_step(self) -> None:
        """Count the step and start its random bits, the same ones whenever this step is made."""
        self.param_groups[0]["steps"] += 1
        for generator in self._generators.values():
            generator.manual_seed(self._seed())

    def _seed(self) -> int:
        """Of the step's random bits: other rows of a model have other bits, the same rows the same on all ranks."""
        steps = int(self.param_groups[0]["steps"])
        if self._shards is None:
            return seed_of(steps)
        return seed_of(steps * dist.get_world_size(self._shards) + dist.get_rank(self._shards))

    def _noise(self, device: torch.device) -> Generator | None:
        if self._rounding != "stochastic":
            return None
        if device not in self._generators:
            self._generators[device] = Generator(device).manual_seed(self._seed())
        return self._generators[device]

    def _weights(self, pieces: list[Piece]) -> Wide:
        parameters = [piece.of(piece.parameter) for piece in pieces]
        if not self._has_remainder(pieces[0].parameter):
            return Wide(parameters)
        return Wide(parameters, [piece.of(self._state(piece.parameter, "remainder")) for piece in pieces])

    @staticmethod
    def _gradients(pieces: list[Piece]) -> list[Tensor]:
        return Wide([piece.of(piece.parameter.grad) for piece in pieces if piece.parameter.grad is not None]).values

    def _state(self, parameter: Tensor, name: str) -> Tensor:
        state = self.state[parameter]
        if name not in state:
            dtype = self._dtype_of(name, parameter)
            state[name] = (
                torch.zeros((), dtype=dtype, device=parameter.device)
                if name == "step"
                else torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
            )
        return state[name]

    def _make_states(self, parameters: Sequence[Tensor], *names: str) -> None:
        """All ranks have the same states of a parameter, also one that holds no row of it."""
        for parameter in parameters:
            for name in (*names, "remainder") if self._has_remainder(parameter) else names:
                self._state(parameter, name)

    def _has_remainder(self, parameter: Tensor) -> bool:
        return self._rounding == "master" and parameter.dtype == torch.bfloat16

    def _dtype_of(self, name: str, parameter: Tensor) -> torch.dtype:
        special = {"step": torch.float32, "remainder": torch.int16}
        return special.get(name) or self._dtype_of_state(parameter)

    def _dtype_of_state(self, parameter: Tensor) -> torch.dtype:
        return self._state_dtype or parameter.dtype

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state dict, each tensor in the dtype that this optimiser keeps it in.

        torch's own would cast all of them to the dtype of the parameter: float32 moments of bf16 parameters would
        lose half of their bits, and the remainders their meaning.
        """
        super().load_state_dict({**state_dict, "state": {}})
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                dtype = self._dtype_of(name, parameter)
                self.state[parameter][name] = value.to(dtype=dtype, device=parameter.device)


def reset_state(optimizer: Optimizer) -> None:
    """Zero momenta, moments and step counts in place, as in a new optimiser.

    The remainders of ``rounding="master"`` stay: they are the lower half of the parameters.
    """
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, Tensor) and name != "remainder":
                value.zero_()


def float_dtype(key: str, name: str | None) -> torch.dtype | None:
    """The dtype of this name; ValueError that names the optimiser's ``key`` for any other word."""
    if name is None:
        return None
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"optimizer.{key}={name}: name a floating-point dtype such as bfloat16 or float32")
    return dtype
