"""Masks written as DICOM objects and read back by programs that share no code with the writers."""

from __future__ import annotations

import copy
import errno
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk  # noqa: N813 - its customary name
from doubles.ct_series import LAYOUTS, Series
from doubles.errors import refused
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.path import Path as Polygon
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from scipy import ndimage

from fseft_edge import __version__
from fseft_edge.dicom_output import (
    DicomKind,
    SegmentationAlgorithm,
    WrittenDicom,
    write_dicom_results,
    write_dicom_segmentation,
    write_structure_set,
)
from fseft_edge.masks.result import SegmentedOrgan
from fseft_edge.runtime.errors import FseftEdgeError, GeometryError, InputError, LabelError, OutOfSpaceError, UsageError
from fseft_edge.runtime.scans.volume import LabelMap
from fseft_edge.runtime.system import atomic

ORGANS = tuple(
    SegmentedOrgan(name, label, 0.0, ())
    for label, name in enumerate(("left_kidney", "kidney_right", "liver", "ptv_54"), start=1)
)
ALGORITHM = SegmentationAlgorithm("e" * 64, {organ.name: str(organ.label) * 64 for organ in ORGANS})
Writer = Callable[..., Any]
WRITERS: list[Writer] = [write_dicom_segmentation, write_structure_set]


def mask(series: Series, seed: int = 0) -> NDArray[np.uint8]:
    """Return label values ``[column, row, slice]``: asymmetric organs with contacts and holes, but no liver."""
    random = np.random.default_rng(seed)
    blobs = ndimage.gaussian_filter(random.normal(size=series.shape), 1)
    values = np.zeros(series.shape, np.uint8)
    values[blobs > 0.1] = 1
    values[blobs < -0.1] = 2
    values[random.random(series.shape) < 0.05] = 4
    values[0, 0, -1] = 4
    return values


def results(
    folder: Path,
    labels: LabelMap,
    source: list[Dataset],
    kinds: Sequence[DicomKind] = ("seg", "rtstruct"),
    *,
    organs: Sequence[SegmentedOrgan] = ORGANS,
    algorithm: SegmentationAlgorithm = ALGORITHM,
) -> tuple[WrittenDicom, ...]:
    return write_dicom_results(folder, "case", kinds, labels=labels, organs=organs, source=source, algorithm=algorithm)


def check_points(found: NDArray[np.float64], labels: LabelMap, label: int) -> None:
    """Check that points in RAS+ mm are the centres of all voxels of an organ, each exactly once."""
    places = (np.c_[found, np.ones(len(found))] @ np.linalg.inv(labels.affine).T)[:, :3]
    indices = places.round().astype(int)
    np.testing.assert_allclose(places, indices, atol=0.01)
    assert len(np.unique(indices, axis=0)) == len(indices)
    again = np.zeros(labels.shape, bool)
    again[tuple(indices.T)] = True
    np.testing.assert_array_equal(again, labels.array == label)


def segments(dataset: Dataset) -> Iterator[tuple[Dataset, NDArray[np.float64]]]:
    """Yield each segment with its pixel centres in RAS+ mm, from the bits and the functional groups (PS3.3 A.51)."""
    size = dataset.Rows * dataset.Columns
    bits = np.unpackbits(np.frombuffer(dataset.PixelData, np.uint8), bitorder="little")
    shared = dataset.SharedFunctionalGroupsSequence[0]
    orientation = np.array(shared.PlaneOrientationSequence[0].ImageOrientationPatient, float)
    between_rows, between_columns = map(float, shared.PixelMeasuresSequence[0].PixelSpacing)
    found: dict[int, list[NDArray[np.float64]]] = {}
    for number, frame in enumerate(dataset.PerFrameFunctionalGroupsSequence):
        position = np.array(frame.PlanePositionSequence[0].ImagePositionPatient, float)
        groups = frame if "SegmentIdentificationSequence" in frame else shared
        segment = groups.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        rows, columns = np.nonzero(bits[number * size : (number + 1) * size].reshape(dataset.Rows, dataset.Columns))
        points = position + np.outer(columns * between_columns, orientation[:3])
        points += np.outer(rows * between_rows, orientation[3:])
        found.setdefault(segment, []).append(points * (-1, -1, 1))
    for description in dataset.SegmentSequence:
        yield description, np.concatenate(found[description.SegmentNumber])


def regions(dataset: Dataset, images: list[Dataset]) -> Iterator[tuple[Dataset, NDArray[np.float64]]]:
    """Yield each ROI with the pixel centres inside its contours in RAS+ mm; matplotlib fills the contours."""
    by_uid = {image.SOPInstanceUID: image for image in images}
    named = {region.ROINumber: region for region in dataset.StructureSetROISequence}
    for contours in dataset.ROIContourSequence:
        points = []
        for contour in contours.ContourSequence:
            assert contour.ContourGeometricType == "CLOSED_PLANAR"
            vertices = np.array(contour.ContourData, float).reshape(-1, 3)
            assert len(vertices) == contour.NumberOfContourPoints
            image = by_uid[contour.ContourImageSequence[0].ReferencedSOPInstanceUID]
            position = np.array(image.ImagePositionPatient, float)
            along_row, along_column = np.array(image.ImageOrientationPatient, float).reshape(2, 3)
            between_rows, between_columns = map(float, image.PixelSpacing)
            off = vertices - position
            outline = np.stack([off @ along_row / between_columns, off @ along_column / between_rows], axis=1)
            np.testing.assert_allclose(off @ np.cross(along_row, along_column), 0, atol=2e-3)
            near = [
                slice(max(int(low), 0), int(high) + 2) for low, high in zip(outline.min(0), outline.max(0), strict=True)
            ]
            columns, rows = (axis.ravel() for axis in np.mgrid[near[0], near[1]])
            inside = Polygon(np.vstack([outline, outline[:1]])).contains_points(np.stack([columns, rows], axis=1))
            placed = position + np.outer(columns[inside] * between_columns, along_row)
            points.append((placed + np.outer(rows[inside] * between_rows, along_column)) * (-1, -1, 1))
        yield named[contours.ReferencedROINumber], np.concatenate(points)


def check_both(folder: Path, series: Series, labels: LabelMap, source: list[Dataset]) -> None:
    results(folder, labels, source)
    by_name = {organ.name: organ.label for organ in ORGANS}
    present = [organ.name for organ in ORGANS if (labels.array == organ.label).any()]
    seen = []
    for description, points in segments(pydicom.dcmread(folder / "case.seg.dcm")):
        check_points(points, labels, by_name[description.SegmentLabel])
        seen.append(description.SegmentLabel)
    assert seen == present
    seen = []
    for region, points in regions(pydicom.dcmread(folder / "case.rtstruct.dcm"), series.headers()):
        check_points(points, labels, by_name[region.ROIName])
        seen.append(region.ROIName)
    assert seen == present


@pytest.mark.parametrize("layout", LAYOUTS)
def test_both_objects_contain_the_mask_at_its_position(tmp_path: Path, layout: str) -> None:
    series = Series(LAYOUTS[layout])
    check_both(tmp_path, series, series.label_map(mask(series)), series.headers())


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from(sorted(LAYOUTS)),
    st.permutations((0, 1, 2)),
    st.integers(0, 7),
    # At least eight pixels per image: highdicom 0.28 packs the bits of smaller images wrongly.
    st.tuples(st.integers(3, 9), st.integers(3, 9), st.integers(2, 5)),
    st.tuples(*[st.floats(0.3, 6.0)] * 3),
    st.randoms(use_true_random=False),
)
def test_the_order_of_the_images_and_of_the_mask_axes_has_no_effect(
    tmp_path_factory: pytest.TempPathFactory, layout: str, axes: Any, flips: int, shape: Any, spacing: Any, random: Any
) -> None:
    columns, rows, slices = shape
    spacing = tuple(round(step, 3) for step in spacing)
    series = Series(LAYOUTS[layout], columns, rows, slices, spacing)
    source = series.headers()
    random.shuffle(source)
    values = np.random.default_rng(columns).integers(0, 3, series.shape).astype(np.uint8)
    values[0, 0, 0] = 1
    check_both(tmp_path_factory.mktemp("case"), series, series.label_map(values, tuple(axes), flips), source)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_mask_of_a_multi_frame_source_is_correct(tmp_path: Path, layout: str) -> None:
    series = Series(LAYOUTS[layout])
    labels, source = series.label_map(mask(series)), series.enhanced()
    results(tmp_path, labels, [source])
    by_name = {organ.name: organ.label for organ in ORGANS}
    for description, points in segments(pydicom.dcmread(tmp_path / "case.seg.dcm")):
        check_points(points, labels, by_name[description.SegmentLabel])
    # A program finds the plane of a contour by its frame number.
    positions = [
        frame.PlanePositionSequence[0].ImagePositionPatient for frame in source.PerFrameFunctionalGroupsSequence
    ]
    normal = np.cross(*np.array(LAYOUTS[layout][:2]))
    for region in pydicom.dcmread(tmp_path / "case.rtstruct.dcm").ROIContourSequence:
        for contour in region.ContourSequence:
            image = contour.ContourImageSequence[0]
            assert image.ReferencedSOPInstanceUID == source.SOPInstanceUID
            place = np.array(positions[image.ReferencedFrameNumber - 1], float)
            off_plane = (np.array(contour.ContourData, float).reshape(-1, 3) - place) @ normal
            np.testing.assert_allclose(off_plane, 0, atol=2e-3)


@pytest.mark.parametrize("layout", sorted(set(LAYOUTS) - {"tilted"}))  # an ITK image cannot have non-orthogonal axes
def test_dcmqi_reads_the_mask_from_the_segmentation(tmp_path: Path, layout: str) -> None:
    series = Series(LAYOUTS[layout])
    labels = series.label_map(mask(series))
    written = write_dicom_segmentation(tmp_path / "case.dcm", labels, ORGANS, series.headers(), ALGORITHM)
    (tmp_path / "read").mkdir()
    program = Path(sys.executable).with_name("segimage2itkimage")
    options = ["--inputDICOM", str(written.path), "--outputDirectory", str(tmp_path / "read"), "--outputType", "nrrd"]
    subprocess.run([program, *options], check=True, capture_output=True)  # noqa: S603 - the arguments are this test's
    meta = json.loads((tmp_path / "read" / "meta.json").read_text(encoding="utf-8"))
    by_name = {organ.name: organ.label for organ in ORGANS}
    for number, (described, *_) in enumerate(meta["segmentAttributes"], start=1):
        image = sitk.ReadImage(tmp_path / "read" / f"{number}.nrrd")
        indices = np.argwhere(sitk.GetArrayFromImage(image) > 0)[:, ::-1].tolist()
        points = np.array([image.TransformIndexToPhysicalPoint(index) for index in indices]) * (-1, -1, 1)
        check_points(points, labels, by_name[described["SegmentLabel"]])
    assert len(meta["segmentAttributes"]) == 3


def test_simpleitk_reads_every_voxel_of_the_segmentation(tmp_path: Path) -> None:
    series = Series()
    labels = series.label_map(mask(series))
    write_dicom_segmentation(tmp_path / "case.dcm", labels, ORGANS, series.headers(), ALGORITHM)
    frames = sitk.GetArrayFromImage(sitk.ReadImage(tmp_path / "case.dcm")) > 0
    assert frames.sum() == np.count_nonzero(labels.array)
    assert frames.any(axis=(1, 2)).all()  # no empty frame is stored


def test_the_left_organ_has_the_left_code_and_is_on_the_left_side(tmp_path: Path) -> None:
    series = Series(columns=40)
    values = np.zeros(series.shape, np.uint8)
    # In a row of an axial image, x increases towards the patient's left (LPS).
    values[25:35, 3:6, 1:3], values[5:15, 3:6, 1:3] = 1, 2
    results(tmp_path, series.label_map(values), series.headers())
    sides, x_of_side = {"7771000": "left", "24028007": "right"}, {}
    for description, points in segments(pydicom.dcmread(tmp_path / "case.seg.dcm")):
        kind = description.SegmentedPropertyTypeCodeSequence[0]
        assert (kind.CodeValue, kind.CodingSchemeDesignator) == ("64033007", "SCT")
        side = sides[kind.SegmentedPropertyTypeModifierCodeSequence[0].CodeValue]
        assert side in description.SegmentLabel
        x_of_side[side] = points[:, 0].mean()
    assert x_of_side["left"] < x_of_side["right"]  # RAS+: x increases towards the right
    structures = pydicom.dcmread(tmp_path / "case.rtstruct.dcm")
    for observation, contours in zip(structures.RTROIObservationsSequence, structures.ROIContourSequence, strict=True):
        kind = observation.RTROIIdentificationCodeSequence[0]
        side = sides[kind.SegmentedPropertyTypeModifierCodeSequence[0].CodeValue]
        x = np.array(contours.ContourSequence[0].ContourData, float)[::3].mean()
        assert x == pytest.approx(-x_of_side[side], abs=0.1)


@pytest.mark.parametrize("kind", ["seg", "rtstruct"])
def test_the_object_has_patient_study_and_frame_of_reference_of_its_source(tmp_path: Path, kind: DicomKind) -> None:
    series = Series()
    source = series.headers()
    results(tmp_path, series.label_map(mask(series)), source, (kind,))
    dataset = pydicom.dcmread(tmp_path / f"case.{kind}.dcm")
    for keyword in (
        "PatientName",
        "PatientID",
        "PatientBirthDate",
        "PatientSex",
        "StudyInstanceUID",
        "StudyDate",
        "StudyTime",
        "StudyID",
        "AccessionNumber",
        "ReferringPhysicianName",
        "FrameOfReferenceUID",
    ):
        assert dataset[keyword].value == source[0][keyword].value, keyword
    assert dataset.SeriesInstanceUID != source[0].SeriesInstanceUID
    assert dataset.SOPInstanceUID == dataset.file_meta.MediaStorageSOPInstanceUID
    assert (dataset.Manufacturer, dataset.SoftwareVersions) == ("fseft-edge", __version__)


def test_both_objects_refer_to_every_image_of_the_source(tmp_path: Path) -> None:
    series = Series()
    source = series.headers()
    results(tmp_path, series.label_map(mask(series)), source)
    uids = {image.SOPInstanceUID for image in source}
    segmentation = pydicom.dcmread(tmp_path / "case.seg.dcm")
    (referenced,) = segmentation.ReferencedSeriesSequence
    assert referenced.SeriesInstanceUID == source[0].SeriesInstanceUID
    assert {image.ReferencedSOPInstanceUID for image in referenced.ReferencedInstanceSequence} == uids
    by_position = {tuple(map(float, image.ImagePositionPatient)): image.SOPInstanceUID for image in source}
    for frame in segmentation.PerFrameFunctionalGroupsSequence:
        named = frame.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        assert named == by_position[tuple(map(float, frame.PlanePositionSequence[0].ImagePositionPatient))]
    structures = pydicom.dcmread(tmp_path / "case.rtstruct.dcm")
    (frame_of_reference,) = structures.ReferencedFrameOfReferenceSequence
    (study,) = frame_of_reference.RTReferencedStudySequence
    (images,) = study.RTReferencedSeriesSequence
    assert frame_of_reference.FrameOfReferenceUID == source[0].FrameOfReferenceUID
    assert study.ReferencedSOPInstanceUID == source[0].StudyInstanceUID
    assert {image.ReferencedSOPInstanceUID for image in images.ContourImageSequence} == uids


def test_every_organ_names_its_algorithm_and_adapter(tmp_path: Path) -> None:
    series = Series()
    labels = series.label_map(mask(series))
    algorithm = replace(ALGORITHM, transductive=True)
    results(tmp_path, labels, series.headers(), algorithm=algorithm)
    segmentation = pydicom.dcmread(tmp_path / "case.seg.dcm")
    structures = pydicom.dcmread(tmp_path / "case.rtstruct.dcm")
    named = [
        (segment.SegmentLabel, segment.SegmentAlgorithmType, segment.SegmentationAlgorithmIdentificationSequence[0])
        for segment in segmentation.SegmentSequence
    ] + [
        (region.ROIName, region.ROIGenerationAlgorithm, region.ROIDerivationAlgorithmIdentificationSequence[0])
        for region in structures.StructureSetROISequence
    ]
    for name, kind, item in named:
        assert (kind, item.AlgorithmName, item.AlgorithmVersion) == ("AUTOMATIC", "fseft-edge", __version__)
        assert item.AlgorithmParameters == (
            f"encoder_id={ALGORITHM.encoder_id},adapter_sha256={ALGORITHM.adapters[name]},transductive=yes"
        )


@pytest.mark.parametrize("writer", WRITERS)
def test_equal_results_give_equal_bytes_and_other_results_other_uids(tmp_path: Path, writer: Writer) -> None:
    series = Series()
    values, source = mask(series), series.headers()

    def written(name: str, labels: LabelMap, algorithm: SegmentationAlgorithm = ALGORITHM) -> tuple[bytes, Dataset]:
        path = writer(tmp_path / name, labels, ORGANS, source, algorithm).path
        return path.read_bytes(), pydicom.dcmread(path)

    first, dataset = written("a.dcm", series.label_map(values))
    source.reverse()
    again, _ = written("b.dcm", series.label_map(values, (2, 0, 1), 5))
    assert first == again
    values[3, 3, 3] = 4 if values[3, 3, 3] != 4 else 0
    others = [
        written("c.dcm", series.label_map(values))[1],
        written("d.dcm", series.label_map(mask(series)), replace(ALGORITHM, encoder_id="f" * 64))[1],
    ]
    for keyword in ("SOPInstanceUID", "SeriesInstanceUID"):
        assert len({found[keyword].value for found in (dataset, *others)}) == 3
    assert all(len(dataset[keyword].value) <= 64 for keyword in ("SOPInstanceUID", "SeriesInstanceUID"))


def test_the_segmentation_has_the_date_of_the_scan_and_the_structure_set_no_date(tmp_path: Path) -> None:
    series = Series()
    source, labels = series.headers(), series.label_map(mask(series))

    def date() -> tuple[str, str]:
        path = write_dicom_segmentation(tmp_path / "case.dcm", labels, ORGANS, source, ALGORITHM).path
        dataset = pydicom.dcmread(cast("Path", path))
        return dataset.ContentDate, dataset.ContentTime

    assert date() == ("20240229", "101530")
    for image in source:
        del image.SeriesDate, image.SeriesTime
    assert date() == ("20240229", "101112")
    for image in source:
        image.StudyDate = image.StudyTime = ""
    assert date() == ("19000101", "000000")
    write_structure_set(tmp_path / "case.dcm", labels, ORGANS, source, ALGORITHM)
    assert pydicom.dcmread(tmp_path / "case.dcm").StructureSetDate == ""


def test_an_organ_without_voxels_is_omitted_and_returned_as_omitted(tmp_path: Path) -> None:
    series = Series()
    labels = series.label_map(mask(series))
    for done in results(tmp_path, labels, series.headers()):
        assert (done.organs, done.omitted) == (("left_kidney", "kidney_right", "ptv_54"), ("liver",))
    segmentation = pydicom.dcmread(tmp_path / "case.seg.dcm")
    assert [segment.SegmentNumber for segment in segmentation.SegmentSequence] == [1, 2, 3]
    structures = pydicom.dcmread(tmp_path / "case.rtstruct.dcm")
    assert [region.ROINumber for region in structures.StructureSetROISequence] == [1, 2, 3]


@pytest.mark.parametrize("kind", ["seg", "rtstruct"])
def test_an_empty_mask_writes_no_file_and_deletes_an_older_one(tmp_path: Path, kind: DicomKind) -> None:
    series = Series()
    (tmp_path / f"case.{kind}.dcm").write_bytes(b"of an earlier run")
    empty = series.label_map(np.zeros(series.shape, np.uint8))
    (done,) = results(tmp_path, empty, series.headers(), (kind,))
    assert (done.kind, done.path, done.organs) == (kind, None, ())
    assert done.omitted == tuple(organ.name for organ in ORGANS)
    assert list(tmp_path.iterdir()) == []


def test_the_private_coding_scheme_is_declared(tmp_path: Path) -> None:
    series = Series()
    labels = series.label_map(mask(series))
    for done in results(tmp_path, labels, series.headers()):
        dataset = pydicom.dcmread(cast("Path", done.path))
        assert [item.CodingSchemeDesignator for item in dataset.CodingSchemeIdentificationSequence] == ["99FSEFTEDGE"]


def _another_frame_of_reference(source: list[Dataset]) -> None:
    source[1].FrameOfReferenceUID = "1.2.3"


def _moved(source: list[Dataset]) -> None:
    for image in source:
        image.ImagePositionPatient = [-30.5, *image.ImagePositionPatient[1:]]


def _without(keyword: str) -> Callable[[list[Dataset]], None]:
    def change(source: list[Dataset]) -> None:
        for image in source:
            del image[keyword]

    return change


def _turned(source: list[Dataset]) -> None:
    source[2].ImageOrientationPatient = [-1, 0, 0, 0, -1, 0]


def _beyond(source: list[Dataset]) -> None:
    source[0].ImagePositionPatient = [*source[0].ImagePositionPatient[:2], 1000]


def _slice_twice(source: list[Dataset]) -> None:
    source.append(copy.deepcopy(source[0]))
    source[-1].SOPInstanceUID = "1.2.3"


def _other_size(source: list[Dataset]) -> None:
    for image in source:
        image.Rows += 1


BROKEN: dict[str, tuple[Callable[[list[Dataset]], Any], type[FseftEdgeError], tuple[object, ...]]] = {
    "no image": (lambda source: source.clear(), InputError, ()),
    "a slice missing": (lambda source: source.pop(), GeometryError, (5, 6)),
    "a slice twice": (_slice_twice, GeometryError, (7, 6)),
    "an image twice": (lambda source: source.append(source[0]), InputError, ("SOPInstanceUID (0008,0018)",)),
    "no frame of reference": (_without("FrameOfReferenceUID"), GeometryError, ("FrameOfReferenceUID",)),
    "two frames of reference": (_another_frame_of_reference, InputError, ("FrameOfReferenceUID",)),
    "no position": (_without("ImagePositionPatient"), GeometryError, ("ImagePositionPatient",)),
    "no spacing": (_without("PixelSpacing"), GeometryError, ("PixelSpacing",)),
    "no instance UID": (_without("SOPInstanceUID"), InputError, ("SOPInstanceUID",)),
    "moved by half a millimetre": (_moved, GeometryError, ("0.5 mm", "0.1 mm")),
    "one slice turned": (_turned, GeometryError, ("0.1 mm",)),
    "one slice far away": (_beyond, GeometryError, ()),
    "another matrix": (_other_size, GeometryError, ("11 rows",)),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("trouble", BROKEN)
def test_a_source_that_does_not_fit_the_mask_is_refused(tmp_path: Path, writer: Writer, trouble: str) -> None:
    change, kind, named = BROKEN[trouble]
    series = Series()
    source = series.headers()
    change(source)
    with refused(kind, *named) as caught:
        writer(tmp_path / "case.dcm", series.label_map(mask(series)), ORGANS, source, ALGORITHM)
    assert caught.value.exit_code == 3
    assert "Grün" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("writer", WRITERS)
def test_rounded_positions_in_the_headers_are_accepted(tmp_path: Path, writer: Writer) -> None:
    series = Series(LAYOUTS["oblique"])
    source = series.headers()
    for image in source:
        image.ImagePositionPatient = [f"{float(value):.2f}" for value in image.ImagePositionPatient]
    assert writer(tmp_path / "case.dcm", series.label_map(mask(series)), ORGANS, source, ALGORITHM).path.exists()


@pytest.mark.parametrize("writer", WRITERS)
def test_headers_with_only_the_required_attributes_are_enough(tmp_path: Path, writer: Writer) -> None:
    series = Series()
    source = series.headers()
    needed = "SOPClassUID SOPInstanceUID StudyInstanceUID SeriesInstanceUID FrameOfReferenceUID Rows Columns"
    kept = set(f"{needed} ImagePositionPatient ImageOrientationPatient PixelSpacing".split())
    for image in source:
        for element in list(image):
            if element.keyword not in kept:
                del image[element.tag]
    dataset = pydicom.dcmread(
        writer(tmp_path / "case.dcm", series.label_map(mask(series)), ORGANS, source, ALGORITHM).path
    )
    assert (str(dataset.PatientName), dataset.PatientID, dataset.StudyDate) == ("", "", "")


@pytest.mark.parametrize("writer", WRITERS)
def test_a_label_value_without_an_organ_is_refused(tmp_path: Path, writer: Writer) -> None:
    series = Series()
    with refused(LabelError, "value 4"):
        writer(tmp_path / "case.dcm", series.label_map(mask(series)), ORGANS[:3], series.headers(), ALGORITHM)


def test_an_unknown_kind_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    series = Series()
    kinds = cast("list[DicomKind]", ["seg", "sr"])
    with refused(UsageError, "'sr'"):
        results(tmp_path, series.label_map(mask(series)), series.headers(), kinds)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_reported_and_the_older_file_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: Writer
) -> None:
    series = Series()
    path = tmp_path / "case.dcm"
    path.write_bytes(b"older")

    def full(_path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(atomic, "_flush", full)
    with refused(OutOfSpaceError, path) as caught:
        writer(path, series.label_map(mask(series)), ORGANS, series.headers(), ALGORITHM)
    assert caught.value.exit_code == 4
    assert path.read_bytes() == b"older"
    assert [file.name for file in tmp_path.iterdir()] == ["case.dcm"]


def test_an_output_path_that_is_a_folder_is_refused(tmp_path: Path) -> None:
    series = Series()
    (tmp_path / "results.dcm").mkdir()
    with refused(UsageError, tmp_path / "results.dcm"):
        write_structure_set(
            tmp_path / "results.dcm", series.label_map(mask(series)), ORGANS, series.headers(), ALGORITHM
        )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dciodvfy_finds_no_error(tmp_path: Path, layout: str) -> None:
    program = shutil.which("dciodvfy")
    if program is None:
        pytest.skip("dciodvfy (Debian package dicom3tools) is not installed")
    series = Series(LAYOUTS[layout])
    labels = series.label_map(mask(series))
    for source in (series.headers(), [series.enhanced()]):
        for done in results(tmp_path, labels, source):
            command = [program, str(done.path)]
            checked = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - a fixed program
            output = checked.stdout + checked.stderr
            assert {"seg": "Segmentation", "rtstruct": "RTStructureSet"}[done.kind] in output
            assert "Error" not in output, output


@pytest.mark.real_ct
def test_the_lungs_of_a_real_series_are_on_the_correct_sides(tmp_path: Path, real_ct: Path) -> None:
    with zipfile.ZipFile(real_ct / "dicom" / "chest_61.zip") as archive:
        names = [name for name in archive.namelist() if name.endswith(".dcm")]
        archive.extractall(tmp_path / "ct", names)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(tmp_path / "ct"), recursive=True))
    image = reader.Execute()  # the geometry comes from SimpleITK and not from the tested code
    hu = sitk.GetArrayFromImage(image)
    air = np.stack([ndimage.binary_fill_holes(plane > -300) & (plane < -400) for plane in hu])
    lungs = np.isin(*_two_largest(ndimage.binary_opening(air, iterations=2)))
    values = np.zeros(hu.shape, np.uint8)
    middle = hu.shape[2] // 2  # in a row of this supine series, x increases towards the patient's left
    values[..., middle:][lungs[..., middle:]], values[..., :middle][lungs[..., :middle]] = 1, 2
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    labels = LabelMap(np.ascontiguousarray(values.T), np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine)
    organs = [SegmentedOrgan(name, label, 0.0, ()) for label, name in enumerate(("left_lung", "right_lung"), start=1)]
    source = [
        pydicom.dcmread(path, stop_before_pixels=True)
        for path in sorted((tmp_path / "ct").rglob("*.dcm"), reverse=True)
    ]
    results(tmp_path, labels, source, organs=organs)
    centres = []
    for description, points in segments(pydicom.dcmread(tmp_path / "case.seg.dcm")):
        check_points(points, labels, description.SegmentNumber)
        centres.append(points[:, 0].mean())
    assert centres[0] < centres[1]  # RAS+: the left lung has the smaller x
    for region, points in regions(pydicom.dcmread(tmp_path / "case.rtstruct.dcm"), source):
        check_points(points, labels, region.ROINumber)
    program = shutil.which("plastimatch")
    if program is None:
        pytest.skip("plastimatch (Debian package plastimatch) is not installed: only this last part was not tested")
    options = ["--referenced-ct", str(tmp_path / "ct"), "--output-prefix", str(tmp_path / "masks")]
    command = [program, "convert", "--input", str(tmp_path / "case.rtstruct.dcm"), *options, "--prefix-format", "nrrd"]
    subprocess.run(command, check=True, capture_output=True)  # noqa: S603 - a fixed program
    for organ in organs:
        read = sitk.GetArrayFromImage(sitk.ReadImage(tmp_path / "masks" / f"{organ.name}.nrrd")) > 0
        np.testing.assert_array_equal(read, values == organ.label)


def _two_largest(mask: NDArray[np.bool_]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    pieces, _ = ndimage.label(mask)
    sizes = np.bincount(pieces.ravel())
    sizes[0] = 0
    return pieces, np.argsort(sizes)[-2:]
