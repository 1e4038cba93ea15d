"""Measure speed and memory of backends: the Python function behind ``fseft-edge benchmark``."""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeAlias

import torch

from fseft_edge._version import __version__
from fseft_edge.adapters.file import read_adapter
from fseft_edge.export.built_in import open_encoder
from fseft_edge.machine.arithmetic import flop_of
from fseft_edge.machine.speed_jobs import (
    CeilingJob,
    CeilingSample,
    EncoderJob,
    EncoderSample,
    Peaks,
    ScanJob,
    ScanSample,
    measure_in_process,
)
from fseft_edge.machine.speed_results import EncoderSpeed, Failure, ScanSpeed, SpeedReport, Spread
from fseft_edge.phantom import phantom
from fseft_edge.runtime.encoder import remembered_speed
from fseft_edge.runtime.encoder.backend_choice import backend_choices
from fseft_edge.runtime.encoder.bundle import EncoderBundle, Precision
from fseft_edge.runtime.encoder.session import backend_names, resolve_device
from fseft_edge.runtime.errors import EnvironmentProblemError, UsageError
from fseft_edge.runtime.scans.nifti import case_name, list_cases, write_ct
from fseft_edge.runtime.system.atomic import check_writable
from fseft_edge.runtime.system.libraries import installed_versions
from fseft_edge.runtime.system.machine import this_machine
from fseft_edge.runtime.system.progress import Progress, ProgressTask, SilentProgress

BATCHES: Final = (1, 2)
ROUNDS: Final = 3

_REPEATS = 3

Configuration: TypeAlias = tuple[str, Precision]
"""A backend and its precision."""
_PHANTOM_SEED = 0


def benchmark(
    encoder: str | Path,
    *,
    scans: Sequence[str | Path] = (),
    adapter: str | Path | None = None,
    backends: Sequence[str] = (),
    device: str = "auto",
    rounds: int = ROUNDS,
    remember: bool = False,
    progress: Progress | None = None,
) -> SpeedReport:
    """Measure speed and memory of an encoder on this machine.

    Every measurement runs in a new process. Every round measures each configuration (backend and precision) once, so
    that the load from other programs affects all configurations equally.

    Args:
        encoder: encoder bundle.
        scans: CTs (NIfTI) and folders of CTs; empty means a built-in phantom.
        adapter: adapter with which the scans are segmented; None means that only their feature maps are computed.
        backends: backends to measure, each in every precision that ``auto`` may use, or else in float32; empty means
            all configurations that ``auto`` may use on the device.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:n``.
        rounds: number of rounds.
        remember: store the order of the backends on this machine for ``auto``
            (:mod:`fseft_edge.runtime.encoder.remembered_speed`).
        progress: display of the progress; None shows nothing.

    Returns:
        Results of the benchmark. They include the measurements that the environment did not allow.

    Raises:
        UsageError: a device or backend is unknown.
        InputError: bundle, adapter or scan is not usable.
        EnvironmentProblemError: the device does not exist, no measurement of windows succeeded, or the order cannot be
            stored.
    """
    machine = this_machine()
    load_before = os.getloadavg()[0] / machine.cpu.usable_cores
    bundle = open_encoder(encoder)
    target = resolve_device(device)
    configurations = _configurations(bundle, target, backends)
    if remember:
        check_writable(remembered_speed.speeds_file())
    adapter = None if adapter is None else Path(adapter)
    if adapter is not None:
        read_adapter(adapter).check_encoder(bundle, path=adapter)
    flop = flop_of(bundle.network(), bundle.window)
    with ExitStack() as stack:
        paths = [path for scan in scans for path in list_cases(Path(scan))]
        if not paths:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="fseft-edge-"))
            paths = [Path(folder) / "phantom.nii.gz"]
            write_ct(paths[0], phantom(_PHANTOM_SEED).volume)
        plan = _Plan(bundle, str(target), configurations, tuple(paths), adapter)
        total = rounds * len(configurations) * (len(BATCHES) + len(paths)) + rounds
        task = stack.enter_context((progress or SilentProgress()).task(f"measure {bundle.manifest.name}", total))
        samples = _Samples()
        for _ in range(rounds):
            _one_round(plan, samples, task)
    if not samples.encoder:
        first = samples.failures[0]
        raise EnvironmentProblemError(first.message, remedy=first.remedy)
    ceilings = {precision: max(found) for precision, found in samples.ceilings.items()}
    speeds = tuple(_encoder_speeds(samples, flop, ceilings))
    scan_speeds = tuple(_scan_speeds(samples))
    seconds = _seconds_a_window(speeds)
    if bundle.whole_scan is not None:
        seconds = _seconds_for_scans(scan_speeds, len(paths)) or seconds
    file = remembered_speed.remember(bundle, target, seconds) if remember else None
    return SpeedReport(
        version=__version__,
        machine=machine,
        versions=installed_versions(),
        encoder_name=bundle.manifest.name,
        encoder_id=bundle.encoder_id,
        window=bundle.window,
        flop_a_window=flop,
        device=remembered_speed.device_name(target),
        load_before=load_before,
        ceilings=ceilings,
        rounds=rounds,
        encoder=speeds,
        scans=scan_speeds,
        failures=tuple(samples.failures),
        remembered=str(file) if file else None,
    )


@dataclass(frozen=True)
class _Plan:
    bundle: EncoderBundle
    device: str
    configurations: tuple[Configuration, ...]
    scans: tuple[Path, ...]
    adapter: Path | None


@dataclass
class _Samples:
    """The measurements so far. A configuration that failed is not measured again."""

    encoder: dict[tuple[Configuration, int], list[EncoderSample]] = field(default_factory=dict)
    scans: dict[tuple[Configuration, Path], list[ScanSample]] = field(default_factory=dict)
    ceilings: dict[str, list[float]] = field(default_factory=dict)
    failed: set[tuple[Configuration, object]] = field(default_factory=set)
    failures: list[Failure] = field(default_factory=list)

    def has_encoded(self, configuration: Configuration) -> bool:
        """Whether the configuration has encoded any windows."""
        return any(measured == configuration for measured, _ in self.encoder)

    def fail(self, measurement: tuple[Configuration, object], what: str, error: EnvironmentProblemError) -> None:
        """Record that a measurement failed."""
        self.failed.add(measurement)
        self.failures.append(Failure.of(what, error))


def _configurations(bundle: EncoderBundle, device: torch.device, wanted: Sequence[str]) -> tuple[Configuration, ...]:
    unknown = [name for name in wanted if name not in backend_names()]
    if unknown:
        raise UsageError(
            f"The backend {unknown[0]!r} is unknown.", remedy=f"Choose from: {', '.join(backend_names())}."
        )
    usable = [choice for choice in backend_choices(bundle, device) if choice.usable]
    automatic: list[Configuration] = [(choice.backend, choice.precision) for choice in usable]
    if not wanted:
        return tuple(automatic)
    named: list[Configuration] = []
    for name in wanted:
        named += [configuration for configuration in automatic if configuration[0] == name] or [(name, "float32")]
    return tuple(dict.fromkeys(named))


def _one_round(plan: _Plan, samples: _Samples, task: ProgressTask) -> None:
    for batch in BATCHES:
        for configuration in plan.configurations:
            if (configuration, batch) not in samples.failed:
                _measure_windows(plan, samples, configuration, batch)
            task.advance()
    for precision in dict.fromkeys(precision for (_, precision), _ in samples.encoder):
        job = CeilingJob(device=plan.device, precision=precision)
        samples.ceilings.setdefault(precision, []).append(measure_in_process(job, CeilingSample).flop_a_second)
    task.advance()
    for scan in plan.scans:
        for configuration in plan.configurations:
            if (configuration, scan) not in samples.failed and samples.has_encoded(configuration):
                _measure_scan(plan, samples, configuration, scan)
            task.advance()


def _measure_windows(plan: _Plan, samples: _Samples, configuration: Configuration, batch: int) -> None:
    job = EncoderJob(
        encoder=plan.bundle.path,
        backend=configuration[0],
        precision=configuration[1],
        device=plan.device,
        batch=batch,
        repeats=_REPEATS,
    )
    try:
        sample = measure_in_process(job, EncoderSample)
    except EnvironmentProblemError as error:
        samples.fail((configuration, batch), f"{' '.join(configuration)}, batch of {batch}", error)
        return
    samples.encoder.setdefault((configuration, batch), []).append(sample)


def _measure_scan(plan: _Plan, samples: _Samples, configuration: Configuration, scan: Path) -> None:
    job = ScanJob(
        encoder=plan.bundle.path,
        backend=configuration[0],
        precision=configuration[1],
        device=plan.device,
        scan=scan,
        adapter=plan.adapter,
    )
    try:
        sample = measure_in_process(job, ScanSample)
    except EnvironmentProblemError as error:
        samples.fail((configuration, scan), f"{' '.join(configuration)}, {case_name(scan)}", error)
        return
    samples.scans.setdefault((configuration, scan), []).append(sample)


def _encoder_speeds(samples: _Samples, flop: int, ceilings: dict[str, float]) -> Iterator[EncoderSpeed]:
    for ((backend, precision), batch), turns in samples.encoder.items():
        seconds = Spread.of([value for turn in turns for value in turn.seconds])
        rate = batch / seconds.median
        yield EncoderSpeed(
            backend=backend,
            precision=precision,
            batch=batch,
            seconds=seconds,
            first_seconds=statistics.median(turn.first_seconds for turn in turns),
            open_seconds=statistics.median(turn.open_seconds for turn in turns),
            windows_a_second=rate,
            share_of_ceiling=rate * flop / ceilings[precision],
            peak_ram_bytes=_largest_ram(turn.peaks for turn in turns),
            peak_vram_bytes=_largest_vram(turn.peaks for turn in turns),
        )


def _scan_speeds(samples: _Samples) -> Iterator[ScanSpeed]:
    for ((backend, precision), scan), turns in samples.scans.items():
        stages = dict.fromkeys(stage for turn in turns for stage in turn.stages)
        yield ScanSpeed(
            backend=backend,
            precision=precision,
            scan=case_name(scan),
            seconds=Spread.of([sum(turn.stages.values()) for turn in turns]),
            stages={stage: statistics.median(turn.stages.get(stage, 0.0) for turn in turns) for stage in stages},
            open_seconds=statistics.median(turn.open_seconds for turn in turns),
            peak_ram_bytes=_largest_ram(turn.peaks for turn in turns),
            peak_vram_bytes=_largest_vram(turn.peaks for turn in turns),
        )


def _seconds_a_window(speeds: Sequence[EncoderSpeed]) -> dict[tuple[str, str], float]:
    """Return the median seconds per window of each configuration, with its fastest batch size."""
    rates: dict[tuple[str, str], float] = {}
    for speed in speeds:
        configuration = (speed.backend, speed.precision)
        rates[configuration] = max(speed.windows_a_second, rates.get(configuration, 0.0))
    return {configuration: 1 / rate for configuration, rate in rates.items()}


def _seconds_for_scans(speeds: Sequence[ScanSpeed], scans: int) -> dict[tuple[str, str], float]:
    """Return the median seconds of the stage ``encode``, added for all scans; without configurations that failed."""
    found: dict[tuple[str, str], list[float]] = {}
    for speed in speeds:
        found.setdefault((speed.backend, speed.precision), []).append(speed.stages["encode"])
    return {configuration: sum(seconds) for configuration, seconds in found.items() if len(seconds) == scans}


def _largest_ram(turns: Iterator[Peaks]) -> int:
    return max(peaks.ram_bytes for peaks in turns)


def _largest_vram(turns: Iterator[Peaks]) -> int | None:
    return max((peaks.vram_bytes for peaks in turns if peaks.vram_bytes is not None), default=None)
