"""Test and measure on a machine with an NVIDIA GPU, in at most 12 minutes, without a network: docs/gpu.md.

    benchmarks/gpu_day.sh --output gpu_day --wheels FOLDER

Every part runs in a process of its own with its own time limit, so a part that fails or hangs does not stop the others;
the last lines of its output are in the table. No part starts when the time is up. A part whose packages are missing is
skipped. After every part, `gpu_day.json` and `gpu_day.md` in the output folder are written again.

Wheels of a folder are installed into a temporary folder, each without its dependencies and without any index; the
machine's own packages stay as they are. The package runs from this checkout without being installed. `--device cpu`
runs the parts that need no GPU, each with a longer time limit.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from child_process import Finished, end_with_children, run

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
DATA = ROOT / "fseft_edge" / "demonstration_data"
SCAN = DATA / "ct" / "hn_164.nii.gz"
MINUTES = 12.0
_CPU_TIMES = 4  # a part may take this many times its limit on a CPU
_LEAST_S = 5.0  # no part starts with less time than this
_LAST_LINES = 8
_CLI = "import sys; from fseft_edge.cli.main import main; sys.exit(main())"

NETWORK: tuple[str, ...] = ("torch", "numpy", "lazy_loader")
PACKAGE = (
    *NETWORK,
    "scipy",
    "nibabel",
    "safetensors",
    "pydantic",
    "blosc2",
    "filelock",
    "click",
    "rich",
    "cc3d",
    "PIL",
)
EXPORT = (*PACKAGE, "onnx", "onnxscript")
TESTS = (*EXPORT, "pytest", "hypothesis", "monai")

_PROBE = """
import importlib, json, sys
found = {}
for name in json.loads(sys.argv[1]):
    try:
        importlib.import_module(name)
    except BaseException as error:
        found[name] = f"{type(error).__name__}: {error}"[:200]
print(json.dumps(found))
"""
_MACHINE = """
import importlib.metadata as metadata, json, sys
import torch
found = {"PyTorch": torch.__version__, "CUDA of PyTorch": torch.version.cuda, "cuDNN": torch.backends.cudnn.version()}
for name in ("onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "openvino", "monai", "numpy"):
    try:
        found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
        pass
if torch.cuda.is_available():
    properties = torch.cuda.get_device_properties(0)
    found["GPU"] = properties.name
    found["compute capability"] = f"{properties.major}.{properties.minor}"
    found["GPU memory, GiB"] = round(properties.total_memory / 2**30, 1)
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Part:
    """One part of the script.

    Attributes:
        name: name in the table.
        command: program and arguments.
        limit_s: time limit in seconds on a GPU.
        needs: modules that must be importable; PyTorch must also find a GPU, unless the device is the CPU.
        files: files that earlier parts write, without which this part cannot run.
        gpu: whether the part needs an NVIDIA GPU.
        result: JSON file that the part writes; None if the JSON lines of its output are the result.
    """

    name: str
    command: tuple[str | Path, ...]
    limit_s: float
    needs: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()
    gpu: bool = False
    result: Path | None = None


@dataclass
class Outcome:
    """What became of a part.

    Attributes:
        part: name of the part.
        state: ``done``, ``failed`` or ``skipped``.
        detail: why the part was skipped, or the last lines of its output; one line if it did not fail.
        wall_s, processor_s, peak_mib: time in seconds and peak memory of the largest process; None if skipped.
        result: JSON objects that the part reported.
    """

    part: str
    state: str
    detail: str = ""
    wall_s: float | None = None
    processor_s: float | None = None
    peak_mib: float | None = None
    result: list[dict[str, Any]] = field(default_factory=list)


def cli(*words: str | Path) -> tuple[str | Path, ...]:
    """Return the command line of ``fseft-edge`` from this checkout, without progress reports."""
    return (sys.executable, "-c", _CLI, *words, "--quiet")


def script(name: str, *words: str | Path) -> tuple[str | Path, ...]:
    """Return the command line of a script in this folder."""
    return (sys.executable, HERE / name, *words)


def parts(work: Path, device: str, scan: Path) -> Iterator[Part]:
    """Yield all parts; what matters most comes first."""
    edge, swin, adapter = work / "edge_base.encoder", work / "random.encoder", work / "zero_shot.adapter"
    repeats = "1" if device == "cpu" else "5"
    for name, needs in (("residual_unet", NETWORK), ("swin_unetr", (*NETWORK, "monai"))):
        command = script("gpu_windows.py", "--architecture", name, "--device", device, "--repeats", repeats)
        yield Part(f"one window of 96^3 in plain PyTorch, {name}", command, 90, needs)
    tests = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", ROOT / "tests" / "gpu")
    yield Part("tests/gpu", tests, 180, TESTS, gpu=True)
    export = cli("export", "--model", "edge_base", "--parity-ct", SCAN, "-o", edge)
    yield Part("export of edge_base", export, 150, EXPORT)
    yield Part("zero-shot adapter", script("gpu_inputs.py", "adapter", edge, adapter), 60, EXPORT, (edge,))
    yield from engines(edge, 90, "--parity-ct", SCAN)
    for backend in ("auto", "torch"):
        command = cli("segment", scan, "--encoder", edge, "-o", work / backend, "--device", device)
        yield Part(f"file to mask, {backend}", (*command, "--backend", backend), 90, PACKAGE, (edge,))
    yield adaptation("without validation", "--no-validate", edge, device)
    tuning = script("tuning_memory.py", "--methods", "lora", "--device", device, "--json")
    for network, modules in (("residual_unet", PACKAGE), ("swin_unetr", (*PACKAGE, "monai"))):
        yield Part(f"LoRA of {network}", (*tuning, "--network", network), 120, modules)
    yield from speeds(edge, device, scan, adapter)
    yield Part("SwinUNETR-48, random weights", script("gpu_inputs.py", "swin_unetr", work), 120, (*EXPORT, "monai"))
    yield from engines(swin, 150, "--precision", "float32")
    yield from speeds(swin, device, scan)
    yield adaptation("with validation", "--validate", edge, device)


def engines(bundle: Path, limit_s: float, *options: str | Path) -> Iterator[Part]:
    """Yield the building of an engine by each library."""
    for library in ("tensorrt_rtx", "tensorrt"):
        command = cli("build-engines", bundle, "--library", library, *options)
        yield Part(f"engine of {bundle.stem}, {library}", command, limit_s, (*EXPORT, library), (bundle,), gpu=True)


def speeds(bundle: Path, device: str, scan: Path, *adapters: Path) -> Iterator[Part]:
    """Yield the times of windows and of a scan by each backend."""
    backends = ("torch", "onnxruntime", *(("openvino",) if device == "cpu" else ("tensorrt_rtx", "tensorrt")))
    for backend in backends:
        report = bundle.with_name(f"{bundle.stem}_{backend}.json")
        options = [word for adapter in adapters for word in ("--adapter", adapter)]
        command = cli("benchmark", bundle, "--device", device, "--scan", scan, *options, "--json", report)
        yield Part(
            f"windows and scan, {bundle.stem}, {backend}",
            (*command, "--backend", backend, "--rounds", "1"),
            120,
            (*PACKAGE, *(() if backend == "torch" else (backend,))),
            (bundle, *adapters),
            gpu=backend.startswith("tensorrt"),
            result=report,
        )


def adaptation(name: str, validation: str, encoder: Path, device: str) -> Part:
    """Return the training of an adapter for both parotids on four demonstration CTs."""
    images = ("--images", DATA / "ct", "--labels", DATA / "label", "--organ", "right_parotid=3,left_parotid=4")
    cases = [word for case in ("hn_002", "hn_004", "hn_017", "hn_020") for word in ("--case", case)]
    written = encoder.with_name(f"{validation.strip('-')}.adapter")
    command = cli("adapt", "--encoder", encoder, *images, *cases, validation, "-o", written, "--device", device)
    return Part(f"adapt, four scans, {name}", command, 180, PACKAGE, (encoder,))


def install(wheels: Path, target: Path) -> Iterator[Outcome]:
    """Install every wheel of a folder that fits this Python into a folder, without index and dependencies."""
    for name in sorted({wheel.name.split("-")[0] for wheel in wheels.glob("*.whl")}):
        command = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--quiet", "--upgrade"]
        done = run([*command, "--find-links", wheels, "--target", target, name], limit_s=120)
        yield outcome(f"wheel of {name}", done)


def linked_package(folder: Path) -> Path:
    """Write a folder of links from which the package can be imported, and return this folder.

    The rooms ``runtime`` and ``export`` are installed inside the package (``pyproject.toml``).
    """
    package = folder / "fseft_edge"
    package.mkdir(parents=True)
    for entry in (*(ROOT / "fseft_edge").iterdir(), ROOT / "runtime", ROOT / "export"):
        if entry.name != "__pycache__":
            (package / entry.name).symlink_to(entry)
    return folder


def outcome(name: str, done: Finished, written: dict[str, Any] | None = None) -> Outcome:
    """Return the outcome of a part that ran."""
    lines = done.last_lines(_LAST_LINES if done.code else 1)
    if done.timed_out:
        lines.append(f"ended after its time limit, {done.wall_s:.0f} s")
    elif done.code:
        lines.append(f"exit code {done.code}")
    return Outcome(
        name,
        "failed" if done.code else "done",
        "\n".join(lines),
        round(done.wall_s, 2),
        round(done.processor_s, 2),
        round(done.peak_mib),
        done.json_lines() if written is None else [written],
    )


def obstacle(part: Part, device: str, missing: Mapping[str, str]) -> str | None:
    """Return the reason why a part cannot run, or None."""
    if part.gpu and device == "cpu":
        return "needs an NVIDIA GPU"
    lacking = [f"{name} ({missing[name]})" for name in part.needs if name in missing]
    if lacking:
        return f"cannot be used: {', '.join(lacking)}"
    absent = [path.name for path in part.files if not path.exists()]
    return f"an earlier part did not write {', '.join(absent)}" if absent else None


def run_parts(
    planned: Sequence[Part], device: str, missing: Mapping[str, str], environment: Mapping[str, str], ends: float
) -> Iterator[Outcome]:
    """Run the parts one after another until a moment of the monotonic clock, and yield the outcome of each."""
    for part in planned:
        left = ends - time.monotonic()
        reason = obstacle(part, device, missing)
        if reason is None and left < _LEAST_S:
            reason = "the time was up"
        if reason is not None:
            yield Outcome(part.name, "skipped", reason)
            continue
        try:
            limit_s = part.limit_s * (_CPU_TIMES if device == "cpu" else 1)
            done = run(part.command, limit_s=min(limit_s, left), environment=environment, folder=HERE)
            written = json.loads(part.result.read_text()) if part.result and part.result.exists() else None
            yield outcome(part.name, done, written)
        except (OSError, ValueError) as error:  # the program does not start, or its file is damaged
            yield Outcome(part.name, "failed", f"{type(error).__name__}: {error}")


def short(result: Mapping[str, Any]) -> str:
    """Return the numbers of a result in a few words; of `fseft-edge benchmark`, the median seconds."""
    if "encoder" in result and "scans" in result:
        windows = [
            f"{row['precision']}, {row['batch']} windows: {row['seconds']['median']:.4f} s" for row in result["encoder"]
        ]
        scans = [f"{row['precision']}, scan: {row['seconds']['median']:.2f} s" for row in result["scans"]]
        return "; ".join([*windows, *scans])
    return "; ".join(f"{name}: {value}" for name, value in result.items())


def write_report(folder: Path, machine: Mapping[str, Any], outcomes: Sequence[Outcome]) -> None:
    """Write the JSON file and the Markdown table, each by one rename."""
    table = [f"# GPU day: {machine.get('GPU', machine['device'])}", ""]
    table += [f"- {name}: {value}" for name, value in machine.items()]
    table += ["", "| part | state | wall s | processor s | peak MiB | result or reason |", "|---|---|---|---|---|---|"]
    for one in outcomes:
        text = "\n".join(map(short, one.result)) if one.state == "done" and one.result else one.detail
        shown = "<br>".join(line.replace("|", "\\|") for line in text.splitlines())
        numbers = ["" if number is None else f"{number:.1f}" for number in (one.wall_s, one.processor_s, one.peak_mib)]
        table.append(f"| {one.part} | {one.state} | {' | '.join(numbers)} | {shown} |")
    contents = {
        "gpu_day.json": json.dumps({"machine": machine, "parts": [asdict(one) for one in outcomes]}, indent=1),
        "gpu_day.md": "\n".join(table),
    }
    for name, text in contents.items():
        temporary = folder / f".{name}"
        temporary.write_text(text + "\n")
        temporary.replace(folder / name)


def describe_machine(device: str, environment: Mapping[str, str]) -> dict[str, Any]:
    """Return the names and versions of the machine and of its libraries."""
    machine: dict[str, Any] = {"device": device, "Python": platform.python_version(), "cores": os.cpu_count()}
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        machine["nvidia-smi"] = "; ".join(run(query, limit_s=20).last_lines(8))
    done = run([sys.executable, "-c", _MACHINE], limit_s=60, environment=environment)
    return {**machine, **(done.json_lines() or [{"PyTorch": "; ".join(done.last_lines(1))}])[-1]}


def main() -> None:
    """Run all parts, write the report, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("gpu_day"), help="folder for the report")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to install, without a network")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--scan", type=Path, default=SCAN, help="CT to encode and segment; default: a demonstration CT")
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument("--only", metavar="TEXT", help="run only parts whose name contains this text")
    arguments = parser.parse_args()
    end_with_children()
    ends = time.monotonic() + 60 * arguments.minutes
    arguments.output.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="fseft-edge-") as folder:
        work, packages = Path(folder) / "work", Path(folder) / "packages"
        work.mkdir()
        scan = work / f"scan.nii{'.gz' if arguments.scan.suffix == '.gz' else ''}"
        scan.symlink_to(arguments.scan.resolve())  # the name of the file does not reach the report
        if arguments.wheels:
            outcomes += install(arguments.wheels, packages)
        paths = [linked_package(Path(folder) / "links"), packages, os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(str(path) for path in paths if str(path)),
            "PYTHONDONTWRITEBYTECODE": "1",
            "XDG_CACHE_HOME": str(Path(folder) / "cache"),  # remembered speeds of this user do not change the results
        }
        machine = describe_machine(arguments.device, environment)
        planned = [
            part
            for part in parts(work, arguments.device, scan)
            if arguments.only is None or arguments.only in part.name
        ]
        names = sorted({name for part in planned for name in part.needs})
        probed = run([sys.executable, "-c", _PROBE, json.dumps(names)], limit_s=120, environment=environment)
        write_report(arguments.output, machine, outcomes)
        missing = {name: why for found in probed.json_lines() for name, why in found.items()}
        if arguments.device == "cuda" and "GPU" not in machine:
            missing["torch"] = "finds no NVIDIA GPU"
        for one in run_parts(planned, arguments.device, missing, environment, ends):
            outcomes.append(one)
            print(f"{one.part}: {one.state}", flush=True)
            write_report(arguments.output, machine, outcomes)
    print((arguments.output / "gpu_day.md").read_text())


if __name__ == "__main__":
    main()
