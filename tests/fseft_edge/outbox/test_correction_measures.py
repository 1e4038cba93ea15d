"""Surface distance and added path length of a correction."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from fseft_edge.evaluation.metrics import surface_scores
from fseft_edge.masks.result import SegmentedOrgan
from fseft_edge.outbox.correction_measures import corrected_organs
from fseft_edge.outbox.records import CorrectedOrgan
from fseft_edge.runtime.scans.volume import LabelMap

ORGANS = (SegmentedOrgan("liver", 3, 1.0, ()), SegmentedOrgan("spleen", 300, 1.0, ()))


def compared(
    draft: NDArray[np.unsignedinteger],
    corrected: NDArray[np.unsignedinteger],
    spacing: tuple[float, float, float] = (1.0, 1.0, 3.0),
) -> tuple[CorrectedOrgan, ...]:
    affine = np.diag([*spacing, 1.0])
    return corrected_organs(LabelMap(draft, affine), LabelMap(corrected, affine), ORGANS)


def block(*bounds: tuple[int, int], label: int = 3) -> NDArray[np.uint16]:
    labels = np.zeros((20, 18, 10), np.uint16)
    labels[tuple(slice(*bound) for bound in bounds)] = label
    return labels


def test_a_mask_without_changes_has_no_distance_and_no_added_path() -> None:
    same = block((4, 9), (5, 9), (2, 6))
    assert compared(same, same) == (
        CorrectedOrgan("liver", 3, pytest.approx(5 * 4 * 4 * 3.0 / 1000), 0.0, 0.0, 0.0),
        CorrectedOrgan("spleen", 300, 0.0, None, None, 0.0),
    )


def test_the_added_path_is_the_new_contour_on_every_slice() -> None:
    """A block that is moved by one voxel has two new sides; a new slice has its whole contour."""
    draft = block((4, 9), (5, 9), (2, 6))
    (moved, _) = compared(draft, block((5, 10), (5, 9), (2, 6)))
    # On each of 4 slices: 4 voxels of the new right side, and 2 of the new left side, which were inside before.
    assert moved.added_path_mm == pytest.approx(4 * (4 + 2) * 1.0)
    (taller, _) = compared(draft, block((4, 9), (5, 9), (2, 7)))
    assert taller.added_path_mm == pytest.approx(2 * 5 + 2 * 4 - 4)
    assert (taller.hd95_mm, taller.volume_ml) == (3.0, pytest.approx(5 * 4 * 5 * 3.0 / 1000))


def test_the_added_path_has_the_side_of_voxels_that_are_not_square() -> None:
    draft, taller = block((4, 9), (5, 9), (2, 6)), block((4, 9), (5, 9), (2, 7))
    assert compared(draft, taller, (0.5, 2.0, 3.0))[0].added_path_mm == pytest.approx(14 * 1.0)
    assert compared(draft, taller, (2.0, 2.0, 3.0))[0].added_path_mm == pytest.approx(14 * 2.0)


def test_what_is_only_erased_adds_the_new_contour_alone() -> None:
    draft = block((4, 9), (5, 9), (2, 6))
    assert compared(draft, block((4, 9), (5, 9), (2, 5)))[0].added_path_mm == 0
    nothing = compared(draft, np.zeros_like(draft))[0]
    assert nothing == CorrectedOrgan("liver", 3, 0.0, None, None, 0.0)
    new = compared(np.zeros_like(draft), draft)[0]
    assert (new.mean_distance_mm, new.hd95_mm, new.added_path_mm) == (None, None, 4 * 14.0)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_the_measures_do_not_depend_on_the_order_of_axes(order: tuple[int, int, int]) -> None:
    affine = np.diag([1.0, 2.0, 3.0, 1.0])
    draft, corrected = block((4, 9), (5, 9), (2, 6)), block((5, 12), (3, 9), (2, 8))
    plain = corrected_organs(LabelMap(draft, affine), LabelMap(corrected, affine), ORGANS)
    turned = affine[:, [*order, 3]].copy()
    turned[:, 0] *= -1
    arrays = (array.transpose(order)[::-1] for array in (draft, corrected))
    assert corrected_organs(*(LabelMap(array, turned) for array in arrays), ORGANS) == plain


def test_the_surface_distance_agrees_with_monai_and_with_all_pairs_of_surface_voxels() -> None:
    rng = np.random.default_rng(3)
    spacing = (1.5, 0.8, 3.0)
    masks = [ndimage.gaussian_filter(rng.normal(size=(20, 18, 10)), 2.0) > 0.01 for _ in range(2)]
    draft, corrected = (mask.astype(np.uint16) * 300 for mask in masks)
    (_, spleen) = compared(draft, corrected, spacing)
    hd95, _ = surface_scores(*masks, spacing)
    assert spleen.hd95_mm == pytest.approx(hd95, abs=1e-3)
    places = [np.argwhere(mask & ~ndimage.binary_erosion(mask)) * spacing for mask in masks]
    apart = np.linalg.norm(places[0][:, None] - places[1][None], axis=2)
    mean = np.concatenate([apart.min(0), apart.min(1)]).mean()
    assert spleen.mean_distance_mm == pytest.approx(mean, abs=1e-3)
