"""Variations of a scan: other lengths, the same voxels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fseft_edge.augmentation import VARIATIONS, Variation
from fseft_edge.runtime.volume import LabelMap, Volume


def test_a_zoomed_patient_has_other_lengths_and_the_same_voxels() -> None:
    affine = np.diag([2.0, -2.0, 3.0, 1.0])[:, [1, 0, 2, 3]]
    affine[:3, 3] = [5, 6, 7]
    volume = Volume(np.zeros((4, 6, 8), np.int16), affine, source=Path("a.nii.gz"))
    zoomed = Variation(1.1).of(volume)
    assert zoomed.array is volume.array
    assert zoomed.spacing == pytest.approx((2.2, 2.2, 3.3))
    assert (zoomed.axcodes, zoomed.source) == (volume.axcodes, volume.source)
    labels = Variation(1.1).of(LabelMap(np.zeros((4, 6, 8), np.uint8), affine))
    np.testing.assert_array_equal(labels.affine, zoomed.affine)
    np.testing.assert_array_equal(volume.affine, affine)


def test_bodies_vary_to_both_sides_of_their_size() -> None:
    zooms = [variation.zoom for variation in VARIATIONS]
    assert min(zooms) < 1 < max(zooms)
