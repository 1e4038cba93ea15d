"""A test of the overnight batch: `make benchmark BENCHMARK=night`, or this script with options.

An inbox contains 34 real scans of several kinds and six damaged inputs. The parts of the test, in this order:

- `kills`: all processes of the batch are killed at random moments and started again; then the batch finishes. The
  script checks that every good case is done exactly once, and that every damaged case is listed with a reason.
- `pipeline`: one run in which the stages of cases overlap, and one run without overlap; their masks must equal those of
  the first part, byte by byte.
- `cluster`: one run with one Dask worker and one run with two Dask workers, with one thread each.

The script prints Markdown and writes its files to OUTPUT, which must be new or empty.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import os
import random
import shutil
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import headneck

from fseft_edge.adaptation.adapt import adapt
from fseft_edge.adaptation.training import TrainingSettings
from fseft_edge.adapters.network import AdapterSettings
from fseft_edge.outbox.content_key import content_key
from fseft_edge.outbox.records import CaseRecord, CaseState
from fseft_edge.outbox.store import BatchStore, state_path
from fseft_edge.runtime.errors import FseftEdgeError
from fseft_edge.runtime.scans.organs import OrganLabel

PARTS = ("kills", "pipeline", "cluster")


@dataclass(frozen=True)
class Batch:
    """The folders and files of the test."""

    root: Path
    encoder: Path
    adapters: tuple[Path, ...]

    @property
    def inbox(self) -> Path:
        """Folder of the waiting scans."""
        return self.root / "inbox"

    def start(self, outbox: str, *options: str) -> subprocess.Popen[bytes]:
        """Start `batch run` as the leader of a process group of its own."""
        command = [sys.executable, "-c", "from fseft_edge.cli.main import main; main()", "batch", "run"]
        command += [
            str(self.inbox),
            str(self.root / outbox),
            "--encoder",
            str(self.encoder),
            "--settle",
            "1",
        ]
        command += [word for adapter in self.adapters for word in ("--adapter", str(adapter))]
        return subprocess.Popen(  # noqa: S603 - fixed arguments
            [*command, *options], start_new_session=True, env={**os.environ, "TMPDIR": str(self.root / "tmp")}
        )

    def cases(self, outbox: str) -> list[CaseRecord]:
        """Return the content of the state file."""
        with contextlib.suppress(FseftEdgeError), BatchStore(state_path(self.root / outbox)) as store:
            return store.cases()
        return []

    def masks(self, outbox: str) -> dict[str, bytes]:
        """Return the masks by the key of their case."""
        return {path.parent.name: path.read_bytes() for path in (self.root / outbox).glob("case-*/case-*.nii.gz")}


def main() -> None:
    """Run all parts of the test."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=headneck.RUNS / "night")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument(
        "--cases",
        type=int,
        default=25,
        help="number of head-and-neck scans of `test`; use fewer scans for a short trial",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    arguments = parser.parse_args()
    batch = _prepared(arguments.output)
    good, broken = _fill(batch.inbox, arguments.cases)
    print(f"{len(good)} good inputs, {len(broken)} broken ones, {len(batch.adapters)} adapters\n")
    if "kills" in arguments.parts:
        _kills(batch, good, broken, arguments.kills, random.Random(arguments.seed))  # noqa: S311 - not used for security
    if "pipeline" in arguments.parts:
        _pipeline(batch)
    if "cluster" in arguments.parts:
        _cluster(batch)


def _prepared(root: Path) -> Batch:
    for folder in ("inbox", "tmp", "images", "labels"):
        (root / folder).mkdir(parents=True)
    support = headneck.split("support")[:3]
    for case in support:
        (root / "images" / f"{case}.nii.gz").symlink_to(headneck.image_path(case).absolute())
        (root / "labels" / f"{case}.nii.gz").symlink_to(headneck.label_path(case).absolute())
    encoder = headneck.encoder(None).path.absolute()
    made = []
    for name, organs in (
        ("axis", [OrganLabel("brainstem", 1), OrganLabel("spinal_cord", 2), OrganLabel("mandible", 7)]),
        ("parotids", [OrganLabel("parotid_right", 3), OrganLabel("parotid_left", 4)]),
    ):
        made.append(root / f"{name}.adapter")
        adapt(
            encoder,
            root / "images",
            root / "labels",
            organs,
            made[-1],
            settings=AdapterSettings(method="linear", levels="all"),
            training=TrainingSettings(seed=0),
            validate=False,
            cache=headneck.RUNS / "features",
        )
    return Batch(root, encoder, tuple(made))


def _fill(inbox: Path, test_cases: int) -> tuple[set[str], set[str]]:
    """Write scans of every kind to the inbox; return the keys of the good cases and of the damaged cases."""
    data = headneck.data_root()
    good: list[Path] = []
    cases = headneck.split("test")[:test_cases] + headneck.split("support")[3:7]
    for path in (
        *(headneck.image_path(case) for case in cases),
        *(data / "abdomen" / f"{name}.nii.gz" for name in ("ct_sm", "ct_3mm", "ct_1p5mm")),
        data / "fullsize" / "thorax_512.nii.gz",
        data / "dicom" / "chest_61.zip",
    ):
        good.append(inbox / path.name)
        shutil.copy(path, good[-1])
    whole = headneck.image_path(headneck.split("support")[8]).read_bytes()
    plain = gzip.decompress(whole)
    broken = {
        "text.nii.gz": b"no scan at all",
        "empty.nii": b"",
        "truncated.nii.gz": whole[: len(whole) // 2],
        "scaled_to_one.nii": _scaled_to_one(plain),
        "cut_header.nii.gz": gzip.compress(plain[:200]),
        "archive.zip": b"PK\x03\x04 but no more of it",
    }
    for name, content in broken.items():
        (inbox / name).write_bytes(content)
    return {content_key(path) for path in good}, {content_key(inbox / name) for name in broken}


def _scaled_to_one(plain: bytes) -> bytes:
    """Return a NIfTI file whose slope and intercept (bytes 112 to 119) scale HU to values between 0 and 1."""
    return plain[:112] + struct.pack("<ff", 1 / 4000, 0.25) + plain[120:]


def _kills(batch: Batch, good: set[str], broken: set[str], kills: int, moments: random.Random) -> None:
    done: dict[str, int] = {}
    struck = []
    for _ in range(kills):
        process = batch.start("killed")
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(moments.uniform(2.0, 25.0))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        states = [case.state for case in batch.cases("killed")]
        struck.append(states.count(CaseState.RUNNING))
        _check_once(batch, done)
    started = time.monotonic()
    batch.start("killed").wait()
    _check_once(batch, done)
    state = {case.key: case for case in batch.cases("killed")}
    finished = {key for key, case in state.items() if case.state == CaseState.DONE}
    failed = {key for key, case in state.items() if case.state == CaseState.FAILED and case.reason}
    with sqlite3.connect(state_path(batch.root / "killed")) as connection:
        sound = connection.execute("PRAGMA integrity_check").fetchone()[0]
    left = [*(batch.root / "killed").rglob("*partial*"), *(batch.root / "tmp").iterdir()]
    print("## Killed and started again\n")
    print(f"- {kills} kills; cases in progress at each: {struck}; the last run took {time.monotonic() - started:.0f} s")
    print(f"- good cases done: {len(finished & good)} of {len(good)}; others done: {len(finished - good)}")
    print(f"- broken inputs that failed with a reason: {len(failed & broken)} of {len(broken)}")
    print(f"- other cases that failed: {len(failed - broken)}")
    print(f"- attempts counted against a case: {sum(case.attempts for case in state.values())}")
    print("- results made again after they were done: 0 (looked at after every kill)")
    print(f"- state: {sound}; files left over: {len(left)}\n")
    for key in sorted(failed):
        print(f"  - {state[key].reason}")
    print()


def _check_once(batch: Batch, done: dict[str, int]) -> None:
    """Raise SystemExit if the result of a finished case was written again."""
    for path in (batch.root / "killed").glob("case-*/case-*.nii.gz"):
        date = path.stat().st_mtime_ns
        if done.setdefault(path.parent.name, date) != date:
            raise SystemExit(f"{path.parent.name} was made twice")


def _pipeline(batch: Batch) -> None:
    print("## Stages overlapping, and one by one\n")
    print("| run | cases | seconds | cases an hour | encoder idle |\n|---|---|---|---|---|")
    seconds = {}
    for outbox, options in (("overlapping", ()), ("one_by_one", ("--one-by-one",))):
        batch.start(outbox, *options).wait()
        seconds[outbox] = _row(batch, outbox)
    print(f"\nRatio {seconds['one_by_one'] / seconds['overlapping']:.2f}; {_same(batch, ['killed', *seconds])}\n")


def _cluster(batch: Batch) -> None:
    print("## One Dask worker, and two\n")
    print("| run | cases | seconds | cases an hour | encoder idle |\n|---|---|---|---|---|")
    seconds = {}
    for workers in (1, 2):
        outbox = f"workers_{workers}"
        with _workers(workers, batch.root / "tmp") as address:
            batch.start(outbox, "--scheduler", address).wait()
        seconds[outbox] = _row(batch, outbox)
    print(f"\nRatio {seconds['workers_1'] / seconds['workers_2']:.2f}; {_same(batch, ['killed', *seconds])}")


def _row(batch: Batch, outbox: str) -> float:
    """Print a row; return the seconds from the start of the first case to the end of the last case."""
    done = [case for case in batch.cases(outbox) if case.seconds is not None]
    begun = min(case.started_at for case in done if case.started_at is not None)
    wall = max(case.finished_at for case in done if case.finished_at is not None) - begun
    encoding = sum(case.seconds.encode for case in done if case.seconds is not None)
    idle = f"{max(0.0, 1 - encoding / wall):.0%}" if outbox in ("overlapping", "one_by_one") else "–"
    print(f"| {outbox} | {len(done)} | {wall:.0f} | {3600 * len(done) / wall:.0f} | {idle} |", flush=True)
    return wall


def _same(batch: Batch, outboxes: Sequence[str]) -> str:
    masks = [batch.masks(outbox) for outbox in outboxes if (batch.root / outbox).exists()]
    return "masks are the same bytes" if all(other == masks[0] for other in masks) else "MASKS DIFFER"


@contextlib.contextmanager
def _workers(count: int, temporary: Path) -> Iterator[str]:
    """Run a scheduler and workers on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"tcp://127.0.0.1:{port}"
    commands = [["distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", str(port), "--no-dashboard"]]
    commands += [["distributed.cli.dask_worker", address, "--nthreads", "1", "--no-dashboard"]] * count
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(temporary)}
    processes = []
    for command in commands:
        processes.append(
            subprocess.Popen(  # noqa: S603 - fixed arguments
                [sys.executable, "-m", *command],
                env=environment,
                start_new_session=True,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        )
    try:
        time.sleep(10)  # wait until all workers are connected to the scheduler
        yield address
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


if __name__ == "__main__":
    main()
