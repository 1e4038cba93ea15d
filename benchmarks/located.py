"""The part of a scan around a parotid against the whole scan, SwinUNETR-48: `make benchmark BENCHMARK=located`.

The script counts the windows of SwinUNETR-48 that `segment` and `adapt` encode for an organ of the size of a parotid,
at random places in the body, for each kind of adapter. It measures the processor seconds of the locator (coarse pass
and its adapter) and of a window, and prints the ratio to the whole scan; a window takes the same time everywhere.
Random weights compute as long as trained ones. One processor core: set OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from on_demand import places, processor_seconds, write_random_swin_unetr

from fseft_edge.adaptation.adapt import WINDOWS_ELSEWHERE
from fseft_edge.adaptation.locator import open_coarse_encoder, windows_over
from fseft_edge.adaptation.partial_encoding import AROUND_ORGAN
from fseft_edge.adapters.blocks import Box
from fseft_edge.adapters.network import Adapter, AdapterSettings, zero_shot
from fseft_edge.masks.prediction import predict_sections
from fseft_edge.masks.region import clipped, read_by
from fseft_edge.runtime.encoder.encoding import layout_of
from fseft_edge.runtime.encoder.feature_store import FeatureStore
from fseft_edge.runtime.encoder.session import open_session
from fseft_edge.runtime.scans.grid import Grid
from fseft_edge.runtime.scans.nifti import read_ct
from fseft_edge.runtime.system.memory import AS_MUCH_AS_IS_FREE

KINDS = [
    AdapterSettings("linear", "finest"),
    AdapterSettings("spatial", "finest"),
    AdapterSettings("linear", "all"),
    AdapterSettings("pointwise", "all"),
    AdapterSettings("spatial", "all"),
]


def main() -> None:
    """Count, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scan", type=Path, help="CT; without it, fullsize/thorax_512.nii.gz in FSEFT_EDGE_DATA")
    parser.add_argument("--margin", type=float, default=15.0, help="margin of the locator in mm")
    parser.add_argument("--places", type=int, default=200, help="number of places")
    parser.add_argument("--windows", type=int, default=2, help="number of windows that are measured")
    arguments = parser.parse_args()
    volume = read_ct(arguments.scan or Path(os.environ["FSEFT_EDGE_DATA"]) / "fullsize" / "thorax_512.nii.gz")
    with tempfile.TemporaryDirectory() as temporary:
        bundle = write_random_swin_unetr(Path(temporary) / "random.encoder")
        grid = Grid.of(volume, bundle.preprocessing)
        layout = layout_of(grid, bundle)
        with open_coarse_encoder("cpu") as coarse:
            before = processor_seconds()
            encoded = coarse.encode(volume, FeatureStore(Path(temporary) / "coarse"), AS_MUCH_AS_IS_FREE)
            encoding = processor_seconds() - before
            for _ in predict_sections(encoded, [zero_shot(encoded.levels, [None])]):
                pass
            locating = processor_seconds() - before
        with open_session(bundle, device="cpu", backend="torch") as session:
            batch = torch.rand(1, 1, *bundle.window)
            session.encode(batch)
            before = processor_seconds()
            for _ in range(arguments.windows):
                session.encode(batch)
            window = (processor_seconds() - before) / arguments.windows
        organs = [Box(*ranges) for ranges in places(grid, grid.section(volume, 0, grid.shape[2]), arguments.places)]
        limit = Box(*((0, length) for length in grid.shape))
        print(f"grid {grid.shape}, {layout.windows} windows in the whole scan, {window:.1f} s a window")
        print(f"locator: {locating:.1f} s, of which {encoding:.1f} s the coarse encoder")
        print("| adapter | context | windows, `segment` | ratio with locator | windows, `adapt` | ratio with locator |")
        print("|---|---|---|---|---|---|")
        for kind in KINDS:
            adapter = Adapter(kind, bundle.levels, 1)
            grown = [
                Box(
                    *(
                        (low - round(arguments.margin / spacing), high + round(arguments.margin / spacing))
                        for (low, high), spacing in zip(organ.ranges, bundle.preprocessing.spacing, strict=True)
                    )
                )
                for organ in organs
            ]
            here = np.mean([windows_over(layout, [read_by([adapter], clipped(box, limit))]) for box in grown])
            blocks = [read_by([adapter], clipped(organ.grown(AROUND_ORGAN), limit)) for organ in organs]
            learned = np.mean([windows_over(layout, [box]) for box in blocks]) + WINDOWS_ELSEWHERE
            whole = layout.windows * window
            context = organs[0].x[0] - read_by([adapter], organs[0]).x[0]
            print(
                f"| {kind.name} | {context} | {here:.1f} | {(here * window + locating) / whole:.3f} "
                f"| {learned:.1f} | {(learned * window + locating) / whole:.3f} |"
            )


if __name__ == "__main__":
    main()
