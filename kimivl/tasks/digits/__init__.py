"""The embedded task `digits`: questions about real handwritten digits, for all three stages."""

from kimivl.tasks.digits.build import write

__all__ = ["write"]
