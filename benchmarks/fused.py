"""The fused graph of `export-adapter` on whole scans: `make benchmark BENCHMARK=fused`.

Prints the size of the graph, the difference of its probabilities from those of fseft-edge in one window of a real CT,
and the DSC between masks of fseft-edge, which blends features, and masks from blended probabilities. For whole scans,
prints also the DSC of both masks with the contours. All masks are compared before post-processing.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import headneck
import numpy as np
from numpy.typing import NDArray

from fseft_edge.adaptation.adapt import adapt
from fseft_edge.adaptation.training import TrainingSettings
from fseft_edge.adapters.file import AdapterFile, read_adapter
from fseft_edge.adapters.onnx_export import export_adapter
from fseft_edge.evaluation.metrics import dice
from fseft_edge.masks.prediction import predict_sections, segment_encoded
from fseft_edge.runtime.encoder.backends.onnxruntime import import_onnxruntime
from fseft_edge.runtime.encoder.bundle import EncoderBundle
from fseft_edge.runtime.encoder.encoding import OVERLAP, EncodedScan, encode_scan
from fseft_edge.runtime.encoder.feature_store import FeatureStore
from fseft_edge.runtime.encoder.session import open_session
from fseft_edge.runtime.encoder.windows import gaussian_importance
from fseft_edge.runtime.scans.grid import Grid
from fseft_edge.runtime.scans.nifti import read_ct, read_label_map
from fseft_edge.runtime.scans.volume import Volume

Array = NDArray[np.float32]


def main() -> None:
    """Measure on support scans that were not used for training the adapter, and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--adapter", type=Path, help="adapter with sigmoid for the built-in encoder; default: a briefly trained adapter"
    )
    parser.add_argument("--cases", nargs="+", default=headneck.split("support")[2:5])
    parser.add_argument("--overlaps", type=float, nargs="+", default=[OVERLAP, 0.5])
    arguments = parser.parse_args()
    bundle = headneck.encoder(None)
    with tempfile.TemporaryDirectory() as folder:
        path = arguments.adapter or _quick_adapter(bundle, Path(folder))
        file = read_adapter(path)
        started = time.perf_counter()
        graph = export_adapter(path, Path(folder) / "fused.onnx", encoder=bundle.path)
        print(
            f"{graph.path.stat().st_size / 1e6:.2f} MB, written in {time.perf_counter() - started:.0f} s, "
            f"noise windows within {graph.difference:.1e}"
        )
        session = import_onnxruntime().InferenceSession(graph.path)
        for case in arguments.cases:
            volume = read_ct(headneck.image_path(case))
            contours = read_label_map(headneck.label_path(case)).array
            for name, scan, reference in (
                ("one window", _one_window(volume, bundle), None),
                ("whole scan", volume, contours),
            ):
                _compare(
                    f"{case} {name}",
                    scan,
                    reference,
                    session=session,
                    file=file,
                    bundle=bundle,
                    overlaps=arguments.overlaps,
                    folder=Path(folder),
                )


def _compare(
    what: str,
    volume: Volume,
    reference: NDArray[np.unsignedinteger] | None,
    *,
    session: Any,  # noqa: ANN401 - onnxruntime has no type annotations
    file: AdapterFile,
    bundle: EncoderBundle,
    overlaps: list[float],
    folder: Path,
) -> None:
    """Print the difference between the graph's result and that of fseft-edge, stored as float32, on one scan."""
    with open_session(bundle, device="cpu") as encoder:
        encoded = encode_scan(volume, bundle=bundle, session=encoder, store=FeatureStore(folder), storage="float32")
    own = np.concatenate([section for _, section in predict_sections(encoded, [file.adapter])], axis=3)
    masks = segment_encoded(encoded, [file.adapter])
    scan = encoded.grid.section(volume, 0, encoded.grid.shape[2])
    for overlap in overlaps if reference is not None else overlaps[:1]:
        fused, windows = blended(session, scan, bundle.window, overlap)
        labels = _labels(encoded, fused)
        difference = np.abs(fused - own)
        print(
            f"{what}, grid {encoded.grid.shape}, overlap {overlap}, {windows} windows: probability differs by at most "
            f"{difference.max():.1e}, on average {difference.mean():.1e}; DSC with the toolkit's masks"
            + (", of both with the contours (toolkit's first):" if reference is not None else ":")
        )
        for number, organ in enumerate(file.description.organs, start=1):
            scores = [dice(labels == number, masks == number)]
            if reference is not None:
                scores += [dice(result == number, reference == organ.label) for result in (masks, labels)]
            print(
                f"  {organ.name} {', '.join('none' if score is None else f'{score:.4f}' for score in scores)}",
                flush=True,
            )


def blended(
    session: Any,  # noqa: ANN401 - onnxruntime has no type annotations
    scan: Array,
    window: tuple[int, int, int],
    overlap: float,
) -> tuple[Array, int]:
    """Return the blended probabilities ``[classes, X, Y, Z]`` of a scan on its grid, and the number of windows."""
    padded = np.pad(scan, [(0, max(0, size - length)) for size, length in zip(window, scan.shape, strict=True)])
    origins = list(
        itertools.product(*(_origins(length, size, overlap) for length, size in zip(padded.shape, window, strict=True)))
    )
    importance = gaussian_importance(window).numpy()
    total: Array | None = None
    weight = np.zeros(padded.shape, np.float32)
    for origin in origins:
        where = tuple(slice(start, start + size) for start, size in zip(origin, window, strict=True))
        probabilities = session.run(None, {"windows": padded[where][None, None]})[0][0]
        if total is None:
            total = np.zeros((len(probabilities), *padded.shape), np.float32)
        total[:, *where] += importance * probabilities
        weight[where] += importance
    assert total is not None  # noqa: S101 - every grid has at least one window
    return (total / weight)[:, *(slice(length) for length in scan.shape)], len(origins)


def _origins(length: int, size: int, overlap: float) -> list[int]:
    return [*range(0, length - size, int(size * (1 - overlap))), length - size]


def _labels(encoded: EncodedScan, probabilities: Array) -> NDArray[np.uint8]:
    """Return the label map of sigmoid probabilities on the lattice of the scan, with the decision rule of `segment`."""
    labels = np.zeros(encoded.grid.source_shape, np.uint8)
    sections: Iterator[tuple[int, Array]] = iter([(0, probabilities)])
    for piece in encoded.grid.to_source(sections):
        where = [slice(None)] * 3
        where[piece.axis] = slice(piece.start, piece.stop)
        best = piece.probabilities.max(axis=0)
        labels[tuple(where)] = np.where(best > 0.5, piece.probabilities.argmax(axis=0) + 1, 0)
    return labels


def _one_window(volume: Volume, bundle: EncoderBundle) -> Volume:
    """Return the middle part of a scan, whose grid fits into one window."""
    grid = Grid.of(volume, bundle.preprocessing)
    part = []
    for axis, size in zip(grid.axes, bundle.window, strict=True):
        centre, half = (axis.start + axis.stop) // 2, int(size * axis.spacing / axis.source_spacing) // 2
        cut = axis.flip_range(slice(max(0, centre - half), min(axis.source_length, centre + half)))
        part.append((axis.source_axis, cut))
    box = tuple(cut for _, cut in sorted(part, key=lambda pair: pair[0]))
    affine = volume.affine.copy()
    affine[:3, 3] += volume.affine[:3, :3] @ [cut.start for cut in box]
    return replace(volume, array=np.ascontiguousarray(volume.array[box]), affine=affine)


def _quick_adapter(bundle: EncoderBundle, folder: Path) -> Path:
    """Write an adapter trained on two support scans for two epochs, which is enough for a comparison of its outputs."""
    path = folder / "quick.adapter"
    adapt(
        bundle.path,
        headneck.image_path("").parent,
        headneck.label_path("").parent,
        headneck.ORGANS,
        path,
        training=TrainingSettings(epochs=2),
        cases=headneck.split("support")[:2],
        validate=False,
    )
    return path


if __name__ == "__main__":
    main()
