"""One measurement in a process of its own: what is asked, what is answered, and the process.

A fresh process gives every measurement its own peak memory and its own warm-up, and takes everything an engine holds
with it. Questions and answers travel as JSON over stdin and stdout.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Final, Literal, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from fseft_edge.runtime import errors
from fseft_edge.runtime.encoder.bundle import Precision
from fseft_edge.runtime.errors import EnvironmentProblemError, FseftEdgeError, OutOfMemoryError

_WORKER: Final = "fseft_edge.machine.speed_worker"


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class EncoderJob(_Message):
    """Encode the same ``batch`` windows ``repeats`` times."""

    kind: Literal["encoder"] = "encoder"
    encoder: Path
    backend: str
    precision: Precision
    device: str
    batch: int
    repeats: int


class ScanJob(_Message):
    """Take a scan from its file to its features; with an adapter, to its mask."""

    kind: Literal["scan"] = "scan"
    encoder: Path
    backend: str
    precision: Precision
    device: str
    scan: Path
    adapter: Path | None


class CeilingJob(_Message):
    """Multiply large matrices of a precision."""

    kind: Literal["ceiling"] = "ceiling"
    device: str
    precision: Precision


Job: TypeAlias = EncoderJob | ScanJob | CeilingJob
_JOB: Final[TypeAdapter[Job]] = TypeAdapter(Annotated[Job, Field(discriminator="kind")])


class Peaks(_Message):
    """The most memory that the process held.

    Attributes:
        ram_bytes: resident.
        vram_bytes: of the GPU, by PyTorch's allocator; None on a CPU. What other engines allocate is not in it.
    """

    ram_bytes: int
    vram_bytes: int | None


class EncoderSample(_Message):
    """What encoding took.

    Attributes:
        open_seconds: opening the session.
        first_seconds: the first batch, in which engines allocate and tune themselves.
        seconds: every later batch.
    """

    open_seconds: float
    first_seconds: float
    seconds: tuple[float, ...]
    peaks: Peaks


class ScanSample(_Message):
    """What a scan took, opening the encoder apart.

    Attributes:
        stages: seconds of each, in the order of the work.
    """

    open_seconds: float
    stages: dict[str, float]
    peaks: Peaks


class CeilingSample(_Message):
    """Floating-point operations a second of the matrix product."""

    flop_a_second: float


class Failed(_Message):
    """An error that has a remedy."""

    error: str
    message: str
    remedy: str


def read_job(text: str) -> Job:
    """Return the job that a process was given."""
    return _JOB.validate_json(text)


Sample = TypeVar("Sample", EncoderSample, ScanSample, CeilingSample)


def in_a_process(job: Job, answer: type[Sample]) -> Sample:
    """Return a measurement that a fresh process made.

    Raises:
        FseftEdgeError: what went wrong there, as the same class.
        OutOfMemoryError: the system killed the process.
        EnvironmentProblemError: the process ended in another way.
    """
    # Features derive from the scan: the folder that they lie in goes with this process, however the other one ends.
    with tempfile.TemporaryDirectory(prefix="fseft-edge-") as folder:
        environment = {**os.environ, "TMPDIR": folder}
        if isinstance(job, ScanJob) and job.device != "cpu":
            environment["CUDA_LAUNCH_BLOCKING"] = "1"  # else work is booked where the CPU waits for it
        done = subprocess.run(  # noqa: S603 - this package's own module
            [sys.executable, "-m", _WORKER],
            input=job.model_dump_json(),
            capture_output=True,
            text=True,
            check=False,
            env=environment,
        )
    last = done.stdout.strip().rpartition("\n")[2]
    if done.returncode == 0:
        return answer.model_validate_json(last)
    if last.startswith("{"):
        raise _as_raised(Failed.model_validate_json(last))
    if done.returncode == -signal.SIGKILL:
        raise OutOfMemoryError(
            "The system killed a measurement, most likely for its memory.", remedy="Close other programs, and repeat."
        )
    said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
    raise EnvironmentProblemError(
        f"A measurement ended with exit code {done.returncode}: {said}.",
        remedy="Measure another backend, or see what `fseft-edge doctor` says of this one.",
    )


def _as_raised(failed: Failed) -> FseftEdgeError:
    kind: type[FseftEdgeError] = getattr(errors, failed.error)
    return kind(failed.message, remedy=failed.remedy)
