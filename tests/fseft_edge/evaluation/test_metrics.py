"""DSC, HD95 and normalised surface distance: closed forms, distance transforms, another program, empty masks."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.metrics.hausdorff_distance import compute_hausdorff_distance
from numpy.typing import NDArray
from scipy import ndimage

from fseft_edge.evaluation.metrics import MaskScore, dice, score_mask, surface_scores, volume_ml

Mask = NDArray[np.bool_]
SPACINGS = [(1.0, 1.0, 1.0), (0.7, 0.9, 5.0), (3.9, 2.5, 1.1)]


def box(shape: tuple[int, int, int], start: tuple[int, int, int], size: int) -> Mask:
    mask = np.zeros(shape, dtype=bool)
    mask[tuple(slice(first, first + size) for first in start)] = True
    return mask


def sphere(radius_mm: float, spacing: tuple[float, float, float], shape: tuple[int, int, int]) -> Mask:
    distances = [(np.arange(n) - (n - 1) / 2) * step for n, step in zip(shape, spacing, strict=True)]
    x, y, z = np.meshgrid(*distances, indexing="ij")
    return np.asarray(x**2 + y**2 + z**2 <= radius_mm**2)


def blobs(seed: int, shape: tuple[int, int, int]) -> tuple[Mask, Mask]:
    rng = np.random.default_rng(seed)
    first, second = (ndimage.gaussian_filter(rng.normal(size=shape), 1.5, mode="constant") for _ in range(2))
    return first > 0.08, (first + 0.5 * second) > 0.08


def scipy_surface_distances(
    a: Mask, b: Mask, spacing: tuple[float, float, float]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the distances from each surface to the other, from dense distance transforms of the complete lattice."""
    surfaces = [mask & ~ndimage.binary_erosion(mask) for mask in (a, b)]
    to_a, to_b = (ndimage.distance_transform_edt(~surface, sampling=spacing) for surface in surfaces)
    return to_b[surfaces[0]], to_a[surfaces[1]]


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("shift", [1, 3, 5])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_shifted_cube_has_closed_form_scores(axis: int, shift: int, spacing: tuple[float, float, float]) -> None:
    start = [4, 4, 4]
    reference = box((24, 24, 24), (4, 4, 4), 10)
    start[axis] += shift
    score = score_mask(box((24, 24, 24), (start[0], start[1], start[2]), 10), reference, spacing)
    assert score.dsc == pytest.approx(1 - shift / 10)
    assert score.hd95_mm == pytest.approx(shift * spacing[axis])  # the leading face is more than 5 % of the surface


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (1.0, 1.5, 2.0)])
def test_the_distance_of_concentric_spheres_is_the_difference_of_their_radii(
    spacing: tuple[float, float, float],
) -> None:
    shape = (60, 56, 52)
    small, large = sphere(16, spacing, shape), sphere(24, spacing, shape)
    half_voxel = math.hypot(*spacing) / 2
    hd95_mm, nsd_tight = surface_scores(small, large, spacing, nsd_tolerance_mm=8 - 2 * half_voxel)
    _, nsd_loose = surface_scores(small, large, spacing, nsd_tolerance_mm=8 + 2 * half_voxel)
    assert hd95_mm == pytest.approx(8, abs=2 * half_voxel)
    assert nsd_tight == pytest.approx(0, abs=0.02)
    assert nsd_loose == 1
    assert dice(small, large) == pytest.approx(2 * 16**3 / (16**3 + 24**3), rel=0.02)
    assert volume_ml(large, math.prod(spacing)) == pytest.approx(4 / 3 * math.pi * 2.4**3, rel=0.02)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), spacing=st.sampled_from(SPACINGS))
def test_the_hausdorff_distance_equals_dense_distance_transforms(
    seed: int, spacing: tuple[float, float, float]
) -> None:
    a, b = blobs(seed, (15, 17, 12))
    if not a.any() or not b.any():
        return
    from_a, from_b = scipy_surface_distances(a, b, spacing)
    hd95_mm, _ = surface_scores(a, b, spacing)
    assert hd95_mm == pytest.approx(max(np.percentile(from_a, 95), np.percentile(from_b, 95)), rel=1e-5)


OF_NIKOLOV = [
    # seed of `blobs`, spacing, tolerance, and the result of `surface-distance` 0.1, the package of Nikolov et al.:
    # compute_surface_dice_at_tolerance(compute_surface_distances(b, a, spacing), tolerance)
    (0, (1.0, 1.0, 1.0), 1.0, 0.843928),
    (0, (1.0, 1.0, 1.0), 2.0, 0.927902),
    (0, (1.0, 1.0, 1.0), 4.3, 0.99945),
    (0, (0.7, 0.9, 5.0), 1.0, 0.818666),
    (0, (0.7, 0.9, 5.0), 2.0, 0.893677),
    (0, (0.7, 0.9, 5.0), 4.3, 0.989474),
    (0, (3.9, 2.5, 1.1), 1.0, 0.63523),
    (0, (3.9, 2.5, 1.1), 2.0, 0.759183),
    (0, (3.9, 2.5, 1.1), 4.3, 0.898415),
    (1, (1.0, 1.0, 1.0), 1.0, 0.953555),
    (1, (1.0, 1.0, 1.0), 2.0, 0.984871),
    (1, (1.0, 1.0, 1.0), 4.3, 1.0),
    (1, (0.7, 0.9, 5.0), 1.0, 0.940332),
    (1, (0.7, 0.9, 5.0), 2.0, 0.98455),
    (1, (0.7, 0.9, 5.0), 4.3, 1.0),
    (1, (3.9, 2.5, 1.1), 1.0, 0.719231),
    (1, (3.9, 2.5, 1.1), 2.0, 0.862745),
    (1, (3.9, 2.5, 1.1), 4.3, 0.979116),
    (2, (1.0, 1.0, 1.0), 1.0, 0.839516),
    (2, (1.0, 1.0, 1.0), 2.0, 0.921095),
    (2, (1.0, 1.0, 1.0), 4.3, 0.994062),
    (2, (0.7, 0.9, 5.0), 1.0, 0.796395),
    (2, (0.7, 0.9, 5.0), 2.0, 0.865981),
    (2, (0.7, 0.9, 5.0), 4.3, 0.94345),
    (2, (3.9, 2.5, 1.1), 1.0, 0.630297),
    (2, (3.9, 2.5, 1.1), 2.0, 0.761805),
    (2, (3.9, 2.5, 1.1), 4.3, 0.898909),
]


@pytest.mark.parametrize(("seed", "spacing", "tolerance", "expected"), OF_NIKOLOV)
def test_the_normalised_surface_distance_is_that_of_nikolov(
    seed: int, spacing: tuple[float, float, float], tolerance: float, expected: float
) -> None:
    a, b = blobs(seed, (15, 17, 12))
    assert surface_scores(a, b, spacing, nsd_tolerance_mm=tolerance)[1] == pytest.approx(expected, abs=1e-6)


def test_the_normalised_surface_distance_is_a_share_of_area_and_not_of_voxels() -> None:
    """A column of 40 x 40 x 100 mm in slices of 5 mm, and a column that is 20 mm longer. Of voxels, 75 % are near."""
    reference, prediction = (np.zeros((50, 50, 30), dtype=bool) for _ in range(2))
    reference[5:45, 5:45, 3:23] = True
    prediction[5:45, 5:45, 3:27] = True
    _, nsd = surface_scores(prediction, reference, (1.0, 1.0, 5.0), nsd_tolerance_mm=4)
    end, side, rim = 40 * 40, 4 * 40 * 100, 40**2 - 32**2  # the rim of the reference's end is near the long column
    assert nsd == pytest.approx((2 * end + 2 * side + rim) / (4 * end + 2 * side + 4 * 40 * 20), abs=0.02)


@pytest.mark.filterwarnings("ignore:.*always_return_as_numpy:FutureWarning")
def test_the_crop_does_not_change_scores_of_masks_at_the_border_of_the_scan() -> None:
    a, b = box((40, 30, 20), (0, 12, 10), 9), box((40, 30, 20), (2, 14, 11), 9)
    whole = compute_hausdorff_distance(
        torch.from_numpy(a)[None, None],
        torch.from_numpy(b)[None, None],
        include_background=True,
        percentile=95,
        spacing=(0.8, 1.2, 3.0),
    )
    assert surface_scores(a, b, (0.8, 1.2, 3.0))[0] == float(whole)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), axes=st.permutations([0, 1, 2]), reverse=st.integers(0, 2))
def test_scores_do_not_depend_on_the_array_axes(seed: int, axes: list[int], reverse: int) -> None:
    a, b = blobs(seed, (11, 13, 15))
    spacing = (0.7, 1.3, 2.5)
    turned = [np.flip(mask.transpose(axes), reverse) for mask in (a, b)]
    score = score_mask(a, b, spacing)
    other = score_mask(turned[0], turned[1], (spacing[axes[0]], spacing[axes[1]], spacing[axes[2]]))
    assert other.dsc == score.dsc
    assert other.nsd == pytest.approx(score.nsd, abs=1e-6)
    assert other.hd95_mm == pytest.approx(score.hd95_mm)


def test_a_distance_equal_to_the_tolerance_is_within_the_tolerance() -> None:
    reference = box((30, 30, 30), (5, 5, 5), 12)
    shifted = box((30, 30, 30), (8, 5, 5), 12)
    assert surface_scores(shifted, reference, (0.7, 0.7, 0.7), nsd_tolerance_mm=2.1) == (pytest.approx(2.1), 1.0)
    assert surface_scores(shifted, reference, (0.7, 0.7, 0.7), nsd_tolerance_mm=2.0)[1] < 1


def test_identical_masks_have_perfect_scores() -> None:
    mask = sphere(8, (1.0, 1.0, 2.0), (24, 24, 12))
    assert score_mask(mask, mask.copy(), (1.0, 1.0, 2.0)) == MaskScore(dsc=1.0, hd95_mm=0.0, nsd=1.0)


def test_two_empty_masks_have_no_scores_and_one_empty_mask_has_the_worst_scores() -> None:
    empty, full = np.zeros((8, 8, 8), dtype=bool), box((8, 8, 8), (2, 2, 2), 4)
    assert score_mask(empty, empty, (1, 1, 1)) == MaskScore(dsc=None, hd95_mm=None, nsd=None)
    worst = MaskScore(dsc=0.0, hd95_mm=math.inf, nsd=0.0)
    assert score_mask(empty, full, (1, 1, 1)) == worst
    assert score_mask(full, empty, (1, 1, 1)) == worst


def test_masks_of_different_shape_or_type_are_refused() -> None:
    mask = np.zeros((4, 4, 4), dtype=bool)
    with pytest.raises(ValueError, match=r"\(4, 4, 4\).*\(3, 4, 4\)"):
        dice(mask, mask[:3])
    with pytest.raises(TypeError, match="uint8"):
        dice(mask, mask.astype(np.uint8))  # type: ignore[arg-type]  # the wrong type is the point


def test_dice_needs_neither_monai_nor_torch() -> None:
    code = (
        "import sys, numpy as np; from fseft_edge.evaluation.metrics import dice; "
        "dice(np.ones(3, bool), np.ones(3, bool)); "
        "assert not {'monai', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)  # noqa: S603 - a fixed script
