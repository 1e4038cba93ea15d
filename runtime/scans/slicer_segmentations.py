"""Segmentations of 3D Slicer (``.seg.nrrd``) as structures of a CT.

Source: https://slicer.readthedocs.io/en/latest/developer_guide/modules/segmentations.html. Such a file is an NRRD file
with one layer, or with several layers if segments overlap. A segment is the voxels of its layer
(``SegmentN_Layer``) that have its label value (``SegmentN_LabelValue``). Files of 3D Slicer before version 4.11 do not
state these two: each segment has its own layer, and the value 1. A file of a single voxel means that all segments are
empty. 3D Slicer reads such files in the same way (``vtkMRMLSegmentationStorageNode.cxx``).

3D Slicer stores only the part of the lattice that the segments need. The part is placed on the lattice of the CT by its
geometry in the NRRD header; ``Segmentation_ReferenceImageExtentOffset`` counts voxels of a lattice that the file does
not contain, and is not used. ``SegmentN_Extent`` is only compared with the voxels. If the voxels are not those of the
CT, but have the same axes, as with the oversampling of 3D Slicer, then the share of each voxel of the CT is computed
exactly, as overlap of boxes.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from fseft_edge.runtime.errors import GeometryError, LabelError
from fseft_edge.runtime.scans.components import Slices
from fseft_edge.runtime.scans.lattice import LATTICE_TOLERANCE, deviation
from fseft_edge.runtime.scans.nrrd_files import read_nrrd
from fseft_edge.runtime.scans.organs import LARGEST_LABEL
from fseft_edge.runtime.scans.resampled_shares import resampled
from fseft_edge.runtime.scans.structures import BoxedShare, Lattice, StructureSummary

_KEY: Final = re.compile(r"Segment([0-9]{1,6})_([A-Za-z]+)")
_REPRESENTATION: Final = ("Segmentation_SourceRepresentation", "Segmentation_MasterRepresentation")
_BINARY: Final = "Binary labelmap"
_EXPORT: Final = "Save the segmentation again with 3D Slicer, with a binary label map as its source representation."
_RESAMPLE: Final = (
    "In 3D Slicer, set the scan as source geometry of the segmentation (Segment Editor, button beside 'Source "
    "volume'), and save the segmentation again."
)


@dataclass(frozen=True, eq=False)
class Segment:
    """A segment of a segmentation of 3D Slicer.

    Attributes:
        name: name in the file (``SegmentN_Name``).
        number: label value in its layer.
        layer: all voxels of the layer ``[X, Y, Z]``.
        affine: from voxel index of the layer to RAS+ mm.
        box: the smallest box that contains the segment; None if it has no voxels.
        source: the file, for messages.
    """

    name: str
    number: int
    layer: NDArray[Any]
    affine: NDArray[np.float64]
    box: Slices | None
    source: Path

    @property
    def frame_of_reference(self) -> str:
        """Empty: the file states no frame of reference."""
        return ""

    @property
    def is_empty(self) -> bool:
        """Whether the file names the segment but contains no voxel of it, so that it counts as not annotated."""
        return self.box is None

    def summary(self) -> StructureSummary:
        """Return the number of slices with voxels along the last axis of the file, and the volume."""
        if self.box is None:
            return StructureSummary(0, 0, 0.0, ("BINARY",), ())
        filled = self.layer[self.box] == self.number
        voxel_ml = abs(float(np.linalg.det(self.affine[:3, :3]))) / 1000
        planes = int(filled.any(axis=(0, 1)).sum())
        return StructureSummary(0, planes, int(np.count_nonzero(filled)) * voxel_ml, ("BINARY",), ())

    def share(self, lattice: Lattice) -> tuple[BoxedShare, tuple[str, ...]]:
        """Return the share of each voxel of a CT, and warnings as whole sentences without names.

        The shares are 0 and 1 if the lattice of the file is a part of the lattice of the CT, to a tenth of a voxel.

        Raises:
            GeometryError: the axes of the file are not those of the CT, or a part of the segment is outside the CT.
        """
        if self.box is None:
            return BoxedShare.of(np.zeros((0, 0, 0), np.float32), (0, 0, 0), lattice.shape), ()
        order, steps, first = self._place(lattice)
        filled = self.layer[self.box] == self.number
        start = np.array([part.start for part in self.box])
        ends = first + steps * np.stack([start, start + filled.shape - 1])[:, order]
        low, high = ends.min(axis=0), ends.max(axis=0)
        if (np.abs(steps) == 1).all() and (first == np.rint(first)).all():
            self._check_inside(low, high, lattice, allowed=0.0)
            shares = np.flip(filled.transpose(order), tuple(axis for axis in range(3) if steps[axis] < 0))
            x, y, z = (int(end) for end in low)
            return BoxedShare.of(shares.astype(np.float32), (x, y, z), lattice.shape), ()
        beyond = (np.abs(steps) - 1) / 2  # from the edge of a voxel of the CT to that of a voxel of the file
        self._check_inside(low - beyond, high + beyond, lattice, allowed=0.5)
        affine = self.affine.copy()
        affine[:3, 3] += affine[:3, :3] @ start
        return resampled(filled.astype(np.float32), affine, lattice), (
            "The voxels of the segmentation are not those of the scan; the share of each voxel was computed.",
        )

    def _place(self, lattice: Lattice) -> tuple[tuple[int, int, int], NDArray[np.float64], NDArray[np.float64]]:
        """Return how voxels of the file lie among those of the CT.

        Returns:
            The axis of the file along each axis of the CT; the voxels of the CT from one voxel of the file to the next,
            negative if the axis runs in the opposite direction; and the place of the first voxel of the file. Whole
            numbers if the deviation from them is rounding.
        """
        to_ct = np.linalg.solve(lattice.affine, self.affine).astype(np.float64)
        directions = np.abs(to_ct[:3, :3] / np.linalg.norm(to_ct[:3, :3], axis=0))
        x, y, z = (int(axis) for axis in directions.argmax(axis=1))
        order = (x, y, z)
        if sorted(order) != [0, 1, 2]:
            raise self._other_lattice("their axes have other directions")
        steps, first = to_ct[range(3), order], to_ct[:3, 3]
        apart = 0.0
        whole: NDArray[np.float64] = np.rint(first)
        for step, start in ((np.sign(steps), whole), (steps, first)):
            straight = np.eye(4)
            straight[:3] = 0.0
            straight[range(3), order], straight[:3, 3] = step, start
            # Of two affines into the lattice of the CT, the difference is in voxels of the CT.
            apart = deviation(np.eye(4), np.eye(4) + to_ct - straight, self.layer.shape).voxels
            if apart <= LATTICE_TOLERANCE:
                return order, step, start
        raise self._other_lattice(f"their axes are inclined to each other, by up to {apart:.2g} voxels of the scan")

    def _other_lattice(self, what: str) -> GeometryError:
        return GeometryError(
            f"The segmentation {self.source} and the scan have different lattices: {what}.", remedy=_RESAMPLE
        )

    def _check_inside(
        self, low: NDArray[np.float64], high: NDArray[np.float64], lattice: Lattice, *, allowed: float
    ) -> None:
        """Raise GeometryError if a range of voxels leaves the CT by more than ``allowed`` voxels of the CT."""
        outside = float(max((-low).max(), (high - np.array(lattice.shape) + 1).max()))
        if outside > allowed + LATTICE_TOLERANCE:
            raise GeometryError(
                f"A segment of {self.source} is outside the scan by up to {outside:.3g} voxels.",
                remedy="Give the segmentation of this scan, or remove what is drawn outside the scan.",
            )


@dataclass(frozen=True, eq=False)
class SlicerSegmentation:
    """A segmentation of 3D Slicer.

    Attributes:
        path: the file.
        structures: all segments, in the order of the file; also those without voxels.
        warnings: everything that was left out or is unusual, as whole sentences without names.
    """

    path: Path
    structures: tuple[Segment, ...]
    warnings: tuple[str, ...]


def read_segmentation(path: Path) -> SlicerSegmentation:
    """Read a segmentation of 3D Slicer.

    Args:
        path: ``.seg.nrrd`` file.

    Raises:
        UnreadableFileError: the file is missing, a folder, truncated, damaged, or not NRRD.
        GeometryError: the geometry is missing, unknown or impossible.
        LabelError: the file contains no segments, no label values, or segments without a layer or label value of
            their own.
        OutOfSpaceError: the temporary folder has too little disk space for the unpacked voxels.
    """
    stored = read_nrrd(path)
    array, affine = stored.image.array, stored.image.affine
    representation = next((stored.values[key] for key in _REPRESENTATION if key in stored.values), _BINARY)
    if array.dtype.kind not in "iu" or array.ndim > 4 or representation != _BINARY:
        raise LabelError(
            f"{path} is not a segmentation of label values: its shape is {array.shape}, its value type is "
            f"{array.dtype}, and its source representation is {representation!r}.",
            remedy=_EXPORT,
        )
    lists = [axis for axis in range(array.ndim) if axis not in stored.spatial]
    layers = list(np.moveaxis(array, lists, [0])) if lists else [array]
    headers = _headers(stored.values, len(layers), path)
    boxes = {} if layers[0].size == 1 else _boxes(layers, headers)
    segments = tuple(
        Segment(header.name, header.value, layers[header.layer], affine, boxes.get(header.key), path)
        for header in headers
    )
    warnings = [*stored.image.warnings, *_extent_warnings(headers, boxes)]
    if layers[0].size > 1 and _voxels(layers) > sum(
        int(np.count_nonzero(segment.layer[segment.box] == segment.number)) for segment in segments if segment.box
    ):
        warnings.append("The file contains label values that belong to no segment, which were ignored.")
    return SlicerSegmentation(path, segments, tuple(warnings))


@dataclass(frozen=True)
class _Header:
    """What the header says about a segment. ``extent`` is None if it is not stated."""

    name: str
    layer: int
    value: int
    extent: tuple[int, ...] | None

    @property
    def key(self) -> tuple[int, int]:
        return self.layer, self.value


def _headers(values: Mapping[str, str], layers: int, path: Path) -> list[_Header]:
    fields: dict[int, dict[str, str]] = defaultdict(dict)
    for key, value in values.items():
        if found := _KEY.fullmatch(key):
            fields[int(found[1])][found[2]] = value.strip()
    if not fields:
        raise LabelError(
            f"{path} contains no segments.",
            remedy="Give a segmentation that 3D Slicer saved; name a label map without segments .nrrd.",
        )
    headers = [_header(number, fields[number], layers, path) for number in sorted(fields)]
    if len({header.key for header in headers}) < len(headers):
        raise LabelError(f"{path} contains two segments with the same layer and label value.", remedy=_EXPORT)
    return headers


def _header(number: int, fields: Mapping[str, str], layers: int, path: Path) -> _Header:
    try:
        layer = int(fields.get("Layer", number if layers > 1 else 0))
        value = int(fields.get("LabelValue", "1"))
        extent = tuple(int(end) for end in fields["Extent"].split()) if "Extent" in fields else None
    except ValueError as error:
        raise LabelError(f"{path} contains a segment whose header is damaged.", remedy=_EXPORT) from error
    if not (0 <= layer < layers and 1 <= value <= LARGEST_LABEL):
        raise LabelError(
            f"{path} contains a segment with the layer {layer} and the label value {value}, but the file has "
            f"{layers} {'layer' if layers == 1 else 'layers'}, and a label value is from 1 to {LARGEST_LABEL}.",
            remedy=_EXPORT,
        )
    name = fields.get("Name") or fields.get("ID") or f"Segment_{number + 1}"
    return _Header(name, layer, value, extent)


def _boxes(layers: Sequence[NDArray[Any]], headers: Sequence[_Header]) -> dict[tuple[int, int], Slices]:
    """Return the smallest box of each layer and label value that has voxels."""
    boxes: dict[tuple[int, int], Slices] = {}
    for layer in {header.layer for header in headers}:
        wanted = [header.value for header in headers if header.layer == layer]
        # The last axis is stored slowest.
        found = ndimage.find_objects(layers[layer].T, max_label=max(wanted))
        for value in wanted:
            box = found[value - 1]
            if box is not None:
                z, y, x = box
                boxes[layer, value] = (x, y, z)
    return boxes


def _voxels(layers: Sequence[NDArray[Any]]) -> int:
    return sum(int(np.count_nonzero(layer)) for layer in layers)


def _extent_warnings(headers: Sequence[_Header], boxes: Mapping[tuple[int, int], Slices]) -> list[str]:
    def outside(header: _Header) -> bool:
        box = boxes.get(header.key)
        if box is None or header.extent is None or len(header.extent) != 6:
            return False
        ends = zip(header.extent[::2], header.extent[1::2], strict=True)
        return any(part.start < low or part.stop - 1 > high for part, (low, high) in zip(box, ends, strict=True))

    if not any(outside(header) for header in headers):
        return []
    return ["A segment has voxels outside the extent that the header states for it; all of its voxels were read."]
