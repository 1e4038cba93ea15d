"""Identity of scans and annotations by their content: file format, compression and axis order change no hash.

Two files of the same scan have the same hash, whatever their names and containers are. The arrays are hashed in the
axis order nearest to RAS+, so that a scan that another program stored flipped or with permuted axes keeps its hash.
Voxel spacing and position are not part of a hash, because programs round them differently.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, Final

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from fseft_edge.runtime.scans.annotation import Annotation, OrganShares
from fseft_edge.runtime.scans.volume import LabelMap, Volume, slabs

_HU: Final = (-1000, 3000)
"""HU are limited to this range: programs fill the corners outside the field of view with different values below air."""

_LISTED: Final = 20


def scan_sha256(volume: Volume) -> str:
    """Return the SHA-256 of the shape and the HU of a scan, in whole HU from -1000 to 3000.

    The voxels are read once, in pieces.
    """
    voxels = _in_ras(volume.array, volume.affine)
    digest = hashlib.sha256(f"fseft-edge scan {voxels.shape}".encode())
    for piece in slabs(voxels):
        hu = np.rint(piece.astype(np.float64) * volume.slope + volume.intercept)
        digest.update(np.ascontiguousarray(np.clip(hu, *_HU).astype("<i2").T).data)
        volume.release()
    return digest.hexdigest()


def annotation_sha256(annotation: Annotation, values: Sequence[int]) -> str:
    """Return the SHA-256 of the shape of an annotation and of the organs in it.

    Args:
        annotation: the annotation; of shares, those voxels are hashed of which an organ fills at least half.
        values: label value of each organ. The number of an organ in this sequence is hashed instead of its label value,
            and all other label values are hashed as background: contours of further organs do not change the hash.
    """
    labels = annotation.label_map(values) if isinstance(annotation, OrganShares) else annotation
    voxels = _in_ras(labels.array, labels.affine)
    digest = hashlib.sha256(f"fseft-edge annotation {voxels.shape}".encode())
    for piece in slabs(voxels):
        numbers = np.zeros(piece.shape, "<u2")
        for number, value in enumerate(values, start=1):
            numbers[piece == value] = number
        digest.update(np.ascontiguousarray(numbers.T).data)
    return digest.hexdigest()


def found_label_values(label_maps: Iterable[LabelMap]) -> str:
    """Return the label values in label maps as text for a message: ``1 (in 3 files, 10.1 to 12.3 ml)``, ...

    Args:
        label_maps: the label maps; only one of them is used at a time.
    """
    volumes: dict[int, list[float]] = {}
    for labels in label_maps:
        values, counts = np.unique(labels.array, return_counts=True)
        for value, count in zip(values.tolist(), counts.tolist(), strict=True):
            if value:
                volumes.setdefault(value, []).append(count * labels.voxel_volume_mm3 / 1000)
    listed = [
        f"{value} (in {len(ml)} {'file' if len(ml) == 1 else 'files'}, {_range(ml)} ml)"
        for value, ml in sorted(volumes.items())[:_LISTED]
    ]
    if len(volumes) > _LISTED:
        listed.append(f"and {len(volumes) - _LISTED} more")
    return ", ".join(listed) or "none"


def _range(ml: Sequence[float]) -> str:
    low, high = f"{min(ml):.1f}", f"{max(ml):.1f}"
    return low if low == high else f"{low} to {high}"


def _in_ras(array: NDArray[Any], affine: NDArray[np.float64]) -> NDArray[Any]:
    """Return a view of an array in the axis order nearest to RAS+."""
    view: NDArray[Any] = nib.orientations.apply_orientation(array, nib.orientations.io_orientation(affine))
    return view
