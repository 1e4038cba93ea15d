"""Time of segmenting a scan compared with MONAI's sliding window: `make benchmark BENCHMARK=end_to_end`.

The time of `segment` with the encoder's head includes reading, resampling, encoding, blending, resampling to the scan's
lattice and writing the mask. The time of MONAI includes only sliding_window_inference of this network and head on the
resampled scan, in eager PyTorch, with equal windows and overlap. Every measurement runs in a separate process. Rounds
alternate, and the ratio compares the fastest rounds.
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
from typing import cast

import headneck
import torch
from torch.nn import functional as F

from fseft_edge.adaptation.adapt import zero_shot_adapter
from fseft_edge.adapters.file import write_adapter
from fseft_edge.runtime.encoder.bundle import EncoderBundle, Precision
from fseft_edge.runtime.encoder.encoding import OVERLAP
from fseft_edge.runtime.encoder.windows import WindowLayout
from fseft_edge.runtime.scans.grid import Grid
from fseft_edge.runtime.scans.nifti import read_ct
from fseft_edge.runtime.scans.organs import OrganLabel
from fseft_edge.segmentation.segment import segment

NAMES = ("monai", "torch float32", "onnxruntime float32", "openvino float32", "openvino bfloat16")


def monai_seconds(bundle: EncoderBundle, scan: Path) -> float:
    """Return the time in seconds of MONAI's sliding window for the logits of the resampled scan."""
    from monai.inferers import sliding_window_inference  # noqa: PLC0415 - only this measurement may include the import

    network, weight, bias = bundle.network().eval(), bundle.head_weight(), bundle.head_bias()
    volume = read_ct(scan)
    grid = Grid.of(volume, bundle.preprocessing)
    layout = WindowLayout.plan(grid.shape, bundle.window, max(level.stride for level in bundle.levels), OVERLAP)
    section = torch.from_numpy(grid.section(volume, 0, grid.shape[2]))
    padding = [n for size, full in zip(grid.shape, layout.padded_shape, strict=True) for n in (full - size, 0)][::-1]
    padded = F.pad(section, padding)[None, None]
    started = time.monotonic()
    with torch.inference_mode():
        sliding_window_inference(
            padded,
            bundle.window,
            1,
            lambda x: F.conv3d(network(x)[0], weight[..., None, None, None], bias),
            overlap=OVERLAP,
            mode="gaussian",
            sigma_scale=0.125,
        )
    return time.monotonic() - started


def our_seconds(bundle: EncoderBundle, scan: Path, backend: str, precision: Precision) -> float:
    """Return the time in seconds from the file to the mask."""
    organs = [OrganLabel(name, number) for number, name in enumerate(bundle.manifest.organs, start=1)]
    with tempfile.TemporaryDirectory() as folder:
        adapter = Path(folder) / "zero_shot.adapter"
        write_adapter(adapter, zero_shot_adapter(bundle, organs))
        started = time.monotonic()
        segment([scan], [adapter], Path(folder) / "masks", encoder=bundle.path, backend=backend, precision=precision)
        return time.monotonic() - started


def measure(encoder: Path, scan: Path, name: str) -> None:
    """Run one measurement in this process and print the result as JSON."""
    bundle = EncoderBundle.open(encoder)
    backend, _, precision = name.partition(" ")
    seconds = (
        monai_seconds(bundle, scan)
        if name == "monai"
        else our_seconds(bundle, scan, backend, cast("Precision", precision))
    )
    print(json.dumps({"seconds": seconds, "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scan", type=Path, help="CT to segment; default: the abdomen CT in FSEFT_EDGE_DATA")
    parser.add_argument("--encoder", type=Path)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=NAMES, default=list(NAMES), metavar="NAME")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    scan = arguments.scan or headneck.data_root() / "abdomen" / "ct_1p5mm.nii.gz"
    encoder = arguments.encoder or headneck.encoder(None).path
    if arguments.measure:
        measure(encoder, scan, arguments.measure)
        return
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in arguments.only}
    for _ in range(arguments.rounds):
        for name in arguments.only:
            command = [sys.executable, __file__, "--encoder", str(encoder), "--scan", str(scan), "--measure", name]
            printed = subprocess.check_output(command, text=True)  # noqa: S603 - runs this file
            rounds[name].append(json.loads(printed))
    reference = min(result["seconds"] for result in rounds.get("monai", rounds[arguments.only[0]]))
    print("| segment | seconds | times faster | peak MiB |\n|---|---|---|---|")
    for name, results in rounds.items():
        seconds = min(result["seconds"] for result in results)
        peak = max(result["peak_mib"] for result in results)
        print(f"| {name} | {seconds:.1f} | {reference / seconds:.2f} | {peak:.0f} |")


if __name__ == "__main__":
    main()
