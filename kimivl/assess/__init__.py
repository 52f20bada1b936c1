"""Assessment of problem sets: how often a model solves each problem, and which answers can be guessed."""

from kimivl.assess.assessment import Assessment

__all__ = ["Assessment"]
