"""The diagnosis of machines, libraries and bundles by `doctor`, with simulated missing parts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch
from doubles.encoder import write_tiny_encoder
from doubles.errors import refused
from doubles.libraries import fake_library
from rich.console import Console

from fseft_edge.machine import doctor
from fseft_edge.machine.doctor import Diagnosis, diagnose
from fseft_edge.machine.doctor_page import diagnosis_tables
from fseft_edge.runtime.encoder import session
from fseft_edge.runtime.encoder.backend_choice import NO_PARITY_REPORT, backend_choices
from fseft_edge.runtime.encoder.bundle import EncoderBundle
from fseft_edge.runtime.errors import EncoderBundleError
from fseft_edge.runtime.system.libraries import BUILT_WITHOUT_CUDA, Library
from fseft_edge.runtime.system.limits import usable_cores
from fseft_edge.runtime.system.machine import Gpu, Machine, this_machine

CPU_BUILD = f"this PyTorch (2.13.0+cpu) {BUILT_WITHOUT_CUDA}"
A4000 = Gpu("NVIDIA RTX A4000", "8.6", 16 << 30, 15 << 30, "nvidia-smi")
READY = {
    name: Library(name, (name,), "1.0", "ready", None, offers)
    for name, offers in {
        "torch": ("CPU build",),
        "onnxruntime": ("CPUExecutionProvider",),
        "openvino": (),
        "tensorrt": (),
        "tensorrt_rtx": (),
    }.items()
}
Simulate = Callable[..., Diagnosis]


@pytest.fixture
def simulate(monkeypatch: pytest.MonkeyPatch) -> Simulate:
    """Return a function that diagnoses a machine with the given libraries, GPUs and driver."""

    def run(
        *libraries: Library, gpus: tuple[Gpu, ...] = (), driver: str | None = None, cuda: str | None = "no GPU"
    ) -> Diagnosis:
        found = {**READY, **{library.module: library for library in libraries}}
        machine: Machine = replace(this_machine(), gpus=gpus, driver=driver)
        monkeypatch.setattr(doctor, "this_machine", lambda: machine)
        monkeypatch.setattr(doctor, "library", found.__getitem__)
        monkeypatch.setattr(doctor, "cuda_problem", lambda: cuda)
        return diagnose()

    return run


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> EncoderBundle:
    folder = tmp_path_factory.mktemp("doctor")
    (folder / "graph.onnx").touch()
    return write_tiny_encoder(folder / "tiny.encoder", graph=folder / "graph.onnx")


def shown(diagnosis: Diagnosis, width: int = 100) -> str:
    console = Console(file=StringIO(), width=width)
    for table in diagnosis_tables(diagnosis):
        console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined]  # the StringIO above


def run_doctor(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a new process."""
    return subprocess.run(  # noqa: S603 - arguments from the tests
        [sys.executable, "-c", "from fseft_edge.cli.main import main; main()", "doctor", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, **environment},
    )


def test_a_complete_machine_gets_no_advice(simulate: Simulate) -> None:
    assert simulate().advice == ()


def test_a_pytorch_without_cuda_on_a_machine_with_a_driver_is_a_problem(simulate: Simulate) -> None:
    diagnosis = simulate(driver="550.54.14", gpus=(A4000,), cuda=CPU_BUILD)
    first, second = diagnosis.advice
    assert "550.54.14" in first.problem
    assert CPU_BUILD in first.problem
    assert first.remedy.startswith("pip uninstall torch; pip install torch")
    assert "onnxruntime" in second.problem
    assert second.remedy == "pip uninstall onnxruntime; pip install 'fseft-edge[gpu]'"
    assert "compute capability 8.6, 15.0 GiB of 16.0 GiB free" in " ".join(shown(diagnosis, 160).split())


def test_a_driver_that_is_too_old_has_to_be_updated(simulate: Simulate) -> None:
    cuda = "PyTorch (2.13.0) cannot start CUDA: the driver is too old"
    (advice, *_) = simulate(driver="470.1", gpus=(A4000,), cuda=cuda).advice
    assert cuda in advice.problem
    assert "driver" in advice.remedy
    assert "pip" not in advice.remedy


def test_a_machine_without_a_gpu_needs_no_driver(simulate: Simulate) -> None:
    assert simulate(cuda=CPU_BUILD).advice == ()


@pytest.mark.parametrize(
    ("driver", "command"), [(None, "pip install 'fseft-edge[cpu]'"), ("550.1", "pip install 'fseft-edge[gpu]'")]
)
def test_the_advice_for_a_missing_backend_is_the_command_that_installs_it(
    simulate: Simulate, driver: str | None, command: str
) -> None:
    missing = Library("onnxruntime", (), None, "missing", "not installed")
    diagnosis = simulate(missing, driver=driver, cuda=None)
    (advice,) = diagnosis.advice
    assert "onnxruntime" in advice.problem
    assert advice.remedy == command
    assert command in shown(diagnosis)


def test_the_advice_for_a_broken_backend_contains_the_reason(simulate: Simulate) -> None:
    broken = Library("onnxruntime", ("onnxruntime",), "1.31.1", "broken", "libonnx.so: not there")
    (advice,) = simulate(broken).advice
    assert "onnxruntime" in advice.problem
    assert "libonnx.so: not there" in advice.problem


def test_two_wheels_of_onnxruntime_are_a_problem(simulate: Simulate) -> None:
    both = Library("onnxruntime", ("onnxruntime", "onnxruntime-gpu"), "1.22", "ready", None, ("CPUExecutionProvider",))
    (advice,) = simulate(both).advice
    assert "onnxruntime and onnxruntime-gpu" in advice.problem
    assert advice.remedy == "pip uninstall onnxruntime onnxruntime-gpu; pip install 'fseft-edge[cpu]'"


def test_every_backend_of_this_version_can_be_advised(simulate: Simulate, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = [Library(name, (), None, "missing", "not installed") for name in ("openvino", "tensorrt_rtx")]
    assert [advice.remedy for advice in simulate(*absent).advice] == ["pip install 'fseft-edge[openvino]'"]
    monkeypatch.setitem(session._OPENERS, "tensorrt_rtx", None)
    assert [advice.remedy for advice in simulate(*absent).advice] == ["pip install 'fseft-edge[openvino]'"]
    with_gpu = simulate(*absent, driver="550.1", cuda=None).advice
    assert "tensorrt_rtx" in with_gpu[-1].problem
    assert with_gpu[-1].remedy == "pip install 'fseft-edge[rtx]'"


def test_the_backends_of_a_bundle_are_those_of_auto(bundle: EncoderBundle) -> None:
    (encoder,) = diagnose([bundle.path]).encoders
    choices = list(backend_choices(bundle, torch.device("cpu")))
    on_cpu = [row for row in encoder.backends if row.device == "cpu"]
    assert [(row.backend, row.precision, row.reason) for row in on_cpu] == [
        (choice.backend, choice.precision, choice.obstacle) for choice in choices
    ]
    assert [row.backend for row in on_cpu if row.chosen] == ["torch"]
    (other,) = (row for row in on_cpu if row.backend == "onnxruntime")
    assert other.reason == NO_PARITY_REPORT
    assert "onnxruntime" in str(other.remedy)


def test_a_bundle_without_a_graph_has_to_be_exported_again(tmp_path: Path) -> None:
    plain = write_tiny_encoder(tmp_path / "plain.encoder")
    (encoder,) = diagnose([plain.path]).encoders
    (row,) = (row for row in encoder.backends if row.backend == "onnxruntime" and row.device == "cpu")
    assert "ONNX graph" in str(row.remedy)


def test_a_broken_library_of_a_bundle_has_an_install_command_as_remedy(
    bundle: EncoderBundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_library(monkeypatch, tmp_path, "onnxruntime", "raise ImportError('libonnx.so: not there')")
    (encoder,) = diagnose([bundle.path]).encoders
    row = next(row for row in encoder.backends if row.backend == "onnxruntime")
    assert row.reason == "broken: libonnx.so: not there"
    assert str(row.remedy).startswith("pip install 'fseft-edge[")


def test_a_bundle_without_read_permission_is_an_input_error(
    bundle: EncoderBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deny(path: Path) -> EncoderBundle:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(EncoderBundle, "open", deny)
    with refused(EncoderBundleError, bundle.path, "Permission denied") as caught:
        diagnose([bundle.path])
    assert caught.value.exit_code == 3


def test_the_output_fits_100_columns(bundle: EncoderBundle) -> None:
    text = shown(diagnose([bundle.path]))
    assert max(map(len, text.splitlines())) <= 100
    assert "yes, used by auto" in text


def test_json_contains_all_fields_and_nothing_else_is_printed(bundle: EncoderBundle) -> None:
    done = run_doctor(bundle.path, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found["schema_version"] == 1
    assert set(found) == {
        *("schema_version", "version", "machine", "libraries", "cuda_problem", "encoders", "advice"),
    }
    assert found["machine"]["cpu"]["usable_cores"] == usable_cores()
    assert found["libraries"][0]["version"] == torch.__version__
    assert found["encoders"][0]["encoder_id"] == bundle.encoder_id


def test_doctor_works_with_a_broken_pytorch(bundle: EncoderBundle, tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise OSError('libtorch_cpu.so: cannot open shared object file')")
    done = run_doctor(bundle.path, PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    assert "libtorch_cpu.so: cannot open shared object file" in done.stdout
    assert "pip uninstall torch; pip install torch" in done.stdout


@pytest.mark.parametrize(("arguments", "code"), [(["--colour"], 2), ([Path(__file__).parent], 3)])
def test_usage_errors_and_unreadable_bundles_have_their_exit_codes(arguments: list[object], code: int) -> None:
    done = run_doctor(*arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert "Traceback" not in done.stderr


def test_monai_is_not_imported(bundle: EncoderBundle) -> None:
    script = (
        "import sys; from pathlib import Path; import fseft_edge; "
        "fseft_edge.diagnose([Path(sys.argv[1])]); print('monai' in sys.modules)"
    )
    done = subprocess.run(  # noqa: S603 - a fixed script
        [sys.executable, "-c", script, str(bundle.path)], capture_output=True, text=True, timeout=300, check=True
    )
    assert done.stdout == "False\n"
