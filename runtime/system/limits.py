"""What the operating system lets this process use: the memory and the processors of its control groups.

A container or a batch system limits programs by control groups, which are nested: the tightest of the own group and of
all groups around it counts. Linux has two versions of them (cgroups(7)), and a machine can use both at the same time.
Within a control group namespace, groups outside of the namespace are invisible, so only the kernel knows their limits.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

_NO_LIMIT: Final = 1 << 60  # version 1 states "unlimited" as a number near 2^63
_ROOT: Final = Path("/")


@dataclass(frozen=True)
class MemoryLimit:
    """Memory limit of a control group, in bytes.

    Attributes:
        limit: memory that the processes of the group may use together.
        used: memory that they use, without file pages that were not used recently, because the kernel frees these
            pages before it enforces the limit. This is the working set of Kubernetes.
    """

    limit: int
    used: int

    @property
    def free(self) -> int:
        """Memory that the group may still take, in bytes."""
        return max(self.limit - self.used, 0)


@dataclass(frozen=True)
class _Group:
    """A folder of a control group; ``version`` is 1 or 2."""

    folder: Path
    version: int


def memory_limits(root: Path = _ROOT) -> list[MemoryLimit]:
    """Return the memory limits of the control group of this process and of all visible groups around it.

    Version 2 kills the processes of a group at ``memory.max`` and slows them down at ``memory.high``: the lower counts.

    Args:
        root: folder that contains ``proc`` and ``sys``.
    """
    found = []
    for group in _groups(root, "memory"):
        if group.version == 1:
            limits = [_number(group.folder / "memory.limit_in_bytes")]
            statistics = _statistics(group.folder / "memory.stat")
            limits.append(statistics.get("hierarchical_memory_limit"))
            used = _number(group.folder / "memory.usage_in_bytes")
            cached = statistics.get("total_inactive_file", 0)
        else:
            limits = [_number(group.folder / name) for name in ("memory.max", "memory.high")]
            used = _number(group.folder / "memory.current")
            cached = _statistics(group.folder / "memory.stat").get("inactive_file", 0)
        limit = min((value for value in limits if value is not None), default=_NO_LIMIT)
        if limit < _NO_LIMIT and used is not None:
            found.append(MemoryLimit(limit, max(used - cached, 0)))
    return found


def usable_cores(root: Path = _ROOT) -> int:
    """Return the number of logical cores that this process may use, at least 1.

    It is the smaller of the number of cores on which the process may run (taskset(1), cpusets) and of the processor
    time that its control groups get, in cores, rounded up.

    Args:
        root: folder that contains ``proc`` and ``sys``.
    """
    cores = float(len(os.sched_getaffinity(0)))
    for group in _groups(root, "cpu"):
        if group.version == 1:
            quota, period = (_number(group.folder / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
        else:
            words = _text(group.folder / "cpu.max").split()
            quota, period = (_as_number(word) for word in (*words, "", "")[:2])
        if quota is not None and period is not None and quota > 0 and period > 0:
            cores = min(cores, quota / period)
    return max(1, math.ceil(cores))


def _groups(root: Path, controller: str) -> Iterator[_Group]:
    """Yield the control group of this process and the visible groups around it, innermost first, for a controller."""
    own = dict(_own_groups(_text(root / "proc/self/cgroup"), controller))
    for version, top, mounted in _mounts(_text(root / "proc/self/mountinfo"), controller):
        if version in own:
            folder = root / mounted.lstrip("/")
            inner = folder / _below(own[version], top)
            for path in (inner, *inner.parents):
                yield _Group(path, version)
                if path == folder:
                    break


def _own_groups(text: str, controller: str) -> Iterator[tuple[int, str]]:
    """Yield the version of each hierarchy that may have the controller, and the path of the own group in it."""
    for line in text.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            yield 2, path
        elif controller in controllers.split(","):
            yield 1, path


def _mounts(text: str, controller: str) -> Iterator[tuple[int, str, str]]:
    """Yield version, topmost visible group and mount point of each hierarchy that may have the controller (proc(5))."""
    for line in text.splitlines():
        mount, _, kind = line.partition(" - ")
        fields, kinds = mount.split(), kind.split()
        if len(fields) < 5 or len(kinds) < 3:
            continue
        top, point = (_unescaped(field) for field in fields[3:5])
        if kinds[0] == "cgroup2":
            yield 2, top, point
        elif kinds[0] == "cgroup" and controller in kinds[2].split(","):
            yield 1, top, point


def _below(group: str, top: str) -> PurePosixPath:
    """Return the path of a group below the mount point.

    A container may see its group as the topmost one although the path in ``/proc/self/cgroup`` is that of the machine,
    or the other way round. If the path does not continue the topmost group, the topmost group is the nearest known one.
    """
    path = PurePosixPath(group)
    if ".." in path.parts or not path.is_relative_to(top):
        return PurePosixPath()
    return path.relative_to(top)


def _unescaped(field: str) -> str:
    """Return a path of ``/proc/self/mountinfo``, where a blank is written as a backslash and its octal code."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), field)


def _statistics(path: Path) -> dict[str, int]:
    """Return the numbers in a file with lines of the form ``name number``."""
    pairs = (line.split() for line in _text(path).splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdecimal()}


def _number(path: Path) -> int | None:
    return _as_number(_text(path).strip())


def _as_number(text: str) -> int | None:
    return int(text) if text.isdecimal() else None


def _text(path: Path) -> str:
    """Return the text of a system file; empty if it does not exist or cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
