"""Agreement of a predicted mask with a reference: DSC, HD95, normalised surface distance, volumes.

The two surface measures have different definitions of a surface, those of their usual implementations in MONAI:

- Normalised surface distance: the definition of Nikolov et al., as in their package ``surface-distance``. Each 2x2x2
  neighbourhood of voxels that the surface crosses is one surface element, whose area comes from the marching cubes
  algorithm. The score is a share of area, independent of voxel size and of the direction of the axes.
- HD95: the surface consists of all voxels of the mask with a face neighbour outside the mask. Distances are measured
  between the centres of these voxels, and each voxel counts once.

For both, the outside of the scan counts as outside the mask, and distances are in mm.

References: Dice 1945 (DSC); Huttenlocher et al. 1993 (Hausdorff distance); Nikolov et al., "Clinically applicable
segmentation of head and neck anatomy", J Med Internet Res 23 (2021) e26151 (normalised surface distance, called
surface Dice there); Maier-Hein et al., "Metrics reloaded", Nature Methods 21 (2024) 195-212 (which of them to report
together).
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
"""Allowance for rounding: distances are float32 sums of voxel spacings, and a distance equal to the tolerance counts
as within the tolerance."""


@dataclass(frozen=True)
class MaskScore:
    """The agreement of one predicted mask with its reference.

    If both masks are empty, ``dsc``, ``hd95_mm`` and ``nsd`` are None. If only one mask is empty, ``dsc`` and ``nsd``
    are 0 and ``hd95_mm`` is infinite.
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
    """Return DSC, HD95 and normalised surface distance of a pair of masks.

    Args:
        prediction: predicted mask ``[X, Y, Z]``.
        reference: reference mask ``[X, Y, Z]`` on the lattice of the prediction.
        spacing: voxel spacing along each array axis in mm.
        nsd_tolerance_mm: tolerance of the normalised surface distance in mm.
    """
    hd95_mm, nsd = surface_scores(prediction, reference, spacing, nsd_tolerance_mm=nsd_tolerance_mm)
    return MaskScore(dsc=dice(prediction, reference), hd95_mm=hd95_mm, nsd=nsd)


def volume_ml(mask: NDArray[np.bool_], voxel_volume_mm3: float) -> float:
    """Return the volume of a mask of any shape in ml, rounded to 1e-6 ml to remove the rounding error of the affine."""
    return round(int(np.count_nonzero(mask)) * voxel_volume_mm3 / 1000, 6)


def dice(prediction: NDArray[np.bool_], reference: NDArray[np.bool_]) -> float | None:
    """Return the Dice similarity coefficient ``2 |P ∩ R| / (|P| + |R|)``, 0 to 1; None if both masks are empty.

    Args:
        prediction: predicted mask of any shape.
        reference: reference mask of the shape of the prediction.
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
    """Return HD95 in mm and normalised surface distance (0 to 1) of a pair of masks.

    HD95 is the larger of the 95th percentiles of the two directed surface distances, over surface voxels. The
    normalised surface distance is the share of the area of both surfaces that is within the tolerance of the other
    surface. The module states the definitions of the surfaces, and :class:`MaskScore` the values for empty masks.

    Args:
        prediction: predicted mask ``[X, Y, Z]``.
        reference: reference mask ``[X, Y, Z]`` on the lattice of the prediction.
        spacing: voxel spacing along each array axis in mm.
        nsd_tolerance_mm: tolerance of the normalised surface distance in mm.
    """
    _require_masks(prediction, reference)
    box = _bounding_box(prediction, reference)
    if box is None:
        return None, None
    prediction, reference = prediction[box], reference[box]
    if not prediction.any() or not reference.any():
        return math.inf, 0.0

    import torch  # noqa: PLC0415 - the import takes seconds, and DSC does not need it
    from monai.metrics.hausdorff_distance import compute_hausdorff_distance  # noqa: PLC0415 - DSC does not need it
    from monai.metrics.surface_dice import compute_surface_dice  # noqa: PLC0415 - DSC does not need it

    y_pred, y = (torch.from_numpy(np.ascontiguousarray(mask))[None, None] for mask in (prediction, reference))
    with warnings.catch_warnings():
        # MONAI 1.5 and 1.6 use a deprecated argument of MONAI here.
        warnings.filterwarnings("ignore", message=".*always_return_as_numpy", category=FutureWarning)
        hd95_mm = compute_hausdorff_distance(y_pred, y, include_background=True, percentile=95, spacing=spacing)
        nsd = compute_surface_dice(
            *(y_pred, y),
            class_thresholds=[nsd_tolerance_mm + _ROUNDING_MM],
            include_background=True,
            spacing=spacing,
            use_subvoxels=True,
        )
    return float(hd95_mm), float(nsd)


def _require_masks(prediction: NDArray[np.bool_], reference: NDArray[np.bool_]) -> None:
    if prediction.dtype != np.bool_ or reference.dtype != np.bool_:
        raise TypeError(f"masks must be boolean arrays, but they are {prediction.dtype} and {reference.dtype}")
    if prediction.shape != reference.shape:
        raise ValueError(f"masks must have the same shape, but have {prediction.shape} and {reference.shape}")


def _bounding_box(*masks: NDArray[np.bool_]) -> tuple[slice, ...] | None:
    """Return the bounding box of all masks plus a margin of one voxel inside the lattice; None if all masks are empty.

    With the margin, the surface of the mask inside the box is the surface inside the complete lattice, so that the
    scores are equal.
    """
    box = []
    for axis in range(3):
        others = tuple(other for other in range(3) if other != axis)
        occupied = np.flatnonzero(np.logical_or.reduce([mask.any(axis=others) for mask in masks]))
        if occupied.size == 0:
            return None
        box.append(slice(max(int(occupied[0]) - 1, 0), int(occupied[-1]) + 2))
    return tuple(box)
