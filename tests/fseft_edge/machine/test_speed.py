"""Measurement of speed and memory: operations, times of stages, order of measurements, and failures."""

from __future__ import annotations

import cProfile
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from doubles.encoder import WINDOW, write_case, write_random_adapter, write_tiny_encoder
from doubles.errors import refused
from rich.console import Console
from torch import nn

import fseft_edge.masks.prediction
from fseft_edge.cli.machine_commands import benchmark as benchmark_command
from fseft_edge.machine import arithmetic
from fseft_edge.machine import speed as runs
from fseft_edge.machine import speed_jobs as jobs
from fseft_edge.machine import speed_stages as stages
from fseft_edge.machine.arithmetic import flop_of, matrix_product_ceiling
from fseft_edge.machine.speed import BATCHES, benchmark
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
from fseft_edge.machine.speed_results import SpeedReport, Spread
from fseft_edge.machine.speed_stages import STAGES, encoded, segmented, stage_times
from fseft_edge.machine.speed_tables import speed_tables
from fseft_edge.masks.decision import Decision
from fseft_edge.runtime.encoder import feature_store
from fseft_edge.runtime.encoder.backends.pytorch import TorchSession
from fseft_edge.runtime.encoder.bundle import EncoderBundle
from fseft_edge.runtime.encoder.networks import rolling
from fseft_edge.runtime.encoder.remembered_speed import remembered_order, speeds_file
from fseft_edge.runtime.errors import (
    EncoderBundleError,
    EnvironmentProblemError,
    MissingBackendError,
    OutOfMemoryError,
    UsageError,
)
from fseft_edge.runtime.scans import nifti
from fseft_edge.runtime.scans.grid import Grid
from fseft_edge.runtime.scans.source_pieces import BackResampler
from fseft_edge.runtime.system.limits import usable_cores

CPU = torch.device("cpu")
NO_VRAM = Peaks(ram_bytes=1 << 30, vram_bytes=None)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> EncoderBundle:
    folder = tmp_path_factory.mktemp("benchmarking")
    bundle = write_tiny_encoder(folder / "tiny.encoder")
    write_random_adapter(folder / "a.adapter", bundle, ("liver", "spleen"))
    write_case(folder, "case_1", 1)
    return bundle


@pytest.fixture
def scan(bundle: EncoderBundle) -> Path:
    return bundle.path.parent / "images" / "case_1.nii.gz"


@pytest.fixture
def adapter(bundle: EncoderBundle) -> Path:
    return bundle.path.parent / "a.adapter"


@pytest.mark.parametrize(
    ("convolution", "multiplications"),
    [
        (nn.Conv3d(1, 8, 3, padding=1), 16 * 12 * 8 * 8 * 27),
        (nn.Conv3d(1, 6, 2, stride=2), 8 * 6 * 4 * 6 * 8),
        (nn.Sequential(nn.Conv3d(1, 4, 1), nn.ReLU(), nn.Conv3d(4, 5, 1)), 16 * 12 * 8 * (4 + 20)),
    ],
)
def test_the_operations_of_convolutions_are_those_of_the_closed_form(
    convolution: nn.Module, multiplications: int
) -> None:
    assert flop_of(convolution, (16, 12, 8)) == 2 * multiplications


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_ceiling_is_the_best_product_in_its_precision(monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    seconds = iter([9.0, 0.5, 0.25, 0.5])
    types = []

    def fake(work: Callable[[], torch.Tensor], device: torch.device) -> float:
        types.append(work().dtype)
        return next(seconds)

    monkeypatch.setattr(arithmetic, "_SIDE", {"cpu": 10})
    monkeypatch.setattr(arithmetic, "timed", fake)
    assert matrix_product_ceiling(CPU, precision) == 2 * 10**3 / 0.25
    assert set(types) == {getattr(torch, precision)}


def test_spread_is_median_and_quartiles() -> None:
    values = [5.0, 1.0, 2.0, 4.0, 8.0, 3.0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    assert Spread.of(values) == Spread(6, median, low, high)
    assert Spread.of([2.0]) == Spread(1, 2.0, 2.0, 2.0)


class VirtualClock:
    """A clock whose time passes only in functions chosen by the test."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        return self.now

    def slow(self, monkeypatch: pytest.MonkeyPatch, owner: object, name: str, ticks: int, calls: list[str]) -> None:
        """Let every call of a function take ``ticks``."""
        original = getattr(owner, name)

        def taking_time(*arguments: object, **options: object) -> object:
            self.now += ticks
            calls.append(name)
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, taking_time)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> VirtualClock:
    clock = VirtualClock()
    make = cProfile.Profile
    monkeypatch.setattr(stages.cProfile, "Profile", lambda: make(clock, 1.0))
    monkeypatch.setattr(stages.time, "perf_counter", lambda: float(clock.now))
    return clock


def test_every_stage_has_the_time_spent_in_it(
    bundle: EncoderBundle, scan: Path, adapter: Path, clock: VirtualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for owner, name, ticks in (
        (nifti, "check_hounsfield", 3),
        (Grid, "_interpolated", 5),
        (TorchSession, "_encode_batch", 7),
        (feature_store, "write_feature_map", 11),
        (fseft_edge.masks.prediction, "predict_block", 13),
        (BackResampler, "_piece", 17),
        (nifti, "_write", 19),
        (Decision, "add", 23),
    ):
        clock.slow(monkeypatch, owner, name, ticks, calls)
    how = {"encoder": bundle.path, "backend": "torch", "precision": "float32", "device": "cpu"}
    times = stage_times(lambda: segmented(scan, adapter=adapter, **how))
    assert times.opening == 0
    assert times.stages == {
        "read": 3,
        "grid": 5 * calls.count("_interpolated"),
        "encode": 7 * calls.count("_encode_batch"),
        "store": 11,
        "adapter": 13 * calls.count("predict_block"),
        "back": 17 * calls.count("_piece"),
        "write": 19,
        "other": 23 * calls.count("add"),
    }
    assert min(map(calls.count, ("_interpolated", "_encode_batch", "predict_block", "_piece", "add"))) > 0


def test_without_an_adapter_the_last_stage_stores_the_features(bundle: EncoderBundle, scan: Path) -> None:
    times = stage_times(lambda: encoded(scan, encoder=bundle.path, backend="torch", precision="float32", device="cpu"))
    assert list(times.stages) == ["read", "grid", "encode", "blend", "store", "other"]
    assert set(times.stages) < set(STAGES)
    assert times.opening > 0


def test_a_whole_scan_has_no_blend_and_its_network_is_the_stage_encode(
    tmp_path: Path, clock: VirtualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = write_tiny_encoder(tmp_path / "tiny.encoder", whole_scan=True)
    image, _ = write_case(tmp_path, "case_1", 1)
    calls: list[str] = []
    for owner, name, ticks in ((Grid, "_interpolated", 5), (rolling._Ring, "planes", 7)):
        clock.slow(monkeypatch, owner, name, ticks, calls)
    how = {"encoder": bundle.path, "backend": "torch", "precision": "float32", "device": "cpu"}
    times = stage_times(lambda: encoded(image, **how))
    assert times.stages == {"grid": 5 * calls.count("_interpolated"), "encode": 7 * calls.count("planes")}


def use_worker(monkeypatch: pytest.MonkeyPatch, folder: Path, source: str) -> None:
    """Let measuring processes run this source instead."""
    (folder / "another_worker.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setattr(jobs, "_WORKER", "another_worker")


CEILING = CeilingJob(device="cpu", precision="float32")


def test_an_error_of_a_measuring_process_keeps_its_class_and_remedy(bundle: EncoderBundle) -> None:
    job = EncoderJob(encoder=bundle.path, backend="onnxruntime", precision="float32", device="cpu", batch=1, repeats=1)
    with refused(EncoderBundleError, bundle.path) as caught:
        measure_in_process(job, EncoderSample)
    assert "--backend torch" in caught.value.remedy


def test_a_process_killed_by_the_system_ran_out_of_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_worker(monkeypatch, tmp_path, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    with refused(OutOfMemoryError):
        measure_in_process(CEILING, CeilingSample)


def test_a_process_that_crashes_is_an_environment_problem(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_worker(monkeypatch, tmp_path, "raise ImportError('libfoo.so: not there')")
    with refused(EnvironmentProblemError, "exit code 1", "ImportError: libfoo.so: not there"):
        measure_in_process(CEILING, CeilingSample)


def test_temporary_files_of_a_killed_process_are_deleted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Feature maps contain patient data, and a killed process cannot delete its files."""
    path_file = tmp_path / "path"
    source = f"""
import os, signal, tempfile
from pathlib import Path
Path({str(path_file)!r}).write_text(tempfile.mkdtemp())
os.kill(os.getpid(), signal.SIGKILL)
"""
    use_worker(monkeypatch, tmp_path, source)
    with refused(OutOfMemoryError):
        measure_in_process(CEILING, CeilingSample)
    assert not Path(path_file.read_text()).exists()


def test_other_output_on_stdout_does_not_change_the_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_worker(monkeypatch, tmp_path, """print('some engine: hello');print('{"flop_a_second": 2.5}')""")
    assert measure_in_process(CEILING, CeilingSample) == CeilingSample(flop_a_second=2.5)


def test_peak_memory_is_that_of_the_measuring_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = """
import torch
from fseft_edge.machine.clock import peaks
before = peaks(torch.device("cpu")).ram_bytes
torch.ones(64 << 20)
print(peaks(torch.device("cpu")).ram_bytes - before, before)
"""
    ballast = np.ones(1 << 27)  # 1 GiB in this process
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)  # noqa: S603 - a fixed script
    grown, before = map(int, done.stdout.split())
    assert before < ballast.nbytes
    assert grown == pytest.approx(256 << 20, rel=0.1)


class FakeProcesses:
    """Replaces the measuring processes with fixed answers."""

    def __init__(self) -> None:
        self.jobs: list[EncoderJob | ScanJob | CeilingJob] = []
        self.failing: dict[tuple[str, int | str], Exception] = {}

    def __call__(
        self, job: EncoderJob | ScanJob | CeilingJob, answer: type
    ) -> EncoderSample | ScanSample | CeilingSample:
        self.jobs.append(job)
        if isinstance(job, CeilingJob):
            return CeilingSample(flop_a_second=1e9 * len(self.jobs))
        failure = self.failing.get((job.backend, job.batch if isinstance(job, EncoderJob) else job.scan.name))
        if failure is not None:
            raise failure
        if isinstance(job, ScanJob):
            encoding = {"torch": 3.0, "onnxruntime": 5.0}[job.backend]
            return ScanSample(open_seconds=1.0, stages={"read": 1.0, "encode": encoding}, peaks=NO_VRAM)
        seconds = {"torch": 2.0, "onnxruntime": 1.0}[job.backend] * job.batch
        return EncoderSample(open_seconds=0.5, first_seconds=9.0, seconds=(seconds,) * 3, peaks=NO_VRAM)

    def turns(self) -> list[tuple[str, int | str]]:
        return [
            (job.backend, job.batch if isinstance(job, EncoderJob) else job.scan.name)
            for job in self.jobs
            if not isinstance(job, CeilingJob)
        ]


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeProcesses]:
    processes = FakeProcesses()
    monkeypatch.setattr(runs, "measure_in_process", processes)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return processes


BOTH = ("torch", "onnxruntime")


def test_every_round_measures_all_configurations_one_after_another(
    bundle: EncoderBundle, scan: Path, processes: FakeProcesses
) -> None:
    benchmark(bundle.path, scans=[scan], backends=BOTH, device="cpu", rounds=2)
    once = [(backend, what) for what in (*BATCHES, scan.name) for backend in BOTH]
    assert processes.turns() == once * 2


def test_the_results_follow_from_the_samples(bundle: EncoderBundle, scan: Path, processes: FakeProcesses) -> None:
    report = benchmark(bundle.path, scans=[scan], backends=BOTH, device="cpu", rounds=2)
    assert report.flop_a_window == flop_of(bundle.network(), WINDOW)
    (first_ceiling, second_ceiling) = (
        1e9 * (number + 1) for number, job in enumerate(processes.jobs) if isinstance(job, CeilingJob)
    )
    assert report.ceilings == {"float32": max(first_ceiling, second_ceiling)}
    row = next(row for row in report.encoder if (row.backend, row.batch) == ("torch", 2))
    assert row.seconds == Spread(6, 4.0, 4.0, 4.0)
    assert (row.first_seconds, row.open_seconds, row.windows_a_second) == (9.0, 0.5, 0.5)
    assert row.share_of_ceiling == pytest.approx(0.5 * report.flop_a_window / second_ceiling)
    (torch_scan, _) = report.scans
    assert (torch_scan.scan, torch_scan.seconds, torch_scan.precision) == (
        "case_1",
        Spread(2, 4.0, 4.0, 4.0),
        "float32",
    )
    assert report.remembered is None
    assert not speeds_file().exists()


def test_a_failed_configuration_is_not_measured_again_and_the_others_are(
    bundle: EncoderBundle, scan: Path, processes: FakeProcesses
) -> None:
    processes.failing[("torch", 2)] = OutOfMemoryError("Out of memory.", remedy="Close programs.")
    processes.failing[("onnxruntime", scan.name)] = MissingBackendError("Not installed.", remedy="Install it.")
    report = benchmark(bundle.path, scans=[scan], backends=BOTH, device="cpu", rounds=3)
    assert processes.turns().count(("torch", 2)) == 1
    assert processes.turns().count(("torch", 1)) == 3
    assert [(failure.what, failure.message) for failure in report.failures] == [
        ("torch float32, batch of 2", "Out of memory."),
        ("onnxruntime float32, case_1", "Not installed."),
    ]
    assert [(row.backend, row.batch) for row in report.encoder] == [
        ("torch", 1),
        ("onnxruntime", 1),
        ("onnxruntime", 2),
    ]
    assert [row.backend for row in report.scans] == ["torch"]


def test_a_backend_that_encodes_no_windows_gets_no_scan(
    bundle: EncoderBundle, scan: Path, processes: FakeProcesses
) -> None:
    for batch in BATCHES:
        processes.failing[("torch", batch)] = MissingBackendError("Not installed.", remedy="Install it.")
    benchmark(bundle.path, scans=[scan], backends=BOTH, device="cpu", rounds=1)
    assert ("torch", scan.name) not in processes.turns()
    for batch in BATCHES:
        processes.failing[("onnxruntime", batch)] = MissingBackendError("Not installed either.", remedy="Install it.")
    with refused(EnvironmentProblemError, "Not installed"):
        benchmark(bundle.path, scans=[scan], backends=BOTH, device="cpu", rounds=1)


def test_an_input_error_stops_the_benchmark(bundle: EncoderBundle, scan: Path, processes: FakeProcesses) -> None:
    processes.failing[("torch", scan.name)] = EncoderBundleError("Damaged.", remedy="Export again.")
    with refused(EncoderBundleError):
        benchmark(bundle.path, scans=[scan], backends=BOTH, device="cpu")


def test_an_unknown_backend_is_a_usage_error(bundle: EncoderBundle, processes: FakeProcesses) -> None:
    with refused(UsageError, "'abacus'"):
        benchmark(bundle.path, backends=["abacus"], device="cpu")
    assert processes.jobs == []


def test_the_default_backends_are_those_of_auto(bundle: EncoderBundle, processes: FakeProcesses) -> None:
    benchmark(bundle.path, device="cpu", rounds=1)
    assert {backend for backend, _ in processes.turns()} == {"torch"}  # the bundle has no graph
    assert [name for _, name in processes.turns()][-1] == "phantom.nii.gz"


def test_the_order_is_stored_on_request(bundle: EncoderBundle, scan: Path, processes: FakeProcesses) -> None:
    report = benchmark(bundle.path, scans=[scan], backends=BOTH, device="cpu", rounds=1, remember=True)
    assert report.remembered == str(speeds_file())
    assert remembered_order(bundle, CPU) == [("onnxruntime", "float32"), ("torch", "float32")]


def test_backends_for_whole_scans_are_remembered_in_the_order_of_their_time_for_the_scans(
    tmp_path: Path, scan: Path, processes: FakeProcesses
) -> None:
    bundle = write_tiny_encoder(tmp_path / "tiny.encoder", whole_scan=True)
    benchmark(bundle.path, scans=[scan], backends=BOTH, device="cpu", rounds=1, remember=True)
    assert remembered_order(bundle, CPU) == [("torch", "float32"), ("onnxruntime", "float32")]
    processes.failing[("torch", scan.name)] = OutOfMemoryError("Out of memory.", remedy="Close programs.")
    benchmark(bundle.path, scans=[scan], backends=BOTH, device="cpu", rounds=1, remember=True)
    assert remembered_order(bundle, CPU) == [("onnxruntime", "float32")]


def test_tables_fit_100_columns(bundle: EncoderBundle, scan: Path, processes: FakeProcesses) -> None:
    report = benchmark(bundle.path, scans=[scan], backends=BOTH, device="cpu", rounds=1)
    text = shown(report)
    assert max(map(len, text.splitlines())) <= 100
    assert "4.00 (4.00–4.00)" in text
    assert "3.00  75%" in text


@pytest.mark.parametrize(("load", "mentioned"), [(0.1, False), (4.0, True)])
def test_the_load_of_a_busy_machine_is_mentioned(
    bundle: EncoderBundle,
    scan: Path,
    processes: FakeProcesses,
    monkeypatch: pytest.MonkeyPatch,
    load: float,
    mentioned: bool,
) -> None:
    cores = usable_cores()
    monkeypatch.setattr(os, "getloadavg", lambda: (load * cores, 9.0, 9.0))
    report = benchmark(bundle.path, scans=[scan], backends=BOTH, device="cpu", rounds=1)
    assert report.load_before == load
    assert (f"load {load:.1f}" in shown(report)) == mentioned


def shown(report: SpeedReport) -> str:
    console = Console(file=StringIO(), width=100)
    for table in speed_tables(report):
        console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined]  # the StringIO above


def test_the_command_measures_a_tiny_encoder(
    bundle: EncoderBundle, scan: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The measuring processes are real."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    arguments = [bundle.path, "--scan", scan, "--adapter", adapter, "--backend", "torch", "--device", "cpu"]
    arguments += ["--rounds", "1", "--json", tmp_path / "speed.json", "--remember"]
    done = CliRunner().invoke(benchmark_command, [*map(str, arguments)])
    assert done.exit_code == 0, done.output
    assert str(tmp_path / "fseft-edge" / "speeds.json") in done.stdout
    report = json.loads((tmp_path / "speed.json").read_text())
    assert report["schema_version"] == 1
    assert set(report) == {"schema_version", *SpeedReport.__dataclass_fields__}
    assert [(row["backend"], row["batch"], row["seconds"]["n"]) for row in report["encoder"]] == [
        ("torch", 1, 3),
        ("torch", 2, 3),
    ]
    (scan_row,) = report["scans"]
    assert list(scan_row["stages"]) == ["read", "grid", "encode", "blend", "store", "adapter", "back", "write", "other"]
    assert scan_row["seconds"]["n"] == 1
    for row in (*report["encoder"], scan_row):
        assert row["peak_ram_bytes"] > 100 << 20  # PyTorch already needs more than this
        assert row["peak_vram_bytes"] is None
    assert report["failures"] == []
