"""How well a predicted mask agrees with a reference: DSC, HD95, normalised surface distance, volumes.

Surfaces are those of MONAI (and of Nikolov et al. in its voxel form): the mask's voxels with a face neighbour
outside the mask, the scan's border counting as outside; distances run between the centres of such voxels, in mm.

References: Dice 1945 (DSC); Huttenlocher et al. 1993 (Hausdorff distance); Nikolov et al., "Clinically applicable
segmentation of head and neck anatomy", J Med Internet Res 23 (2021) e26151 (normalised surface distance); Maier-Hein
et al., "Metrics reloaded", Nature Methods 21 (2024) 195-212 (which of them to report together).
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Spacing = tuple[float, float, float]

DEFAULT_NSD_TOLERANCE_MM = 2.0

_ROUNDING_MM = 1e-4
"""Distances are float32 sums of spacings read from an affine; a distance of the tolerance itself is within it."""


@dataclass(frozen=True)
class MaskScore:
    """The agreement of one predicted mask with its reference.

    With both masks empty there is nothing to agree about: ``dsc``, ``hd95_mm`` and ``nsd`` are None. With one of
    them empty, ``dsc`` and ``nsd`` are 0 and ``hd95_mm`` is infinite.
    """

    dsc: float | None
    hd95_mm: float | None
    nsd: float | None


def score_mask(
    prediction: NDArray[np.bool_],
    reference: NDArray[np.bool_],
    spacing: Spacing,
    *,
    nsd_tolerance_mm: float = DEFAULT_NSD_TOLERANCE_MM,
) -> MaskScore:
    """DSC, HD95 and normalised surface distance of one pair of masks.

    Args:
        prediction: `[X, Y, Z]`.
        reference: `[X, Y, Z]`, on the same lattice.
        spacing: distance of neighbouring voxel centres along each array axis, mm.
        nsd_tolerance_mm: how far a surface may be off and still count as right, mm.
    """
    hd95_mm, nsd = surface_scores(prediction, reference, spacing, nsd_tolerance_mm=nsd_tolerance_mm)
    return MaskScore(dsc=dice(prediction, reference), hd95_mm=hd95_mm, nsd=nsd)


def volume_ml(mask: NDArray[np.bool_], voxel_volume_mm3: float) -> float:
    """Volume of a mask of any shape, ml, rounded to 1e-6 ml: a determinant's last bits are no volume."""
    return round(int(np.count_nonzero(mask)) * voxel_volume_mm3 / 1000, 6)


def dice(prediction: NDArray[np.bool_], reference: NDArray[np.bool_]) -> float | None:
    """Dice similarity coefficient ``2 |P ∩ R| / (|P| + |R|)``, 0 to 1; None when both masks are empty.

    Args:
        prediction: any shape.
        reference: the same shape.
    """
    _require_masks(prediction, reference)
    voxels = int(np.count_nonzero(prediction)) + int(np.count_nonzero(reference))
    if voxels == 0:
        return None
    return 2 * int(np.count_nonzero(prediction & reference)) / voxels


def surface_scores(
    prediction: NDArray[np.bool_],
    reference: NDArray[np.bool_],
    spacing: Spacing,
    *,
    nsd_tolerance_mm: float = DEFAULT_NSD_TOLERANCE_MM,
) -> tuple[float | None, float | None]:
    """HD95 in mm and normalised surface distance (0 to 1) of a pair of masks `[X, Y, Z]`.

    HD95 is the larger of the two directed 95th percentiles; the normalised surface distance is the share of both
    surfaces' voxels that lie within the tolerance of the other surface. Empty masks: see :class:`MaskScore`.

    Args:
        prediction: `[X, Y, Z]`.
        reference: `[X, Y, Z]`, on the same lattice.
        spacing: distance of neighbouring voxel centres along each array axis, mm.
        nsd_tolerance_mm: how far a surface may be off and still count as right, mm.
    """
    _require_masks(prediction, reference)
    box = _bounding_box(prediction, reference)
    if box is None:
        return None, None
    prediction, reference = prediction[box], reference[box]
    if not prediction.any() or not reference.any():
        return math.inf, 0.0

    import torch  # noqa: PLC0415  seconds to import, and DSC alone needs neither
    from monai.metrics.hausdorff_distance import compute_hausdorff_distance  # noqa: PLC0415 - likewise
    from monai.metrics.surface_dice import compute_surface_dice  # noqa: PLC0415 - likewise

    y_pred, y = (torch.from_numpy(np.ascontiguousarray(mask))[None, None] for mask in (prediction, reference))
    with warnings.catch_warnings():
        # MONAI 1.5 and 1.6 call their own deprecated argument here.
        warnings.filterwarnings("ignore", message=".*always_return_as_numpy", category=FutureWarning)
        hd95_mm = compute_hausdorff_distance(y_pred, y, include_background=True, percentile=95, spacing=spacing)
        nsd = compute_surface_dice(
            y_pred, y, class_thresholds=[nsd_tolerance_mm + _ROUNDING_MM], include_background=True, spacing=spacing
        )
    return float(hd95_mm), float(nsd)


def _require_masks(prediction: NDArray[np.bool_], reference: NDArray[np.bool_]) -> None:
    if prediction.dtype != np.bool_ or reference.dtype != np.bool_:
        raise TypeError(f"masks are boolean arrays, not {prediction.dtype} and {reference.dtype}")
    if prediction.shape != reference.shape:
        raise ValueError(f"masks of one lattice have one shape, not {prediction.shape} and {reference.shape}")


def _bounding_box(*masks: NDArray[np.bool_]) -> tuple[slice, ...] | None:
    """The smallest box around every mask, one voxel wider where the lattice has one; None when all are empty.

    The margin keeps a face of the mask that lies inside the lattice from becoming a face at its border; both are
    surface, so that the scores of the box and of the whole lattice are the same.
    """
    box = []
    for axis in range(3):
        others = tuple(other for other in range(3) if other != axis)
        occupied = np.flatnonzero(np.logical_or.reduce([mask.any(axis=others) for mask in masks]))
        if occupied.size == 0:
            return None
        box.append(slice(max(int(occupied[0]) - 1, 0), int(occupied[-1]) + 2))
    return tuple(box)
