"""What watches a run: its progress, its speed, its examples, and the signals that stop it."""

from kimivl.callbacks.audit import Audit
from kimivl.callbacks.experts import Experts
from kimivl.callbacks.preemption import Preemption
from kimivl.callbacks.problems import Problems
from kimivl.callbacks.progress import Progress
from kimivl.callbacks.samples import Samples
from kimivl.callbacks.throughput import Throughput

__all__ = ["Audit", "Experts", "Preemption", "Problems", "Progress", "Samples", "Throughput"]
