"""How much memory devices have, and what CUDA takes of it before the first tensor.

Vendors' gigabytes are binary here: an "80GB" H100 has 79.1 GiB that torch can see, which is 84.9 GB of 10^9 bytes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

GB, GIB = 10**9, 2**30

# GiB that torch.cuda.get_device_properties(...).total_memory gives; a label as the vendor prints it.
_KNOWN = {"24GB": 23.5, "40GB": 39.4, "48GB": 44.5, "80GB": 79.1, "96GB": 94.5, "141GB": 139.8, "192GB": 178.4}
_NAMES = {"L4": "24GB", "A100": "80GB", "L40S": "48GB", "H100": "80GB", "H200": "141GB", "B200": "192GB"}
_CHOICES = "a size such as 80GB (as on the box), 79.1GiB (as torch sees it) or one of " + ", ".join(_NAMES)


@dataclass(frozen=True, slots=True)
class Device:
    """A device by name and the bytes that torch can see of it."""

    name: str
    capacity: int

    @classmethod
    def of(cls, text: str) -> Device:
        """From what a user types: ``80GB``, ``79.1GiB``, ``H100``.

        Raises:
            ValueError: for anything else.
        """
        label = _NAMES.get(text.upper(), text)
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(gib|gb)", label.lower())
        if match is None or float(match[1]) <= 0:
            raise ValueError(f"--gpu {text}: give {_CHOICES}")
        number, unit = float(match[1]), match[2]
        if unit == "gib":
            return cls(text, round(number * GIB))
        # Of a size that is not in the table: what is lost to error correction and firmware is 1 to 7%.
        visible = _KNOWN.get(f"{match[1]}GB", number * 0.97)
        return cls(f"{text} device" if label == text else f"{text} {label}", round(visible * GIB))

    @classmethod
    def found(cls) -> Device | None:
        """The first CUDA device of this machine."""
        if not torch.cuda.is_available():
            return None
        properties = torch.cuda.get_device_properties(0)
        return cls(properties.name, properties.total_memory)
