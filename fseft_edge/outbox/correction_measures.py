"""How much a person corrected: surface distance and added path length of a corrected mask to the mask of the batch.

- Surface distance: the surface consists of all voxels of an organ with a face neighbour outside the organ, as for the
  HD95 of :mod:`fseft_edge.evaluation.metrics`. The mean is taken over the surface voxels of both masks, each with its
  distance to the nearest surface voxel of the other mask. The HD95 is the larger of the 95th percentiles of both
  directions.
- Added path length: the contour of an organ on a slice consists of the voxels of the organ with a neighbour outside the
  organ on this slice, one beside another along an axis. The added path length is the number of contour voxels of the
  corrected mask that are not contour voxels of the mask of the batch, over all slices, times the side of a voxel in the
  slice (Vaassen et al., "Evaluation of measures for assessing time-saving of automatic organ-at-risk segmentation in
  radiotherapy", Physics and Imaging in Radiation Oncology 13 (2020) 1-6, doi 10.1016/j.phro.2019.12.001). Slices are
  perpendicular to the axis nearest to the direction of the head. Of voxels that are not square, the side is the square
  root of their area.

Both count the outside of the scan as outside the organ, and are in mm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from fseft_edge.evaluation.metrics import volume_ml
from fseft_edge.masks.result import SegmentedOrgan
from fseft_edge.outbox.records import CorrectedOrgan
from fseft_edge.runtime.scans.volume import LabelMap, spacing_of

_DECIMALS_MM: Final = 3


def corrected_organs(
    draft: LabelMap, corrected: LabelMap, organs: Sequence[SegmentedOrgan]
) -> tuple[CorrectedOrgan, ...]:
    """Return every organ of a corrected mask, compared with the mask that the batch made.

    Args:
        draft: the mask that the batch made.
        corrected: the corrected mask, on the lattice of ``draft``.
        organs: the organs of both masks.
    """
    places = [ndimage.find_objects(labels.array) for labels in (draft, corrected)]
    return tuple(_compared(draft, corrected, organ, places) for organ in organs)


def _compared(
    draft: LabelMap,
    corrected: LabelMap,
    organ: SegmentedOrgan,
    places: Sequence[Sequence[tuple[slice, ...] | None]],
) -> CorrectedOrgan:
    found = [boxes[organ.label - 1] if organ.label <= len(boxes) else None for boxes in places]
    boxes = [box for box in found if box is not None]
    around = tuple(
        slice(max(min(box[axis].start for box in boxes) - 1, 0), max(box[axis].stop for box in boxes) + 1)
        for axis in range(3 if boxes else 0)
    )
    before, after = (labels.array[around] == organ.label for labels in (draft, corrected))
    spacing = spacing_of(corrected.affine)
    mean, hd95 = _surface_distances(before, after, spacing) if len(boxes) == 2 else (None, None)
    return CorrectedOrgan(
        organ.name,
        organ.label,
        volume_ml(after, corrected.voxel_volume_mm3),
        mean,
        hd95,
        _added_path(before, after, spacing, slice_axis(corrected.affine)) if boxes else 0.0,
    )


def slice_axis(affine: NDArray[np.float64]) -> int:
    """Return the voxel axis that is nearest to the direction from the feet to the head."""
    return int(np.argmax(np.abs(affine[2, :3]) / spacing_of(affine)))


def _surface_distances(
    before: NDArray[np.bool_], after: NDArray[np.bool_], spacing: tuple[float, float, float]
) -> tuple[float, float]:
    """Return the mean and the 95th percentile of the surface distance of two masks that are not empty, in mm."""
    if np.array_equal(before, after):
        return 0.0, 0.0
    faces = ndimage.generate_binary_structure(3, 1)
    surfaces = [mask & ~ndimage.binary_erosion(mask, faces) for mask in (before, after)]
    directions = [
        ndimage.distance_transform_edt(~other, sampling=spacing)[surface]
        for surface, other in (surfaces, reversed(surfaces))
    ]
    mean = float(np.concatenate(directions).mean())
    hd95 = max(float(np.percentile(distances, 95)) for distances in directions)
    return round(mean, _DECIMALS_MM), round(hd95, _DECIMALS_MM)


def _added_path(
    before: NDArray[np.bool_], after: NDArray[np.bool_], spacing: tuple[float, float, float], axis: int
) -> float:
    """Return the added path length of two masks in mm.

    Args:
        before: mask of the batch.
        after: corrected mask.
        spacing: voxel spacing along each array axis in mm.
        axis: array axis that is perpendicular to the slices.
    """
    beside = ndimage.generate_binary_structure(3, 1)
    beside[tuple(slice(None) if other != axis else [0, 2] for other in range(3))] = False
    old, new = (mask & ~ndimage.binary_erosion(mask, beside) for mask in (before, after))
    side = math.sqrt(math.prod(spacing) / spacing[axis])
    return round(int(np.count_nonzero(new & ~old)) * side, _DECIMALS_MM)
