"""Numerical error of features and masks on a real CT: `make benchmark BENCHMARK=exactness`.

Prints the error of ONNX Runtime's features relative to PyTorch, and the changes of zero-shot probabilities and masks if
features are stored as float16 instead of float32.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import headneck
import numpy as np

from fseft_edge.adaptation.adapt import zero_shot_adapter
from fseft_edge.evaluation.metrics import dice
from fseft_edge.masks.prediction import predict_sections
from fseft_edge.runtime.encoder.encoding import encode_scan
from fseft_edge.runtime.encoder.feature_store import FeatureStore
from fseft_edge.runtime.encoder.session import open_session
from fseft_edge.runtime.scans.nifti import read_ct


def main() -> None:
    """Measure on one support scan and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", default=headneck.split("support")[0])
    arguments = parser.parse_args()
    bundle = headneck.encoder(None)
    volume = read_ct(headneck.image_path(arguments.case))
    organs = zero_shot_adapter(bundle, headneck.BASE).adapter
    probabilities, finest = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for backend, storage in (("torch", "float32"), ("onnxruntime", "float32"), ("torch", "float16")):
            with open_session(bundle, backend=backend) as session:
                store = FeatureStore(Path(folder) / backend)
                encoded = encode_scan(volume, bundle=bundle, session=session, store=store, storage=storage)
            sections = [section for _, section in predict_sections(encoded, [organs])]
            probabilities[backend, storage] = np.concatenate(sections, axis=3)
            finest[backend, storage] = [
                encoded.features.read(level, *((0, size // step.stride) for size in encoded.features.padded_shape))
                .float()
                .numpy()
                for level, step in enumerate(encoded.features.levels)
            ]
    reference = "torch", "float32"
    for key in (("onnxruntime", "float32"), ("torch", "float16")):
        errors = [
            float(np.abs(a - b).max() / np.abs(a).max()) for a, b in zip(finest[reference], finest[key], strict=True)
        ]
        change = np.abs(probabilities[key] - probabilities[reference]).max()
        masks = [probabilities[k] > 0.5 for k in (reference, key)]
        agreement = min(dice(a, b) or 0.0 for a, b in zip(*masks, strict=True))
        print(
            f"{key[0]} {key[1]} against torch float32: feature error by level "
            f"{', '.join(f'{error:.1e}' for error in errors)}; probability {change:.1e}; least mask DSC {agreement:.5f}"
        )


if __name__ == "__main__":
    main()
