"""Properties of a simulated machine: /proc, cgroups, nvidia-smi, PyTorch."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fseft_edge.runtime.system import machine
from fseft_edge.runtime.system.machine import Gpu, this_machine

CPUINFO = """processor\t: 0
model name\t: Fast Chip 9000
flags\t\t: fpu sse2 avx2 avx512f avx512_bf16 amx_bf16

processor\t: 1
model name\t: Slow Chip
flags\t\t: fpu avx512_vnni
"""
VERSION = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.14  Thu Feb 22 01:44:30 UTC 2024\nGCC version: 12\n"
OPEN_VERSION = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build  (dvs)\n"


@pytest.fixture
def proc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Return an empty /proc on a machine without memory limit of a container, nvidia-smi and GPU."""
    root = tmp_path / "proc"
    root.mkdir()
    (tmp_path / "bin").mkdir()
    monkeypatch.setattr(machine, "_PROC", root)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return root


def write_nvidia_smi(proc: Path, script: str) -> None:
    program = proc.parent / "bin" / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)


def test_a_machine_without_any_information_is_described_without_an_error(proc: Path) -> None:
    found = this_machine()
    assert (found.memory, found.driver, found.gpus, found.cpu.instructions) == (None, None, (), ())
    assert found.cpu.cores >= found.cpu.usable_cores >= 1


def test_processor_is_the_first_in_cpuinfo_with_its_relevant_instructions(proc: Path) -> None:
    (proc / "cpuinfo").write_text(CPUINFO)
    cpu = this_machine().cpu
    assert cpu.model == "Fast Chip 9000"
    assert cpu.instructions == ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


@pytest.mark.parametrize(
    ("limit", "expected"), [(None, (8000, 6000)), ("max", (8000, 6000)), ("4096000", (4000, 3000))]
)
def test_memory_is_that_of_the_machine_or_of_the_container(
    proc: Path, limit: str | None, expected: tuple[int, int]
) -> None:
    (proc / "meminfo").write_text("MemTotal:  8000 kB\nMemFree:  100 kB\nMemAvailable:  6000 kB\n")
    if limit is not None:
        (proc / "self").mkdir()
        (proc / "self" / "cgroup").write_text("0::/job\n")
        (proc / "self" / "mountinfo").write_text("31 23 0:28 / /groups rw - cgroup2 cgroup rw\n")
        job = proc.parent / "groups" / "job"
        job.mkdir(parents=True)
        (job / "memory.max").write_text(f"{limit}\n")
        (job / "memory.current").write_text("1024000\n")
    memory = this_machine().memory
    assert memory is not None
    assert (memory.total_bytes, memory.free_bytes) == tuple(size * 1024 for size in expected)


def test_free_disk_space_is_that_of_the_operating_system(
    proc: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    working, _ = this_machine().disks
    assert (working.purpose, working.folder) == ("working folder", str(tmp_path))
    assert working.free_bytes == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.1)


@pytest.mark.parametrize(("text", "version"), [(VERSION, "550.54.14"), (OPEN_VERSION, "570.86.15")])
def test_a_loaded_driver_is_found_without_nvidia_smi(proc: Path, text: str, version: str) -> None:
    card = proc / "driver/nvidia/gpus/0000:01:00.0/information"
    card.parent.mkdir(parents=True)
    card.write_text("Model: \t\t NVIDIA RTX A2000\nIRQ:   \t\t 88\n")
    (proc / "driver/nvidia/version").write_text(text)
    found = this_machine()
    assert found.driver == version
    assert found.gpus == (Gpu("NVIDIA RTX A2000", None, None, None, "driver"),)


def test_driver_and_gpus_come_from_nvidia_smi(proc: Path) -> None:
    write_nvidia_smi(
        proc,
        "echo 'NVIDIA RTX A4000, 535.183.01, 8.6, 16376, 15000'\necho 'NVIDIA T400, 535.183.01, [N/A], [N/A], [N/A]'",
    )
    found = this_machine()
    assert found.driver == "535.183.01"
    assert found.gpus == (
        Gpu("NVIDIA RTX A4000", "8.6", 16376 << 20, 15000 << 20, "nvidia-smi"),
        Gpu("NVIDIA T400", None, None, None, "nvidia-smi"),
    )


@pytest.mark.parametrize("script", ["echo 'NVIDIA-SMI has failed'; exit 9", "echo 'No devices were found'", "kill $$"])
def test_a_failing_nvidia_smi_is_ignored(proc: Path, script: str) -> None:
    write_nvidia_smi(proc, script)
    assert (this_machine().driver, this_machine().gpus) == (None, ())


def test_gpus_of_pytorch_have_priority_over_other_sources(proc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_nvidia_smi(proc, "echo 'NVIDIA L4, 550.54.14, 8.9, 23034, 22000'")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    properties = SimpleNamespace(name="NVIDIA L4", major=8, minor=9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (5, 7))
    found = this_machine()
    assert found.gpus == (Gpu("NVIDIA L4", "8.9", 7, 5, "torch"),)
    assert found.driver == "550.54.14"


def test_gpus_come_from_other_sources_if_pytorch_fails(proc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_nvidia_smi(proc, "echo 'NVIDIA L4, 550.54.14, 8.9, 23034, 22000'")

    def failing() -> bool:
        raise RuntimeError("CUDA cannot start")

    monkeypatch.setattr(torch.cuda, "is_available", failing)
    assert [gpu.seen_by for gpu in this_machine().gpus] == ["nvidia-smi"]


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="no /proc here")
def test_the_real_machine_agrees_with_the_c_library() -> None:
    found = this_machine()
    assert found.memory is not None
    assert found.memory.total_bytes <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < found.memory.free_bytes < found.memory.total_bytes
