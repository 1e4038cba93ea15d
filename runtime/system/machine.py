"""Properties of this machine: processor, memory, disks, NVIDIA driver and GPUs.

These functions never raise an error: a value that cannot be determined is None or is left out. PyTorch is imported only
to list the GPUs, and a broken PyTorch is tolerated. All sizes are in bytes.
"""

from __future__ import annotations

import contextlib
import csv
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Final, Literal

from fseft_edge.runtime.system.limits import memory_limits, usable_cores

_INSTRUCTIONS: Final = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16")
"""Instruction sets for the fast code of the inference engines, with their Linux names."""

_PROC = Path("/proc")
_NETWORK_FILE_SYSTEMS: Final = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "glusterfs", "lustre", "beegfs", "gpfs", "davfs"}
    | {"fuse.sshfs", "fuse.glusterfs", "fuse.ceph"}
)
_QUERY = ("--query-gpu=name,driver_version,compute_cap,memory.total,memory.free", "--format=csv,noheader,nounits")
_QUERY_SECONDS = 20.0


@dataclass(frozen=True)
class Cpu:
    """The processor.

    Attributes:
        model: model name of the processor.
        cores: number of logical cores of the machine.
        usable_cores: number of logical cores that this process may use
            (:func:`fseft_edge.runtime.system.limits.usable_cores`).
        instructions: available instruction sets among those that the inference engines use.
    """

    model: str
    cores: int
    usable_cores: int
    instructions: tuple[str, ...]


@dataclass(frozen=True)
class Memory:
    """Main memory of the machine, or of the container if the container has a memory limit."""

    total_bytes: int
    free_bytes: int


@dataclass(frozen=True)
class Disk:
    """Free disk space in one folder."""

    purpose: Literal["working folder", "temporary files"]
    folder: str
    free_bytes: int


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU.

    Attributes:
        name: model name of the GPU.
        compute_capability: CUDA compute capability, for example ``8.9``.
        total_bytes, free_bytes: total and free GPU memory in bytes.
        seen_by: source of this information. Only a GPU seen by ``torch`` can be used for computing.
    """

    name: str
    compute_capability: str | None
    total_bytes: int | None
    free_bytes: int | None
    seen_by: Literal["torch", "nvidia-smi", "driver"]


@dataclass(frozen=True)
class Machine:
    """Properties of this machine.

    Attributes:
        system: name and version of the operating system.
        python: version of Python.
        cpu: the processor.
        memory: main memory; None if unknown.
        disks: free disk space in the working folder and in the folder for temporary files.
        driver: version of the NVIDIA driver; None if no driver is loaded.
        gpus: the NVIDIA GPUs.
    """

    system: str
    python: str
    cpu: Cpu
    memory: Memory | None
    disks: tuple[Disk, ...]
    driver: str | None
    gpus: tuple[Gpu, ...]


def this_machine() -> Machine:
    """Return the properties of this machine."""
    reported_driver, reported = _from_nvidia_smi()
    return Machine(
        system=platform.platform(),
        python=platform.python_version(),
        cpu=cpu(),
        memory=_memory(),
        disks=tuple(_disks()),
        driver=_driver_version() or reported_driver,
        gpus=_from_torch() or reported or _from_driver(),
    )


def cpu() -> Cpu:
    """Return the properties of the processor."""
    fields = _first_fields(_PROC / "cpuinfo", ("model name", "flags", "Features"))
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    return Cpu(
        model=fields.get("model name") or platform.processor() or platform.machine(),
        cores=os.cpu_count() or 1,
        usable_cores=usable_cores(),
        instructions=tuple(name for name in _INSTRUCTIONS if name in flags),
    )


def _memory() -> Memory | None:
    fields = _first_fields(_PROC / "meminfo", ("MemTotal", "MemAvailable"))
    try:
        total, free = (int(fields[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    except (KeyError, ValueError, IndexError):
        return None
    groups = memory_limits(_PROC.parent)
    return Memory(min([total, *(group.limit for group in groups)]), min([free, *(group.free for group in groups)]))


def _disks() -> Iterator[Disk]:
    with contextlib.suppress(OSError):  # the working folder may have been deleted
        yield Disk("working folder", str(Path.cwd()), shutil.disk_usage(Path.cwd()).free)
    with contextlib.suppress(OSError):
        yield Disk("temporary files", tempfile.gettempdir(), shutil.disk_usage(tempfile.gettempdir()).free)


def _driver_version() -> str | None:
    """Return the version of the loaded NVIDIA kernel module, or None."""
    found = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", _text(_PROC / "driver/nvidia/version"))
    return found[1] if found else None


def _from_torch() -> tuple[Gpu, ...]:
    """Return the GPUs that PyTorch can use. Reading the free memory loads CUDA, which takes one to two seconds."""
    try:
        torch = import_module("torch")
        if not torch.cuda.is_available():
            return ()
        gpus = []
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            free, total = torch.cuda.mem_get_info(index)
            gpus.append(Gpu(properties.name, f"{properties.major}.{properties.minor}", total, free, "torch"))
        return tuple(gpus)
    except Exception:  # a broken PyTorch can raise any exception; `cuda_problem` reports the reason
        return ()


def _from_nvidia_smi() -> tuple[str | None, tuple[Gpu, ...]]:
    """Return the driver version and the GPUs as reported by ``nvidia-smi``."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None, ()
    try:
        answer = subprocess.run(  # noqa: S603 - fixed arguments
            [program, *_QUERY], capture_output=True, text=True, timeout=_QUERY_SECONDS, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None, ()
    driver, gpus = None, []
    for row in csv.reader(answer.splitlines(), skipinitialspace=True):
        if len(row) == 5:
            name, driver, capability, total, free = row
            known = capability if re.fullmatch(r"\d+\.\d+", capability) else None
            gpus.append(Gpu(name, known, _mebibytes(total), _mebibytes(free), "nvidia-smi"))
    return driver, tuple(gpus)


def _from_driver() -> tuple[Gpu, ...]:
    """Return the GPUs that the kernel module lists. Their memory is unknown."""
    files = sorted((_PROC / "driver/nvidia/gpus").glob("*/information"))
    return tuple(Gpu(_first_fields(file, ("Model",)).get("Model", "?"), None, None, None, "driver") for file in files)


def _mebibytes(text: str) -> int | None:
    return int(text) << 20 if text.strip().isdecimal() else None


def _first_fields(file: Path, names: tuple[str, ...]) -> dict[str, str]:
    """Return, for each name that occurs in a file of ``name: value`` lines, the first value."""
    found: dict[str, str] = {}
    for line in _text(file).splitlines():
        name, separator, value = line.partition(":")
        if separator and name.strip() in names:
            found.setdefault(name.strip(), value.strip())
    return found


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def network_file_system(path: Path, mounts: Path = _PROC / "mounts") -> str | None:
    """Return the file system type of the network drive that contains a path, or None for a local disk.

    Args:
        path: path of a file or folder; it need not exist.
        mounts: file with one line for each mounted file system, in the format of proc(5).
    """
    place = path.resolve()
    kinds: dict[Path, str] = {}
    with contextlib.suppress(OSError):
        for line in mounts.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
            _, where, kind, *_ = line.split()
            mount_point = where.encode("utf-8", "surrogateescape").decode("unicode_escape")  # a space is "\\040"
            kinds[Path(mount_point)] = kind
    deepest = max((mount for mount in kinds if mount == place or mount in place.parents), default=None, key=_depth)
    kind = kinds[deepest] if deepest is not None else ""
    return kind if kind in _NETWORK_FILE_SYSTEMS else None


def _depth(path: Path) -> int:
    return len(path.parts)
