"""Memory: what there is, what a run may take, and how to tell that it ran out.

Budgets and predictions count what the process keeps resident for itself. Pages of files that it has mapped, which the
system can take back at any time, are let go of as soon as they were used and do not count.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from fseft_edge.runtime.errors import OutOfMemoryError, UsageError

if TYPE_CHECKING:
    import torch

_log = logging.getLogger(__name__)

GB = 1_000_000_000

# Of memory that nobody uses, this much is taken without being asked: others work on the machine too.
_SHARE_OF_FREE = 0.9

_PAGE = os.sysconf("SC_PAGE_SIZE")
_NO_LIMIT = 1 << 60  # cgroups say "unlimited" by a number near 2^63

# What CPU allocators (PyTorch's, oneDNN's, the C++ library's) and ONNX Runtime's arena say; the last raises a kind of
# its own that is no RuntimeError.
_SIGNS = ("out of memory", "can't allocate memory", "cannot allocate memory", "bad_alloc", "failed to allocate memory")
_KINDS_WITH_SIGNS = ("torch", "onnxruntime", "builtins")


@dataclass(frozen=True)
class Budget:
    """What a run may take, in bytes.

    Attributes:
        ram: memory of this process; None takes what is free when a scan's turn comes (:func:`free_ram`).
        vram: memory of the GPU, as far as PyTorch or ONNX Runtime allocate it; None likewise (:func:`free_vram`).
    """

    ram: int | None = None
    vram: int | None = None

    @classmethod
    def of(cls, memory_gb: float | None, vram_gb: float | None) -> Budget:
        """Return a budget given in units of 1e9 bytes.

        Raises:
            UsageError: a budget is not positive.
        """
        for name, value in (("memory", memory_gb), ("vram", vram_gb)):
            if value is not None and not 0 < value < float("inf"):
                raise UsageError(
                    f"A {name} budget of {value} GB is impossible.", remedy="Give a number above 0, or leave it out."
                )
        ram, vram = (None if value is None else int(value * GB) for value in (memory_gb, vram_gb))
        return cls(ram, vram)


AS_MUCH_AS_IS_FREE = Budget()


@dataclass(frozen=True)
class Footprint:
    """The most bytes that something is predicted to take: ``ram`` of this process, ``vram`` of the GPU."""

    ram: int
    vram: int = 0


class _HasFootprint(Protocol):
    @property
    def footprint(self) -> Footprint: ...


_Plan = TypeVar("_Plan", bound=_HasFootprint)


def first_that_fits(plans: Sequence[_Plan], budget: Budget, device: torch.device, work: str) -> _Plan:
    """Return the first plan within the budget.

    Where nothing was given, what is free is the budget; if no plan is within that, the one that takes least is tried
    with a warning, since a prediction is no reason to refuse.

    Args:
        plans: the most convenient one first.
        budget: what may be taken.
        device: where the work computes.
        work: what is planned, for messages: ``encoding this scan``.

    Raises:
        OutOfMemoryError: a budget was given and no plan is within it; the message says the smallest that works.
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
    ram = free_ram() if budget.ram is None else budget.ram
    vram = free_vram(device) if budget.vram is None else budget.vram
    for plan in allowed:
        if plan.footprint.ram <= ram and plan.footprint.vram <= vram:
            return plan
    smallest = min(allowed, key=lambda plan: (plan.footprint.vram, plan.footprint.ram))
    _log.warning(
        "%s may take %.1f GB of memory (and %.1f GB of the GPU's), more than is free; trying all the same",
        work.capitalize(),
        smallest.footprint.ram / GB,
        smallest.footprint.vram / GB,
    )
    return smallest


def _too_small(work: str, option: str, budget: int, least: int) -> OutOfMemoryError:
    enough = -(-least // (GB // 100)) / 100  # rounded up to 0.01 GB, so that what is printed works
    return OutOfMemoryError(
        f"A budget of {budget / GB:.2f} GB is too small for {work}: at least {enough:.2f} GB are needed.",
        remedy=f"Give --{option} {enough:.2f} or more.",
        least=least,
    )


def resident_bytes() -> int:
    """Return what this process holds in memory now, pages of its libraries included."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * _PAGE


def free_ram() -> int:
    """Return what this process may come to hold: 90 % of what it holds already and what nobody uses.

    What nobody uses is the system's own estimate (``MemAvailable``), or what a control group leaves, if that is less.
    """
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
    available = int(fields["MemAvailable"].split()[0]) << 10
    for limit, usage in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        allowed, used = _number(limit), _number(usage)
        if allowed is not None and used is not None and allowed < _NO_LIMIT:
            available = min(available, max(allowed - used, 0))
    return int(_SHARE_OF_FREE * (resident_bytes() + available))


def free_vram(device: torch.device) -> int:
    """Return what this process may come to hold of a GPU: 90 % of what it holds and what is free; 0 of a CPU."""
    if device.type != "cuda":
        return 0
    import torch  # noqa: PLC0415 - only where there is a GPU, and then it is there already

    free, _ = torch.cuda.mem_get_info(device)
    return int(_SHARE_OF_FREE * (free + torch.cuda.memory_reserved(device)))


def _number(path: str) -> int | None:
    """Return the number in a file of the system, None where there is none."""
    try:
        return int(Path(path).read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


@contextlib.contextmanager
def memory_explained(message: str, *, remedy: str) -> Iterator[None]:
    """Say what ran out of memory, and what helps; serves as a decorator too.

    Args:
        message: see :class:`OutOfMemoryError`.
        remedy: likewise.

    Raises:
        OutOfMemoryError: memory ran out within.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OutOfMemoryError) or not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(message, remedy=remedy) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory, of the machine or of a GPU, is used up."""
    if isinstance(error, OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return type(error).__module__.partition(".")[0] in _KINDS_WITH_SIGNS and any(sign in text for sign in _SIGNS)
