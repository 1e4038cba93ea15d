"""Segment a CT with a graph of `fseft-edge export-adapter`, in a program that does not use fseft-edge.

    python segment_onnx.py GRAPH SCAN MASK

Steps 1 to 8 of export-adapter.md. The program needs nibabel, NumPy and onnxruntime. Set
ORT_DISABLE_TELEMETRY=1: otherwise onnxruntime reports its use over the network.
"""

import itertools
import json
import sys
from pathlib import Path
from typing import Any, cast

import nibabel as nib
import numpy as np
import onnxruntime  # type: ignore[import-untyped]  # it has no type hints
from numpy.typing import NDArray


def weights(positions: NDArray[Any], count: int, reach: float) -> NDArray[np.float32]:
    """Return a matrix of linear interpolation."""
    positions = np.clip(positions, 0, count - 1) if reach == 1 else positions
    matrix = np.maximum(0, 1 - np.abs(positions[:, None] - np.arange(count)) / reach)
    return np.asarray(matrix / matrix.sum(axis=1, keepdims=True), dtype=np.float32)


def along_every_axis(array: NDArray[Any], matrices: list[NDArray[np.float32]]) -> NDArray[Any]:
    """Multiply the last three axes by a matrix each."""
    for axis, matrix in enumerate(matrices, start=array.ndim - 3):
        array = np.moveaxis(np.tensordot(matrix, array, axes=(1, axis)), 0, axis)
    return array


def box_above(hu: NDArray[Any], threshold: float | None, spacing: NDArray[Any]) -> list[tuple[int, int]]:
    """Return the box of all voxels above a HU value, plus 10 mm."""
    if threshold is None or not (hu > threshold).any():
        return [(0, count) for count in hu.shape]
    found = np.nonzero(hu > threshold)
    margin = [int(np.ceil(10 / step)) for step in spacing]
    return [(max(0, i.min() - m), min(n, i.max() + 1 + m)) for i, m, n in zip(found, margin, hu.shape, strict=True)]


def blended(
    session: onnxruntime.InferenceSession,
    grid: NDArray[np.float32],
    window: list[int],
    overlap: float,
    blending: dict[str, Any],
) -> NDArray[np.float32]:
    """Return the blended probabilities of all windows, ``[K, X, Y, Z]``."""
    padded = np.pad(grid, [(0, max(0, w - n)) for w, n in zip(window, grid.shape, strict=True)])
    steps = [max(1, int(w * (1 - overlap))) for w in window]
    starts = [[*range(0, n - w, step), n - w] for n, w, step in zip(padded.shape, window, steps, strict=True)]
    x, y, z = (np.exp(-(((np.arange(w) - (w - 1) / 2) / (blending["sigma_scale"] * w)) ** 2) / 2) for w in window)
    importance = np.einsum("x,y,z->xyz", x, y, z)
    importance = np.maximum(importance, max(importance.min(), blending["minimum"])).astype(np.float32)
    classes = session.get_outputs()[0].shape[1]
    total, weight = np.zeros((classes, *padded.shape), np.float32), np.zeros(padded.shape, np.float32)
    for corner in itertools.product(*starts):
        here = tuple(slice(start, start + w) for start, w in zip(corner, window, strict=True))
        probabilities = session.run(["probabilities"], {"windows": padded[here][None, None]})[0][0]
        total[(slice(None), *here)] += importance * probabilities
        weight[here] += importance
    total /= weight
    return total[(slice(None), *(slice(n) for n in grid.shape))]


def segment(graph: str | Path, scan: str | Path, output: str | Path) -> None:
    """Write the mask of a scan."""
    session = onnxruntime.InferenceSession(graph)
    said = session.get_modelmeta().custom_metadata_map
    names = ("organs", "preprocessing", "window", "overlap", "blending")
    organs, preprocessing, *sliding = (json.loads(said[f"fseft_edge.{name}"]) for name in names)

    image = cast("nib.Nifti1Image", nib.load(scan))
    stored = nib.orientations.io_orientation(image.affine)
    wanted = nib.orientations.axcodes2ornt(tuple(preprocessing["axcodes"]))
    turned = image.as_reoriented(nib.orientations.ornt_transform(stored, wanted))
    hu, spacing = turned.get_fdata(dtype=np.float32), nib.affines.voxel_sizes(turned.affine)

    to_grid, to_scan = [], []
    box = box_above(hu, preprocessing["crop_below_hu"], spacing)
    for count, old, new, (start, stop) in zip(hu.shape, spacing, preprocessing["spacing"], box, strict=True):
        length = max(1, int(np.floor((stop - start) * old / new + 0.5)))
        on_scan = (np.arange(length) - (length - 1) / 2) * new / old + (start + stop - 1) / 2
        to_grid.append(weights(on_scan, count, max(1, new / old) if preprocessing["antialias"] else 1))
        on_grid = (np.arange(count) - (start + stop - 1) / 2) * old / new + (length - 1) / 2
        to_scan.append(weights(on_grid, length, 1))
        to_scan[-1][:start] = to_scan[-1][stop:] = 0

    low, high = preprocessing["hu_window"]
    grid = np.clip((along_every_axis(hu, to_grid) - low) / (high - low), 0, 1).astype(np.float32)
    probabilities = blended(session, grid, *sliding)
    probabilities = along_every_axis(probabilities, to_scan)

    likely = probabilities[[organ["channel"] for organ in organs]]
    threshold = 0.5 if said["fseft_edge.activation"] == "sigmoid" else probabilities[0]
    labels = np.array([organ["mask_label"] for organ in organs])[likely.argmax(axis=0)]
    mask = np.where(likely.max(axis=0) > threshold, labels, 0).astype(np.uint16)
    mask = nib.orientations.apply_orientation(mask, nib.orientations.ornt_transform(wanted, stored))
    nib.save(nib.Nifti1Image(mask, image.affine), output)


if __name__ == "__main__":
    segment(*sys.argv[1:])
