"""Volumes and label maps: refused input, lattice, and reading in parts."""

from __future__ import annotations

import hashlib
from itertools import permutations, product
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from doubles import nifti_files
from doubles.errors import refused
from doubles.nifti_files import turned
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.spatial.transform import Rotation

from fseft_edge.runtime.errors import GeometryError, LabelError, NotACtError
from fseft_edge.runtime.scans.lattice import deviation
from fseft_edge.runtime.scans.nifti import read_ct, read_label_map
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


ODD = turned((3, 7, -12), spacing=2.0)
LABELS = np.random.default_rng(3).integers(0, 200, (7, 6, 5)).astype(np.uint8)
ORDERS = [(order, flips) for order in permutations(range(3)) for flips in product((False, True), repeat=3)]


def stored_as(array, affine, order, flips):
    """Return voxels and affine in another axis order, as nibabel reorders them."""
    orientation = [[order.index(axis), -1 if flips[order.index(axis)] else 1] for axis in range(3)]
    image = nib.Nifti1Image(array, affine).as_reoriented(np.array(orientation))
    return np.asanyarray(image.dataobj), image.affine


@pytest.mark.parametrize(("order", "flips"), ORDERS)
def test_labels_in_every_axis_order_get_the_order_of_the_scan_voxel_by_voxel(order, flips):
    scan = Volume(np.zeros(LABELS.shape, np.int16), ODD)
    array, affine = stored_as(LABELS, ODD, order, flips)
    found = labels_on(scan, LabelMap(array, affine, source=Path("a.nii")))
    np.testing.assert_array_equal(found.array, LABELS)
    assert min(found.array.strides) > 0
    assert found.affine is scan.affine or np.array_equal(found.affine, scan.affine)
    assert found.source == Path("a.nii")


def test_labels_on_the_lattice_of_the_scan_are_not_copied():
    scan, labels = volume(), LabelMap(np.zeros((5, 4, 3), np.uint8), AFFINE)
    assert labels_on(scan, labels).array is labels.array


@pytest.mark.parametrize("shift", [(0.089, 0, 0), (0, -0.089, 0), (0, 0, 0.29), (0.08, 0.08, 0.2)])
def test_a_tenth_of_the_voxel_spacing_along_each_axis_is_rounding(shift):
    """The spacing is 0.9 x 0.9 x 3 mm."""
    moved = AFFINE.copy()
    moved[:3, 3] = shift
    scan = volume()
    found = labels_on(scan, LabelMap(np.ones((5, 4, 3), np.uint8), moved))
    np.testing.assert_array_equal(found.affine, scan.affine)


@pytest.mark.parametrize(
    ("shift", "distance"), [((0.091, 0, 0), "0.091 mm"), ((0, 0, 0.31), "0.31 mm"), ((0.9, 0, 0), "0.9 mm")]
)
def test_more_than_a_tenth_is_refused_and_the_message_states_distance_and_place(shift, distance):
    moved = AFFINE.copy()
    moved[:3, 3] = shift
    scan = volume(source=Path("ct/hn_001.nii.gz"))
    labels = LabelMap(np.zeros((5, 4, 3), np.uint8), moved, source=Path("label/hn_001.nii.gz"))
    with refused(GeometryError, scan.source, labels.source, distance, "voxel [0, 0, 0]"):
        labels_on(scan, labels)


def test_a_small_error_of_the_spacing_counts_at_the_far_corner():
    stretched = AFFINE.copy()
    stretched[0, 0] *= 1.002
    scan = volume(shape=(40, 4, 3))
    labels_on(scan, LabelMap(np.zeros((40, 4, 3), np.uint8), stretched))
    scan = volume(shape=(80, 4, 3))
    with refused(GeometryError, "0.142 mm at the voxel [79, 0, 0]"):
        labels_on(scan, LabelMap(np.zeros((80, 4, 3), np.uint8), stretched))


def test_affines_that_print_alike_have_a_distance():
    other = AFFINE.copy()
    other[0, 0] += 4e-6
    scan = volume(shape=(30000, 2, 2))
    labels = LabelMap(np.zeros((30000, 2, 2), np.uint8), other)
    assert str(np.round(scan.affine, 4)) == str(np.round(other, 4))
    with refused(GeometryError, "0.12 mm"):
        labels_on(scan, labels)


def test_labels_of_another_shape_or_direction_are_refused():
    with refused(GeometryError, "(5, 4, 3) voxels", "(5, 4, 2) voxels"):
        labels_on(volume(), LabelMap(np.zeros((5, 4, 2), np.uint8), AFFINE))
    mirrored = np.diag([-1.0, 1.0, 1.0, 1.0]) @ AFFINE  # without the origin of a flipped copy
    with refused(GeometryError, "3.6 mm"):
        labels_on(volume(), LabelMap(np.zeros((5, 4, 3), np.uint8), mirrored))
    with refused(GeometryError, "mm at the voxel"):
        labels_on(volume(), LabelMap(np.zeros((5, 4, 3), np.uint8), np.diag([3.0, 3.0, 9.0, 1.0])))


def test_messages_call_both_by_the_words_of_the_caller():
    reference = LabelMap(np.zeros((5, 4, 3), np.uint8), AFFINE)
    with refused(GeometryError, "The reference (unnamed) and the prediction"):
        labels_on(reference, LabelMap(np.zeros((5, 4, 2), np.uint8), AFFINE), ("reference", "prediction"))


def test_annotations_drawn_with_itk_on_an_oblique_scan_lie_on_its_lattice(tmp_path):
    """ITK rounds direction cosines, so that far corners move by 6 micrometres."""
    affine = turned((3, 7, -12), digits=4)
    scan = nifti_files.write(tmp_path / "ct.nii", sform=affine, qform=affine)
    labels = nifti_files.organs(nifti_files.phantom())
    drawn = read_label_map(nifti_files.drawn_with_itk(scan, labels, tmp_path / "labels.nii"))
    found = labels_on(read_ct(scan), drawn)
    assert deviation(found.affine, drawn.affine, drawn.shape).mm > 0.005
    np.testing.assert_array_equal(found.array, labels)
