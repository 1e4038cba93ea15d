"""Volumes and label maps: refused input, lattice, and reading in parts."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from doubles.errors import refused
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.spatial.transform import Rotation

from fseft_edge.runtime.errors import GeometryError, LabelError, NotACtError
from fseft_edge.runtime.scans.volume import LabelMap, Volume, labels_on

AFFINE = np.diag([-0.9, -0.9, 3.0, 1.0])


def volume(shape=(5, 4, 3), affine=AFFINE, **settings) -> Volume:
    return Volume(np.arange(np.prod(shape), dtype=np.int16).reshape(shape), affine, **settings)


def test_volume_has_shape_directions_spacing_and_voxel_volume():
    turned = Rotation.from_euler("xyz", [10, -5, 7], degrees=True).as_matrix()
    affine = np.eye(4)
    affine[:3, :3] = turned @ np.array([[0, 0.8, 0], [-0.9, 0, 0], [0, 0, -2.5]])
    oblique = volume(affine=affine)
    assert oblique.shape == (5, 4, 3)
    assert oblique.axcodes == "PRI"
    np.testing.assert_allclose(oblique.spacing, (0.9, 0.8, 2.5))
    assert oblique.voxel_volume_mm3 == pytest.approx(0.9 * 0.8 * 2.5)


def test_sheared_voxels_have_the_volume_of_the_parallelepiped():
    gantry_tilt = AFFINE.copy()
    gantry_tilt[1, 2] = 3.0 * np.tan(np.radians(20))
    assert volume(affine=gantry_tilt).voxel_volume_mm3 == pytest.approx(0.9 * 0.9 * 3.0)


def test_hu_rescales_the_requested_part():
    scan = volume(slope=2.0, intercept=-1024.0)
    part = scan.hu((slice(1, 3), slice(0, 4), slice(2, 3)))
    assert part.dtype == np.float32
    np.testing.assert_array_equal(part, 2.0 * scan.array[1:3, :, 2:3] - 1024.0)


def test_affine_is_a_read_only_copy():
    affine = AFFINE.copy()
    scan = volume(affine=affine)
    affine[0, 0] = 7.0
    assert scan.affine[0, 0] == -0.9
    with pytest.raises(ValueError, match="read-only"):
        scan.affine[0, 0] = 7.0


@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 3, 2), (5, 4, 1), (1, 4, 3)])
def test_image_without_three_axes_of_two_voxels_is_refused(shape):
    with refused(NotACtError, "scan.nii"):
        Volume(np.zeros(shape, np.int16), AFFINE, source=Path("scan.nii"))


@pytest.mark.parametrize("dtype", [np.complex64, [("R", "u1"), ("G", "u1"), ("B", "u1")], bool])
def test_values_that_are_not_intensities_are_refused(dtype):
    with refused(NotACtError, "scan.nii"):
        Volume(np.zeros((5, 4, 3), dtype), AFFINE, source=Path("scan.nii"))


@pytest.mark.parametrize("rescale", [(0.0, 0.0), (np.nan, 0.0), (1.0, np.inf)])
def test_impossible_rescale_is_refused(rescale):
    with refused(NotACtError, *rescale):
        volume(slope=rescale[0], intercept=rescale[1])


@pytest.mark.parametrize(
    "affine",
    [
        np.full((4, 4), np.nan),
        np.diag([1.0, np.inf, 1.0, 1.0]),
        np.diag([1.0, 1.0, 0.0, 1.0]),
        np.array([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]),
        np.eye(3),
        np.diag([1e6, 1e6, 1e6, 1.0]),
        np.diag([1e-6, 1e-6, 1e-6, 1.0]),
    ],
    ids=["nan", "infinite", "flat", "parallel", "3x3", "kilometres", "nanometres"],
)
def test_invalid_affine_is_refused(affine):
    with refused(GeometryError, "scan.nii"):
        volume(affine=affine, source=Path("scan.nii"))
    with refused(GeometryError, "labels.nii"):
        LabelMap(np.zeros((5, 4, 3), np.uint8), affine, source=Path("labels.nii"))


@pytest.mark.parametrize("array", [np.zeros((5, 4), np.uint8), np.zeros((5, 4, 3), np.int16)])
def test_label_map_must_be_three_dimensional_and_unsigned(array):
    with refused(LabelError, "labels.nii"):
        LabelMap(array, AFFINE, source=Path("labels.nii"))


@given(
    array=hnp.arrays(
        st.sampled_from(["<i2", ">i2", "<f4", ">i4", "u1"]),
        hnp.array_shapes(min_dims=3, max_dims=3, min_side=2, max_side=7),
    )
)
def test_chunks_give_the_same_bytes_for_every_memory_layout(array):
    def digest(voxels) -> str:
        running = hashlib.sha256()
        for chunk in Volume(voxels, AFFINE).chunks():
            assert chunk.flags.c_contiguous
            running.update(chunk)
        return running.hexdigest()

    in_nifti_order = array.astype(array.dtype.newbyteorder("<")).tobytes(order="F")
    expected = hashlib.sha256(in_nifti_order).hexdigest()
    padded = np.zeros(tuple(2 * n for n in array.shape), array.dtype)
    padded[::2, ::2, ::2] = array
    layouts = [array, np.asfortranarray(array), padded[::2, ::2, ::2], array.astype(array.dtype.newbyteorder())]
    assert {digest(layout) for layout in layouts} == {expected}


def test_chunks_have_at_most_8_mib():
    scan = Volume(np.zeros((512, 512, 40), np.int16, order="F"), AFFINE)
    chunks = list(scan.chunks())
    assert max(chunk.nbytes for chunk in chunks) <= 8 << 20
    assert sum(chunk.shape[0] for chunk in chunks) == 40


