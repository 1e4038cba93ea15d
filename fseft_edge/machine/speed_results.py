"""Results of a benchmark."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import numpy as np

from fseft_edge.runtime.errors import FseftEdgeError
from fseft_edge.runtime.system.atomic import atomic_path
from fseft_edge.runtime.system.machine import Machine

SCHEMA_VERSION: Final = 1


@dataclass(frozen=True)
class Spread:
    """Repeated measurements in seconds: number, median, first quartile (low) and third quartile (high)."""

    n: int
    median: float
    low: float
    high: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread:
        """Return the spread of at least one measurement; quartiles use linear interpolation."""
        low, median, high = (float(value) for value in np.percentile(seconds, (25, 50, 75)))
        return cls(len(seconds), median, low, high)


@dataclass(frozen=True)
class EncoderSpeed:
    """Speed and memory of a backend that encodes windows.

    Attributes:
        backend: name of the backend.
        precision: precision of the computation.
        batch: number of windows in a batch.
        seconds: times of a batch after the first one.
        first_seconds: median time of the first batch of a process.
        open_seconds: median time to open the session.
        windows_a_second: ``batch`` divided by the median time of a batch.
        share_of_ceiling: floating-point operations per second, relative to a large matrix product in the same precision
            on this device. The value can be above 1 if an algorithm needs fewer operations than were counted.
        peak_ram_bytes, peak_vram_bytes: largest peak of all rounds; on a GPU, the memory that PyTorch allocated.
    """

    backend: str
    precision: str
    batch: int
    seconds: Spread
    first_seconds: float
    open_seconds: float
    windows_a_second: float
    share_of_ceiling: float
    peak_ram_bytes: int
    peak_vram_bytes: int | None


@dataclass(frozen=True)
class ScanSpeed:
    """Speed and memory of a backend for a whole scan.

    Attributes:
        backend: name of the backend.
        precision: precision of the computation.
        scan: name of the case; `phantom` is the built-in phantom.
        seconds: times from the scan file to the feature map, or with an adapter to the mask file, without
            ``open_seconds``.
        stages: median seconds of each stage (:data:`fseft_edge.machine.speed_stages.STAGES`).
        open_seconds: median time to open the encoder.
        peak_ram_bytes, peak_vram_bytes: largest peak of all rounds; on a GPU, the memory that PyTorch allocated.
    """

    backend: str
    precision: str
    scan: str
    seconds: Spread
    stages: dict[str, float]
    open_seconds: float
    peak_ram_bytes: int
    peak_vram_bytes: int | None


@dataclass(frozen=True)
class Failure:
    """A measurement that failed, with the message and remedy of its error."""

    what: str
    message: str
    remedy: str

    @classmethod
    def of(cls, what: str, error: FseftEdgeError) -> Failure:
        """Return the failure for an error."""
        return cls(what, error.message, error.remedy)


@dataclass(frozen=True)
class SpeedReport:
    """Results of a benchmark.

    Attributes:
        version: version of fseft-edge.
        machine: hardware and operating system.
        versions: versions of the libraries of the backends, by distribution name.
        encoder_name, encoder_id, window: name, id and window size of the encoder.
        flop_a_window: floating-point operations of the plain network for one window.
        device: model of the processor or GPU, and the number of CPU threads.
        load_before: average number of processes that used or waited for the processor in the minute before the
            benchmark, per usable core. A large value means that other programs influenced the measurement.
        ceilings: floating-point operations per second of a large matrix product on the device, by precision.
        rounds: number of measurements of every backend.
        encoder: results for windows.
        scans: results for scans.
        failures: measurements that failed.
        remembered: file in which the order of backends for ``auto`` was stored; None if it was not stored.
    """

    version: str
    machine: Machine
    versions: dict[str, str]
    encoder_name: str
    encoder_id: str
    window: tuple[int, int, int]
    flop_a_window: int
    device: str
    load_before: float
    ceilings: dict[str, float]
    rounds: int
    encoder: tuple[EncoderSpeed, ...]
    scans: tuple[ScanSpeed, ...]
    failures: tuple[Failure, ...]
    remembered: str | None

    def as_dict(self) -> dict[str, object]:
        """Return all fields and the schema version, ready for JSON."""
        return {"schema_version": SCHEMA_VERSION, **asdict(self)}

    def to_json(self, path: Path) -> None:
        """Write the result of :meth:`as_dict` to a file.

        Raises:
            OutOfSpaceError: the disk is full or not writable.
        """
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(self.as_dict(), indent=2) + "\n", encoding="utf-8")
