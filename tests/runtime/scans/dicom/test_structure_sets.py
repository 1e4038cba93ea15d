"""RT Structure Sets are read as contours: odd files, refusals, references, and what their ROIs are on the CT."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from doubles.dicom import Series, save, zipped
from doubles.structure_sets import Roi, circle, rectangle, set_coordinates, structure_set
from pydicom.dataset import Dataset, FileDataset
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian

from fseft_edge.dicom_output import SegmentationAlgorithm, write_structure_set
from fseft_edge.masks.result import SegmentedOrgan
from fseft_edge.runtime.errors import GeometryError, InputError, UnreadableFileError
from fseft_edge.runtime.scans.dicom.annotation_objects import AnnotationObject
from fseft_edge.runtime.scans.dicom.annotations import find_annotations
from fseft_edge.runtime.scans.structures import Lattice
from fseft_edge.runtime.scans.volume import LabelMap

SERIES = Series(np.full((40, 36, 12), -1000, np.int16), (1.0, 1.0, 3.0), origin=(-20.0, -10.0, 50.0))
IMAGES: Sequence[Dataset] = SERIES.datasets()
LATTICE = Lattice(
    (40, 36, 12),
    np.diag([-1.0, -1.0, 1.0, 1.0]) @ np.array([[1, 0, 0, -20.0], [0, 1, 0, -10.0], [0, 0, 3, 50.0], [0, 0, 0, 1]]),
)
HEIGHTS = [50.0 + 3 * index for index in range(3, 7)]
DISCS = [circle((-3.2, 5.4), 6, height) for height in HEIGHTS]


def read(dataset: FileDataset, folder: Path) -> AnnotationObject:
    """Write a structure set and return it as read."""
    found = find_annotations(save(dataset, folder / "rs.dcm"))
    assert found.problems == ()
    (one,) = found.objects
    return one


def problem(dataset: FileDataset, folder: Path) -> InputError:
    """Write a structure set that is not readable and return the reason."""
    found = find_annotations(save(dataset, folder / "rs.dcm"))
    assert found.objects == ()
    ((_, reason),) = found.problems
    assert "Secretname" not in str(reason)
    return reason


def test_a_structure_set_names_its_rois_its_images_and_its_state(tmp_path: Path) -> None:
    found = read(structure_set([Roi("Parotid L", DISCS, number=12), Roi("Empty", number=3)], IMAGES), tmp_path)
    assert found.kind == "rtstruct"
    assert found.path == tmp_path / "rs.dcm"
    assert found.frames_of_reference == (SERIES.frame_of_reference,)
    assert found.images == {image.SOPInstanceUID for image in IMAGES}
    assert found.series == {SERIES.uid}
    assert (found.label, found.date, found.time, found.approval) == ("PLAN", "20240229", "101530", "APPROVED")
    assert [(one.name, one.number, one.is_empty) for one in found.structures] == [
        ("Parotid L", 12, False),
        ("Empty", 3, True),
    ]
    summary = found.structures[0].summary()
    assert (summary.contours, summary.planes, summary.forms, summary.warnings) == (4, 4, ("CLOSED_PLANAR",), ())
    assert summary.volume_ml == pytest.approx(np.pi * 36 * 12 / 1000, rel=1e-3)
    share, warnings = found.structures[0].share(LATTICE)
    assert share.voxels == pytest.approx(np.pi * 36 * 4, rel=1e-3)
    assert warnings == ()
    centre = np.argwhere(share.whole() == 1).mean(axis=0)
    np.testing.assert_allclose(centre, [16.8, 15.4, 4.5], atol=0.2)  # in pixels from the first voxel
    share, warnings = found.structures[1].share(LATTICE)
    assert share.voxels == 0
    assert warnings == ("ROI 3: it has no closed contour and counts as not annotated.",)


def without_images(dataset: FileDataset) -> None:
    del dataset.ReferencedFrameOfReferenceSequence[0].RTReferencedStudySequence
    for contour in dataset.ROIContourSequence[0].ContourSequence:
        del contour.ContourImageSequence


def with_long_decimals(dataset: FileDataset) -> None:
    for contour, points in zip(dataset.ROIContourSequence[0].ContourSequence, DISCS, strict=True):
        set_coordinates(contour, "\\".join(f"{value:.25f}" for value in points.ravel()))


def without_contour_counts(dataset: FileDataset) -> None:
    for contour in dataset.ROIContourSequence[0].ContourSequence:
        del contour.NumberOfContourPoints


def with_two_items(dataset: FileDataset) -> None:
    """Two items of ROIContourSequence with contours of one ROI."""
    second = Dataset()
    second.ReferencedROINumber = 1
    second.ContourSequence = [dataset.ROIContourSequence[0].ContourSequence.pop()]
    dataset.ROIContourSequence.append(second)


def explicit(dataset: FileDataset) -> None:
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian


def deflated(dataset: FileDataset) -> None:
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian


@pytest.mark.parametrize(
    "change", [without_images, with_long_decimals, without_contour_counts, with_two_items, explicit, deflated]
)
def test_odd_files_give_the_same_shares(change: Callable[[FileDataset], None], tmp_path: Path) -> None:
    expected = read(structure_set([Roi("a", DISCS)], IMAGES), tmp_path / "as it should be").structures[0]
    odd = structure_set([Roi("a", DISCS)], IMAGES)
    change(odd)
    found = read(odd, tmp_path).structures[0]
    np.testing.assert_allclose(found.share(LATTICE)[0].whole(), expected.share(LATTICE)[0].whole(), atol=1e-4)


def test_a_set_without_images_says_so(tmp_path: Path) -> None:
    dataset = structure_set([Roi("a", DISCS)], IMAGES)
    without_images(dataset)
    found = read(dataset, tmp_path)
    assert not found.images
    assert "names no images" in found.warnings[0]


def test_types_that_enclose_nothing_are_left_out_by_name(tmp_path: Path) -> None:
    forms = ["POINT", "OPEN_PLANAR", "OPEN_NONPLANAR", "CLOSED_PLANAR", "CLOSED_PLANAR", "Ada^Secret"]
    dataset = structure_set([Roi("a", [DISCS[0][:1], DISCS[0], DISCS[1], DISCS[0], DISCS[1], DISCS[2]], forms)], IMAGES)
    set_coordinates(dataset.ROIContourSequence[0].ContourSequence[4], "")
    (roi,) = read(dataset, tmp_path).structures
    share, warnings = roi.share(LATTICE)
    assert share.voxels == pytest.approx(np.pi * 36, rel=1e-3)
    assert warnings == (
        "ROI 1: 1 contour of the type (unknown) were left out.",
        "ROI 1: 1 contour of the type OPEN_NONPLANAR were left out.",
        "ROI 1: 1 contour of the type OPEN_PLANAR were left out.",
        "ROI 1: 1 contour of the type POINT were left out.",
        "ROI 1: 1 contour without points were left out.",
    )
    assert roi.summary().warnings == warnings


def test_exclusive_contours_are_read_as_such(tmp_path: Path) -> None:
    two = [rectangle((-10, 0), (-4, 6), 59.0), rectangle((-6, 0), (0, 6), 59.0)]
    (roi,) = read(structure_set([Roi("a", two, "CLOSEDPLANAR_XOR")], IMAGES), tmp_path).structures
    assert roi.share(LATTICE)[0].voxels == pytest.approx(48)


@pytest.mark.parametrize("text", ["1\\2\\nan", "1\\2", "1\\2\\3\\x", "1\\2\\1e300", "1\\\\2", "inf\\0\\0"])
def test_coordinates_that_are_no_points_are_refused(text: str, tmp_path: Path) -> None:
    dataset = structure_set([Roi("Secretname", DISCS)], IMAGES)
    set_coordinates(dataset.ROIContourSequence[0].ContourSequence[1], text)
    (roi,) = read(dataset, tmp_path).structures
    for asked in (lambda: roi.share(LATTICE), roi.summary):
        with pytest.raises(GeometryError, match=r"Contour 2 of 4 of ROI 1 has coordinates") as error:
            asked()
        assert "Secretname" not in str(error.value)


def test_decimal_commas_and_wrong_counts_are_said(tmp_path: Path) -> None:
    dataset = structure_set([Roi("a", DISCS)], IMAGES)
    contours = dataset.ROIContourSequence[0].ContourSequence
    set_coordinates(contours[0], "\\".join(f"{value:.3f}".replace(".", ",") for value in DISCS[0].ravel()))
    contours[1].NumberOfContourPoints = 7
    (roi,) = read(dataset, tmp_path).structures
    share, warnings = roi.share(LATTICE)
    assert share.voxels == pytest.approx(np.pi * 36 * 4, rel=1e-3)
    assert [("commas" in one, "NumberOfContourPoints" in one) for one in warnings] == [(True, False), (False, True)]


def test_a_moved_contour_is_refused(tmp_path: Path) -> None:
    dataset = structure_set([Roi("a", DISCS)], IMAGES)
    dataset.ROIContourSequence[0].ContourSequence[2].ContourOffsetVector = [0, 0, 1.5]
    (roi,) = read(dataset, tmp_path).structures
    with pytest.raises(GeometryError, match="ContourOffsetVector"):
        roi.share(LATTICE)


@pytest.mark.parametrize(
    ("charset", "encoding"), [("ISO_IR 192", "utf-8"), ("ISO_IR 100", "latin-1"), (None, "utf-8"), ("WRONG", "latin-1")]
)
def test_names_are_read_in_any_character_set(charset: str | None, encoding: str, tmp_path: Path) -> None:
    dataset = structure_set([Roi("Muller", DISCS)], IMAGES)
    if charset:
        dataset.SpecificCharacterSet = charset
    path = save(dataset, tmp_path / "rs.dcm")
    data = path.read_bytes()
    name = "Müll".encode(encoding).ljust(6)
    path.write_bytes(data.replace(b"Muller", name))
    (found,) = find_annotations(path).objects
    assert found.structures[0].name == "Müll"


def test_several_frames_of_reference_are_told_apart(tmp_path: Path) -> None:
    dataset = structure_set([Roi("a", DISCS, number=1), Roi("b", DISCS, number=2)], IMAGES)
    dataset.StructureSetROISequence[1].ReferencedFrameOfReferenceUID = "1.2.3"
    found = read(dataset, tmp_path)
    assert [one.frame_of_reference for one in found.structures] == [SERIES.frame_of_reference, "1.2.3"]
    assert found.frames_of_reference == (SERIES.frame_of_reference, "1.2.3")


def test_rois_that_cannot_be_told_apart_are_refused(tmp_path: Path) -> None:
    same = structure_set([Roi("Secretname", DISCS), Roi("b", DISCS)], IMAGES)
    assert "with the same number" in problem(same, tmp_path).message
    none = structure_set([Roi("Secretname", DISCS)], IMAGES)
    none.StructureSetROISequence[0].ROINumber = None
    assert "without a number" in problem(none, tmp_path).message


def test_two_rois_may_have_the_same_name(tmp_path: Path) -> None:
    found = read(structure_set([Roi("a", DISCS, number=5), Roi("a", DISCS[:2], number=9)], IMAGES), tmp_path)
    assert [one.summary().planes for one in found.structures] == [4, 2]


def test_contours_of_an_unknown_roi_are_said(tmp_path: Path) -> None:
    dataset = structure_set([Roi("a", DISCS)], IMAGES)
    dataset.ROIContourSequence[0].ReferencedROINumber = 8
    found = read(dataset, tmp_path)
    assert found.structures[0].is_empty
    assert found.warnings == ("4 contours without a ROI were left out.",)


def test_a_set_without_rois_is_refused(tmp_path: Path) -> None:
    reason = problem(structure_set([], IMAGES), tmp_path)
    assert isinstance(reason, UnreadableFileError)
    assert "StructureSetROISequence" in reason.message


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    whole = save(structure_set([Roi("Secretname", DISCS)], IMAGES), tmp_path / "rs.dcm").read_bytes()
    cut = tmp_path / "cut.dcm"
    for size in range(700, len(whole), len(whole) // 23):
        cut.write_bytes(whole[:size])
        found = find_annotations(cut)
        assert not found.objects
        for _, reason in found.problems:
            assert isinstance(reason, UnreadableFileError)
            assert "Secretname" not in str(reason)


def test_other_dicom_files_are_skipped(tmp_path: Path) -> None:
    SERIES.write(tmp_path)
    save(structure_set([Roi("a", DISCS)], IMAGES), tmp_path / "x" / "rs.dcm")
    found = find_annotations(tmp_path)
    assert [one.kind for one in found.objects] == ["rtstruct"]
    assert found.problems == ()
    assert find_annotations(tmp_path / "IM000").objects == ()


def test_an_archive_is_read_and_its_file_names_stay_out_of_messages(tmp_path: Path) -> None:
    save(structure_set([Roi("a", DISCS)], IMAGES), tmp_path / "case" / "Secretname.dcm")
    save(structure_set([], IMAGES), tmp_path / "case" / "Secretname2.dcm")
    archive = zipped(tmp_path / "case", tmp_path / "case.zip")
    for path in (archive, tmp_path / "case"):
        found = find_annotations(path)
        assert found.objects[0].structures[0].share(LATTICE)[0].voxels == pytest.approx(np.pi * 36 * 4, rel=1e-3)
        ((_, reason),) = found.problems
        assert str(path) in reason.message
        assert "Secretname" not in str(reason)


def test_interpolation_can_be_switched_off(tmp_path: Path) -> None:
    path = save(structure_set([Roi("a", DISCS[::2])], IMAGES), tmp_path / "rs.dcm")
    for interpolate, slices in ((True, 3), (False, 2)):
        (found,) = find_annotations(path, interpolate=interpolate).objects
        share, warnings = found.structures[0].share(LATTICE)
        assert share.voxels == pytest.approx(np.pi * 36 * slices, rel=2e-3)
        assert "every second slice" in warnings[0]


def test_real_masks_survive_our_own_structure_sets(real_ct: Path, tmp_path: Path) -> None:
    """Five organs of a real head-and-neck scan (OpenKBP): DSC at least 0.99."""
    import nibabel as nib  # noqa: PLC0415 - only here

    folder = real_ct / "headneck"
    name = json.loads((folder / "splits.json").read_text())["support"][0]
    image: Any = nib.load(next((folder / "label").glob(f"{name}*")))
    values = np.asarray(image.dataobj).astype(np.uint8)
    wanted = (1, 2, 3, 4, 7)
    labels = LabelMap(np.where(np.isin(values, wanted), values, 0).astype(np.uint8), np.asarray(image.affine))
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ labels.affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    series = Series(
        np.zeros(labels.shape, np.int16),
        (float(spacing[0]), float(spacing[1]), float(spacing[2])),
        tuple((lps[:3, :2] / spacing[:2]).T.ravel().tolist()),
        origin=(float(lps[0, 3]), float(lps[1, 3]), float(lps[2, 3])),
    )
    organs = [SegmentedOrgan(f"organ_{label}", label, 0.0, ()) for label in wanted]
    algorithm = SegmentationAlgorithm("e" * 64, {organ.name: "a" * 64 for organ in organs})
    write_structure_set(tmp_path / "rs.dcm", labels, organs, list(series.datasets()), algorithm)
    (found,) = find_annotations(tmp_path / "rs.dcm").objects
    assert len(found.structures) == len(wanted)
    for structure in found.structures:
        mask = structure.share(Lattice(labels.shape, labels.affine))[0].mask()
        truth = labels.array == int(structure.name.split("_")[1])
        common = np.count_nonzero(mask.inside & truth[mask.box])
        assert 2 * common / (mask.voxels + np.count_nonzero(truth)) >= 0.99


def test_random_damage_is_refused_or_read_but_never_a_crash(tmp_path: Path) -> None:
    data = save(structure_set([Roi("Secretname", DISCS[:2])], IMAGES), tmp_path / "rs.dcm").read_bytes()
    damaged = tmp_path / "damaged.dcm"
    said: list[str] = []
    for number in range(60):
        random = np.random.default_rng(number)
        first, second = random.integers(132, len(data) - 40, 2)
        other = random.integers(0, 256, 4, dtype=np.uint8).tobytes()
        changed = (
            data[:first] + other + data[first + 4 :],
            data[:first] + data[first + 9 :],
            data[:first] + data[second:],
        )
        damaged.write_bytes(changed[number % 3])
        found = find_annotations(damaged)
        said += [str(reason) for _, reason in found.problems]
        for one in found.objects:
            for roi in one.structures:
                try:
                    roi.summary()
                    roi.share(LATTICE)
                except InputError as error:
                    said.append(str(error))
    assert not any("Secretname" in one for one in said)
    assert len(said) > 20
