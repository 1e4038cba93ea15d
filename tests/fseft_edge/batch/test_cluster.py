"""The batch over a real Dask scheduler with two real worker processes, one of which is killed half-way."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from doubles.encoder import write_case, write_random_adapter, write_tiny_encoder

from fseft_edge.outbox.records import CaseState
from fseft_edge.outbox.store import BatchStore, state_path
from fseft_edge.runtime.errors import UsageError
from fseft_edge.segmentation.segment import segment

NAMES = tuple(f"patient_{number}" for number in range(6))
PATIENCE = 180.0


@dataclass
class Cluster:
    """A scheduler and workers on this machine."""

    root: Path
    port: int
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"tcp://127.0.0.1:{self.port}"

    def start(self, *command: str) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "TMPDIR": str(self.root / "tmp"), "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(  # noqa: S603 - the arguments are this test's
            [sys.executable, "-m", *command],
            env=environment,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=self.root,
        )
        self.processes.append(process)
        return process

    def start_worker(self, *options: str) -> subprocess.Popen[bytes]:
        return self.start(
            "distributed.cli.dask_worker", self.address, "--no-dashboard", "--host", "127.0.0.1", *options
        )

    def run(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", "from fseft_edge.cli.main import main; main()", "batch", "run", "inbox"]
        command += [
            "-o",
            "outbox",
            "--adapter",
            "liver.adapter",
            "--settle",
            "0",
            "--scheduler",
            self.address,
        ]
        return subprocess.Popen(  # noqa: S603 - the arguments are this test's
            command,
            cwd=self.root,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(self.root / "tmp")},
        )


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    pytest.importorskip("distributed")
    (tmp_path / "tmp").mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        cluster = Cluster(tmp_path, free.getsockname()[1])
    cluster.start(
        "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", str(cluster.port), "--no-dashboard"
    )
    yield cluster
    for process in cluster.processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def cases_of(outbox: Path) -> list[CaseState]:
    with contextlib.suppress(UsageError), BatchStore(state_path(outbox)) as store:
        return [case.state for case in store.cases()]
    return []


def test_the_cases_of_a_killed_worker_move_to_the_other(cluster: Cluster) -> None:
    root = cluster.root
    for seed, name in enumerate(NAMES):
        write_case(root, name, seed)
    (root / "images").rename(root / "inbox")
    (root / "inbox" / "broken.nii.gz").write_bytes(b"no scan")
    write_random_adapter(root / "liver.adapter", write_tiny_encoder(root / "tiny.encoder"))
    first, _ = cluster.start_worker("--nthreads", "1"), cluster.start_worker("--nthreads", "1")
    run = cluster.run()
    give_up = time.monotonic() + PATIENCE
    while cases_of(root / "outbox").count(CaseState.RUNNING) < 2 and run.poll() is None and time.monotonic() < give_up:
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    said, _ = run.communicate(timeout=PATIENCE)
    assert run.returncode == 5, said
    assert sorted(cases_of(root / "outbox")) == sorted([CaseState.DONE] * len(NAMES) + [CaseState.FAILED])
    (root / "broken").mkdir()
    (root / "inbox" / "broken.nii.gz").rename(root / "broken" / "broken.nii.gz")
    segment([root / "inbox"], [root / "liver.adapter"], root / "masks", device="cpu")
    made = sorted(path.read_bytes() for path in (root / "outbox").glob("case-*/case-*.nii.gz"))
    assert made == sorted(path.read_bytes() for path in (root / "masks").glob("*.nii.gz"))
    assert not list((root / "outbox").glob(".*.partial*"))


def test_what_cannot_work_is_said(cluster: Cluster) -> None:
    root = cluster.root
    (root / "inbox").mkdir()
    write_case(root, "patient", 1)[0].rename(root / "inbox" / "patient.nii.gz")
    write_random_adapter(root / "liver.adapter", write_tiny_encoder(root / "tiny.encoder"))
    cluster.start_worker("--nthreads", "2")
    said, _ = (run := cluster.run()).communicate(timeout=PATIENCE)
    assert run.returncode == 4, said
    assert "several cases at a time" in said
    assert "--nthreads 1" in said
    cluster.port = 1
    said, _ = (run := cluster.run()).communicate(timeout=PATIENCE)
    assert run.returncode == 4
    assert "no Dask scheduler" in said
    assert cases_of(root / "outbox") == [CaseState.WAITING]
