"""Errors of the machine in the words of a user: out of memory, a full disk, a lost worker, a file cut short."""

from __future__ import annotations

import errno
import re
import resource
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

GB = 10**9
_FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}
_REFUSED = (errno.EACCES, errno.EIO, errno.EROFS)
_FULL_WORDS = ("No space left on device", "os error 28", "Disk quota exceeded", "os error 122")
# What torch's writer says when a write fails, and afterwards when it is closed; it does not say why.
_WRITER_WORDS = ("PytorchStreamWriter failed", "unexpected pos", "file write failed", "open file failed")
_ANSWERING = ("drawing", "validating", "testing")
"""What a run does, by `kimivl.callbacks.Watchdog`, when its model answers problems."""
_OTHER_MODEL = "Error(s) in loading state_dict"


class MachineFault(ValueError):
    """The machine could not do what the run asked for; the message says what, and how to go on."""


@contextmanager
def writing(path: Path, size: int) -> Iterator[None]:
    """Errors of writing ``path``, of about ``size`` bytes, in words.

    Raises:
        MachineFault: when the disk is full, or the system does not take it.
    """
    free = _free(path)  # what the failed write has taken may still be taken
    try:
        yield
    except (OSError, RuntimeError) as error:
        by_torch = any(word in str(error) for word in _WRITER_WORDS)
        reason = _FULL[errno.ENOSPC] if by_torch and _free(path) < size else _full(error)
        if reason is not None:
            reason, remedy = f"{reason} ({size / GB:.3f} GB needed, {free / GB:.3f} GB free)", "Make room"
        elif by_torch or isinstance(error, OSError):
            reason, remedy = f"the system did not take it ({_in_short(error)})", "Mend that"
        else:
            raise
        raise MachineFault(
            f"{path} could not be written: {reason}; what was there before is whole. {remedy}, and type the same "
            "command: it goes on from the last checkpoint"
        ) from error


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Errors of reading the checkpoint at ``path``, in words; nothing else is done in the block.

    Raises:
        MachineFault: when it is damaged, or the system does not give it.
    """
    try:
        yield
    except Exception as error:  # torch makes of damaged bytes whatever they say
        if _is_out_of_memory(error):
            raise
        raise MachineFault(
            f"{path} cannot be read ({_in_short(error)}): where it is damaged, remove it, and go on from another one "
            "with ckpt_path=PATH, or begin anew"
        ) from error


def explained(
    error: BaseException, doing: str, config: Mapping[str, Any], overrides: list[str], output_dir: Path
) -> BaseException:
    """The same error in one sentence, where it is one of the machine; otherwise the error itself.

    Args:
        doing: what the run was at.
        config: the resolved one of the run.
        overrides: as the user typed them, for the command that shows more.
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
    if _is_out_of_memory(error):
        return MachineFault(_out_of_memory(text, doing, config, overrides))
    if (reason := _full(error)) is not None:
        path = getattr(error, "filename", None) or output_dir
        return MachineFault(
            f"{path} could not be written while {doing}: {reason} ({_free(Path(path)) / GB:.3f} GB free); make room, "
            "and type the same command: it goes on from the last checkpoint"
        )
    if isinstance(error, OSError) and error.errno in _REFUSED:
        return MachineFault(
            f"{error.filename or output_dir} could not be read or written while {doing}: {error.strerror}; mend that, "
            "and type the same command: it goes on from the last checkpoint"
        )
    if found := re.search(r"DataLoader worker \(pid(?:\(s\))? [\d, ]+\) (.*)", text):
        return MachineFault(
            f"a process that loads data was lost while {doing} ({found[1].rstrip('. ')}): mostly the system killed it "
            "for want of host memory (dmesg says it); set data.num_workers lower, 0 for none, and type the same "
            "command: it goes on from the last checkpoint"
        )
    return error


def _out_of_memory(text: str, doing: str, config: Mapping[str, Any], overrides: list[str]) -> str:
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        peak = torch.cuda.max_memory_allocated() / GB
        used = f"the GPU's peak was {peak:.1f} of {total / GB:.1f} GB"
    else:
        used = f"the process's peak was {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB"
    wanted = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", text)
    asked = f", and {wanted[1]} more were asked for" if wanted else ""
    where = " ".join(["kimivl memory", *overrides])
    return f"out of memory while {doing}: {used}{asked}. {_taking_less(doing, config)}. Where it all goes: {where}"


def _taking_less(doing: str, config: Mapping[str, Any]) -> str:
    if doing.startswith(_ANSWERING):
        return "A smaller rollout.max_rows takes less, and goes on from the last checkpoint"
    length = "data.max_length" if config["stage"] == "rl" else "max_length in data.phases"
    others = {"none": "full (or selective)", "selective": "full"}
    if (mode := config["activation_checkpointing"]) not in others:
        return f"A shorter {length} takes less, but begins anew"
    return (
        f"activation_checkpointing={others[mode]} takes less, and goes on from the last checkpoint; a shorter {length} "
        "does too, but begins anew"
    )


def _is_out_of_memory(error: BaseException) -> bool:
    of_torch = "DefaultCPUAllocator: can't allocate memory" in str(error)
    return of_torch or isinstance(error, torch.OutOfMemoryError | MemoryError)


def _in_short(error: BaseException) -> str:
    """The first sentence of what an error says, without the line of C++ that says it."""
    said = re.sub(r"\[enforce fail at [^]]*\] \. ", "", " ".join(str(error).split()))
    return said.partition(". ")[0].rstrip(".")[:200] or type(error).__name__


def _full(error: BaseException) -> str | None:
    """Why there is no room, where the error says so."""
    if isinstance(error, OSError) and error.errno in _FULL:
        return _FULL[error.errno]
    return _FULL[errno.ENOSPC] if any(word in str(error) for word in _FULL_WORDS) else None


def _free(path: Path) -> int:
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free
