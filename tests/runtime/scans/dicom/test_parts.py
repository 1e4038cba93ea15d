"""Slices of one SeriesInstanceUID that are no single stack: each is read, refused or named in a warning."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 - its customary name
from doubles.dicom import PATIENT, Series, save, some_hu
from doubles.dicom_readers import assert_agrees, hu_of, read_with_dcm2niix, read_with_simpleitk
from doubles.errors import refused
from doubles.odd_dicom import (
    SERIES,
    beside,
    changed,
    each,
    enhanced_in_two_views,
    localiser_inside,
    other_matrix,
    raw,
    sheet,
    table_drift,
    two_views,
    ultrasound,
)
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid

from fseft_edge.runtime.errors import (
    ChooseSeriesError,
    DuplicateSliceError,
    FseftEdgeError,
    GeometryError,
    MissingSliceError,
    MixedSeriesError,
    NotACtError,
    PixelFormatError,
    RescaleError,
    UnevenSlicesError,
    UnreadableFileError,
)
from fseft_edge.runtime.scans.dicom import choose_series, find_series
from fseft_edge.runtime.scans.nifti import write_label_map
from fseft_edge.runtime.scans.sources import read_scan
from fseft_edge.runtime.scans.volume import Volume

SPACING = "PixelSpacing (0028,0030)"


def tilted_from(first_other: int, degrees: float):
    """Return a change that turns the slices from one on about the x axis."""
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))

    def change(dataset: Dataset, place: int) -> None:
        if place >= first_other:
            dataset.ImageOrientationPatient = [1, 0, 0, 0, round(float(cos), 8), round(float(sin), 8)]

    return change


def almost_parallel(folder: Path) -> Path:
    """Write slices of 384 mm, of which some are turned by 0.15 degrees: a corner moves by more than a pixel."""
    large = replace(SERIES, hu=np.broadcast_to(some_hu((128, 128, 1)), (128, 128, 8)))
    return large.write(folder, tilted_from(5, 0.15))


def every_other(folder: Path) -> Path:
    """Write nine slices, of which every other one has another PixelSpacing."""

    def change(dataset: Dataset, place: int) -> None:
        dataset.PixelSpacing = [4, 4] if place % 2 else [3, 3]

    return replace(SERIES, hu=some_hu((24, 20, 9))).write(folder, change)


REFUSED = {
    "another spacing from a slice on": (two_views(5), MixedSeriesError, ("5 of 8", "other 3", SPACING)),
    "another spacing in the last slice": (two_views(7), MixedSeriesError, ("7 of 8", "other 1", SPACING)),
    "half and half": (two_views(4), ChooseSeriesError, ("2 series of 4 slices",)),
    "another spacing, a little": (two_views(5, "3.02"), MixedSeriesError, (SPACING,)),
    "another matrix": (other_matrix, MixedSeriesError, ("8 of 13", "Columns (0028,0011)")),
    "another orientation": (
        changed(tilted_from(5, 3.0)),
        MixedSeriesError,
        ("5 of 8", "ImageOrientationPatient (0020,0037)"),
    ),
    "an orientation that is almost the same": (
        almost_parallel,
        GeometryError,
        ("ImageOrientationPatient (0020,0037)", "tenth of a pixel"),
    ),
    "an enhanced image": (enhanced_in_two_views, MixedSeriesError, ("5 of 8", "other 3", SPACING)),
    "slices between those of the other part": (
        changed(lambda ds, place: setattr(ds, "PixelSpacing", [4, 4] if place in (1, 3, 5) else [3, 3])),
        UnevenSlicesError,
        ("5 to 10 mm", "CT, 5 slices", "CT, 3 slices"),
    ),
    "every other slice of nine": (every_other, MixedSeriesError, ("5 of 9", "other 4", SPACING)),
    "another frame of reference": (
        two_views(5, FrameOfReferenceUID=generate_uid()),
        MixedSeriesError,
        ("FrameOfReferenceUID (0020,0052)",),
    ),
    "another unit": (
        changed(lambda ds, place: setattr(ds, "RescaleType", "OD" if place == 3 else "HU")),
        RescaleError,
        ("RescaleType (0028,1054)",),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_part_that_may_be_missing_is_refused(tmp_path, case):
    write, kind, named = REFUSED[case]
    with refused(kind, tmp_path, *named):
        read_scan(write(tmp_path / "in"))


def test_each_part_can_be_selected_by_number_and_names_what_is_left_out(tmp_path):
    folder = two_views(5)(tmp_path / "in")
    files = sorted(folder.iterdir())
    for number, places in (("1", files[:5]), ("2", files[5:])):
        scan = read_scan(folder, number)
        assert_agrees(scan, read_with_simpleitk(folder, places))
        (warning,) = scan.warnings
        assert f"{8 - len(places)} images" in warning
        assert SPACING in warning
        assert "may belong to the scan" in warning


def test_each_part_equals_that_of_dcm2niix(tmp_path):
    """On the whole series, dcm2niix and GDCM stack all slices as if they had one spacing."""
    folder = two_views(5)(tmp_path / "in")
    for number, places in (("1", range(5)), ("2", range(5, 8))):
        part = tmp_path / number
        part.mkdir()
        for place in places:
            (part / f"{place}").write_bytes((folder / f"IM{place:03d}").read_bytes())
        (second,) = read_with_dcm2niix(part)
        assert_agrees(read_scan(folder, number), second, voxels=1e-3)


def test_the_list_of_series_shows_which_have_warnings(tmp_path):
    def change(dataset: Dataset, place: int) -> None:
        dataset.PixelSpacing = [4, 4] if place > 4 else [3, 3]
        if place > 4:
            del dataset.Modality

    with refused(MixedSeriesError) as caught:
        read_scan(SERIES.write(tmp_path, change))
    shown = {line.split(" slices")[0][-1]: line for line in caught.value.message.splitlines()[1:]}
    assert shown["3"].endswith("; with warnings")
    assert not shown["5"].endswith("; with warnings")


def test_a_smaller_whole_series_does_not_replace_a_larger_series_in_parts(tmp_path):
    two_views(4)(tmp_path / "in" / "a")
    replace(SERIES, hu=some_hu((24, 20, 5)), uid=generate_uid()).write(tmp_path / "in" / "b")
    with refused(ChooseSeriesError, "2 series of 4 slices"):
        read_scan(tmp_path / "in")


def _scan_left_out(folder: Path, write, *named: str) -> Volume:
    scan = read_scan(write(folder))
    np.testing.assert_array_equal(hu_of(scan), SERIES.hu)
    assert len(scan.warnings) == 1
    for name in named:
        assert name in scan.warnings[0]
    return scan


def _other_plane(folder: Path) -> Path:
    SERIES.write(folder / "a")
    coronal = replace(SERIES, hu=some_hu((24, 8, 5)), orientation=(1.0, 0.0, 0.0, 0.0, 0.0, -1.0))
    coronal.write(folder / "b")
    return folder


def _same_range(folder: Path) -> Path:
    SERIES.write(folder / "a")
    replace(SERIES, hu=some_hu((30, 20, 4)), spacing=(2.0, 2.0, 10.0)).write(folder / "b")
    return folder


def _report_with_the_uid(folder: Path) -> Path:
    report = sheet(SOPClassUID="1.2.840.10008.5.1.4.1.1.88.67", Modality="SR")
    report.file_meta.MediaStorageSOPClassUID = report.SOPClassUID
    del report.PixelData
    return beside(report)(folder)


def _damaged_preamble(folder: Path) -> Path:
    SERIES.write(folder)
    last = replace(SERIES, hu=SERIES.hu[:, :, :1], origin=(-36.0, -30.0, -360.0)).write(folder / "b") / "IM000"
    last.write_bytes(last.read_bytes().replace(b"DICM", b"DIXM", 1))
    return folder


def _next_slice_of_another_series(folder: Path) -> Path:
    SERIES.write(folder)
    rest = replace(SERIES, hu=SERIES.hu[:, :, :3], origin=(-36.0, -30.0, -360.0), uid=generate_uid())
    return rest.write(folder / "b").parent


def _empty_file(folder: Path) -> Path:
    SERIES.write(folder)
    (folder / "IM008").touch()
    return folder


def _file_without_its_beginning(folder: Path) -> Path:
    """The last file has lost the middle of its preamble and header, so that no sign of DICOM is left in it."""
    SERIES.write(folder)
    last = replace(SERIES, hu=SERIES.hu[:, :, :1], origin=(-36.0, -30.0, -360.0)).write(folder / "b") / "IM000"
    last.write_bytes(bytes(80) + last.read_bytes()[-1500:])
    return folder


def _next_slice_with_another_modality(folder: Path) -> Path:
    SERIES.write(folder)
    rest = replace(SERIES, hu=SERIES.hu[:, :, :1], origin=(-36.0, -30.0, -360.0), uid="1.2.826.999")
    rest.write(folder / "b", lambda ds, _: setattr(ds, "Modality", "CV"))
    return folder


def _file_without_its_header(folder: Path) -> Path:
    """Only its name says that the file belongs to the series."""
    SERIES.write(folder)
    (folder / "IM0010").write_bytes(b"\x07\x03" * 480)
    return folder


LEFT_OUT = {
    "a localiser": (localiser_inside, ("1 image", "localiser")),
    "another plane": (_other_plane, ("5 images", "do not continue the stack")),
    "the same range": (_same_range, ("4 images", "Columns (0028,0011)")),
    "another modality": (beside(sheet(Modality="PT", SOPClassUID="1.2.840.10008.5.1.4.1.1.128")), ("1 image",)),
    "a report": (_report_with_the_uid, ("1 DICOM object without image",)),
    "a damaged preamble": (_damaged_preamble, ("1 file", "not DICOM")),
    "another series goes on": (_next_slice_of_another_series, ("3 images with another SeriesInstanceUID",)),
    "another series and modality goes on": (_next_slice_with_another_modality, ("1 image with another Series",)),
    "a file without its beginning": (_file_without_its_beginning, ("1 file", "not DICOM")),
    "a file without its header": (_file_without_its_header, ("1 file", "not DICOM")),
    "an empty file": (_empty_file, ("1 file", "empty")),
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_another_picture_with_the_uid_of_the_series_is_named(tmp_path, case):
    write, named = LEFT_OUT[case]
    _scan_left_out(tmp_path / "in", write, *named)


def test_a_localiser_with_the_uid_of_the_scan_does_not_hinder_the_choice_by_uid(tmp_path):
    scan = read_scan(localiser_inside(tmp_path / "in"), SERIES.uid)
    np.testing.assert_array_equal(hu_of(scan), SERIES.hu)
    assert "localiser" in scan.warnings[0]


def test_phases_of_a_dynamic_scan_are_refused(tmp_path):
    SERIES.write(tmp_path / "a", lambda ds, _: setattr(ds, "AcquisitionNumber", 1))
    later = replace(SERIES, hu=some_hu((24, 20, 8), seed=9))
    later.write(tmp_path / "b", lambda ds, _: setattr(ds, "AcquisitionNumber", 2))
    with refused(DuplicateSliceError, "16 slices", "8 positions"):
        read_scan(tmp_path)


def test_two_acquisitions_of_one_stack_are_one_scan(tmp_path):
    folder = SERIES.write(tmp_path, lambda ds, place: setattr(ds, "AcquisitionNumber", 1 + (place > 3)))
    scan = read_scan(folder)
    assert_agrees(scan, read_with_simpleitk(folder))
    assert scan.warnings == ()


def test_only_some_slices_have_a_frame_of_reference(tmp_path):
    def change(dataset: Dataset, place: int) -> None:
        if place == 2:
            del dataset.FrameOfReferenceUID

    scan = read_scan(SERIES.write(tmp_path, change))
    assert scan.warnings == (
        "In 1 of 8 slices, FrameOfReferenceUID (0020,0052) is missing: the images are assumed to have one frame of "
        "reference.",
    )


def test_the_warnings_are_those_of_the_series(tmp_path):
    series = choose_series(find_series(localiser_inside(tmp_path / "in")))
    assert read_scan(tmp_path / "in").warnings == series.warnings


# Rounding


@pytest.mark.parametrize("step", [1e-6, 5e-5, 2e-4])
def test_rounded_cosines_do_not_split_a_large_series(tmp_path, step):
    """The field of view of a body scan: 512 pixels of 0.75 mm."""
    series = replace(Series(np.broadcast_to(some_hu((512, 512, 1)), (512, 512, 4))), spacing=(0.75, 0.75, 5.0))

    def change(dataset: Dataset, place: int) -> None:
        if place % 2:
            dataset.ImageOrientationPatient = [1, f"{step:.7f}", 0, f"{-step:.7f}", 1, 0]

    folder = series.write(tmp_path, change)
    scan = read_scan(folder)
    assert scan.warnings == ()
    assert_agrees(scan, read_with_simpleitk(folder, sorted(folder.iterdir())), voxels=0.1)


def assert_itk_reads(scan: Volume, path: Path) -> None:
    """Check that ITK, which refuses axes that are not perpendicular, reads a mask of the scan with the right places."""
    write_label_map(path, scan.label_map(np.ones(scan.shape, np.uint8)))
    image = sitk.ReadImage(path)
    last = [size - 1 for size in scan.shape]
    place = np.array(image.TransformIndexToPhysicalPoint(last)) * (-1, -1, 1)
    np.testing.assert_allclose(place, (scan.affine @ (*last, 1))[:3], atol=2e-3)


@pytest.mark.parametrize("digits", [3, 4, 6])
def test_itk_reads_masks_of_series_with_rounded_headers(tmp_path, digits):
    angles = np.radians([8, -20, 33])
    axes = np.linalg.qr(np.cross(np.eye(3), angles) + np.eye(3))[0]
    orientation = tuple(float(value) for value in (*axes[:, 0], *axes[:, 1]))
    series = replace(SERIES, orientation=orientation)

    def change(dataset: Dataset, place: int) -> None:
        dataset.ImageOrientationPatient = [f"{value:.{digits}f}" for value in orientation]
        dataset.ImagePositionPatient = [f"{value:.{digits}f}" for value in series.position(place)]

    folder = series.write(tmp_path / "in", change)
    scan = read_scan(folder)
    assert_itk_reads(scan, tmp_path / "mask.nii.gz")
    assert_agrees(scan, read_with_simpleitk(folder), voxels=0.1)
    off = np.abs(scan.affine @ (11, 10, 4, 1) - (*series.world()[11, 10, 4], 1)).max()
    assert off <= 0.1


def test_a_drift_of_the_table_below_a_tenth_of_a_pixel_is_no_tilt(tmp_path):
    """The angle of 0.38 degrees alone would look like a tilt of the gantry."""
    series = Series(some_hu((24, 20, 15)), spacing=(3.0, 3.0, 1.5))
    folder = series.write(tmp_path, table_drift(series))
    scan = read_scan(folder)
    assert_agrees(scan, read_with_simpleitk(folder), voxels=0.1)
    assert scan.warnings == ()
    assert_itk_reads(scan, tmp_path / "mask.nii.gz")


def test_a_larger_drift_of_the_table_is_in_the_affine_and_in_the_warnings(tmp_path):
    """After 60 slices, the last one is 0.6 mm aside. SimpleITK would place it as if it was straight."""
    series = Series(some_hu((24, 20, 60)), spacing=(0.75, 0.75, 1.25))
    scan = read_scan(series.write(tmp_path, table_drift(series)))
    last = (scan.affine @ (0, 0, 59, 1))[:3] * (-1, -1, 1)
    np.testing.assert_allclose(last, np.add(series.position(59), (0, 0.59, 0)), atol=1e-6)
    (warning,) = scan.warnings
    assert "0.59 mm" in warning
    assert "ImagePositionPatient (0020,0032)" in warning


# Wrong elements


def bytes_in(place: int, keyword: str, vr: str, value: bytes):
    """Return a writer of the series with these bytes as a value in one slice."""
    return changed(lambda dataset, this: raw(dataset, keyword, vr, value) if this == place else None)


WRONG = {
    "text": (bytes_in(3, "PixelSpacing", "DS", b"Secretname\\1"), GeometryError, f"{SPACING} is no number in 1 of 8"),
    "one value": (bytes_in(3, "PixelSpacing", "DS", b"3.0"), GeometryError, f"{SPACING} has 1 value instead of 2"),
    "thousands": (
        bytes_in(3, "ImagePositionPatient", "DS", b"1,000.5\\0\\0"),
        GeometryError,
        "(0020,0032) is no number",
    ),
    "not a number": (
        bytes_in(3, "ImagePositionPatient", "DS", b"nan\\0\\0"),
        GeometryError,
        "ImagePositionPatient (0020,0032) is no number",
    ),
    "infinite": (
        bytes_in(3, "ImagePositionPatient", "DS", b"1e999\\0\\0"),
        GeometryError,
        "ImagePositionPatient (0020,0032) is not finite or too large",
    ),
    "slope": (bytes_in(3, "RescaleSlope", "DS", b"Secretname"), RescaleError, "RescaleSlope (0028,1053) is no number"),
    "bits": (bytes_in(3, "BitsStored", "US", b"\x0c\x00\x0c\x00"), PixelFormatError, "BitsStored (0028,0101) has 2"),
    "padding": (
        bytes_in(3, "PixelPaddingValue", "IS", b"Secretname"),
        PixelFormatError,
        "PixelPaddingValue (0028,0120)",
    ),
    "huge slope": (bytes_in(3, "RescaleSlope", "DS", b"1e300"), RescaleError, "RescaleSlope (0028,1053) is not finite"),
    "representation": (
        bytes_in(3, "PixelSpacing", "SS", b"3.00\\3.00"),
        GeometryError,
        f"{SPACING} has a wrong value representation",
    ),
    "huge matrix": (each(Rows=65535), PixelFormatError, "24x65535"),
}


@pytest.mark.parametrize("case", WRONG)
def test_the_wrong_element_is_named_and_never_quoted(tmp_path, case):
    write, kind, named = WRONG[case]
    with refused(kind, tmp_path, named) as caught:
        read_scan(write(tmp_path / "in"))
    assert "Secretname" not in str(caught.value)


def test_a_zero_byte_within_a_value_is_no_padding(tmp_path):
    path = SERIES.write(tmp_path) / "IM003"
    content = path.read_bytes()
    path.write_bytes(content.replace(b"DS\x08\x003.0\\3.0 ", b"DS\x08\x003.0\\3\x000 "))
    assert path.read_bytes() != content
    with refused(GeometryError, f"{SPACING} is no number in 1 of 8"):
        read_scan(tmp_path)


def test_wrong_rows_in_one_slice_are_a_gap_or_a_missing_end(tmp_path):
    with refused(MissingSliceError, "slices 3 and 4 of 7"):
        read_scan(bytes_in(3, "Rows", "US", b"\x00\x00")(tmp_path / "within"))
    with refused(MixedSeriesError, "7 of 8", "Rows (0028,0010)"):
        read_scan(bytes_in(7, "Rows", "US", b"\x00\x00")(tmp_path / "end"))


@pytest.mark.parametrize("place", [0, 4, 7])
@pytest.mark.parametrize("marker", [PATIENT.encode(), b"\x20\x00\x32\x00DS", b"\xe0\x7f\x10\x00"])
def test_a_truncated_slice_is_named_by_its_place_in_the_names(tmp_path, place, marker):
    path = SERIES.write(tmp_path) / f"IM{place:03d}"
    content = path.read_bytes()
    path.write_bytes(content[: content.index(marker) + 5])
    with refused(UnreadableFileError, "1 of 8", f"file {place + 1} in the order of the names"):
        read_scan(tmp_path)


def test_a_truncated_slice_of_another_series_is_named_in_a_warning(tmp_path):
    SERIES.write(tmp_path / "a")
    other = replace(SERIES, hu=SERIES.hu[:, :, :3], uid=generate_uid()).write(tmp_path / "b")
    content = (other / "IM001").read_bytes()
    (other / "IM001").write_bytes(content[: content.index(b"\x20\x00\x32\x00DS") + 20])
    scan = read_scan(tmp_path)
    np.testing.assert_array_equal(hu_of(scan), SERIES.hu)
    assert scan.warnings == (
        "1 DICOM file that is not readable was left out: it belongs to other series or other modalities.",
    )


def test_ultrasound_alone_is_refused_as_another_modality(tmp_path):
    save(ultrasound(), tmp_path / "a")
    with pytest.raises(FseftEdgeError, match="not a CT"):
        read_scan(tmp_path)


@pytest.mark.parametrize("slope", ["1e-320", "1e-30", "1e8"])
def test_an_absurd_slope_is_refused_without_an_overflow(tmp_path, slope):
    def change(dataset: Dataset, _: int) -> None:
        dataset.RescaleSlope = slope
        dataset.add_new("PixelPaddingValue", "SS", -2000)

    with refused(NotACtError, tmp_path):
        read_scan(SERIES.write(tmp_path, change))
