"""What a batch of the optimiser step takes of memory while it lasts."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Copies(NamedTuple):
    """Bytes a number: of the float32 copies of a parameter (or gradient) and of a state, and to store either."""

    weight: int
    state: int
    store_weight: int
    store_state: int

    @classmethod
    def of(cls, dtype: torch.dtype, state_dtype: torch.dtype, rounding: str) -> Copies:
        weight, state = (0 if each == torch.float32 else 4 for each in (dtype, state_dtype))
        # Random bits and the mask of NaNs; the remainders put together.
        stores = {"stochastic": (5, 5), "nearest": (0, 0), "master": (2, 0)}[rounding]
        store_weight, store_state = (
            size if each == torch.bfloat16 else 0 for size, each in zip(stores, (dtype, state_dtype), strict=True)
        )
        return cls(weight, state, store_weight, store_state)


def muon_bytes(copies: Copies, product: int, number: int, short: int, long: int) -> float:
    """Peak of a batch of ``number`` matrices; ``product`` is the item size of the Newton-Schulz products."""
    rounded = 0 if product == 4 else product
    each = (
        copies.weight + copies.state + 4 + copies.store_state,  # gradient, momentum, update
        4 + 4 + rounded,  # the update, put together, in the dtype of the products
        product * (2 + 2 * short / long),  # Newton-Schulz
        4 + max(rounded, copies.weight + copies.store_weight),  # its result, the weight
    )
    return max(each) * number * short * long


def adamw_bytes(copies: Copies, numel: int) -> float:
    """Peak of a batch of ``numel`` numbers: weight, gradient and two moments."""
    return (2 * copies.weight + 2 * copies.state + max(copies.store_weight, copies.store_state)) * numel
