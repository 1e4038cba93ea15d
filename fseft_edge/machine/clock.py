"""Measurement of time and peak memory of this process."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fseft_edge.machine.speed_jobs import Peaks


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds until the device has completed the work."""
    _synchronise(device)
    started = time.perf_counter()
    work()
    _synchronise(device)
    return time.perf_counter() - started


def peaks(device: torch.device) -> Peaks:
    """Return the peak memory of this process so far."""
    vram = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return Peaks(ram_bytes=_peak_ram(), vram_bytes=vram)


def _peak_ram() -> int:
    """Return the peak of the resident memory in bytes.

    The value comes from VmHWM in /proc if it is available. ``ru_maxrss`` is the fallback: it can also contain the peak
    of the process that started this one.
    """
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
