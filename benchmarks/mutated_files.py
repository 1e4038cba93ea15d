"""Mutated files of every kind that the toolkit reads: `python benchmarks/mutated_files.py --count 2000 --seed 0`.

Small scans, annotations, models, results and tables are changed at random: bytes, header fields, DICOM elements, JSON
keys, tensors, database rows. Each mutated file must be refused with an error that has a remedy, or be read with the
places and values that independent readers (SimpleITK, nibabel, pydicom) find in it. Each file is read in a process with
a limit of time and memory. ``--only KIND --number N`` shows one mutation.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import queue
import resource
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "shared"))

from doubles.mutated_files import FAULTS, KINDS, Mutator, Verdict  # noqa: E402 - it lies outside the package

SHARES: Final = {
    "NIfTI": 20,
    "label map": 12,
    "DICOM": 26,
    "adapter": 10,
    "tuning": 4,
    "encoder bundle": 10,
    "model file": 4,
    "mask description": 4,
    "batch record": 2,
    "batch state": 4,
    "table": 4,
}
"""Share of each kind in all mutations, in percent."""

SECONDS: Final = 20.0
"""Largest accepted time to read a file and to compare it with independent readers."""

MEMORY_BYTES: Final = 1 << 30
"""Largest accepted memory to read a file of a few kilobytes, beyond the memory of the process before."""

_HARNESS_FAULTS: Final = ("crash", "hang", "memory")
Row = dict[str, Any]


def main() -> int:
    """Check all mutations, print the counts and every fault, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000, help="number of mutated files of all kinds together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=list(SHARES), action="append", help="only these kinds, in equal numbers")
    parser.add_argument("--number", type=int, help="only this mutation of the kinds; it is kept in the folder --keep")
    parser.add_argument("--keep", type=Path, default=Path("mutated"), help="folder for --number")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "mutated_files.json")
    arguments = parser.parse_args()
    kinds = arguments.only or list(SHARES)
    if arguments.number is not None:
        for kind in KINDS:
            if kind.name in kinds:
                print(Mutator(arguments.keep, arguments.seed).check(kind, arguments.number, look_for_needless=True))
        return 0
    counts = {kind: arguments.count // len(kinds) for kind in kinds} if arguments.only else _counts(arguments.count)
    started = time.monotonic()
    rows = checked(counts, arguments.seed, arguments.processes)
    summary = summarised(rows, arguments.seed)
    for row in rows:
        if row["result"] in (*FAULTS, *_HARNESS_FAULTS):
            print(f"{row['kind']} {row['number']}: {row['result']}: {row['start']}: {row['mutation']}: {row['said']}")
    print(markdown(summary))
    print(f"{len(rows)} files in {time.monotonic() - started:.0f} s")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return int(any(summary["faults"].values()))


def _counts(count: int) -> dict[str, int]:
    counts = {kind: count * share // 100 for kind, share in SHARES.items()}
    return {**counts, "DICOM": counts["DICOM"] + count - sum(counts.values())}


def checked(counts: Mapping[str, int], seed: int, processes: int) -> list[Row]:
    """Return the verdict, time and memory of mutations 0 to n - 1 of each kind."""
    waiting: queue.SimpleQueue[tuple[str, int]] = queue.SimpleQueue()
    for kind, count in counts.items():
        for number in range(count):
            waiting.put((kind, number))
    rows: list[Row] = []
    threads = [threading.Thread(target=_drive, args=(waiting, seed, rows)) for _ in range(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    order = list(counts)
    return sorted(rows, key=lambda row: (order.index(row["kind"]), row["number"]))


def _drive(waiting: queue.SimpleQueue[tuple[str, int]], seed: int, rows: list[Row]) -> None:
    """Give mutations to a process of its own, one by one; start another process after a crash or a hang."""
    with tempfile.TemporaryDirectory() as folder:
        worker = _Worker(Path(folder), seed)
        while not waiting.empty():
            try:
                kind, number = waiting.get_nowait()
            except queue.Empty:
                break
            row: Row = {"kind": kind, "number": number, **worker.check(kind, number)}
            if row["result"] not in FAULTS and row.get("peak_bytes", 0) > MEMORY_BYTES:
                row["result"] = "memory"
            rows.append(row)
            if not worker.alive:
                worker = _Worker(Path(tempfile.mkdtemp(dir=folder)), seed)
        worker.close()


class _Worker:
    """A process that checks mutations."""

    def __init__(self, folder: Path, seed: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_work, args=(other, folder, seed), daemon=True)
        self._process.start()
        other.close()
        self._connection.recv()  # the imports are done

    @property
    def alive(self) -> bool:
        """Whether the process can check another mutation."""
        return self._process.is_alive()

    def check(self, kind: str, number: int) -> Row:
        """Return the verdict on a mutation; ``crash`` or ``hang`` if the toolkit did not end to read the file."""
        self._connection.send((kind, number))
        read = self._answer()
        if "result" in read:
            return read
        compared = self._answer()
        if compared["result"] in ("crash", "hang"):  # of another reader
            result = "refused" if read["refused"] else "unconfirmed"
            compared = {**compared, "result": result, "said": f"another reader: {compared['said']}"}
        return {**read, **compared}

    def _answer(self) -> Row:
        nothing = {"mutation": "", "start": ""}
        try:
            if self._connection.poll(SECONDS):
                found: Row = self._connection.recv()
                return found
        except (EOFError, ConnectionResetError):
            self._process.join()
            return {**nothing, "result": "crash", "said": f"exit code {self._process.exitcode}"}
        self.close()
        return {**nothing, "result": "hang", "said": f"more than {SECONDS:g} s"}

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()


def _work(connection: Connection, folder: Path, seed: int) -> None:
    """Check the mutations that arrive, in a process whose memory is limited."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # independent readers write about damaged files there
    mutator, kinds = Mutator(folder, seed), {kind.name: kind for kind in KINDS}
    for kind in KINDS:
        mutator.check(kind, 0)  # what is imported and allocated once
    size = _status("VmSize") + 2 * MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    connection.send(None)
    while True:
        name, number = connection.recv()
        mutator.around_reading = _Measured(connection)
        verdict: Verdict = mutator.check(kinds[name], number, look_for_needless=True)
        connection.send(vars(verdict))


class _Measured:
    """Context that sends the time and the peak of the memory of what happens in it."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def __call__(self) -> _Measured:
        return self

    def __enter__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts again
        self._before, self._started = _status("VmRSS"), time.monotonic()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._connection.send(
            {
                "refused": kind is not None,
                "seconds": round(time.monotonic() - self._started, 3),
                "peak_bytes": max(0, _status("VmHWM") - self._before),
            }
        )


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{key}:"))


def summarised(rows: Sequence[Row], seed: int) -> Row:
    """Return the counts of each kind, the faults, and the most frequent refusals of files that another reader reads."""
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    counts: dict[str, dict[str, float]] = {}
    for kind in kinds:
        mine = [row for row in rows if row["kind"] == kind]
        found = Counter(row["result"] for row in mine)
        counts[kind] = {
            "mutated": len(mine),
            "refused": found["refused"] + found["needless"],
            "refused_but_read_by_another_reader": found["needless"],
            "accepted": found["agreed"] + found["unconfirmed"] + found["accepted"],
            "accepted_and_agrees_with_another_reader": found["agreed"],
            "accepted_and_read_by_no_other_reader": found["unconfirmed"] + found["accepted"],
            "wrong_geometry_or_values": found["wrong"],
            "part_of_a_series_without_a_word": found["part"],
            "tracebacks": found["traceback"],
            "crashes": found["crash"],
            "beyond_time_or_memory": found["hang"] + found["memory"],
            "warnings_of_libraries": found["warning"],
            "messages_with_the_name_of_the_patient": found["private"],
            "longest_seconds": max((row.get("seconds", SECONDS) for row in mine), default=0.0),
            "largest_peak_mib": max((row.get("peak_bytes", 0) >> 20 for row in mine), default=0),
        }
    results = Counter(row["result"] for row in rows)
    needless = Counter((row["kind"], _without_numbers(row["said"])) for row in rows if row["result"] == "needless")
    return {
        "schema_version": 1,
        "seed": seed,
        "mutated": len(rows),
        "limits": {"seconds": SECONDS, "memory_mib": MEMORY_BYTES >> 20},
        "readers": {name: version(name) for name in ("SimpleITK", "nibabel", "pydicom")},
        "faults": {name: results[name] for name in (*FAULTS, *_HARNESS_FAULTS)},
        "kinds": counts,
        "refusals_of_files_that_another_reader_reads": [
            {"kind": kind, "message": message, "count": count} for (kind, message), count in needless.most_common(25)
        ],
    }


def _without_numbers(text: str) -> str:
    words = (" ".join(text.split(". ")[:1])).split()
    return " ".join("N" if any(character.isdigit() for character in word) else word for word in words)[:160]


def markdown(summary: Row) -> str:
    """Return the counts as a table."""
    columns = {
        "mutated": "mutated",
        "refused": "refused",
        "refused_but_read_by_another_reader": "of them read elsewhere",
        "accepted": "accepted",
        "accepted_and_agrees_with_another_reader": "of them confirmed",
        "wrong_geometry_or_values": "wrong",
        "part_of_a_series_without_a_word": "part",
        "tracebacks": "tracebacks",
        "crashes": "crashes",
        "beyond_time_or_memory": "time or memory",
        "longest_seconds": "longest s",
        "largest_peak_mib": "peak MiB",
    }
    lines = [f"| kind | {' | '.join(columns.values())} |", f"|---|{'---|' * len(columns)}"]
    for kind, counts in summary["kinds"].items():
        lines.append(f"| {kind} | {' | '.join(f'{counts[column]:g}' for column in columns)} |")
    needless = [
        f"{row['count']} x {row['kind']}: {row['message']}"
        for row in summary["refusals_of_files_that_another_reader_reads"]
    ]
    return "\n".join([*lines, "", "Refused, but read by another reader:", *needless])


if __name__ == "__main__":
    raise SystemExit(main())
