"""Time and peak memory of this process."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fseft_edge.machine.speed_jobs import Peaks


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that work takes until the device has done it."""
    _finish(device)
    started = time.perf_counter()
    work()
    _finish(device)
    return time.perf_counter() - started


def peaks(device: torch.device) -> Peaks:
    """Return the most memory that this process has held so far."""
    vram = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return Peaks(ram_bytes=_peak_ram(), vram_bytes=vram)


def _peak_ram() -> int:
    """Return the peak of resident memory.

    The kernel's high-water mark of the process's own memory where /proc tells it: ``ru_maxrss`` is also that of the
    process which started this one, if that was larger.
    """
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
