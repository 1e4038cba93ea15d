"""Segmentation of one scan from file to mask, compared with MONAI and nnU-Net v2.

    python benchmarks/peers.py --nnunet-python nnunet/bin/python

Every program runs in a process of its own, on the same number of cores: `fseft-edge segment` without an adapter and
without a cache, MONAI (`monai_peer.py`) and the predictor of nnU-Net (`nnunet_peer.py`, which says how to install it;
left out without `--nnunet-python`). The script also measures `segment` of a scan whose features are in the cache, and,
without the start of Python and reading the scan, its encoding by the same network in one pass and in windows. Other
parts of the table of speeds come from `way_back.py` (adapters, way back, measuring), `on_demand.py` and `located.py`
(SwinUNETR-48), and `memory.py` and `speed.py` (memory against slices).

Rounds alternate between the programs, and the table has the medians. Wall time contains the load from other programs
on the machine; processor time hardly does. The peak is that of the largest single process. `--ours NAME=PATH` compares
several installations of `fseft-edge`. Ratios relate to the first program of a measure. The results are added to the CSV
file, where they replace the results with the same instruction set and number of cores.

Python may write compiled modules, also where the environment forbids this, because an installation by pip has them; the
first round of a program may compile them, so three rounds are the fewest that are fair.

To measure as on a processor with AVX2 only, set ONEDNN_MAX_CPU_ISA=AVX2 and ATEN_CPU_CAPABILITY=avx2.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias

from child_process import Finished, end_with_children, run

HERE = Path(__file__).parent
FILE_TO_MASK, CACHED, ENCODING = "file to mask", "cached features to mask", "encoding"
MEASURES = (FILE_TO_MASK, CACHED, ENCODING)
COLUMNS = (
    "instructions",
    "cores",
    "measure",
    "program",
    "rounds",
    "wall_s",
    "processor_s",
    "peak_mib",
    "times_wall",
    "times_processor",
    "times_peak",
)


_LIMITS = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")

Command: TypeAlias = Sequence[str | Path]


@dataclass(frozen=True)
class Program:
    """One program of a measure. The first program of a measure is the reference of its ratios.

    Attributes:
        measure: what is measured.
        name: name in the table.
        command: returns the command for an empty output folder.
        own_seconds: whether the program itself reports its time, without the start of Python and reading the scan.
    """

    measure: str
    name: str
    command: Callable[[Path], Command]
    own_seconds: bool = False


@dataclass(frozen=True)
class Sample:
    """Wall time and processor time in seconds, and the peak memory in MiB."""

    wall_s: float
    processor_s: float
    peak_mib: float


def instruction_set() -> str:
    """Return the instruction set to which the environment limits PyTorch and oneDNN."""
    return os.environ.get(_LIMITS[0], "native").lower()


def programs(arguments: argparse.Namespace, work: Path) -> Iterator[Program]:
    """Export the encoder, prepare the folder of nnU-Net, and yield what to measure."""
    ours = dict(text.partition("=")[::2] for text in arguments.ours)
    bundles = {name: exported(path, work / f"{name}.encoder") for name, path in ours.items()}
    first = next(iter(ours))

    def segment(name: str, output: Path, options: Command = ()) -> Command:
        return [ours[name], "segment", arguments.scan, "--encoder", bundles[name], "-o", output, *options]

    def monai(output: Path) -> Command:
        return [sys.executable, HERE / "monai_peer.py", arguments.scan, "--encoder", bundles[first], "--output", output]

    def encode(bundle: Path, _: Path) -> Command:
        options = ["--encoder", bundle, "--scan", arguments.scan, "--measure", "auto auto"]
        return [sys.executable, HERE / "speed.py", *options]

    if FILE_TO_MASK in arguments.only:
        for name in ours:
            yield Program(FILE_TO_MASK, name, partial(segment, name))
        yield Program(FILE_TO_MASK, "MONAI", monai)
        if arguments.nnunet_python:
            yield from nnunet(arguments, work)
    if CACHED in arguments.only:
        for name in ours:
            cache = work / f"{name}.cache"
            checked(segment(name, work / f"{name}.masks", ("--cache", cache)))
            yield Program(CACHED, name, partial(segment, name, options=("--cache", cache)))
    if ENCODING in arguments.only:
        windows = exported(ours[first], work / "windows.encoder", "--tiling", "windows")
        yield Program(ENCODING, "whole scan", partial(encode, bundles[first]), own_seconds=True)
        yield Program(ENCODING, "windows", partial(encode, windows), own_seconds=True)


def exported(command: str, bundle: Path, *options: str) -> Path:
    """Export the built-in encoder with an installation of fseft-edge, and return the bundle."""
    # A limit on the instruction set does not hold for the comparison of backends: OpenVINO fails in bfloat16 under it.
    environment = {name: value for name, value in os.environ.items() if name not in _LIMITS}
    checked([command, "export", "--model", "edge_base", "-o", bundle, "-q", *options], environment)
    return bundle


def nnunet(arguments: argparse.Namespace, work: Path) -> Iterator[Program]:
    """Write the folder of nnU-Net's results, and yield both ways to predict."""
    script, results = HERE / "nnunet_peer.py", work / "nnunet_results"
    checked([arguments.nnunet_python, script, "--results", results, "--prepare"])
    command: list[str | Path] = [arguments.nnunet_python, script, "--results", results, "--scan", arguments.scan]
    yield Program(FILE_TO_MASK, "nnU-Net", lambda output: [*command, "--output", output])
    yield Program(FILE_TO_MASK, "nnU-Net in one process", lambda output: [*command, "--output", output, "--sequential"])


def checked(command: Command, environment: Mapping[str, str] | None = None) -> Finished:
    """Return the result of a command that must succeed."""
    done = run(command, environment=environment)
    if done.code:
        sys.exit(f"{' '.join(map(str, command))}\nended with exit code {done.code}:\n{done.output}")
    return done


def measured(program: Program) -> Sample:
    """Run a program once."""
    with tempfile.TemporaryDirectory(prefix="fseft-edge-") as folder:
        done = checked(program.command(Path(folder)))
    if program.own_seconds:
        (own,) = done.json_lines()
        return Sample(own["encoding_s"], own["encoding_processor_s"], own["peak_mib"])
    return Sample(done.wall_s, done.processor_s, done.peak_mib)


def rows(samples: dict[Program, list[Sample]], cores: int) -> list[dict[str, str]]:
    """Return a row of the table for each program; a ratio is that of its median to that of the reference."""
    table: list[dict[str, str]] = []
    references: dict[str, Sample] = {}
    for program, taken in samples.items():
        median = Sample(*(statistics.median(getattr(one, name) for one in taken) for name in Sample.__annotations__))
        reference = references.setdefault(program.measure, median)
        table.append(
            {
                "instructions": instruction_set(),
                "cores": str(cores),
                "measure": program.measure,
                "program": program.name,
                "rounds": str(len(taken)),
                "wall_s": f"{median.wall_s:.1f}",
                "processor_s": f"{median.processor_s:.1f}",
                "peak_mib": f"{median.peak_mib:.0f}",
                "times_wall": f"{median.wall_s / reference.wall_s:.2f}",
                "times_processor": f"{median.processor_s / reference.processor_s:.2f}",
                "times_peak": f"{median.peak_mib / reference.peak_mib:.2f}",
            }
        )
    return table


def write_csv(path: Path, new: list[dict[str, str]]) -> None:
    """Write the rows to a CSV file, after the rows of other instruction sets and numbers of cores."""
    kept: list[dict[str, str]] = []
    if path.exists():
        with path.open(newline="") as file:
            kept = list(csv.DictReader(file))
    replaced = {(row["instructions"], row["cores"]) for row in new}
    kept = [row for row in kept if (row["instructions"], row["cores"]) not in replaced]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept + new)


def main() -> None:
    """Measure, print a Markdown table and write the CSV file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(os.environ.get("FSEFT_EDGE_DATA", "")) / "fullsize" / "thorax_512.nii.gz"
    parser.add_argument("--scan", type=Path, default=default, help="CT; default: the thorax CT in FSEFT_EDGE_DATA")
    parser.add_argument(
        "--ours",
        action="append",
        metavar="NAME=PATH",
        help="command fseft-edge of an installation; may be repeated; default: the one of this Python",
    )
    parser.add_argument("--nnunet-python", type=Path, help="Python with nnunetv2; default: nnU-Net is left out")
    parser.add_argument("--only", nargs="+", choices=MEASURES, default=MEASURES, metavar="MEASURE")
    parser.add_argument("--cores", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "peers.csv", help="CSV file")
    arguments = parser.parse_args()
    end_with_children()
    arguments.ours = arguments.ours or [f"fseft-edge={Path(sys.executable).with_name('fseft-edge')}"]
    if not arguments.scan.is_file():
        parser.error(f"{arguments.scan} is not a file: name a CT with --scan, or set FSEFT_EDGE_DATA")
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.cores])
    os.environ["OMP_NUM_THREADS"] = str(arguments.cores)
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    with tempfile.TemporaryDirectory(prefix="fseft-edge-") as folder:
        samples: dict[Program, list[Sample]] = {program: [] for program in programs(arguments, Path(folder))}
        for _ in range(arguments.rounds):
            for program, taken in samples.items():
                taken.append(measured(program))
                print(program.measure, program.name, taken[-1], file=sys.stderr, flush=True)
    table = rows(samples, arguments.cores)
    write_csv(arguments.output, table)
    print(f"{arguments.scan.name}, {arguments.cores} cores, instructions: {instruction_set()}\n")
    shown = COLUMNS[2:]
    print(f"| {' | '.join(shown)} |\n|{'---|' * len(shown)}")
    for row in table:
        print(f"| {' | '.join(row[column] for column in shown)} |")


if __name__ == "__main__":
    main()
