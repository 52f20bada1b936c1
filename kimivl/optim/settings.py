"""Checks of an optimiser's settings; what they refuse they name by its key."""

import math

import torch


def float_dtype(key: str, name: str | None) -> torch.dtype | None:
    if name is None:
        return None
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"optimizer.{key}={name}: name a floating-point dtype such as bfloat16 or float32")
    return dtype


def check_at_least_zero(**settings: float) -> None:
    for key, value in settings.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"optimizer.{key}={value}: give a number of at least 0")


def check_below_one(**settings: float) -> None:
    for key, value in settings.items():
        if not 0 <= value < 1:
            raise ValueError(f"optimizer.{key}={value}: give a number from 0 to below 1")
