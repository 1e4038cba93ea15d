"""Segmentations of 3D Slicer as structures of a CT: placed by geometry, named, and refused where they do not fit."""

from __future__ import annotations

import gzip
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
from doubles.errors import refused
from doubles.nifti_files import affine_in_itk, turned
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fseft_edge.runtime.errors import GeometryError, LabelError, UnreadableFileError
from fseft_edge.runtime.scans.image_files import read_label_map
from fseft_edge.runtime.scans.slicer_segmentations import Segment, read_segmentation
from fseft_edge.runtime.scans.structures import Lattice

SHAPE = (20, 18, 12)
AFFINE = turned((10, 20, -15)) @ np.diag([0.2, 0.25, 0.6, 1.0])
CT = Lattice(SHAPE, AFFINE)
BALL = np.linalg.norm((np.indices((8, 7, 6)).T - (3.5, 3, 2.5)) / (4, 3.5, 3), axis=-1).T <= 1


def segmentation(
    path: Path,
    layers: Sequence[NDArray],
    segments: Sequence[dict[str, object]],
    affine: NDArray = AFFINE,
    *,
    first: Sequence[float] = (0, 0, 0),
    lines: Sequence[str] = (),
) -> Path:
    """Write a file as 3D Slicer does.

    Args:
        path: file to write.
        layers: label values ``[X, Y, Z]`` of each layer.
        segments: fields of each segment.
        affine: voxel index to RAS+ mm.
        first: voxel index of the first voxel of the layers.
        lines: other lines of the header.
    """
    layers = [np.asarray(layer) for layer in layers]
    several = len(layers) > 1
    in_lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    origin = in_lps @ [*first, 1.0]
    kind = {"u1": "unsigned char", "i2": "short", "u2": "unsigned short", "f4": "float"}[layers[0].dtype.str[1:]]
    header = [
        "NRRD0004",
        "# Complete NRRD file format specification at:",
        "# http://teem.sourceforge.net/nrrd/format.html",
        f"type: {kind}",
        f"dimension: {4 if several else 3}",
        "space: left-posterior-superior",
        f"sizes: {f'{len(layers)} ' if several else ''}{' '.join(map(str, layers[0].shape))}",
        f"space directions: {'none ' if several else ''}{' '.join(_vector(step) for step in in_lps[:3, :3].T)}",
        f"kinds: {'list ' if several else ''}domain domain domain",
        "endian: little",
        "encoding: gzip",
        f"space origin: {_vector(origin[:3])}",
        *(f"Segment{n}_{key}:={value}" for n, fields in enumerate(segments) for key, value in fields.items()),
        "Segmentation_ContainedRepresentationNames:=Binary labelmap|Closed surface|",
        "Segmentation_ConversionParameters:=Collapse labelmaps|1|Merge the labelmaps.&",
        "Segmentation_MasterRepresentation:=Binary labelmap",
        "Segmentation_ReferenceImageExtentOffset:=7 8 9",
        *lines,
    ]
    values = np.stack(layers) if several else layers[0]
    path.write_bytes(("\n".join(header) + "\n\n").encode() + gzip.compress(values.tobytes(order="F")))
    return path


def _vector(numbers: NDArray) -> str:
    return f"({','.join(repr(float(number)) for number in numbers)})"


def named(name: str, value: int, layer: int = 0, **fields: object) -> dict[str, object]:
    return {"ID": f"Segment_{value}", "Name": name, "LabelValue": value, "Layer": layer, **fields}


def on(ct: Lattice, path: Path) -> dict[str, NDArray]:
    return {segment.name: segment.share(ct)[0].whole() for segment in read_segmentation(path).structures}


def placed(part: NDArray, first: Sequence[int], shape: Sequence[int] = SHAPE) -> NDArray:
    whole = np.zeros(shape, np.float32)
    whole[tuple(slice(start, start + size) for start, size in zip(first, part.shape, strict=True))] = part
    return whole


def test_a_part_of_the_lattice_is_placed_by_its_geometry(tmp_path):
    path = segmentation(tmp_path / "a.seg.nrrd", [BALL * np.uint8(5)], [named("liver", 5)], first=(4, 6, 2))
    found = read_segmentation(path)
    assert (found.path, found.warnings) == (path, ())
    (segment,) = found.structures
    assert (segment.name, segment.number, segment.is_empty) == ("liver", 5, False)
    share, warnings = segment.share(CT)
    assert warnings == ()
    np.testing.assert_array_equal(share.whole(), placed(BALL, (4, 6, 2)))
    np.testing.assert_array_equal(share.mask().inside, BALL)


def test_every_axis_order_of_the_file_gives_the_same_shares(tmp_path):
    values = BALL * np.uint8(1)
    for order, signs in itertools.product(itertools.permutations(range(3)), itertools.product((1, -1), repeat=3)):
        stored = np.flip(values.transpose(order), [axis for axis in range(3) if signs[axis] < 0])
        to_values = np.eye(4)
        to_values[:3, :3] = np.eye(3)[list(order)].T * signs
        for axis in range(3):
            to_values[order[axis], 3] = values.shape[order[axis]] - 1 if signs[axis] < 0 else 0
        affine = AFFINE.copy()
        affine[:3, 3] = (AFFINE @ [4, 6, 2, 1])[:3]
        path = segmentation(tmp_path / "a.seg.nrrd", [stored], [named("a", 1)], affine @ to_values)
        np.testing.assert_array_equal(on(CT, path)["a"], placed(BALL, (4, 6, 2)), err_msg=f"{order} {signs}")


def test_overlapping_segments_of_several_layers_are_read_in_full(tmp_path):
    first, second = np.zeros((2, 8, 7, 6), np.uint8)
    first[BALL] = 1
    first[0, 0, 0] = 2
    second[2:5] = 1
    segments = [named("liver", 1), named("gallbladder", 2), named("tumour", 1, 1)]
    path = segmentation(tmp_path / "a.seg.nrrd", [first, second], segments, first=(4, 6, 2))
    assert [(segment.name, segment.number) for segment in read_segmentation(path).structures] == [
        ("liver", 1),
        ("gallbladder", 2),
        ("tumour", 1),
    ]
    for name, mask in (("liver", first == 1), ("gallbladder", first == 2), ("tumour", second == 1)):
        np.testing.assert_array_equal(on(CT, path)[name], placed(mask, (4, 6, 2)))
    image = SimpleITK.ReadImage(str(path))
    np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(image).T[:, :, :, :], np.stack([first, second]))
    np.testing.assert_allclose(affine_in_itk(path)[:3, :3], AFFINE[:3, :3], atol=1e-9)


def test_a_file_that_simpleitk_wrote_is_read(tmp_path):
    image = SimpleITK.GetImageFromArray(np.stack([BALL.T, ~BALL.T], axis=-1).astype(np.uint8), isVector=True)
    image.SetSpacing((0.5, 1.5, 2.5))
    image.SetOrigin((3, 4, 5))
    for number, name in enumerate(("in", "out")):
        for key, value in named(name, 1, number).items():
            image.SetMetaData(f"Segment{number}_{key}", str(value))
    SimpleITK.WriteImage(image, str(tmp_path / "a.seg.nrrd"))
    found = on(Lattice(BALL.shape, affine_in_itk(tmp_path / "a.seg.nrrd")), tmp_path / "a.seg.nrrd")
    np.testing.assert_array_equal(found["in"], BALL)
    np.testing.assert_array_equal(found["out"], ~BALL)


def test_old_files_have_one_layer_for_each_segment(tmp_path):
    """3D Slicer before 4.11 wrote neither layers nor label values."""
    layers = [BALL.astype(np.uint8), (~BALL).astype(np.uint8)]
    segments: list[dict[str, object]] = [{"ID": "a", "Name": "in"}, {"ID": "b", "Name": "out"}]
    path = segmentation(tmp_path / "a.seg.nrrd", layers, segments)
    np.testing.assert_array_equal(on(CT, path)["in"], placed(BALL, (0, 0, 0)))
    np.testing.assert_array_equal(on(CT, path)["out"], placed(~BALL, (0, 0, 0)))
    path = segmentation(tmp_path / "b.seg.nrrd", layers[:1], segments[:1])
    np.testing.assert_array_equal(on(CT, path)["in"], placed(BALL, (0, 0, 0)))


@pytest.mark.parametrize(
    ("stored", "name"),
    [
        ("Schilddrüse", "Schilddrüse"),
        ("肝臓", "肝臓"),
        ("two\\nlines", "two\nlines"),
        ("back\\\\nslash", "back\\nslash"),
        ("a: b := c", "a: b := c"),
        ("# 1", "# 1"),
    ],
)
def test_names_may_have_any_characters(tmp_path, stored, name):
    path = segmentation(tmp_path / "a.seg.nrrd", [BALL.astype(np.uint8)], [named(stored, 1)])
    assert [segment.name for segment in read_segmentation(path).structures] == [name]


def test_a_segment_without_name_has_the_name_of_its_identifier(tmp_path):
    segments = [{"ID": "liver", "LabelValue": 1, "Layer": 0}, {"LabelValue": 2, "Name": ""}]
    path = segmentation(tmp_path / "a.seg.nrrd", [BALL.astype(np.uint8)], segments)
    assert [segment.name for segment in read_segmentation(path).structures] == ["liver", "Segment_2"]


def test_segments_have_the_order_of_their_numbers(tmp_path):
    values = np.arange(1, 13, dtype=np.uint16).reshape(3, 2, 2) * 1000
    segments = [named(f"s{number}", number * 1000) for number in range(1, 13)]
    path = segmentation(tmp_path / "a.seg.nrrd", [values], segments)
    assert [segment.number for segment in read_segmentation(path).structures] == list(range(1000, 13000, 1000))
    assert all(share.sum() == 1 for share in on(CT, path).values())


def test_empty_segments_count_as_not_annotated(tmp_path):
    path = segmentation(
        tmp_path / "a.seg.nrrd", [BALL * np.uint8(2)], [named("a", 1, Extent="0 -1 0 -1 0 -1"), named("b", 2)]
    )
    assert [segment.is_empty for segment in read_segmentation(path).structures] == [True, False]
    assert not on(CT, path)["a"].any()
    one_voxel = segmentation(tmp_path / "b.seg.nrrd", [np.ones((1, 1, 1), np.uint8)], [named("a", 1)], first=(99, 0, 0))
    (segment,) = read_segmentation(one_voxel).structures
    assert segment.is_empty
    assert segment.share(CT)[0].voxels == 0


def test_rounded_geometry_is_placed_on_whole_voxels(tmp_path):
    path = segmentation(
        tmp_path / "a.seg.nrrd", [BALL.astype(np.uint8)], [named("a", 1)], np.round(AFFINE, 3), first=(4.05, 5.95, 2.0)
    )
    np.testing.assert_array_equal(on(CT, path)["a"], placed(BALL, (4, 6, 2)))


def test_a_finer_lattice_fills_voxels_in_part(tmp_path):
    fine = np.random.default_rng(1).integers(0, 2, (12, 8, 6)).astype(np.uint8)
    finer = AFFINE @ np.diag([0.5, 0.5, 0.5, 1.0])
    first = tuple(2 * start - 0.5 for start in (4, 6, 2))
    path = segmentation(tmp_path / "a.seg.nrrd", [fine], [named("a", 1)], finer, first=first)
    share, warnings = read_segmentation(path).structures[0].share(CT)
    expected = fine.reshape(6, 2, 4, 2, 3, 2).mean(axis=(1, 3, 5))
    np.testing.assert_allclose(share.whole(), placed(expected, (4, 6, 2)), atol=1e-5)
    assert len(warnings) == 1
    assert "share of each voxel" in warnings[0]


def test_a_shift_by_half_a_voxel_fills_voxels_in_half(tmp_path):
    path = segmentation(tmp_path / "a.seg.nrrd", [BALL.astype(np.uint8)], [named("a", 1)], first=(4.5, 6, 2))
    found = on(CT, path)["a"]
    np.testing.assert_allclose(found, (placed(BALL, (4, 6, 2)) + placed(BALL, (5, 6, 2))) / 2, atol=1e-5)
    share = read_segmentation(path).structures[0].share(CT)[0]
    np.testing.assert_array_equal(share.mask().inside, found[share.mask().box] >= 0.5)


@given(
    steps=st.tuples(*[st.sampled_from([0.3, 0.5, 0.7, 1.0, 1.3, 2.0, -0.4, -1.0, -1.7])] * 3),
    shifts=st.tuples(*[st.integers(4, 20)] * 3),
    order=st.permutations(range(3)),
)
@settings(max_examples=40, deadline=None)
def test_shares_equal_those_of_many_points_in_each_voxel(tmp_path_factory, steps, shifts, order):
    """All edges of voxels lie at multiples of 1/20, so that 20 points along each axis give the exact shares."""
    path = tmp_path_factory.getbasetemp() / "any.seg.nrrd"
    stored = np.random.default_rng(2).integers(0, 2, (3, 4, 2)).astype(np.uint8)
    mask = stored.transpose(order)  # along the axes of the CT
    first = np.array(
        [4 - 2 * step + (shift / 20 if abs(step) != 1 else 0) for step, shift in zip(steps, shifts, strict=True)]
    )
    to_ct = np.zeros((4, 4))
    to_ct[range(3), order], to_ct[:3, 3], to_ct[3, 3] = steps, first, 1
    segmentation(path, [stored], [named("a", 1)], AFFINE @ to_ct)
    points = [(np.arange(12 * 20) + 0.5) / 20 - 0.5 for _ in range(3)]
    expected = np.pad(mask, ((0, 1),) * 3).astype(np.float64)
    for axis in range(3):
        index = np.rint((points[axis] - first[axis]) / steps[axis]).astype(int)
        index[(index < 0) | (index >= mask.shape[axis])] = -1
        expected = np.take(expected, index, axis=axis)
        expected = expected.reshape(*expected.shape[:axis], 12, 20, *expected.shape[axis + 1 :]).mean(axis=axis + 1)
    shares = on(Lattice((12, 12, 12), AFFINE), path)["a"]
    np.testing.assert_allclose(shares, expected, atol=2e-5)


@pytest.mark.parametrize(
    ("affine", "says"),
    [
        (turned((10, 20, -5)) @ np.diag([0.2, 0.25, 0.6, 1.0]), "inclined"),
        (turned((10, 65, -15)) @ np.diag([0.2, 0.25, 0.6, 1.0]), "different lattices"),
        (turned((45, 45, 45)) @ np.diag([0.2, 0.25, 0.6, 1.0]), "different lattices"),
    ],
)
def test_other_axes_are_refused(tmp_path, affine, says):
    path = segmentation(tmp_path / "a.seg.nrrd", [BALL.astype(np.uint8)], [named("a", 1)], affine, first=(4, 6, 2))
    with refused(GeometryError, path, says):
        on(CT, path)


@pytest.mark.parametrize("first", [(-2, 0, 0), (14, 0, 0), (0, 0, 7), (0, -300, 0), (0.3, 12, 0)])
def test_a_segment_outside_the_scan_is_refused(tmp_path, first):
    path = segmentation(tmp_path / "a.seg.nrrd", [BALL.astype(np.uint8)], [named("a", 1)], first=first)
    with refused(GeometryError, path, "outside the scan"):
        on(CT, path)


def test_a_layer_may_be_larger_than_the_scan(tmp_path):
    padded = np.pad(BALL.astype(np.uint8), 3)
    path = segmentation(tmp_path / "a.seg.nrrd", [padded], [named("a", 1)], first=(-3, 8, 3))
    np.testing.assert_array_equal(on(CT, path)["a"], placed(BALL, (0, 11, 6)))


def test_unusual_extents_and_label_values_are_told(tmp_path):
    path = segmentation(
        tmp_path / "a.seg.nrrd",
        [BALL.astype(np.uint8) + np.uint8(3)],
        [named("Name of a patient", 4, Extent="1 6 1 6 1 5")],
    )
    found = read_segmentation(path)
    assert len(found.warnings) == 2
    assert "outside the extent" in found.warnings[0]
    assert "belong to no segment" in found.warnings[1]
    assert "patient" not in "".join(found.warnings)
    np.testing.assert_array_equal(on(CT, path)["Name of a patient"], placed(BALL, (0, 0, 0)))
    right = segmentation(
        tmp_path / "b.seg.nrrd", [BALL.astype(np.uint8)], [named("a", 1, Extent="0 7 0 6 0 5"), named("b", 2)]
    )
    assert read_segmentation(right).warnings == ()


@pytest.mark.parametrize(
    ("says", "segments"),
    [
        ("no segments", []),
        ("layer 1", [named("a", 1, 1)]),
        ("layer -1", [named("a", 1, -1)]),
        ("label value 0", [named("a", 0)]),
        ("label value 65536", [named("a", 65536)]),
        ("label value -3", [named("a", -3)]),
        ("damaged", [named("a", 1, Extent="0 x")]),
        ("damaged", [{"Name": "a", "LabelValue": "x"}]),
        ("same layer and label value", [named("a", 1), named("b", 1)]),
        ("same layer and label value", [{"Name": "a"}, {"Name": "b"}]),
    ],
)
def test_a_bad_header_is_refused(tmp_path, says, segments):
    path = segmentation(tmp_path / "a.seg.nrrd", [BALL.astype(np.uint8)], segments)
    with refused(LabelError, path, says):
        read_segmentation(path)


def test_other_values_than_label_values_are_refused(tmp_path):
    path = segmentation(tmp_path / "a.seg.nrrd", [BALL.astype(np.float32)], [named("a", 1)])
    with refused(LabelError, path, "float32"):
        read_segmentation(path)
    path = segmentation(
        tmp_path / "b.seg.nrrd",
        [BALL.astype(np.uint8)],
        [named("a", 1)],
        lines=["Segmentation_SourceRepresentation:=Fractional labelmap"],
    )
    with refused(LabelError, path, "Fractional labelmap"):
        read_segmentation(path)
    with refused(UnreadableFileError, tmp_path / "missing.seg.nrrd"):
        read_segmentation(tmp_path / "missing.seg.nrrd")


@pytest.mark.real_ct
def test_real_annotations_have_the_voxels_of_their_label_map(real_ct, tmp_path):
    labels = read_label_map(real_ct / "abdomen" / "ct_sm_seg.nii.gz")
    values = [value for value in np.unique(labels.array).tolist() if value]
    box = tuple(slice(int(filled.min()), int(filled.max()) + 1) for filled in np.nonzero(labels.array))
    path = segmentation(
        tmp_path / "a.seg.nrrd",
        [labels.array[box]],
        [named(f"organ {value}", value) for value in values],
        labels.affine,
        first=[part.start for part in box],
    )
    segments: Sequence[Segment] = read_segmentation(path).structures
    assert len(segments) > 1
    for segment in segments:
        share, warnings = segment.share(Lattice(labels.shape, labels.affine))
        np.testing.assert_array_equal(share.whole(), labels.array == segment.number)
        assert warnings == ()
