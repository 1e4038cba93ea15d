"""Annotations of a scan: which voxels belong to an organ, as a label map or as shares of voxels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from fseft_edge.runtime.errors import GeometryError
from fseft_edge.runtime.scans.lattice import deviation
from fseft_edge.runtime.scans.structures import BoxedShare
from fseft_edge.runtime.scans.volume import LabelMap, Volume, labels_on


@dataclass(frozen=True, eq=False)
class OrganShares:
    """Organs of a scan as shares of voxels, from contours or a segmentation. Organs may overlap.

    Attributes:
        of_label: the shares of each organ by its label value.
        affine: float64 4x4 of the lattice of the scan, voxel index to RAS+ world coordinates in mm.
        shape: voxels along x, y, z.
        source: file of the annotation; None without a file.
    """

    of_label: Mapping[int, BoxedShare] = field(repr=False)
    affine: NDArray[np.float64]
    shape: tuple[int, int, int]
    source: Path | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "of_label", MappingProxyType(dict(self.of_label)))

    @property
    def voxel_volume_mm3(self) -> float:
        """Volume of one voxel."""
        return float(abs(np.linalg.det(self.affine[:3, :3])))

    def contains(self, label: int) -> bool:
        """Return whether the organ with this label value fills at least half of a voxel."""
        return label in self.of_label and self.of_label[label].mask().voxels > 0

    def mask(self, label: int) -> NDArray[np.bool_]:
        """Return the voxels of which the organ with this label value fills at least half, bool ``[X, Y, Z]``."""
        mask = np.zeros(self.shape, bool, order="F")
        if label in self.of_label:
            found = self.of_label[label].mask()
            mask[found.box] = found.inside
        return mask

    def shares(self, label: int) -> NDArray[np.float32]:
        """Return the share of each voxel that the organ with this label value fills, float32 ``[X, Y, Z]``."""
        if label not in self.of_label:
            return np.zeros(self.shape, np.float32, order="F")
        return self.of_label[label].whole()

    def label_map(self, labels: Sequence[int]) -> LabelMap:
        """Return a label map of these organs. Where organs overlap, a voxel gets the last of their label values."""
        array = np.zeros(self.shape, np.min_scalar_type(max(labels, default=0)), order="F")
        for label in labels:
            array[self.mask(label)] = label
        return LabelMap(array, self.affine, self.source)


Annotation: TypeAlias = LabelMap | OrganShares
"""The organs of an annotated scan by label value."""


def annotation_on(scan: Volume, annotation: Annotation) -> Annotation:
    """Return an annotation in the axis order of its scan (see :func:`fseft_edge.runtime.scans.volume.labels_on`).

    Raises:
        GeometryError: the lattices differ.
    """
    if isinstance(annotation, LabelMap):
        return labels_on(scan, annotation)
    if annotation.shape != scan.shape or not deviation(scan.affine, annotation.affine, scan.shape).is_rounding:
        raise GeometryError(
            f"The annotation {annotation.source or '(unnamed)'} was made for the lattice of another scan.",
            remedy="Give the scan and the annotation that belong together.",
        )
    return annotation
