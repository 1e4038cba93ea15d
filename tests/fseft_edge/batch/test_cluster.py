"""Batch runs with a real Dask scheduler and real Dask workers on this machine."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from doubles.encoder import write_case, write_random_adapter, write_tiny_encoder
from doubles.errors import refused

from fseft_edge.batch import cluster_pool
from fseft_edge.batch.coordinator import run_batch
from fseft_edge.batch.settings import BatchSettings, BatchSummary
from fseft_edge.outbox.records import CaseState
from fseft_edge.outbox.store import BatchStore, state_path
from fseft_edge.runtime.errors import EnvironmentProblemError, UsageError
from fseft_edge.segmentation.segment import segment
from fseft_edge.segmentation.settings import SegmentationSettings

NAMES = tuple(f"patient_{number}" for number in range(4))
TIMEOUT = 180.0  # seconds


@dataclass
class Cluster:
    """A Dask scheduler and Dask workers on this machine, and the folders of a batch."""

    root: Path
    port: int
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def settings(self) -> BatchSettings:
        segmentation = SegmentationSettings((self.root / "liver.adapter",), device="cpu", backend="torch")
        scheduler = f"tcp://127.0.0.1:{self.port}"
        return BatchSettings(self.root / "inbox", self.root / "outbox", segmentation, settle=0.0, scheduler=scheduler)

    @property
    def states(self) -> list[CaseState]:
        with contextlib.suppress(UsageError), BatchStore(state_path(self.root / "outbox")) as store:
            return [case.state for case in store.cases()]
        return []

    def start(self, *command: str) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "TMPDIR": str(self.root / "tmp"), "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(  # noqa: S603 - fixed commands
            [sys.executable, "-m", *command],
            env=environment,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=self.root,
        )
        self.processes.append(process)
        return process

    def start_worker(self, threads: int) -> subprocess.Popen[bytes]:
        options = ("--no-dashboard", "--host", "127.0.0.1", "--nthreads", str(threads))
        return self.start("distributed.cli.dask_worker", f"tcp://127.0.0.1:{self.port}", *options)

    def wait_for_worker(self) -> None:
        from distributed import Client  # noqa: PLC0415 - Dask is optional

        with Client(f"tcp://127.0.0.1:{self.port}", timeout=TIMEOUT, set_as_default=False) as client:
            client.wait_for_workers(1, timeout=TIMEOUT)


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    pytest.importorskip("distributed")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    write_random_adapter(tmp_path / "liver.adapter", write_tiny_encoder(tmp_path / "tiny.encoder"))
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


def test_the_cases_of_a_killed_worker_move_to_the_other_worker(cluster: Cluster) -> None:
    root = cluster.root
    for seed, name in enumerate(NAMES):
        write_case(root, name, seed)
    (root / "images").rename(root / "inbox")
    (root / "inbox" / "broken.nii.gz").write_bytes(b"not a scan")
    first, _ = cluster.start_worker(threads=1), cluster.start_worker(threads=1)
    with ThreadPoolExecutor(1) as thread:
        run = thread.submit(run_batch, cluster.settings)
        deadline = time.monotonic() + TIMEOUT
        while cluster.states.count(CaseState.RUNNING) < 2 and not run.done() and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(first.pid, signal.SIGKILL)
        assert run.result(TIMEOUT) == BatchSummary(done=len(NAMES), failed=1, waiting=0)
    assert sorted(cluster.states) == sorted([CaseState.DONE] * len(NAMES) + [CaseState.FAILED])
    (root / "inbox" / "broken.nii.gz").unlink()
    segment([root / "inbox"], [root / "liver.adapter"], root / "masks", device="cpu", backend="torch")
    made = sorted(path.read_bytes() for path in (root / "outbox").glob("case-*/case-*.nii.gz"))
    assert made == sorted(path.read_bytes() for path in (root / "masks").glob("*.nii.gz"))
    assert not list((root / "outbox").glob(".*.partial*"))


def test_unsuitable_workers_and_a_missing_scheduler_are_refused(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_case(cluster.root, "patient", 1)
    (cluster.root / "images").rename(cluster.root / "inbox")
    cluster.start_worker(threads=2)
    cluster.wait_for_worker()
    with refused(EnvironmentProblemError, 2) as caught:
        run_batch(cluster.settings)
    assert "--nthreads 1" in caught.value.remedy
    cluster.port = 1
    monkeypatch.setattr(cluster_pool, "_CONNECT_SECONDS", 1.0)
    with refused(EnvironmentProblemError, "tcp://127.0.0.1:1"):
        run_batch(cluster.settings)
    assert cluster.states == [CaseState.WAITING]
