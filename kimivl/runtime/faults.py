"""Errors of the machine in the words of a user: out of memory, a full disk, a lost worker, a file cut short."""

from __future__ import annotations

import errno
import re
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

GB = 10**9
_FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}
_FULL_WORDS = ("No space left on device", "os error 28", "Disk quota exceeded", "os error 122")
# What torch's writer says when a write fails, and afterwards when it is closed; it never says why.
_WRITER_WORDS = ("PytorchStreamWriter failed", "unexpected pos", "file write failed")
_ANSWERING = ("drawing", "validating", "testing")
"""What a run does, by `kimivl.callbacks.Watchdog`, when its model answers problems."""
_OTHER_MODEL = "Error(s) in loading state_dict"


class MachineFault(ValueError):
    """The machine could not do what the run asked for; the message says what, and how to go on."""


@contextmanager
def writing(path: Path, size: int) -> Iterator[None]:
    """Errors of writing ``path``, of about ``size`` bytes, in words.

    Raises:
        MachineFault: when the disk is full.
    """
    free = _free(path)  # what the failed write has taken may still be taken
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason = _full(error)
        if reason is None and any(word in str(error) for word in _WRITER_WORDS) and _free(path) < size:
            reason = _FULL[errno.ENOSPC]
        if reason is None:
            raise
        raise MachineFault(
            f"{path} could not be written: {reason} ({size / GB:.3f} GB needed, {free / GB:.3f} GB free); "
            "what was there before is whole. Make room, and type the same command: it goes on from the last checkpoint"
        ) from error


def explained(error: BaseException, doing: str, overrides: list[str], output_dir: Path) -> BaseException:
    """The same error in one sentence, where it is one of the machine; otherwise the error itself.

    Args:
        doing: what the run was at. overrides: as the user typed them, for the command that shows more.
    """
    text = str(error)
    if _OTHER_MODEL in text or text.startswith("loaded state dict"):
        details = " ".join(text.partition(":")[2].split() if _OTHER_MODEL in text else text.split())
        return ValueError(
            f"the checkpoint is of another model or optimizer ({details[:200]} ...): go on with the model=, lora=, "
            "module.freeze and optimizer= that it was made with, or leave ckpt_path out"
        )
    if isinstance(error, ValueError):
        return error
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator: can't allocate memory" in text:
        return MachineFault(_out_of_memory(text, doing, overrides))
    if (reason := _full(error)) is not None:
        path = getattr(error, "filename", None) or output_dir
        return MachineFault(
            f"{path} could not be written while {doing}: {reason} ({_free(Path(path)) / GB:.3f} GB free); make room, "
            "and type the same command: it goes on from the last checkpoint"
        )
    if found := re.search(r"DataLoader worker \(pid(?:\(s\))? [\d, ]+\) (.*)", text):
        return MachineFault(
            f"a process that loads data was lost while {doing} ({found[1].rstrip('. ')}): mostly the system killed it "
            "for want of host memory (dmesg says it); set data.num_workers lower, 0 for none, and type the same "
            "command: it goes on from the last checkpoint"
        )
    return error


def _out_of_memory(text: str, doing: str, overrides: list[str]) -> str:
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        peak = torch.cuda.max_memory_allocated() / GB
        used = f"the GPU's peak was {peak:.1f} of {total / GB:.1f} GB"
    else:
        used = f"the process's peak was {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB"
    wanted = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", text)
    asked = f", and {wanted[1]} more were asked for" if wanted else ""
    remedy = (
        "activation_checkpointing=full (or selective) takes less, and goes on from the last checkpoint; a shorter "
        "data.phases max_length does too, but begins anew"
    )
    if doing.startswith(_ANSWERING):
        remedy = "A smaller rollout.max_rows takes less, and goes on from the last checkpoint"
    where = " ".join(["kimivl memory", *overrides])
    return f"out of memory while {doing}: {used}{asked}. {remedy}. Where it all goes: {where}"


def _full(error: BaseException) -> str | None:
    """Why there is no room, where the error says so."""
    if isinstance(error, OSError) and error.errno in _FULL:
        return _FULL[error.errno]
    return _FULL[errno.ENOSPC] if any(word in str(error) for word in _FULL_WORDS) else None


def _free(path: Path) -> int:
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free
