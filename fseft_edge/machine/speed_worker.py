"""The measuring process: ``python -m fseft_edge.machine.speed_worker`` reads a job on stdin, answers on stdout."""

from __future__ import annotations

import sys
import time
from functools import partial

import torch
from pydantic import BaseModel

from fseft_edge.machine.arithmetic import matrix_product_ceiling
from fseft_edge.machine.clock import peaks, timed
from fseft_edge.machine.speed_jobs import (
    CeilingSample,
    EncoderJob,
    EncoderSample,
    Failed,
    Job,
    ScanJob,
    ScanSample,
    read_job,
)
from fseft_edge.runtime.encoder.bundle import EncoderBundle
from fseft_edge.runtime.encoder.session import open_session
from fseft_edge.runtime.errors import FseftEdgeError, OutOfMemoryError


def measure(job: Job) -> EncoderSample | ScanSample | CeilingSample:
    """Run the measurement of a job and return its result."""
    device = torch.device(job.device)
    if isinstance(job, EncoderJob):
        return _encoder(job, device)
    if isinstance(job, ScanJob):
        return _scan(job, device)
    return CeilingSample(flop_a_second=matrix_product_ceiling(device, job.precision))


def _encoder(job: EncoderJob, device: torch.device) -> EncoderSample:
    bundle = EncoderBundle.open(job.encoder)
    windows = torch.rand(job.batch, 1, *bundle.window, generator=torch.Generator().manual_seed(0))
    started = time.perf_counter()
    session = open_session(bundle, device=job.device, backend=job.backend, precision=job.precision)
    opening = time.perf_counter() - started
    with session:
        session.max_batch = job.batch
        first, *later = (timed(lambda: session.encode(windows), device) for _ in range(job.repeats + 1))
        return EncoderSample(
            open_seconds=opening,
            first_seconds=first,
            seconds=tuple(later),
            peaks=peaks(device),
        )


def _scan(job: ScanJob, device: torch.device) -> ScanSample:
    from fseft_edge.machine.speed_stages import encoded, segmented, stage_times  # noqa: PLC0415 - keeps its imports out of the memory of encoder jobs

    work = encoded if job.adapter is None else partial(segmented, adapter=job.adapter)
    times = stage_times(
        partial(work, job.scan, encoder=job.encoder, backend=job.backend, precision=job.precision, device=job.device)
    )
    return ScanSample(open_seconds=times.opening, stages=times.stages, peaks=peaks(device))


def main() -> None:
    """Answer the job on stdin. An FseftEdgeError is also written as an answer, with exit code 1."""
    try:
        answer = measure(read_job(sys.stdin.read()))
    except FseftEdgeError as error:
        _answer(Failed(error=type(error).__name__, message=error.message, remedy=error.remedy))
        sys.exit(1)
    except (MemoryError, torch.OutOfMemoryError) as error:
        message = f"The measurement needs more memory than is free: {str(error).partition('.')[0]}."
        _answer(
            Failed(
                error=OutOfMemoryError.__name__,
                message=message,
                remedy="Close other programs, and repeat the benchmark.",
            )
        )
        sys.exit(1)
    _answer(answer)


def _answer(answer: BaseModel) -> None:
    sys.stdout.write(answer.model_dump_json() + "\n")


if __name__ == "__main__":
    main()
