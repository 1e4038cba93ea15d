"""Difference between zero-shot masks and contours along the body axis: `make benchmark BENCHMARK=extents`.

Scores the encoder's head on every `support` scan, on the lattice of the scan: over the whole scan, and only in the
axial slices with a reference contour. The two scores differ because masks and contours begin and end at different
slices.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import headneck
import numpy as np

from fseft_edge.adaptation.adapt import zero_shot_adapter
from fseft_edge.evaluation.metrics import dice
from fseft_edge.masks.prediction import segment_encoded
from fseft_edge.runtime.encoder.encoding import encode_scan
from fseft_edge.runtime.encoder.feature_store import FeatureStore
from fseft_edge.runtime.encoder.session import open_session
from fseft_edge.runtime.scans.nifti import read_ct, read_label_map

_SLICE_AXIS = 2  # these scans have the axes P-L-I


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="model file of an encoder; default: the built-in encoder")
    bundle = headneck.encoder(parser.parse_args().model)
    adapter = zero_shot_adapter(bundle, headneck.BASE).adapter
    whole: list[list[float]] = []
    within: list[list[float]] = []
    with open_session(bundle) as session:
        store = FeatureStore(headneck.RUNS / "features")
        for case in headneck.split("support"):
            reference = read_label_map(headneck.label_path(case)).array
            encoded = encode_scan(read_ct(headneck.image_path(case)), bundle=bundle, session=session, store=store)
            labels = segment_encoded(encoded, [adapter])
            pairs = [(labels == k, reference == organ.label) for k, organ in enumerate(headneck.BASE, start=1)]
            whole.append([dice(found, truth) or 0.0 for found, truth in pairs])
            contoured = [np.flatnonzero(truth.any(axis=(0, 1))) for _, truth in pairs]
            within.append(
                [
                    dice(found.take(slices, _SLICE_AXIS), truth.take(slices, _SLICE_AXIS)) or 0.0
                    for (found, truth), slices in zip(pairs, contoured, strict=True)
                ]
            )
    print(f"| | {' | '.join(organ.name for organ in headneck.BASE)} | mean |\n|---|{'---|' * (len(headneck.BASE) + 1)}")
    for name, scores in (("whole scan", whole), ("within the reference's slices", within)):
        means = np.mean(scores, axis=0)
        print(f"| {name} | {' | '.join(f'{value:.3f}' for value in means)} | {means.mean():.3f} |")


if __name__ == "__main__":
    main()
