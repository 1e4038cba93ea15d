"""What a benchmark found."""

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
    """Seconds of repeated measurements: how many, their median, first and third quartile."""

    n: int
    median: float
    low: float
    high: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread:
        """Of at least one measurement; quartiles by linear interpolation."""
        low, median, high = (float(value) for value in np.percentile(seconds, (25, 50, 75)))
        return cls(len(seconds), median, low, high)


@dataclass(frozen=True)
class EncoderSpeed:
    """A backend on windows alone.

    Attributes:
        seconds: a batch, once warm.
        first_seconds: the first batch of a process; the median.
        open_seconds: opening the session; the median.
        windows_a_second: batch over the median.
        share_of_ceiling: of the floating-point operations a second that a matrix product of the same precision reaches
            here; above 1 is possible, where an algorithm needs fewer operations than were counted.
        peak_ram_bytes, peak_vram_bytes: the most of all rounds; of the GPU, what PyTorch allocated.
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
    """A backend on a whole scan, opening the encoder apart.

    Attributes:
        scan: name of the case; `phantom` is the built-in one.
        seconds: from the file to its features; with an adapter, to its mask.
        stages: median seconds of each stage (:data:`fseft_edge.machine.speed_stages.STAGES`).
        open_seconds: opening the encoder; the median.
        peak_ram_bytes, peak_vram_bytes: as above.
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
    """What could not be measured, and why."""

    what: str
    message: str
    remedy: str

    @classmethod
    def of(cls, what: str, error: FseftEdgeError) -> Failure:
        """From what was raised."""
        return cls(what, error.message, error.remedy)


@dataclass(frozen=True)
class SpeedReport:
    """What a benchmark found.

    Attributes:
        version: of fseft-edge.
        versions: of what backends compute with, by distribution.
        encoder_name, encoder_id, window: which encoder.
        flop_a_window: floating-point operations of its plain network.
        device: model of the processor or GPU, and the CPU's threads.
        load_before: average number of processes that wanted the processor in the minute before, per usable core; more
            than a little means that other programs are measured, too.
        ceilings: by precision, floating-point operations a second of a large matrix product on the device.
        rounds: how often every competitor had its turn.
        encoder: backends on windows.
        scans: backends on scans.
        failures: what could not be measured.
        remembered: the file that keeps the order for ``auto``, if that was asked for.
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
        """Everything, for JSON."""
        return {"schema_version": SCHEMA_VERSION, **asdict(self)}

    def to_json(self, path: Path) -> None:
        """Write what :meth:`as_dict` returns.

        Raises:
            OutOfSpaceError: the disk is full or not writable.
        """
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(self.as_dict(), indent=2) + "\n", encoding="utf-8")
