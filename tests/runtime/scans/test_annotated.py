"""Annotations find their CTs by UID, by frame of reference, by folder or by name; organs are found by their names."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from doubles.dicom import Series, save, some_hu, zipped
from doubles.errors import refused
from doubles.structure_sets import Points, Roi, rectangle, structure_set
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileDataset
from pydicom.uid import generate_uid

from fseft_edge.runtime.errors import GeometryError, InputError, LabelError, UnreadableFileError, UsageError
from fseft_edge.runtime.scans.annotated import AnnotationSettings, FoundPair, find_pairs, names_of_cases, read_pair
from fseft_edge.runtime.scans.annotation import OrganShares, annotation_on
from fseft_edge.runtime.scans.content import annotation_sha256
from fseft_edge.runtime.scans.nifti import write_ct, write_label_map
from fseft_edge.runtime.scans.organs import parse_organs
from fseft_edge.runtime.scans.structure_names import identifies, printable
from fseft_edge.runtime.scans.volume import LabelMap, Volume

SHAPE = (9, 8, 6)
BOX = (slice(2, 6), slice(3, 7), slice(1, 5))
"""The voxels of the organ in all tests."""

(LIVER,) = parse_organs(["liver=Leber"])


def series(seed: int = 3) -> Series:
    return Series(some_hu(SHAPE, seed), spacing=(1.0, 1.0, 2.0), origin=(0.0, 0.0, 0.0))


def roi(name: str = "Leber", box: tuple[slice, slice, slice] = BOX, number: int = 1) -> Roi:
    x, y, z = box
    outline = [rectangle((x.start - 0.5, y.start - 0.5), (x.stop - 0.5, y.stop - 0.5), 2.0 * k) for k in _range(z)]
    return Roi(name, outline, number=number)


def _range(part: slice) -> range:
    return range(part.start, part.stop)


def write_patient(
    folder: Path, rois: list[Roi] | None = None, seed: int = 3, structures: str | None = "structures.dcm"
) -> tuple[list[FileDataset], FileDataset]:
    """Write a CT series and its structure set into one folder, and return both."""
    images = series(seed).datasets()
    for number, image in enumerate(images):
        save(image, folder / f"IM{number}")
    dataset = structure_set(rois if rois is not None else [roi()], images)
    if structures is not None:
        save(dataset, folder / structures)
    return images, dataset


def mask_of(pair: FoundPair) -> NDArray[np.bool_]:
    annotation = annotation_on(pair.scan.read(), read_pair(pair, [LIVER]))
    assert isinstance(annotation, OrganShares)
    return annotation.mask(LIVER.label)


def expected(box: tuple[slice, slice, slice] = BOX) -> NDArray[np.bool_]:
    mask = np.zeros(SHAPE, bool)
    mask[box] = True
    return mask


def test_a_structure_set_beside_its_ct(tmp_path: Path) -> None:
    write_patient(tmp_path / "anna")
    for place in (tmp_path, tmp_path / "anna"):
        (pair,) = find_pairs(place, place)
        assert pair.scan.name == "anna"
        np.testing.assert_array_equal(mask_of(pair), expected())
    assert names_of_cases(tmp_path) == ["anna"]


def test_structure_sets_find_their_ct_by_its_images_whatever_the_files_are_called(tmp_path: Path) -> None:
    _, first = write_patient(tmp_path / "ct" / "a", seed=1, structures=None)
    other = (slice(0, 3), *BOX[1:])
    _, second = write_patient(tmp_path / "ct" / "b", [roi(box=other)], seed=2, structures=None)
    save(first, tmp_path / "labels" / "2.dcm")
    save(second, tmp_path / "labels" / "1.dcm")
    a, b = find_pairs(tmp_path / "ct", tmp_path / "labels")
    assert (a.scan.name, b.scan.name) == ("a", "b")
    np.testing.assert_array_equal(mask_of(a), expected())
    np.testing.assert_array_equal(mask_of(b), expected(other))
    (only,) = find_pairs(tmp_path / "ct", tmp_path / "labels", ["b"])
    assert only.scan.name == "b"
    with refused(UnreadableFileError, "c"):
        find_pairs(tmp_path / "ct", tmp_path / "labels", ["c"])


def test_of_several_series_the_one_that_was_contoured_is_read(tmp_path: Path) -> None:
    write_patient(tmp_path / "anna", seed=1)
    longer = replace(series(2), hu=some_hu((9, 8, 12), 2))
    longer.write(tmp_path / "anna" / "later")
    (pair,) = find_pairs(tmp_path, tmp_path)
    assert pair.scan.series is not None
    assert pair.scan.series.shape == SHAPE
    np.testing.assert_array_equal(mask_of(pair), expected())


def test_a_ct_in_an_archive(tmp_path: Path) -> None:
    _, dataset = write_patient(tmp_path / "anna", structures=None)
    (tmp_path / "archives").mkdir()
    zipped(tmp_path / "anna", tmp_path / "archives" / "anna.zip")
    save(dataset, tmp_path / "labels" / "x.dcm")
    (pair,) = find_pairs(tmp_path / "archives", tmp_path / "labels")
    np.testing.assert_array_equal(mask_of(pair), expected())


def without_images(dataset: FileDataset) -> FileDataset:
    for frame in dataset.ReferencedFrameOfReferenceSequence:
        del frame.RTReferencedStudySequence
    for region in dataset.ROIContourSequence:
        for contour in region.ContourSequence:
            if "ContourImageSequence" in contour:
                del contour.ContourImageSequence
    return dataset


def test_without_references_the_frame_of_reference_decides(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images, dataset = write_patient(tmp_path / "anna", structures=None)
    save(without_images(dataset), tmp_path / "labels" / "x.dcm")
    (pair,) = find_pairs(tmp_path, tmp_path / "labels")
    np.testing.assert_array_equal(mask_of(pair), expected())
    assert "frame of reference" in caplog.text
    twin = replace(series(2), frame_of_reference=str(images[0].FrameOfReferenceUID))
    twin.write(tmp_path / "berta")
    with refused(InputError, "anna, berta", "frame"):
        find_pairs(tmp_path, tmp_path / "labels")


def test_a_structure_set_of_another_ct_is_refused(tmp_path: Path) -> None:
    write_patient(tmp_path / "anna", structures=None)
    _, other = write_patient(tmp_path / "elsewhere", seed=5, structures=None)
    save(other, tmp_path / "labels" / "x.dcm")
    with refused(InputError, "belongs to a CT", "frame of reference"):
        find_pairs(tmp_path / "anna", tmp_path / "labels")


def test_a_stray_structure_set_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_patient(tmp_path / "ct" / "anna")
    _, other = write_patient(tmp_path / "elsewhere", seed=5, structures=None)
    save(other, tmp_path / "ct" / "anna" / "other.dcm")
    (pair,) = find_pairs(tmp_path / "ct", tmp_path / "ct")
    np.testing.assert_array_equal(mask_of(pair), expected())
    assert "1 of 2 annotations" in caplog.text


def approved(images: list[FileDataset], status: str, date: str, box: tuple[slice, slice, slice]) -> FileDataset:
    dataset = structure_set([roi(box=box)], images)
    dataset.ApprovalStatus, dataset.StructureSetDate, dataset.StructureSetLabel = status, date, f"{status} {date}"
    dataset.SOPInstanceUID = generate_uid(entropy_srcs=[status, date])
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    return dataset


def test_the_newest_approved_of_several_structure_sets(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images, _ = write_patient(tmp_path / "anna", structures=None)
    boxes = [(slice(k, k + 2), *BOX[1:]) for k in range(4)]
    sets = [
        approved(images, *which, box)
        for which, box in zip(
            [("APPROVED", "20240101"), ("APPROVED", "20240301"), ("UNAPPROVED", "20240501"), ("REJECTED", "20240601")],
            boxes,
            strict=True,
        )
    ]
    for number, dataset in enumerate(sets, start=1):
        save(dataset, tmp_path / "anna" / f"RS{number}.dcm")
    (pair,) = find_pairs(tmp_path, tmp_path)
    np.testing.assert_array_equal(mask_of(pair), expected(boxes[1]))
    assert "of 4 annotations, number 2 is used, the newest approved one" in caplog.text
    end = "." + str(sets[3].SOPInstanceUID).rsplit(".", 1)[1]
    for choice, box in (("3", boxes[2]), ("APPROVED 20240101", boxes[0]), (end, boxes[3])):
        (pair,) = find_pairs(tmp_path, tmp_path, settings=AnnotationSettings(choice))
        np.testing.assert_array_equal(mask_of(pair), expected(box))
    with refused(UsageError, "--structure-set 9", "anna"):
        find_pairs(tmp_path, tmp_path, settings=AnnotationSettings("9"))


def test_rejected_structure_sets_alone_are_refused(tmp_path: Path) -> None:
    images, _ = write_patient(tmp_path / "anna", structures=None)
    save(approved(images, "REJECTED", "20240101", BOX), tmp_path / "anna" / "RS.dcm")
    with refused(InputError, "rejected"):
        find_pairs(tmp_path, tmp_path)


def test_a_label_map_of_a_dicom_series_and_a_structure_set_of_a_nifti_file(tmp_path: Path) -> None:
    images, dataset = write_patient(tmp_path / "dicom" / "anna", structures=None)
    (volume,) = (scan.scan.read() for scan in [_only(tmp_path, images, dataset)])
    write_ct(tmp_path / "images" / "anna.nii.gz", volume)
    (pair,) = find_pairs(tmp_path / "images", tmp_path / "by_folder")
    np.testing.assert_array_equal(mask_of(pair), expected())
    write_label_map(tmp_path / "labels" / "anna.nii.gz", LabelMap(expected().astype(np.uint8) * 7, volume.affine))
    (pair,) = find_pairs(tmp_path / "dicom", tmp_path / "labels")
    (organ,) = parse_organs(["liver=7"])
    np.testing.assert_array_equal(read_pair(pair, [organ]).mask(7), expected())
    assert annotation_sha256(read_pair(pair, [organ]), [7])


def _only(root: Path, images: list[FileDataset], dataset: FileDataset) -> FoundPair:
    """Write the structure set into a folder of the patient's name, and return its pair with the DICOM series."""
    assert images
    save(dataset, root / "by_folder" / "anna" / "x.dcm")
    (pair,) = find_pairs(root / "dicom", root / "by_folder")
    return pair


def test_an_annotation_has_the_same_hash_as_label_map_and_as_contours(tmp_path: Path) -> None:
    write_patient(tmp_path / "anna")
    (pair,) = find_pairs(tmp_path, tmp_path)
    shares = read_pair(pair, [LIVER])
    labels = LabelMap(expected().astype(np.uint8), shares.affine)
    assert annotation_sha256(shares, [LIVER.label]) == annotation_sha256(labels, [1])


def test_two_matches_are_refused_with_the_list_and_no_patient_name(tmp_path: Path) -> None:
    rois = [roi("LEBER"), roi("le ber", number=2), roi("Secretname left", number=3)]
    write_patient(tmp_path / "anna", rois)
    (pair,) = find_pairs(tmp_path, tmp_path)
    with refused(LabelError, "LEBER (#1), le ber (#2)", "anna") as caught:
        read_pair(pair, [LIVER])
    assert "Secretname" not in str(caught.value)
    with refused(LabelError, "label value"):
        read_pair(pair, parse_organs(["liver=4"]))
    empty = [Roi("LEBER", number=1), roi("Leber", number=2)]
    write_patient(tmp_path / "berta", empty, seed=4)
    _, pair = find_pairs(tmp_path, tmp_path)
    np.testing.assert_array_equal(mask_of(pair), expected())  # an empty ROI is not annotated


def test_an_absent_or_empty_structure_is_not_annotated(tmp_path: Path) -> None:
    write_patient(tmp_path / "anna", [Roi("Leber"), roi("spleen", number=2)])
    (pair,) = find_pairs(tmp_path, tmp_path)
    organs = parse_organs(["liver=Leber", "spleen", "kidney_left"])
    annotation = read_pair(pair, organs)
    assert [annotation.contains(organ.label) for organ in organs] == [False, True, False]
    assert not annotation.mask(organs[2].label).any()
    assert not annotation.shares(organs[2].label).any()


def test_contours_outside_the_scan_are_refused(tmp_path: Path) -> None:
    far: list[Points] = [rectangle((500, 500), (510, 510), 2.0 * k) for k in range(1, 4)]
    write_patient(tmp_path / "anna", [Roi("Leber", far)])
    (pair,) = find_pairs(tmp_path, tmp_path)
    with refused(GeometryError):
        read_pair(pair, [LIVER])


def test_contours_on_every_second_slice_are_filled_unless_told_otherwise(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = roi(box=(BOX[0], BOX[1], slice(0, 5)))
    write_patient(tmp_path / "anna", [Roi("Leber", whole.contours[::2])])
    (pair,) = find_pairs(tmp_path, tmp_path)
    np.testing.assert_array_equal(mask_of(pair), expected((BOX[0], BOX[1], slice(0, 5))))
    assert "interpolated" in caplog.text
    (pair,) = find_pairs(tmp_path, tmp_path, settings=AnnotationSettings(interpolate=False))
    mask = mask_of(pair)
    assert mask[..., ::2].any()
    assert not mask[..., 1::2].any()
    assert "stay empty" in caplog.text


def test_a_damaged_structure_set_is_named_and_the_others_are_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_patient(tmp_path / "anna")
    whole = (tmp_path / "anna" / "structures.dcm").read_bytes()
    (tmp_path / "anna" / "zz.dcm").write_bytes(whole[: len(whole) // 2])
    with caplog.at_level(logging.WARNING):
        (pair,) = find_pairs(tmp_path, tmp_path)
    assert "left out" in caplog.text
    np.testing.assert_array_equal(mask_of(pair), expected())
    (tmp_path / "anna" / "structures.dcm").unlink()
    with refused(UnreadableFileError):
        find_pairs(tmp_path, tmp_path)


def test_a_label_map_with_names(tmp_path: Path) -> None:
    volume = Volume(some_hu(SHAPE), np.eye(4))
    labels = LabelMap(expected().astype(np.uint8) * 7, volume.affine)
    write_ct(tmp_path / "images" / "a.nii.gz", volume)
    write_label_map(tmp_path / "labels" / "a.nii.gz", labels, {7: "Kidney_L"})
    (pair,) = find_pairs(tmp_path / "images", tmp_path / "labels")
    organs = parse_organs(["kidney_left", "spleen"])
    annotation = read_pair(pair, organs)
    np.testing.assert_array_equal(annotation.mask(organs[0].label), expected())
    assert not annotation.contains(organs[1].label)
    write_label_map(tmp_path / "labels" / "a.nii.gz", labels)
    with refused(LabelError, "no names", "kidney_left"):
        read_pair(pair, organs)


def test_images_and_annotations_in_folders_of_patients(tmp_path: Path) -> None:
    volume = Volume(some_hu(SHAPE), np.eye(4))
    labels = LabelMap(expected().astype(np.uint8), volume.affine)
    for name in ("a", "b"):
        write_ct(tmp_path / "images" / name / "ct.nii.gz", volume)
        write_label_map(tmp_path / "labels" / name / "organs.nii.gz", labels)
    assert [pair.scan.name for pair in find_pairs(tmp_path / "images", tmp_path / "labels")] == ["a", "b"]
    write_ct(tmp_path / "images" / "a" / "second.nii.gz", volume)
    with refused(InputError, "a"):
        find_pairs(tmp_path / "images", tmp_path / "labels")


def test_a_folder_without_scans_or_annotations(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_patient(tmp_path / "anna", structures=None)
    with refused(UnreadableFileError, "no CT series"):
        find_pairs(tmp_path / "empty", tmp_path)
    with refused(UnreadableFileError):
        find_pairs(tmp_path / "anna", tmp_path / "anna")
    with refused(UnreadableFileError, "absent"):
        find_pairs(tmp_path / "absent", tmp_path)
    with refused(UnreadableFileError, "absent"):
        find_pairs(tmp_path / "anna", tmp_path / "absent")


def test_shares_of_another_lattice_are_refused() -> None:
    shares = OrganShares({}, np.eye(4), SHAPE)
    with refused(GeometryError, "another scan"):
        annotation_on(Volume(some_hu(SHAPE), np.diag([2.0, 1.0, 1.0, 1.0])), shares)


def test_no_message_about_a_header_of_the_annotation(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def rename(image: Dataset) -> None:
        image.PatientName = "Secretname^Ada"

    images, dataset = write_patient(tmp_path / "anna", structures=None)
    for image in images:
        rename(image)
    save(without_images(dataset), tmp_path / "anna" / "RS.dcm")
    (pair,) = find_pairs(tmp_path, tmp_path)
    mask_of(pair)
    assert "Secretname" not in caplog.text
    assert "PLAN" not in caplog.text


def test_one_image_and_one_structure_set_of_any_names(tmp_path: Path) -> None:
    _, dataset = write_patient(tmp_path / "anna")
    (pair,) = find_pairs(tmp_path / "anna", tmp_path / "anna" / "structures.dcm")
    np.testing.assert_array_equal(mask_of(pair), expected())
    write_ct(tmp_path / "b.nii.gz", pair.scan.read())
    save(dataset, tmp_path / "RS.dcm")
    (pair,) = find_pairs(tmp_path / "b.nii.gz", tmp_path / "RS.dcm")
    np.testing.assert_array_equal(mask_of(pair), expected())


def test_a_structure_of_another_frame_of_reference_is_refused(tmp_path: Path) -> None:
    images, dataset = write_patient(tmp_path / "anna", structures=None)
    for region in dataset.StructureSetROISequence:
        region.ReferencedFrameOfReferenceUID = generate_uid(entropy_srcs=["another"])
    assert images
    save(dataset, tmp_path / "anna" / "RS.dcm")
    (pair,) = find_pairs(tmp_path, tmp_path)
    with refused(GeometryError, "anna", "liver", "frame of reference"):
        read_pair(pair, [LIVER])


def test_two_contoured_series_of_a_patient_are_two_cases(tmp_path: Path) -> None:
    write_patient(tmp_path / "anna" / "plan", seed=1)
    other = (slice(0, 3), *BOX[1:])
    write_patient(tmp_path / "anna" / "replan", [roi(box=other)], seed=2)
    first, second = find_pairs(tmp_path, tmp_path)
    assert [first.scan.name, second.scan.name] == ["anna_1", "anna_2"]
    found = sorted(int(mask_of(pair).sum()) for pair in (first, second))
    assert found == sorted([int(expected().sum()), int(expected(other).sum())])
    (only,) = find_pairs(tmp_path, tmp_path, ["anna_2"])
    assert only.scan.name == "anna_2"


def test_label_maps_beside_dicom_series_in_the_folders_of_patients(tmp_path: Path) -> None:
    write_patient(tmp_path / "anna", structures=None)
    write_patient(tmp_path / "berta", seed=4)
    (only,) = find_pairs(tmp_path, tmp_path)
    labels = LabelMap(expected().astype(np.uint8), only.scan.read().affine)
    write_label_map(tmp_path / "anna" / "organs.nii.gz", labels)
    first, second = find_pairs(tmp_path, tmp_path)
    assert [first.scan.name, second.scan.name] == ["anna", "berta"]
    np.testing.assert_array_equal(read_pair(first, parse_organs(["liver=1"])).mask(1), expected())
    np.testing.assert_array_equal(mask_of(second), expected())
    write_label_map(tmp_path / "berta" / "organs.nii.gz", labels)
    with refused(InputError, "berta", "different kinds"):
        find_pairs(tmp_path, tmp_path)


def test_one_of_two_structures_of_one_name_is_chosen_by_its_number(tmp_path: Path) -> None:
    other = (slice(0, 3), *BOX[1:])
    write_patient(tmp_path / "anna", [roi("Tumour"), roi("Tumour", other, number=2)])
    (pair,) = find_pairs(tmp_path, tmp_path)
    (tumour,) = parse_organs(["tumour=#2"])
    np.testing.assert_array_equal(read_pair(pair, [tumour]).mask(tumour.label), expected(other))


def test_an_error_of_a_structure_names_case_and_organ(tmp_path: Path) -> None:
    whole = roi(box=(BOX[0], BOX[1], slice(0, 6)))
    write_patient(tmp_path / "anna", [Roi("Leber", [whole.contours[k] for k in (0, 1, 2, 4, 5)])])
    (pair,) = find_pairs(tmp_path, tmp_path)
    with refused(GeometryError, "anna: liver: ROI 1", "irregular"):
        read_pair(pair, [LIVER])


def test_image_files_and_dicom_series_of_one_folder_are_both_found(tmp_path: Path) -> None:
    write_patient(tmp_path / "bert")
    volume = Volume(some_hu(SHAPE), np.eye(4))
    write_ct(tmp_path / "carl.nii.gz", volume)
    write_label_map(tmp_path / "labels" / "carl.nii.gz", LabelMap(expected().astype(np.uint8), volume.affine))
    write_patient(tmp_path / "dora", seed=5)
    assert [pair.scan.name for pair in find_pairs(tmp_path, tmp_path)] == ["bert", "dora"]
    assert [pair.scan.name for pair in find_pairs(tmp_path, tmp_path / "labels")] == ["carl"]


def test_a_dicom_annotation_has_the_name_of_its_file(tmp_path: Path) -> None:
    _, dataset = write_patient(tmp_path / "dicom" / "anna", structures=None)
    (pair,) = find_pairs(tmp_path / "dicom", _saved(dataset, tmp_path / "labels" / "anna.dcm").parent)
    write_ct(tmp_path / "images" / "anna.nii.gz", pair.scan.read())
    write_ct(tmp_path / "images" / "berta.nii.gz", pair.scan.read())
    (pair,) = find_pairs(tmp_path / "images", tmp_path / "labels")
    np.testing.assert_array_equal(mask_of(pair), expected())


def _saved(dataset: FileDataset, path: Path) -> Path:
    save(dataset, path)
    return path


def test_two_series_in_the_frame_of_an_annotation_without_references_are_refused(tmp_path: Path) -> None:
    images, dataset = write_patient(tmp_path / "anna" / "a", structures=None)
    twin = replace(series(2), frame_of_reference=str(images[0].FrameOfReferenceUID))
    twin.write(tmp_path / "anna" / "b")
    save(without_images(dataset), tmp_path / "anna" / "RS.dcm")
    with refused(InputError, "2 CT series", "anna"):
        find_pairs(tmp_path, tmp_path)


def test_images_that_are_not_there_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images, _ = write_patient(tmp_path / "elsewhere", structures=None)
    _, dataset = write_patient(tmp_path / "phase", structures=None)
    twin = replace(series(2), frame_of_reference=str(images[0].FrameOfReferenceUID))
    twin.write(tmp_path / "ct" / "anna")
    save(structure_set([roi()], images), tmp_path / "ct" / "anna" / "RS.dcm")
    (pair,) = find_pairs(tmp_path / "ct", tmp_path / "ct")
    assert dataset is not None
    np.testing.assert_array_equal(mask_of(pair), expected())
    assert "images that are not there" in caplog.text


def test_a_patient_with_rejected_sets_alone_is_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images, _ = write_patient(tmp_path / "anna", structures=None)
    save(approved(images, "REJECTED", "20240101", BOX), tmp_path / "anna" / "RS.dcm")
    write_patient(tmp_path / "berta", seed=4)
    assert [pair.scan.name for pair in find_pairs(tmp_path, tmp_path)] == ["berta"]
    assert "rejected: anna" in caplog.text
    with refused(InputError, "rejected"):
        find_pairs(tmp_path, tmp_path, ["anna"])


def test_without_a_newest_set_the_user_chooses(tmp_path: Path) -> None:
    images, _ = write_patient(tmp_path / "anna", structures=None)
    for number in (1, 2):
        dataset = approved(images, "APPROVED", "20240101", BOX)
        dataset.SOPInstanceUID = generate_uid(entropy_srcs=[str(number)])
        save(dataset, tmp_path / "anna" / f"RS{number}.dcm")
    with refused(InputError, "anna", "newest"):
        find_pairs(tmp_path, tmp_path)
    (pair,) = find_pairs(tmp_path, tmp_path, settings=AnnotationSettings("2"))
    np.testing.assert_array_equal(mask_of(pair), expected())


def test_links_to_the_folders_of_patients_are_followed(tmp_path: Path) -> None:
    write_patient(tmp_path / "archive" / "anna")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "archive" / "anna")
    (pair,) = find_pairs(tmp_path / "in", tmp_path / "in")
    assert pair.scan.name == "linked"
    np.testing.assert_array_equal(mask_of(pair), expected())


@pytest.mark.parametrize(
    ("name", "patient", "hidden"),
    [
        ("Secretname GTV", "Secretname^Ada", True),
        ("MUELLER", "Müller^Eva", True),
        ("muller", "Müller^Eva", True),
        ("Mu\u0308ller", "Müller^Eva", True),
        ("Müller", "Mueller^Eva", True),
        ("An Ng GTV", "Ng^An", True),
        ("王 GTV", "王^小明", True),
        ("PTV 12", "12", True),
        ("GTV 12345", "0012345", True),
        ("A12", "A.1-2", True),
        ("S e c r e t n a m e", "Secretname^Ada", True),
        ("Parotid L", "Secretname^L", False),
        ("Parotid R", "Ng^An", False),
        ("Angle", "Ng^An", False),
    ],
)
def test_names_that_identify_a_patient(name: str, patient: str, *, hidden: bool) -> None:
    words = [word for word in patient.replace("^", " ").split() if word]
    assert identifies(name, words) is hidden


def test_signs_that_a_terminal_obeys_are_not_printed() -> None:
    assert printable("\x1b[31mred\n") == "\N{REPLACEMENT CHARACTER}[31mred\N{REPLACEMENT CHARACTER}"


def test_a_damaged_archive_beside_scans_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_patient(tmp_path / "in" / "anna")
    packed = zipped(tmp_path / "in" / "anna", tmp_path / "whole.zip").read_bytes()
    (tmp_path / "in" / "berta.zip").write_bytes(packed[:40] + bytes(60) + packed[100:])
    (pair,) = find_pairs(tmp_path / "in", tmp_path / "in")
    assert pair.scan.name == "anna"
    assert "archive" in caplog.text
