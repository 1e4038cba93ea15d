"""One measurement in a new process: the job, the answer, and the process.

A new process gives every measurement its own peak memory and its own warm-up, and frees everything that an engine
allocated. Jobs and answers are JSON on stdin and stdout.
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
    """Encode the same ``batch`` windows once, then ``repeats`` times more."""

    kind: Literal["encoder"] = "encoder"
    encoder: Path
    backend: str
    precision: Precision
    device: str
    batch: int
    repeats: int


class ScanJob(_Message):
    """Compute the feature map of a scan file; with an adapter, compute the mask."""

    kind: Literal["scan"] = "scan"
    encoder: Path
    backend: str
    precision: Precision
    device: str
    scan: Path
    adapter: Path | None


class CeilingJob(_Message):
    """Multiply large matrices in a precision."""

    kind: Literal["ceiling"] = "ceiling"
    device: str
    precision: Precision


Job: TypeAlias = EncoderJob | ScanJob | CeilingJob
_JOB: Final[TypeAdapter[Job]] = TypeAdapter(Annotated[Job, Field(discriminator="kind")])


class Peaks(_Message):
    """Peak memory of the process.

    Attributes:
        ram_bytes: peak of the resident memory.
        vram_bytes: peak of the GPU memory allocated by PyTorch; None on a CPU. Memory that other engines allocate is
            not included.
    """

    ram_bytes: int
    vram_bytes: int | None


class EncoderSample(_Message):
    """Times and memory of encoding windows.

    Attributes:
        open_seconds: time to open the session.
        first_seconds: time of the first batch, in which engines allocate memory and choose algorithms.
        seconds: times of all later batches.
        peaks: peak memory of the process.
    """

    open_seconds: float
    first_seconds: float
    seconds: tuple[float, ...]
    peaks: Peaks


class ScanSample(_Message):
    """Times and memory of one scan.

    Attributes:
        open_seconds: time to open the encoder; not included in the stages.
        stages: seconds of each stage, in the order of the computation.
        peaks: peak memory of the process.
    """

    open_seconds: float
    stages: dict[str, float]
    peaks: Peaks


class CeilingSample(_Message):
    """Floating-point operations per second of the matrix product."""

    flop_a_second: float


class Failed(_Message):
    """An FseftEdgeError of the measuring process: class name, message and remedy."""

    error: str
    message: str
    remedy: str


def read_job(text: str) -> Job:
    """Return the job from its JSON text."""
    return _JOB.validate_json(text)


Sample = TypeVar("Sample", EncoderSample, ScanSample, CeilingSample)


def measure_in_process(job: Job, answer: type[Sample]) -> Sample:
    """Run a measurement in a new process and return its result.

    Raises:
        FseftEdgeError: the measuring process reported this error; the class is the class of the original error.
        OutOfMemoryError: the operating system killed the process.
        EnvironmentProblemError: the process ended in another way without an answer.
    """
    # Feature maps contain patient data: this process deletes their folder, even if the measuring process is killed.
    with tempfile.TemporaryDirectory(prefix="fseft-edge-") as folder:
        environment = {**os.environ, "TMPDIR": folder}
        if isinstance(job, ScanJob) and job.device != "cpu":
            environment["CUDA_LAUNCH_BLOCKING"] = "1"  # otherwise GPU work counts for the stage in which the CPU waits
        done = subprocess.run(  # noqa: S603 - runs a module of this package
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
        raise _rebuilt_error(Failed.model_validate_json(last))
    if done.returncode == -signal.SIGKILL:
        raise OutOfMemoryError(
            "The operating system killed a measuring process, probably because memory ran out.",
            remedy="Close other programs, and repeat the benchmark.",
        )
    last_line = (done.stderr.strip().splitlines() or ["no error output"])[-1]
    raise EnvironmentProblemError(
        f"A measuring process ended with exit code {done.returncode}: {last_line}.",
        remedy="Measure another backend with --backend, or check this backend with `fseft-edge doctor`.",
    )


def _rebuilt_error(failed: Failed) -> FseftEdgeError:
    kind: type[FseftEdgeError] = getattr(errors, failed.error)
    return kind(failed.message, remedy=failed.remedy)
