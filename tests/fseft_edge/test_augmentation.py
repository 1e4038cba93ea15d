"""Variations of a scan: what is left and right, how large it is, and which organs it still shows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fseft_edge.augmentation import Variation, other_side, variations
from fseft_edge.organs import OrganLabel
from fseft_edge.runtime.volume import LabelMap, Volume

LEFT, RIGHT, CORD = OrganLabel("parotid_left", 4), OrganLabel("parotid_right", 3), OrganLabel("cord", 2)


@pytest.mark.parametrize(
    ("name", "partner"),
    [
        ("parotid_left", "parotid_right"),
        ("left_lung", "right_lung"),
        ("kidney-r", "kidney-l"),
        ("eye_left_lens", "eye_right_lens"),
        ("liver", None),
        ("cleft", None),
        ("left_right", None),
    ],
)
def test_the_other_side_is_in_the_name(name: str, partner: str | None) -> None:
    assert other_side(name) == partner


def test_scans_are_mirrored_only_where_both_organs_of_a_pair_are_learned() -> None:
    assert [kind.mirrored for kind in variations([LEFT, CORD], "sigmoid")] == [False, False]
    assert not any(kind.mirrored for kind in variations([LEFT, RIGHT, CORD], "softmax"))
    assert any(kind.mirrored for kind in variations([LEFT, RIGHT], "softmax"))
    both = variations([LEFT, RIGHT, CORD], "sigmoid")
    assert len(both) == len(set(both)) == 5
    assert Variation() not in both


def test_in_a_mirrored_scan_pairs_are_swapped_and_the_others_silent() -> None:
    assert Variation(mirrored=True).organs([LEFT, CORD, RIGHT]) == [RIGHT, None, LEFT]
    assert Variation(zoom=1.1).organs([LEFT, CORD]) == [LEFT, CORD]


@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_mirroring_moves_a_voxel_to_the_other_side_of_the_patient(axes: tuple[int, int, int]) -> None:
    """Whatever array axis runs from left to right, and whichever way."""
    array = np.zeros((4, 6, 8), np.int16).transpose(axes)
    affine = np.diag([-2.0, 2.0, 3.0, 1.0])[:, [*axes, 3]]
    at = (1, 2, 3)
    array[at] = 500
    volume = Variation(mirrored=True).of_volume(Volume(array, affine))
    labels = Variation(mirrored=True).of_labels(LabelMap((array > 0).astype(np.uint8), affine))
    (there,) = np.argwhere(volume.array == 500)
    assert np.argwhere(labels.array == 1).tolist() == [there.tolist()]
    before, after = (affine[:3, :3] @ np.asarray(point) for point in (at, there))
    width = 2.0 * (max(array.shape[axis] for axis in [axes.index(0)]) - 1)
    np.testing.assert_allclose(after, [-width - before[0], before[1], before[2]])


def test_a_zoomed_patient_has_other_lengths_and_the_same_voxels() -> None:
    volume = Volume(np.zeros((4, 6, 8), np.int16), np.diag([2.0, 2.0, 3.0, 1.0]), source=Path("a.nii.gz"))
    zoomed = Variation(zoom=1.1).of_volume(volume)
    assert zoomed.array is volume.array
    assert zoomed.spacing == pytest.approx((2.2, 2.2, 3.3))
    assert zoomed.source == volume.source
