"""What watches a run: its progress, its speed, its examples, and the signals that stop it."""

from kimivl.callbacks.audit import Audit
from kimivl.callbacks.checkpoint import Checkpoint, CheckpointFiles
from kimivl.callbacks.experts import Experts
from kimivl.callbacks.gradients import Gradients
from kimivl.callbacks.memory import Memory
from kimivl.callbacks.nonfinite import NonFinite
from kimivl.callbacks.preemption import Preemption
from kimivl.callbacks.problems import Problems
from kimivl.callbacks.progress import Progress
from kimivl.callbacks.rejected import Rejected
from kimivl.callbacks.samples import Samples
from kimivl.callbacks.throughput import Throughput
from kimivl.callbacks.watchdog import Watchdog

__all__ = [
    "Audit",
    "Checkpoint",
    "CheckpointFiles",
    "Experts",
    "Gradients",
    "Memory",
    "NonFinite",
    "Preemption",
    "Problems",
    "Progress",
    "Rejected",
    "Samples",
    "Throughput",
    "Watchdog",
]
