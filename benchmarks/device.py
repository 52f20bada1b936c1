"""Clock, peak memory and speed of the device that a benchmark runs on.

On a CPU the clock is the CPU time of the process and all its threads, which what else the machine does cannot
lengthen as it does the wall clock, and the peak is that of resident memory. On CUDA it is the wall clock between
synchronisations, and the peak is what torch's allocator has handed out.
"""

from __future__ import annotations

import ctypes
import gc
import platform
import re
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from kimivl.model.flops import peak_flops

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "Cannot allocate memory")


class Clock:
    """Seconds on a device, by ``lap``."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.lap()

    def lap(self) -> float:
        """Seconds since the lap before, on the clock that speed is told by."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            now = time.perf_counter()
        else:
            now = time.process_time()
        seconds, self._before = now - getattr(self, "_before", now), now
        return seconds


class Stopwatch:
    """Seconds that calls of a function took in all, without making a GPU wait."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose calls count from now on."""

        def call(*args: Any, **kwargs: Any) -> Any:
            if self.device.type != "cuda":
                begun = time.process_time()
                result = function(*args, **kwargs)
                self._seconds += time.process_time() - begun
                return result
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            result = function(*args, **kwargs)
            end.record()
            self._events.append((start, end))
            return result

        return call

    def read(self) -> float:
        """Seconds since the last reading."""
        if self._events:
            torch.cuda.synchronize(self.device)
        seconds = self._seconds + sum(start.elapsed_time(end) for start, end in self._events) / 1000
        self._seconds, self._events = 0.0, []
        return seconds


class PeakMemory:
    """The most memory in use between construction and ``read``."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        release()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
        else:
            if _CLEAR.exists():
                _CLEAR.write_text("5")  # the high-water mark starts again from here
            self.before = resident("VmRSS")

    def read(self) -> dict[str, int]:
        """Bytes: ``before``, ``peak``, and on CUDA what the allocator holds (``reserved``)."""
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
            reserved = torch.cuda.max_memory_reserved(self.device)
            return {"before": self.before, "peak": peak, "reserved": reserved}
        return {"before": self.before, "peak": resident("VmHWM")}


def resident(field: str) -> int:
    """Bytes of this process by a field of its status file; 0 where the system has none."""
    text = _STATUS.read_text() if _STATUS.exists() else ""
    found = re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def release() -> None:
    """Give memory that nobody uses back, so that a figure is not that of what ran before."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def limit_memory(share: float) -> None:
    """Let an allocation beyond this share of the machine's free memory fail, before the system kills a process.

    Beyond it torch raises an error that ``is_out_of_memory`` knows. CUDA has limits of its own.
    """
    meminfo = Path("/proc/meminfo")
    if meminfo.exists() and not torch.cuda.is_available():
        available = int(meminfo.read_text().split("MemAvailable:")[1].split()[0]) * 1024
        resource.setrlimit(resource.RLIMIT_DATA, (resident("VmData") + int(share * available), resource.RLIM_INFINITY))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, on any device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _OUT_OF_MEMORY)


def describe(device: torch.device) -> dict[str, Any]:
    """What the figures of a run belong to."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def peak_of(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """FLOP/s that utilisation is measured against, and where they are from: a data sheet, or a product tried here."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        known = peak_flops(torch.cuda.get_device_name(device))
        if known is not None:
            return known, "the data sheet's dense bfloat16"
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = seconds_of(lambda: a @ b, device, repeats=5)
    return 2 * size**3 / min(seconds), f"a product of {size} x {size} matrices in {dtype}, tried here"


def seconds_of(work: Callable[[], Any], device: torch.device, repeats: int) -> list[float]:
    """Seconds of each of ``repeats`` calls, after one that does not count."""
    work()
    clock, seconds = Clock(device), []
    for _ in range(repeats):
        clock.lap()
        work()
        seconds.append(clock.lap())
    return seconds
