"""DICOM Segmentations are read segment by segment, placed by position, and resampled where their lattice is another."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from itertools import permutations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 - its customary name
from doubles.dicom import Series, save
from highdicom import AlgorithmIdentificationSequence, PixelMeasuresSequence, PlaneOrientationSequence
from highdicom import PlanePositionSequence as Position
from highdicom.seg import Segmentation, SegmentDescription
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileDataset
from pydicom.sr.codedict import codes
from pydicom.uid import ExplicitVRLittleEndian, RLELossless
from scipy import ndimage

from fseft_edge.runtime.errors import GeometryError, InputError, UnreadableFileError
from fseft_edge.runtime.scans.dicom.annotation_objects import AnnotationObject
from fseft_edge.runtime.scans.dicom.annotations import find_annotations
from fseft_edge.runtime.scans.structures import Lattice

OBLIQUE = (*(0.8, 0.6, 0.0), *(-0.6 * 0.8, 0.8 * 0.8, -0.6))
SERIES = Series(np.full((20, 16, 9), -1000, np.int16), (0.8, 1.1, 3.0), OBLIQUE, origin=(-20.0, -10.0, 50.0))
IMAGES: Sequence[Dataset] = SERIES.datasets()
for image in IMAGES:
    image.PatientBirthDate, image.PatientSex, image.AccessionNumber = "19500102", "F", "A99"
    image.StudyID, image.StudyDate, image.StudyTime, image.ReferringPhysicianName = "S1", "20240229", "101112", ""
    image.SliceThickness = "3"


def lattice_of(series: Series) -> Lattice:
    """Return the lattice of a series with the array axes column, row and slice."""
    affine = np.eye(4)
    axes = np.stack([series.orientation[:3], series.orientation[3:], series.normal], axis=1)
    affine[:3, :3] = axes * series.spacing
    affine[:3, 3] = series.origin
    x, y, z = series.hu.shape
    return Lattice((x, y, z), np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine)


LATTICE = lattice_of(SERIES)


def blobs(count: int = 2, shape: tuple[int, ...] = SERIES.hu.shape) -> NDArray[np.bool_]:
    """Return overlapping masks ``[column, row, slice, segment]`` with empty slices between others."""
    random = np.random.default_rng(0)
    masks = np.stack([ndimage.gaussian_filter(random.normal(size=shape), 1.5) > 0.02 for _ in range(count)], axis=-1)
    masks[:, :, [0, 4, 5]] = False
    return masks


def described(count: int) -> list[SegmentDescription]:
    algorithm = AlgorithmIdentificationSequence("test", codes.DCM.ArtificialIntelligence, "1")
    return [
        SegmentDescription(number, f"Organ {number}", codes.SCT.Organ, codes.SCT.Liver, "AUTOMATIC", algorithm)
        for number in range(1, count + 1)
    ]


def segmentation(
    values: NDArray[Any], form: str = "BINARY", count: int = 2, images: Sequence[Dataset] = IMAGES, **more: Any
) -> FileDataset:
    """Return a segmentation by highdicom; values are ``[column, row, slice, segment]`` or ``[column, row, slice]``."""
    pixels = np.moveaxis(values, (2, 1, 0), (0, 1, 2))
    made: FileDataset = Segmentation(
        images, np.ascontiguousarray(pixels), form, described(count), "1.2.3.4", 1, "1.2.3.4.5", 1, "a", "b", "c", "d",
        **{"omit_empty_frames": True, **more},
    )  # fmt: skip
    return made


def read(dataset: FileDataset, folder: Path) -> AnnotationObject:
    """Write a segmentation and return it as read."""
    found = find_annotations(save(dataset, folder / "seg.dcm"))
    assert found.problems == ()
    (one,) = found.objects
    return one


def problem(dataset: FileDataset, folder: Path) -> InputError:
    """Write a segmentation that is not readable and return the reason."""
    ((_, reason),) = find_annotations(save(dataset, folder / "seg.dcm")).problems
    assert "Secretname" not in str(reason)
    return reason


def test_overlapping_segments_are_read_each_by_itself(tmp_path: Path) -> None:
    masks = blobs()
    assert (masks[..., 0] & masks[..., 1]).any()
    found = read(segmentation(masks), tmp_path)
    assert found.kind == "seg"
    assert found.frames_of_reference == (SERIES.frame_of_reference,)
    assert found.images == {image.SOPInstanceUID for image in IMAGES}
    assert found.series == {SERIES.uid}
    assert [(one.name, one.number) for one in found.structures] == [("Organ 1", 1), ("Organ 2", 2)]
    for index, structure in enumerate(found.structures):
        share, warnings = structure.share(LATTICE)
        np.testing.assert_array_equal(share.whole(), masks[..., index])
        assert warnings == ()
        assert not structure.is_empty
        summary = structure.summary()
        assert summary.planes == masks[..., index].any(axis=(0, 1)).sum()
        assert summary.volume_ml == pytest.approx(masks[..., index].sum() * LATTICE.voxel_volume_mm3 / 1000)


def test_every_way_to_store_the_scan_gives_the_same_mask(tmp_path: Path) -> None:
    mask = blobs()[..., 0]
    structure = read(segmentation(blobs()), tmp_path).structures[0]
    for axes, flips in product(permutations(range(3)), product((1, -1), repeat=3)):
        change = np.zeros((4, 4))
        change[3, 3] = 1
        for new, (old, way) in enumerate(zip(axes, flips, strict=True)):
            change[old, new] = way
            change[old, 3] = 0 if way > 0 else mask.shape[old] - 1
        expected = mask.transpose(axes)[:: flips[0], :: flips[1], :: flips[2]]
        x, y, z = expected.shape
        share, _ = structure.share(Lattice((x, y, z), LATTICE.affine @ change))
        np.testing.assert_array_equal(share.whole(), expected)


def test_frames_are_placed_by_position_in_any_order(tmp_path: Path) -> None:
    dataset = segmentation(blobs())
    order = np.random.default_rng(2).permutation(dataset.NumberOfFrames)
    size = dataset.Rows * dataset.Columns
    bits = np.unpackbits(np.frombuffer(dataset.PixelData, np.uint8), bitorder="little")
    frames = bits[: size * len(order)].reshape(len(order), size)[order]
    dataset.PixelData = np.packbits(frames.ravel(), bitorder="little").tobytes()
    dataset.PixelData += b"\0" * (len(dataset.PixelData) % 2)
    dataset.PerFrameFunctionalGroupsSequence = [dataset.PerFrameFunctionalGroupsSequence[index] for index in order]
    for index, structure in enumerate(read(dataset, tmp_path).structures):
        np.testing.assert_array_equal(structure.share(LATTICE)[0].whole(), blobs()[..., index])


def test_fractions_are_shares(tmp_path: Path) -> None:
    shares = np.random.default_rng(0).integers(0, 201, SERIES.hu.shape) / 200
    shares[:, :, :3] = 0
    more = {"max_fractional_value": 200, "fractional_type": "OCCUPANCY", "transfer_syntax_uid": ExplicitVRLittleEndian}
    found = read(segmentation(shares, "FRACTIONAL", 1, **more), tmp_path)
    np.testing.assert_allclose(found.structures[0].share(LATTICE)[0].whole(), shares, atol=1e-6)
    assert found.warnings == ()
    compressed = segmentation(
        shares,
        "FRACTIONAL",
        1,
        **more | {"fractional_type": "PROBABILITY"},
    )
    assert "probabilities" in read(compressed, tmp_path).warnings[0]


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, RLELossless])
def test_label_maps_are_read(syntax: str, tmp_path: Path) -> None:
    labels = np.where(blobs()[..., 0], 1, np.where(blobs()[..., 1], 2, 0)).astype(np.uint8)
    found = read(segmentation(labels, "LABELMAP", 3, transfer_syntax_uid=syntax), tmp_path)
    for structure in found.structures:
        np.testing.assert_array_equal(structure.share(LATTICE)[0].whole(), labels == structure.number)
    assert [one.is_empty for one in found.structures] == [False, False, True]
    assert found.structures[2].share(LATTICE)[1] == ("Segment 3 has no voxel and counts as not annotated.",)


def test_another_lattice_is_resampled_by_volume_of_overlap(tmp_path: Path) -> None:
    structure = read(segmentation(blobs()), tmp_path).structures[0]
    finer = np.diag([0.5, 1 / 3, 1.0, 1.0])
    finer[:3, 3] = [-0.25, -1 / 3, 0]  # each voxel becomes two times three
    share, warnings = structure.share(Lattice((40, 48, 9), LATTICE.affine @ finer))
    np.testing.assert_allclose(share.whole(), blobs()[..., 0].repeat(2, axis=0).repeat(3, axis=1), atol=1e-5)
    assert "another lattice than the scan and was resampled" in warnings[0]
    coarser = np.diag([2.0, 4.0, 3.0, 1.0])
    coarser[:3, 3] = [0.5, 1.5, 1.0]
    share, _ = structure.share(Lattice((10, 4, 3), LATTICE.affine @ coarser))
    expected = blobs()[..., 0].reshape(10, 2, 4, 4, 3, 3).mean(axis=(1, 3, 5))
    np.testing.assert_allclose(share.whole(), expected, atol=1e-6)


@pytest.mark.parametrize("stated", [True, False])
def test_thick_frames_on_each_second_slice_keep_their_volume(stated: bool, tmp_path: Path) -> None:
    """Their planes are slices of the CT, but each stands for two of them."""
    mask = np.zeros((20, 16, 5, 1), bool)
    mask[4:9, 4:9, 1:4] = True
    measures = PixelMeasuresSequence((1.1, 0.8), 6.0, 6.0 if stated else None)
    dataset = segmentation(mask, count=1, images=IMAGES[::2], pixel_measures=measures)
    share, warnings = read(dataset, tmp_path).structures[0].share(LATTICE)
    assert share.voxels == pytest.approx(2 * mask.sum())
    np.testing.assert_allclose(share.whole()[5, 5], [0, 0.5, 1, 1, 1, 1, 1, 0.5, 0])
    assert "resampled" in warnings[0]


def test_two_frames_at_one_place_are_refused(tmp_path: Path) -> None:
    dataset = segmentation(blobs())
    for frame in dataset.PerFrameFunctionalGroupsSequence:
        frame.SegmentIdentificationSequence[0].ReferencedSegmentNumber = 1
    with pytest.raises(InputError, match="Two frames of a segmentation show segment 1"):
        read(dataset, tmp_path).structures[0].share(LATTICE)


def test_a_turned_lattice_keeps_the_volume(tmp_path: Path) -> None:
    mask = np.zeros(SERIES.hu.shape, bool)
    mask[6:14, 4:12, 3:7] = True
    structure = read(segmentation(mask[..., None], count=1), tmp_path).structures[0]
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(0.2), -np.sin(0.2)], [np.sin(0.2), np.cos(0.2)]]
    turned = Lattice((40, 40, 16), turn @ LATTICE.affine @ np.diag([1, 1, 0.7, 1.0]))
    middle = LATTICE.affine @ [9.5, 7.5, 4.5, 1]
    turned.affine[:3, 3] += (middle - turned.affine @ [20, 20, 8, 1])[:3]
    share, warnings = structure.share(turned)
    assert share.voxels * turned.voxel_volume_mm3 == pytest.approx(mask.sum() * LATTICE.voxel_volume_mm3, rel=0.01)
    assert len(warnings) == 1
    where = share.whole()
    centre = [float(where.sum(axis=tuple({0, 1, 2} - {axis})) @ np.arange(where.shape[axis])) for axis in range(3)]
    np.testing.assert_allclose(np.array(centre) / where.sum(), [20, 20, 8], atol=0.05)


def test_a_segment_beyond_the_scan_is_left_out_or_refused(tmp_path: Path) -> None:
    structure = read(segmentation(blobs()), tmp_path).structures[0]
    below = np.eye(4)
    below[2, 3] = 3
    share, warnings = structure.share(Lattice((20, 16, 6), LATTICE.affine @ below))
    np.testing.assert_array_equal(share.whole(), blobs()[:, :, 3:, 0])
    assert "only partly within the scan" in warnings[0]
    below[2, 3] = 30
    with pytest.raises(GeometryError, match="Segment 1 is outside the scan"):
        structure.share(Lattice((20, 16, 6), LATTICE.affine @ below))


def test_irregular_frames_need_the_lattice_of_the_scan(tmp_path: Path) -> None:
    mask = np.zeros((*SERIES.hu.shape, 1), bool)
    mask[4:9, 4:9, [0, 2, 5]] = True  # the smallest distance is two slices, and three is no multiple of it
    dataset = segmentation(mask, count=1)
    measures = dataset.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    if "SpacingBetweenSlices" in measures:
        del measures.SpacingBetweenSlices
    structure = read(dataset, tmp_path).structures[0]
    np.testing.assert_array_equal(structure.share(LATTICE)[0].whole(), mask[..., 0])
    assert structure.summary().volume_ml is None
    with pytest.raises(GeometryError, match="do not form a lattice"):
        structure.share(Lattice(LATTICE.shape, LATTICE.affine @ np.diag([0.5, 1, 1, 1.0])))


def test_odd_segmentations_are_refused(tmp_path: Path) -> None:
    tiled = segmentation(blobs())
    tiled.TotalPixelMatrixColumns = 400
    assert "tiled" in problem(tiled, tmp_path).message
    unplaced = segmentation(blobs())
    del unplaced.PerFrameFunctionalGroupsSequence[2].PlanePositionSequence
    assert "frame 3 has no valid position" in problem(unplaced, tmp_path).message
    unknown = segmentation(blobs())
    unknown.SegmentationType = "SECRET"
    assert "unknown type" in problem(unknown, tmp_path).message
    twice = segmentation(blobs())
    twice.SegmentSequence[1].SegmentNumber = 1
    assert "same number" in problem(twice, tmp_path).message
    empty = segmentation(blobs())
    empty.SegmentSequence = []
    assert isinstance(problem(empty, tmp_path), UnreadableFileError)
    fewer = segmentation(blobs())
    fewer.NumberOfFrames = 3
    assert isinstance(problem(fewer, tmp_path), UnreadableFileError)


def test_cut_pixels_are_refused(tmp_path: Path) -> None:
    path = save(segmentation(blobs()), tmp_path / "seg.dcm")
    path.write_bytes(path.read_bytes()[:-300])
    ((_, reason),) = find_annotations(path).problems
    assert isinstance(reason, UnreadableFileError)
    assert "cut off" in reason.message


def test_an_own_lattice_of_the_segmentation_is_read(tmp_path: Path) -> None:
    """Frames of other size, spacing and position than the CT, as of a cropped segmentation."""
    mask = np.zeros((10, 6, 4), bool)
    mask[2:9, 1:5, 1:3] = True
    axes = np.stack([SERIES.orientation[:3], SERIES.orientation[3:], SERIES.normal], axis=1)
    first = np.array(SERIES.origin) + axes @ (np.array([5, 4, 2]) * SERIES.spacing)
    positions = [Position("PATIENT", tuple(first + axes[:, 2] * 3.0 * index)) for index in range(4)]
    found = read(
        segmentation(
            mask[..., None],
            count=1,
            pixel_measures=PixelMeasuresSequence((1.1, 0.8), 3.0, 3.0),
            plane_orientation=PlaneOrientationSequence("PATIENT", OBLIQUE),
            plane_positions=positions,
        ),
        tmp_path,
    )
    share, warnings = found.structures[0].share(LATTICE)
    expected = np.zeros(SERIES.hu.shape, bool)
    expected[5:15, 4:10, 2:6] = mask
    np.testing.assert_array_equal(share.whole(), expected)
    assert warnings == ()


def test_dcmqi_reads_the_same(tmp_path: Path) -> None:
    found = read(segmentation(blobs()), tmp_path)
    program = Path(sys.executable).with_name("segimage2itkimage")
    command = [program, "--inputDICOM", found.path, "--outputDirectory", tmp_path, "--outputType", "nii"]
    subprocess.run(command, check=True, capture_output=True)  # noqa: S603 - a program with fixed arguments
    for structure in found.structures:
        image = sitk.ReadImage(str(tmp_path / f"{structure.number}.nii.gz"))
        filled = np.argwhere(sitk.GetArrayFromImage(image) > 0)[:, ::-1]
        places = np.array([image.TransformIndexToPhysicalPoint(one.tolist()) for one in filled]) * (-1, -1, 1)
        voxels = (np.c_[places, np.ones(len(places))] @ np.linalg.inv(LATTICE.affine).T)[:, :3]
        indices = np.rint(voxels).astype(int)
        np.testing.assert_allclose(voxels, indices, atol=1e-3)
        mask = np.zeros(LATTICE.shape, bool)
        mask[tuple(indices.T)] = True
        np.testing.assert_array_equal(structure.share(LATTICE)[0].whole(), mask)


def test_random_damage_is_refused_or_read_but_never_a_crash(tmp_path: Path) -> None:
    data = save(segmentation(blobs()), tmp_path / "seg.dcm").read_bytes()
    damaged = tmp_path / "damaged.dcm"
    said: list[str] = []
    for number in range(40):
        random = np.random.default_rng(number)
        first = int(random.integers(132, len(data) - 40))
        other = random.integers(0, 256, 4, dtype=np.uint8).tobytes()
        changed = (data[:first] + other + data[first + 4 :], data[:first] + data[first + 9 :])
        damaged.write_bytes(changed[number % 2])
        found = find_annotations(damaged)
        said += [str(reason) for _, reason in found.problems]
        for one in found.objects:
            for segment in one.structures:
                try:
                    segment.summary()
                    segment.share(LATTICE)
                except InputError as error:
                    said.append(str(error))
    assert not any("Secretname" in one for one in said)
    assert len(said) > 10
