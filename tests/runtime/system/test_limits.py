"""Limits of control groups, read from simulated system files and from those of this machine."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from fseft_edge.runtime.system import limits
from fseft_edge.runtime.system.limits import MemoryLimit, memory_limits, usable_cores
from fseft_edge.runtime.system.memory import free_ram, resident_bytes

GB = 1_000_000_000
UNLIMITED = "9223372036854771712"
V2 = "/sys/fs/cgroup"


@dataclass(frozen=True)
class Machine:
    """The system files of a simulated machine."""

    root: Path

    def put(self, path: str, text: object) -> None:
        file = self.root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")

    def own_group(self, *lines: str) -> None:
        self.put("/proc/self/cgroup", "\n".join(lines))

    def mounts(self, *lines: tuple[str, str, str, str]) -> None:
        """Write mounts: topmost visible group, mount point, file system, options of the file system."""
        self.put(
            "/proc/self/mountinfo",
            "\n".join(
                f"3{number} 23 0:2{number} {top} {point} rw,nosuid shared:4 - {kind} cgroup {options}"
                for number, (top, point, kind, options) in enumerate(lines)
            ),
        )

    def version_2(self, own: str = "/", top: str = "/") -> None:
        self.own_group(f"0::{own}")
        self.mounts((top, V2, "cgroup2", "rw,nsdelegate"))

    def group(
        self,
        path: str,
        *,
        highest: object = "max",
        slow: object = "max",
        used: int = 0,
        inactive: int = 0,
        active: int = 0,
    ) -> None:
        """Write the memory files of a group of version 2."""
        self.put(f"{V2}{path}/memory.max", highest)
        self.put(f"{V2}{path}/memory.high", slow)
        self.put(f"{V2}{path}/memory.current", used)
        self.put(f"{V2}{path}/memory.stat", f"anon 5\nfile 7\ninactive_file {inactive}\nactive_file {active}")

    def group_1(self, folder: str, *, limit: object, used: int, inactive: int, above: object = UNLIMITED) -> None:
        """Write the memory files of a group of version 1."""
        self.put(f"{folder}/memory.limit_in_bytes", limit)
        self.put(f"{folder}/memory.usage_in_bytes", used)
        statistics = f"inactive_file 1\nhierarchical_memory_limit {above}\ntotal_inactive_file {inactive}"
        self.put(f"{folder}/memory.stat", statistics)

    def cores(self, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
        monkeypatch.setattr(limits.os, "sched_getaffinity", lambda _: set(range(number)))


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_the_tightest_of_nested_groups_counts_and_pages_that_can_be_freed_do_not(machine: Machine) -> None:
    """The pod has a limit, its container has none: the container's files state ``max``."""
    machine.version_2("/kubepods/pod1/container")
    machine.group("/kubepods/pod1/container", used=7 * GB, inactive=5 * GB)
    machine.group("/kubepods/pod1", highest=8 * GB, used=7 * GB, inactive=5 * GB, active=GB)
    machine.group("/kubepods", highest=60 * GB, used=55 * GB, inactive=20 * GB)
    assert memory_limits(machine.root) == [MemoryLimit(8 * GB, 2 * GB), MemoryLimit(60 * GB, 35 * GB)]
    machine.put("/proc/meminfo", "MemTotal: 99 kB\nMemAvailable: 90000000 kB")
    expected = 0.9 * (resident_bytes() + 6 * GB)
    assert free_ram(root=machine.root) == pytest.approx(expected, rel=0.02)
    assert free_ram(3, root=machine.root) == pytest.approx(0.9 * (resident_bytes() + 2 * GB), rel=0.05)


def test_a_group_is_slowed_down_before_its_limit(machine: Machine) -> None:
    machine.version_2("/a")
    machine.group("/a", highest=8 * GB, slow=3 * GB, used=GB)
    assert memory_limits(machine.root) == [MemoryLimit(3 * GB, GB)]


def test_a_group_above_its_limit_has_nothing_left() -> None:
    assert MemoryLimit(GB, 2 * GB).free == 0


def test_in_a_namespace_the_own_group_is_the_topmost(machine: Machine) -> None:
    machine.version_2("/")
    machine.group("", highest=4 * GB, used=GB)
    assert memory_limits(machine.root) == [MemoryLimit(4 * GB, GB)]


@pytest.mark.parametrize(
    ("own", "top"),
    [("/docker/abc", "/docker/abc"), ("/docker/abc", "/docker/other"), ("/", "/docker/abc"), ("/../../x", "/")],
)
def test_a_group_that_is_mounted_as_the_topmost_is_found_there(machine: Machine, own: str, top: str) -> None:
    machine.version_2(own, top)
    machine.group("", highest=4 * GB, used=GB)
    machine.group("/docker/abc", highest=GB, used=0)  # a group of this name inside of the container
    assert memory_limits(machine.root) == [MemoryLimit(4 * GB, GB)]


def test_a_group_inside_of_a_mounted_group_is_found_below_it(machine: Machine) -> None:
    machine.version_2("/docker/abc/inner", "/docker/abc")
    machine.group("", highest=4 * GB, used=2 * GB)
    machine.group("/inner", highest=GB, used=GB // 2)
    assert memory_limits(machine.root) == [MemoryLimit(GB, GB // 2), MemoryLimit(4 * GB, 2 * GB)]


def test_version_1_counts_its_own_limit_and_that_of_the_groups_above(machine: Machine) -> None:
    machine.own_group("5:cpu,cpuacct:/job", "4:memory:/slurm/job", "0::/job")
    machine.mounts(
        ("/", "/sys/fs/cgroup/a\\040b", "cgroup", "rw,memory"),
        ("/", "/sys/fs/cgroup/cpu", "cgroup", "rw,cpu,cpuacct"),
        ("/", "/sys/fs/cgroup/unified", "cgroup2", "rw"),
    )
    machine.group_1("/sys/fs/cgroup/a b/slurm/job", limit=UNLIMITED, used=3 * GB, inactive=GB, above=9 * GB)
    machine.group_1("/sys/fs/cgroup/a b/slurm", limit=5 * GB, used=4 * GB, inactive=2 * GB)
    machine.group_1("/sys/fs/cgroup/a b", limit=UNLIMITED, used=40 * GB, inactive=0)
    assert memory_limits(machine.root) == [MemoryLimit(9 * GB, 2 * GB), MemoryLimit(5 * GB, 2 * GB)]


@pytest.mark.parametrize("text", ["", "garbage", "0::", ":::", "x:y:z\n0::/\xff"])
def test_system_files_that_are_missing_or_strange_state_no_limit(
    machine: Machine, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.cores(monkeypatch, 7)
    assert memory_limits(machine.root) == []
    machine.own_group(text)
    machine.mounts(("/", V2, "cgroup2", "rw"))
    machine.put(f"{V2}/memory.max", "many")
    machine.put(f"{V2}/cpu.max", "many of them")
    assert memory_limits(machine.root) == []
    assert usable_cores(machine.root) == 7


@pytest.mark.parametrize(
    ("inner", "outer", "affinity", "expected"),
    [
        ("max 100000", "max 100000", 16, 16),
        ("250000 100000", "max 100000", 16, 3),
        ("max 100000", "200000 100000", 16, 2),
        ("800000 100000", "400000 100000", 16, 4),
        ("10000 100000", "max", 16, 1),
        ("800000 100000", "max 100000", 6, 6),
    ],
)
def test_cores_are_the_least_of_affinity_and_quotas(
    machine: Machine, inner: str, outer: str, affinity: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.cores(monkeypatch, affinity)
    machine.version_2("/pod/container")
    machine.put(f"{V2}/pod/container/cpu.max", inner)
    machine.put(f"{V2}/pod/cpu.max", outer)
    assert usable_cores(machine.root) == expected


@pytest.mark.parametrize(("quota", "expected"), [("-1", 8), ("150000", 2), ("0", 8)])
def test_cores_of_version_1_come_from_the_quota(
    machine: Machine, quota: str, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.cores(monkeypatch, 8)
    machine.own_group("3:cpu,cpuacct:/docker/abc", "2:cpuset:/other")
    machine.mounts(("/docker/abc", "/sys/fs/cgroup/cpu,cpuacct", "cgroup", "rw,cpu,cpuacct"))
    machine.put("/sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", quota)
    machine.put("/sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us", "100000")
    assert usable_cores(machine.root) == expected


def test_this_machine_allows_at_most_the_cores_that_nproc_counts() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    counted = int(subprocess.run(["nproc"], capture_output=True, text=True, check=True, env=environment).stdout)  # noqa: S607 - of the system
    assert 1 <= usable_cores() <= counted
    assert all(group.limit > 0 and group.used >= 0 for group in memory_limits())
