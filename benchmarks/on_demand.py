"""Features on demand against the whole scan, SwinUNETR-48 with random weights: `make benchmark BENCHMARK=on_demand`.

The script reads boxes of the size of a parotid at random places in the body, each with an empty feature cache, then
encodes the whole scan. It prints windows, processor seconds and their ratios, and compares the features bit for bit.
Random weights compute as long as trained ones. One processor core: set OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fseft_edge.export.zoo import MODELS
from fseft_edge.runtime.encoder.bundle import BundleContents, EncoderBundle
from fseft_edge.runtime.encoder.encoding import EncodedScan, encode_scan
from fseft_edge.runtime.encoder.feature_map import Ranges
from fseft_edge.runtime.encoder.feature_store import FeatureStore
from fseft_edge.runtime.encoder.networks import build_network
from fseft_edge.runtime.encoder.on_demand import FeaturesOnDemand, encode_on_demand
from fseft_edge.runtime.encoder.session import open_session
from fseft_edge.runtime.scans.grid import Grid
from fseft_edge.runtime.scans.nifti import read_ct

PAROTID_MM = (30.0, 40.0, 55.0)
"""Size of a parotid along right-left, back-front and bottom-top."""

_BODY_HU = -200.0


def write_random_swin_unetr(path: Path) -> EncoderBundle:
    """Write an encoder bundle of SwinUNETR-48 with random weights, for PyTorch alone, and return it."""
    description = MODELS["fseft"].published
    assert description is not None  # noqa: S101 - a published model has a description
    torch.manual_seed(0)
    network = build_network(description.architecture, **description.settings).eval()
    organs = description.organs
    contents = BundleContents(
        name="random_swin_unetr_48",
        architecture=description.architecture,
        settings=dict(description.settings),
        preprocessing=description.preprocessing,
        window=description.window,
        organs=organs,
        checkpoint_sha256="0" * 64,
        tools={},
        parity={},
        network=network,
        head_weight=torch.randn(len(organs), network.levels[0].channels),
        head_bias=torch.zeros(len(organs)),
        graph=None,
    )
    return EncoderBundle.write(path, contents)


def places(grid: Grid, input_of_encoder: NDArray[np.float32], count: int, seed: int = 0) -> list[Ranges]:
    """Return boxes of the size of a parotid around random voxels of the body, in voxels of the grid."""
    low, high = grid.preprocessing.hu_window
    body = np.argwhere(input_of_encoder > (_BODY_HU - low) / (high - low))
    boxes = []
    for centre in np.random.default_rng(seed).permutation(body)[:count]:
        ranges = []
        for middle, mm, spacing, length in zip(centre, PAROTID_MM, grid.preprocessing.spacing, grid.shape, strict=True):
            size = min(round(mm / spacing), length)
            start = int(np.clip(middle - size // 2, 0, length - size))
            ranges.append((start, start + size))
        boxes.append((ranges[0], ranges[1], ranges[2]))
    return boxes


def read_box(features: FeaturesOnDemand, box: Ranges) -> list[torch.Tensor]:
    """Return the features of a box at all levels."""
    return [
        features.read(level, *((low // step.stride, -(-high // step.stride)) for low, high in box))
        for level, step in enumerate(features.levels)
    ]


def equal(boxes: Sequence[Ranges], read: Sequence[Sequence[torch.Tensor]], whole: EncodedScan) -> bool:
    """Return whether the features of boxes are those of the whole scan, bit for bit."""
    return all(
        torch.equal(
            level,
            whole.features.read(number, *((low // step.stride, -(-high // step.stride)) for low, high in box)),
        )
        for box, levels in zip(boxes, read, strict=True)
        for number, (level, step) in enumerate(zip(levels, whole.levels, strict=True))
    )


def processor_seconds() -> float:
    """Return the processor seconds of this process so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scan", type=Path, help="CT; without it, abdomen/ct_1p5mm.nii.gz in FSEFT_EDGE_DATA")
    parser.add_argument("--boxes", type=int, default=3, help="number of boxes that are read")
    parser.add_argument("--counted", type=int, default=200, help="number of boxes whose windows are counted")
    parser.add_argument("--without-whole-scan", action="store_true", help="do not encode the whole scan")
    arguments = parser.parse_args()
    scan = arguments.scan or Path(os.environ["FSEFT_EDGE_DATA"]) / "abdomen" / "ct_1p5mm.nii.gz"
    volume = read_ct(scan)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        bundle = write_random_swin_unetr(folder / "random.encoder")
        grid = Grid.of(volume, bundle.preprocessing)
        boxes = places(grid, grid.section(volume, 0, grid.shape[2]), max(arguments.boxes, arguments.counted))
        with open_session(bundle, device="cpu", backend="torch") as session:

            def on_demand(store: str) -> FeaturesOnDemand:
                scan = encode_on_demand(
                    volume, bundle=bundle, session=session, store=FeatureStore(folder / store), grid=grid
                )
                assert isinstance(scan.features, FeaturesOnDemand)  # noqa: S101 - narrows the type
                return scan.features

            features = on_demand("counted")
            counts = [features.need(box) for box in boxes]
            seconds, read = [], []
            for number, box in enumerate(boxes[: arguments.boxes]):
                features = on_demand(str(number))
                before = processor_seconds()
                read.append(read_box(features, box))
                seconds.append(processor_seconds() - before)
                print(f"box {box}: {counts[number]} windows, {seconds[-1]:.1f} s", flush=True)
            print(f"grid {grid.shape}: {features.windows} windows in the whole scan")
            print(f"windows over a box, mean of {len(counts)} boxes: {np.mean(counts):.2f}")
            if arguments.without_whole_scan:
                return
            before = processor_seconds()
            whole = encode_scan(volume, bundle=bundle, session=session, store=FeatureStore(folder / "whole"), grid=grid)
            total = processor_seconds() - before
            print(f"whole scan: {total:.1f} s; on demand / whole scan: {np.mean(seconds) / total:.3f}")
            print("the features are equal" if equal(boxes[: arguments.boxes], read, whole) else "the features DIFFER")


if __name__ == "__main__":
    main()
