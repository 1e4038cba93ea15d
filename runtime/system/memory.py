"""Memory: free memory, memory budgets, choice of a plan within a budget, and detection of out-of-memory errors.

Budgets and predictions count the private resident memory of the process. Pages of memory-mapped files do not count,
because the code releases them directly after use and the operating system can reclaim them at any time.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from fseft_edge.runtime.errors import OutOfMemoryError, UsageError
from fseft_edge.runtime.system.limits import memory_limits

if TYPE_CHECKING:
    import torch

_log = logging.getLogger(__name__)

GB = 1_000_000_000

# Default share of the free memory; the rest is left to other programs on the machine.
_SHARE_OF_FREE = 0.9

_PAGE = os.sysconf("SC_PAGE_SIZE")

# Texts in the messages of the CPU allocators of PyTorch, oneDNN and the C++ library, and of the arena of ONNX Runtime.
# ONNX Runtime raises its own exception class, which is not a RuntimeError.
_SIGNS = ("out of memory", "can't allocate memory", "cannot allocate memory", "bad_alloc", "failed to allocate memory")
_KINDS_WITH_SIGNS = ("torch", "onnxruntime", "builtins")


@dataclass(frozen=True)
class Budget:
    """Memory budget of a run, in bytes.

    Attributes:
        ram: memory that this process may use; None means :func:`free_ram` when the work on a scan starts.
        vram: GPU memory that PyTorch or ONNX Runtime may allocate; None means :func:`free_vram` when the work on a scan
            starts.
        processes: number of processes of this run that share the free memory.
    """

    ram: int | None = None
    vram: int | None = None
    processes: int = 1

    @property
    def limited(self) -> bool:
        """Whether the user limited the memory, so that only one scan at a time may be in memory."""
        return self.ram is not None or self.vram is not None

    @classmethod
    def of(cls, memory_gb: float | None, vram_gb: float | None, processes: int = 1) -> Budget:
        """Return the budget of each process of a run, from amounts in units of 1e9 bytes.

        Args:
            memory_gb: memory that all processes may use together; None means 90 % of the free memory.
            vram_gb: GPU memory that all processes may use together; None means 90 % of the free GPU memory.
            processes: number of processes.

        Raises:
            UsageError: an amount is not a positive finite number.
        """
        for name, value in (("memory", memory_gb), ("vram", vram_gb)):
            if value is not None and not 0 < value < float("inf"):
                raise UsageError(
                    f"The {name} budget is {value} GB, but must be a finite number above 0.",
                    remedy=f"Give a number above 0, or leave --{name} out.",
                )
        ram, vram = (None if value is None else int(value * GB) // processes for value in (memory_gb, vram_gb))
        return cls(ram, vram, processes)


AS_MUCH_AS_IS_FREE = Budget()


@dataclass(frozen=True)
class Footprint:
    """Predicted peak memory in bytes: ``ram`` is memory of this process, ``vram`` is GPU memory."""

    ram: int
    vram: int = 0


class _HasFootprint(Protocol):
    @property
    def footprint(self) -> Footprint: ...


_Plan = TypeVar("_Plan", bound=_HasFootprint)


def first_that_fits(plans: Sequence[_Plan], budget: Budget, device: torch.device, work: str) -> _Plan:
    """Return the first plan whose footprint is within the budget.

    If an amount of the budget is None, the free memory is the limit. If no plan is within the free memory, this
    function logs a warning and returns the plan with the smallest footprint, because a prediction can be too high.

    Args:
        plans: possible plans in order of preference.
        budget: memory that the work may use.
        device: device that computes.
        work: name of the work for messages, such as ``encoding this scan``.

    Raises:
        OutOfMemoryError: the user gave a budget and no plan is within it; the message states the smallest sufficient
            budget.
    """
    allowed = list(plans)
    if budget.vram is not None:
        least = min(plan.footprint.vram for plan in allowed)
        allowed = [plan for plan in allowed if plan.footprint.vram <= budget.vram]
        if not allowed:
            raise _too_small(work, "vram", budget.vram, least)
    if budget.ram is not None:
        least = min(plan.footprint.ram for plan in allowed)
        allowed = [plan for plan in allowed if plan.footprint.ram <= budget.ram]
        if not allowed:
            raise _too_small(work, "memory", budget.ram, least)
    ram = free_ram(budget.processes) if budget.ram is None else budget.ram
    vram = free_vram(device, budget.processes) if budget.vram is None else budget.vram
    for plan in allowed:
        if plan.footprint.ram <= ram and plan.footprint.vram <= vram:
            return plan
    smallest = min(allowed, key=lambda plan: (plan.footprint.vram, plan.footprint.ram))
    _log.warning(
        "%s may need %.1f GB of memory and %.1f GB of GPU memory, which is more than is free; the work starts anyway",
        work.capitalize(),
        smallest.footprint.ram / GB,
        smallest.footprint.vram / GB,
    )
    return smallest


def _too_small(work: str, option: str, budget: int, least: int) -> OutOfMemoryError:
    # The memory of a process before its work differs by about one percent between runs.
    enough = math.ceil(1.02 * least / (GB / 100)) / 100
    return OutOfMemoryError(
        f"The {option} budget of {budget / GB:.2f} GB is too small for {work}, which needs {enough:.2f} GB.",
        remedy=f"Give --{option} {enough:.2f} or more.",
        least=least,
    )


def resident_bytes() -> int:
    """Return the resident memory of this process in bytes, including the pages of its libraries."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * _PAGE


def free_ram(processes: int = 1, root: Path = Path("/")) -> int:
    """Return the memory that this process may use, in bytes: 90 % of its resident memory plus the available memory.

    The available memory is the smallest of ``MemAvailable`` and of what each limit of a control group leaves
    (:func:`fseft_edge.runtime.system.limits.memory_limits`).

    Args:
        processes: number of processes that share the available memory in equal parts.
        root: folder that contains ``proc`` and ``sys``.
    """
    lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    machine = int(fields["MemAvailable"].split()[0]) << 10
    available = min([machine, *(group.free for group in memory_limits(root))])
    return int(_SHARE_OF_FREE * (resident_bytes() + available // processes))


def free_vram(device: torch.device, processes: int = 1) -> int:
    """Return the GPU memory that this process may use in bytes: 90 % of reserved plus free memory; 0 on a CPU.

    Args:
        device: the device.
        processes: number of processes that share the free memory in equal parts.
    """
    if device.type != "cuda":
        return 0
    import torch  # noqa: PLC0415 - a GPU device implies that torch is already imported

    free, _ = torch.cuda.mem_get_info(device)
    return int(_SHARE_OF_FREE * (free // processes + torch.cuda.memory_reserved(device)))


@contextlib.contextmanager
def memory_explained(message: str, *, remedy: str) -> Iterator[None]:
    """Convert any out-of-memory exception of the body into an :class:`OutOfMemoryError`. Also usable as a decorator.

    Args:
        message: message of the :class:`OutOfMemoryError`.
        remedy: remedy of the :class:`OutOfMemoryError`.

    Raises:
        OutOfMemoryError: the body ran out of memory.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OutOfMemoryError) or not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(message, remedy=remedy) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if an exception means that the memory of the machine or of a GPU is exhausted."""
    if isinstance(error, OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return type(error).__module__.partition(".")[0] in _KINDS_WITH_SIGNS and any(sign in text for sign in _SIGNS)
