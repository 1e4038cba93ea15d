"""Axial, coronal and sagittal planes of a scan, in radiological convention.

For any order and direction of the axes in the file, the patient's right is on the left of the picture, anterior is at
the top of the axial plane, superior is at the top of the other two planes, and anterior is on the left of the sagittal
plane. The planes follow the axes of the scan: each axis is treated as the nearest anatomical axis, and nothing is
resampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from fseft_edge.runtime.scans.volume import Volume

Mask = NDArray[np.bool_]

Scalar = TypeVar("Scalar", bound=np.generic)

_AXIS_CODES: Final = ("LR", "PA", "IS")
_BODY_HU: Final = -400.0
_MARGIN_AROUND_BODY_MM: Final = 8.0
_MARGIN_AROUND_ORGANS_MM: Final = 45.0


@dataclass(frozen=True)
class Plane:
    """One of the three planes. Axes are those of RAS: 0 points to the right, 1 to anterior, 2 to superior.

    Attributes:
        name: name of the plane.
        normal: axis perpendicular to the plane.
        across: horizontal axis; it points to the left of the picture.
        up: vertical axis; it points to the top of the picture.
        edges: letters of the directions at the left, right, top and bottom edge.
    """

    name: str
    normal: int
    across: int
    up: int
    edges: tuple[str, str, str, str]


PLANES: Final = (
    Plane("axial", normal=2, across=0, up=1, edges=("R", "L", "A", "P")),
    Plane("coronal", normal=1, across=0, up=2, edges=("R", "L", "S", "I")),
    Plane("sagittal", normal=0, across=1, up=2, edges=("A", "P", "S", "I")),
)


@dataclass(frozen=True, eq=False)
class OrganCut:
    """The masks of one organ in one plane, `[rows, columns]` of the picture; ``reference`` may be None."""

    prediction: Mask
    reference: Mask | None


@dataclass(frozen=True, eq=False)
class Cut:
    """One plane of the scan and of each organ, `[rows, columns]` of the picture, with the size of its pixels in mm."""

    plane: Plane
    hu: NDArray[np.float32]
    organs: tuple[OrganCut, ...]
    row_mm: float
    column_mm: float

    @property
    def size_mm(self) -> tuple[float, float]:
        """Width and height in mm."""
        return self.hu.shape[1] * self.column_mm, self.hu.shape[0] * self.row_mm


def three_cuts(volume: Volume, organs: Sequence[tuple[Mask, Mask | None]]) -> tuple[Cut, ...]:
    """Return the axial, coronal and sagittal plane that show most of the organs, cropped to the region of the organs.

    The score of a plane is the sum over organs of the organ's area in the plane, divided by the organ's largest area in
    any parallel plane. The best plane of a single organ is therefore near its centre, and the best plane of paired
    organs is not between them. If all masks are empty, the planes go through the middle of the scan. The planes are
    cropped to 45 mm around the organs and 8 mm around the body.

    Args:
        volume: the scan.
        organs: prediction, and reference or None, of each organ: boolean `[X, Y, Z]` on the scan's lattice.
    """
    view = _AnatomicalView(volume)
    turned = [
        (view.of(prediction), None if reference is None else view.of(reference)) for prediction, reference in organs
    ]
    masks = [mask for pair in turned for mask in pair if mask is not None]
    indices = [_index_of_best_plane(masks, axis, view.shape[axis]) for axis in range(3)]
    planes_hu = [view.hu_plane(plane.normal, indices[plane.normal]) for plane in PLANES]
    volume.release()
    box = _shown_box(planes_hu, masks, view)

    def cut(mask: Mask, plane: Plane) -> Mask:
        return _as_shown(_slice(mask, plane.normal, indices[plane.normal]), plane, box)

    return tuple(
        Cut(
            plane=plane,
            hu=_as_shown(hu, plane, box),
            organs=tuple(OrganCut(cut(p, plane), None if t is None else cut(t, plane)) for p, t in turned),
            row_mm=view.spacing[plane.up],
            column_mm=view.spacing[plane.across],
        )
        for plane, hu in zip(PLANES, planes_hu, strict=True)
    )


def _as_shown(array: NDArray[Scalar], plane: Plane, box: Sequence[slice]) -> NDArray[Scalar]:
    """Return a plane, given with its two RAS axes in order, as rows and columns of the picture, cropped to the box."""
    return array[box[plane.across], box[plane.up]].T[::-1, ::-1]


class _AnatomicalView:
    """A scan and arrays on its lattice, with axes permuted and flipped to the nearest RAS axes."""

    def __init__(self, volume: Volume) -> None:
        self._volume = volume
        self._source_axes = [next(n for n, code in enumerate(volume.axcodes) if code in pair) for pair in _AXIS_CODES]
        self._flipped = [volume.axcodes[axis] in "LPI" for axis in self._source_axes]
        self.shape = tuple(volume.shape[axis] for axis in self._source_axes)
        self.spacing = tuple(volume.spacing[axis] for axis in self._source_axes)

    def of(self, array: NDArray[Scalar]) -> NDArray[Scalar]:
        """Return a view with RAS axes of an array on the scan's lattice, or on a part of the lattice."""
        return array.transpose(self._source_axes)[tuple(slice(None, None, -1 if flip else 1) for flip in self._flipped)]

    def hu_plane(self, normal: int, index: int) -> NDArray[np.float32]:
        """Return one plane of the scan in HU, with its two remaining RAS axes in order."""
        source_index = self.shape[normal] - 1 - index if self._flipped[normal] else index
        selection = [slice(None)] * 3
        selection[self._source_axes[normal]] = slice(source_index, source_index + 1)
        return _slice(self.of(self._volume.hu((selection[0], selection[1], selection[2]))), normal, 0)


def _slice(array: NDArray[Scalar], axis: int, index: int) -> NDArray[Scalar]:
    """Return one plane of an array, with its other two axes in order."""
    plane: NDArray[Scalar] = np.moveaxis(array, axis, 0)[index]
    return plane


def _index_of_best_plane(masks: Sequence[Mask], axis: int, size: int) -> int:
    """Return the index along a RAS axis of the plane with the best score; the middle one of equally good planes."""
    score = np.zeros(size)
    others = tuple(other for other in range(3) if other != axis)
    for mask in masks:
        area = np.count_nonzero(mask, axis=others)
        score += area / max(int(area.max()), 1)
    best = np.flatnonzero(score >= score.max() - 1e-9)
    return int(best[len(best) // 2])


def _shown_box(planes_hu: Sequence[NDArray[np.float32]], masks: Sequence[Mask], view: _AnatomicalView) -> list[slice]:
    """Return the range of indices to show along each RAS axis: all masks with a margin, limited to the body."""
    box = []
    for axis in range(3):
        others = tuple(other for other in range(3) if other != axis)
        in_mask = np.zeros(view.shape[axis], dtype=bool)
        for mask in masks:
            in_mask |= mask.any(axis=others)
        in_body = in_mask.copy()
        for plane, hu in zip(PLANES, planes_hu, strict=True):
            kept = [other for other in range(3) if other != plane.normal]
            if axis in kept:
                in_body |= (hu > _BODY_HU).any(axis=1 - kept.index(axis))
        body = _widened(in_body, _MARGIN_AROUND_BODY_MM / view.spacing[axis])
        organs = _widened(in_mask, _MARGIN_AROUND_ORGANS_MM / view.spacing[axis])
        box.append(slice(max(body.start, organs.start), min(body.stop, organs.stop)))
    return box


def _widened(occupied: NDArray[np.bool_], margin: float) -> slice:
    """Return the range from the first to the last occupied index, plus a margin; all indices if none is occupied."""
    where = np.flatnonzero(occupied)
    if where.size == 0:
        return slice(0, occupied.size)
    wider = int(np.ceil(margin))
    return slice(max(int(where[0]) - wider, 0), min(int(where[-1]) + 1 + wider, occupied.size))
