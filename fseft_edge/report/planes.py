"""Axial, coronal and sagittal planes of a scan, laid out as radiologists look at them.

Whatever the file's axes: the patient's right is on the picture's left, anterior is up in the axial plane, superior is
up in the other two, and in the sagittal plane anterior is on the left. Planes run along the scan's own axes, each
taken for the anatomical axis it is nearest to; nothing is resampled here.
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
    """One of the three planes; axes count as in RAS: 0 towards the right, 1 towards anterior, 2 towards superior.

    Rows run against ``up`` and columns against ``across``, which puts ``edges`` (left, right, top, bottom) in place.
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
    """One organ in one plane, `[rows, columns]` as shown; ``truth`` is None where there is no reference."""

    prediction: Mask
    truth: Mask | None


@dataclass(frozen=True, eq=False)
class Cut:
    """One plane of the scan and of every organ, `[rows, columns]` as shown, with the size of its pixels in mm."""

    plane: Plane
    hu: NDArray[np.float32]
    organs: tuple[OrganCut, ...]
    row_mm: float
    column_mm: float

    @property
    def size_mm(self) -> tuple[float, float]:
        """Width and height, mm."""
        return self.hu.shape[1] * self.column_mm, self.hu.shape[0] * self.row_mm


def three_cuts(volume: Volume, organs: Sequence[tuple[Mask, Mask | None]]) -> tuple[Cut, ...]:
    """The axial, coronal and sagittal plane that show most of the organs, cut to the organs' surroundings.

    A plane is chosen by each organ's area in it as a share of the organ's largest, summed over organs; for a single
    organ that is near its centre, and for a pair of organs it does not fall between them. Without any voxel in a mask
    the planes run through the middle of the scan. What lies further than 45 mm from every organ, and air around the
    body, is cut away.

    Args:
        volume: the scan.
        organs: prediction and reference (or None) of each organ, boolean `[X, Y, Z]` on the scan's lattice.
    """
    view = _AnatomicalView(volume)
    turned = [(view.of(prediction), None if truth is None else view.of(truth)) for prediction, truth in organs]
    masks = [mask for pair in turned for mask in pair if mask is not None]
    indices = [_most_telling_index(masks, axis, view.shape[axis]) for axis in range(3)]
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
    """A plane with its two RAS axes in order, cut to the box, as rows and columns of a picture."""
    return array[box[plane.across], box[plane.up]].T[::-1, ::-1]


class _AnatomicalView:
    """The scan and arrays on its lattice, their axes permuted and flipped to the nearest RAS."""

    def __init__(self, volume: Volume) -> None:
        self._volume = volume
        self._source_axes = [next(n for n, code in enumerate(volume.axcodes) if code in pair) for pair in _AXIS_CODES]
        self._flipped = [volume.axcodes[axis] in "LPI" for axis in self._source_axes]
        self.shape = tuple(volume.shape[axis] for axis in self._source_axes)
        self.spacing = tuple(volume.spacing[axis] for axis in self._source_axes)

    def of(self, array: NDArray[Scalar]) -> NDArray[Scalar]:
        """A view of an array on the scan's lattice (or a part of it) with RAS axes."""
        return array.transpose(self._source_axes)[tuple(slice(None, None, -1 if flip else 1) for flip in self._flipped)]

    def hu_plane(self, normal: int, index: int) -> NDArray[np.float32]:
        """One plane of the scan, its two remaining RAS axes in order; HU."""
        source_index = self.shape[normal] - 1 - index if self._flipped[normal] else index
        selection = [slice(None)] * 3
        selection[self._source_axes[normal]] = slice(source_index, source_index + 1)
        return _slice(self.of(self._volume.hu((selection[0], selection[1], selection[2]))), normal, 0)


def _slice(array: NDArray[Scalar], axis: int, index: int) -> NDArray[Scalar]:
    """One plane of an array, its other two axes in order."""
    plane: NDArray[Scalar] = np.moveaxis(array, axis, 0)[index]
    return plane


def _most_telling_index(masks: Sequence[Mask], axis: int, size: int) -> int:
    """The index along a RAS axis at which most of the masks is seen; the middle one among equals."""
    seen = np.zeros(size)
    others = tuple(other for other in range(3) if other != axis)
    for mask in masks:
        area = np.count_nonzero(mask, axis=others)
        seen += area / max(int(area.max()), 1)
    best = np.flatnonzero(seen >= seen.max() - 1e-9)
    return int(best[len(best) // 2])


def _shown_box(planes_hu: Sequence[NDArray[np.float32]], masks: Sequence[Mask], view: _AnatomicalView) -> list[slice]:
    """The box of RAS indices to show: all masks and their surroundings, as far as there is body in the planes."""
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
    """From the first to the last index occupied, wider by a margin; everything when nothing is occupied."""
    where = np.flatnonzero(occupied)
    if where.size == 0:
        return slice(0, occupied.size)
    wider = int(np.ceil(margin))
    return slice(max(int(where[0]) - wider, 0), min(int(where[-1]) + 1 + wider, occupied.size))
