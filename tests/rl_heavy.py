"""A verifier that tells what its process has imported."""

import sys


def has_torch(text: str, expected: str) -> bool:
    return "torch" in sys.modules or "numpy" in sys.modules
