"""Where zero-shot masks and contours part: `make benchmark BENCHMARK=extents`.

Scores the encoder's own classifiers on every `support` scan, on the scan's own lattice: over the whole scan, and within
the axial slices that the reference contours. The difference is where an organ is taken to begin and end.
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

_SLICE_AXIS = 2  # of these scans, whose axes are P-L-I


def main() -> None:
    """Measure, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="model file of another encoder than the built-in one")
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
