"""Speed and memory of encoding one clinical-size scan: `make benchmark BENCHMARK=speed`.

Every measurement runs in a separate process, so that the peak memory is that of the measurement. Rounds alternate
between the candidates, and the ratio compares the fastest rounds. The candidates are

- MONAI's sliding_window_inference of this network in eager PyTorch on the resampled scan, with every level blended and
  equal windows and overlap;
- `encode_scan` with each backend and precision, including reading, resampling, blending and writing the feature map;
- `encode_scan` with PyTorch for the scan stacked twice along its slices (the peak memory must not increase).
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import headneck
import numpy as np
import torch

from fseft_edge.runtime.encoder.bundle import EncoderBundle
from fseft_edge.runtime.encoder.encoding import OVERLAP, encode_scan
from fseft_edge.runtime.encoder.feature_store import FeatureStore
from fseft_edge.runtime.encoder.session import open_session
from fseft_edge.runtime.encoder.windows import WindowLayout
from fseft_edge.runtime.scans.grid import Grid
from fseft_edge.runtime.scans.nifti import read_ct, write_ct
from fseft_edge.runtime.scans.volume import Volume


class Seconds(NamedTuple):
    """Wall time and processor time in seconds."""

    wall: float
    processor: float


class Clock:
    """A clock that starts when it is made."""

    def __init__(self) -> None:
        self._started = Seconds(time.monotonic(), time.process_time())

    def seconds(self) -> Seconds:
        """Return the time since the start."""
        return Seconds(time.monotonic() - self._started.wall, time.process_time() - self._started.processor)


def encode_with_monai(bundle: EncoderBundle, scan: Path) -> Seconds:
    """Return the time of MONAI's sliding window for all levels of the resampled scan."""
    from monai.inferers import sliding_window_inference  # noqa: PLC0415 - only this measurement may include the import

    network = bundle.network().eval()
    volume = read_ct(scan)
    grid = Grid.of(volume, bundle.preprocessing)
    coarsest = max(level.stride for level in bundle.levels)
    layout = WindowLayout.plan(grid.shape, bundle.window, coarsest, OVERLAP)
    section = torch.from_numpy(grid.section(volume, 0, grid.shape[2]))
    padding = [n for size, full in zip(grid.shape, layout.padded_shape, strict=True) for n in (full - size, 0)][::-1]
    padded = torch.nn.functional.pad(section, padding)[None, None]
    clock = Clock()
    with torch.inference_mode():
        sliding_window_inference(
            padded, bundle.window, 1, lambda x: tuple(network(x)), overlap=OVERLAP, mode="gaussian", sigma_scale=0.125
        )
    return clock.seconds()


def encode_with_ours(bundle: EncoderBundle, scan: Path, engine: str) -> tuple[Seconds, Seconds]:
    """Return the time from the file to the feature map, and without reading the file.

    Args:
        bundle: encoder bundle.
        scan: CT.
        engine: ``BACKEND`` (in float32) or ``BACKEND PRECISION``.
    """
    backend, _, precision = engine.partition(" ")
    chosen = precision or "float32"
    with tempfile.TemporaryDirectory() as folder, open_session(bundle, backend=backend, precision=chosen) as session:
        clock = Clock()
        volume = read_ct(scan)
        encoding = Clock()
        encode_scan(volume, bundle=bundle, session=session, store=FeatureStore(Path(folder)))
        return clock.seconds(), encoding.seconds()


def measure(arguments: argparse.Namespace) -> None:
    """Run one measurement in this process and print the result as JSON."""
    bundle = EncoderBundle.open(arguments.encoder)
    if arguments.measure == "monai":
        seconds = encoding = encode_with_monai(bundle, arguments.scan)
    else:
        seconds, encoding = encode_with_ours(bundle, arguments.scan, arguments.measure)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    result = {"seconds": seconds.wall, "encoding_s": encoding.wall, "encoding_processor_s": encoding.processor}
    print(json.dumps({**result, "peak_mib": peak}))


def in_a_process(encoder: Path, scan: Path, what: str) -> dict[str, float]:
    """Return the result of a measurement in a new process."""
    command = [sys.executable, __file__, "--encoder", str(encoder), "--scan", str(scan), "--measure", what]
    result: dict[str, float] = json.loads(subprocess.check_output(command))  # noqa: S603 - runs this file
    return result


def stacked_twice(scan: Path, folder: Path) -> Path:
    """Write the scan stacked twice along its slice axis, and return the file."""
    volume = read_ct(scan)
    double = Volume(np.concatenate([volume.array] * 2, axis=2), volume.affine, volume.slope, volume.intercept)
    path = folder / "stacked.nii.gz"
    write_ct(path, double)
    return path


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scan", type=Path)
    parser.add_argument("--encoder", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments)
        return
    scan = arguments.scan or headneck.data_root() / "fullsize" / "thorax_512.nii.gz"
    encoder = arguments.encoder or headneck.encoder(None).path
    names = ("monai", "torch", "onnxruntime", "openvino", "openvino bfloat16")
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(arguments.rounds):
        for name in names:
            rounds[name].append(in_a_process(encoder, scan, name))
    with tempfile.TemporaryDirectory() as folder:
        double = in_a_process(encoder, stacked_twice(scan, Path(folder)), "torch")
    single = in_a_process(encoder, scan, "torch")
    reference = min(result["seconds"] for result in rounds["monai"])
    reference_peak = min(result["peak_mib"] for result in rounds["monai"])
    print("| encode | seconds | times faster | peak MiB | share of MONAI's |\n|---|---|---|---|---|")
    for name in names:
        seconds = min(result["seconds"] for result in rounds[name])
        peak = max(result["peak_mib"] for result in rounds[name])
        print(f"| {name} | {seconds:.1f} | {reference / seconds:.2f} | {peak:.0f} | {peak / reference_peak:.2f} |")
    print(
        f"\nscan stacked twice: {double['peak_mib']:.0f} MiB against {single['peak_mib']:.0f} MiB, "
        f"ratio {double['peak_mib'] / single['peak_mib']:.3f}"
    )


if __name__ == "__main__":
    main()
