"""Series that are not one stack of CT slices are refused with the right kind of error and without a patient name."""

from __future__ import annotations

import struct
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from doubles.dicom import PATIENT, Series, save, some_hu, zipped
from doubles.errors import refused
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.pixels.decoders.base import Decoder
from pydicom.sequence import Sequence as Items
from pydicom.uid import (
    JPEG2000Lossless,
    JPEGExtended12Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
    generate_uid,
)

from fseft_edge.runtime.errors import (
    ArchiveError,
    ChooseSeriesError,
    DuplicateSliceError,
    FseftEdgeError,
    GantryTiltError,
    GeometryError,
    InputError,
    LocaliserError,
    MissingSliceError,
    MixedSeriesError,
    NoDecoderError,
    NoSeriesError,
    NotACtError,
    OtherModalityError,
    PixelFormatError,
    RescaleError,
    SecondaryCaptureError,
    SeveralPatientsError,
    UnevenSlicesError,
    UnreadableFileError,
)
from fseft_edge.runtime.scans.dicom import choose_series, files, find_series, pixels
from fseft_edge.runtime.scans.sources import read_scan

NAMED = [f"{PATIENT}_{number}.dcm" for number in range(9)]
"""File names with the name of the patient, as some archives write them."""


def refusal(path: Path, kind: type[FseftEdgeError], *named: object, series: str | None = None) -> FseftEdgeError:
    """Return the error of reading a scan, after a check that it names the path and ``named``, but no patient."""
    with refused(kind, path, *named) as caught:
        read_scan(path, series)
    error = caught.value
    assert error.exit_code == 3
    chain: BaseException | None = error
    while chain is not None:
        assert "Secretname" not in f"{chain!r} {chain}"
        assert "4711" not in str(chain)
        chain = chain.__cause__
    return error


def moved(series: Series, **offsets_mm):
    """Return a change that moves slices along the normal; ``s3=0.5`` moves slice 3 by 0.5 mm."""

    def change(dataset: Dataset, place: int) -> None:
        off = offsets_mm.get(f"s{place}", 0.0) * series.normal
        dataset.ImagePositionPatient = [round(float(value), 6) for value in series.position(place) + off]

    return change


def attributes(**values):
    """Return a change that sets attributes of every slice; the value None removes an attribute."""

    def change(dataset: Dataset, _: int) -> None:
        for keyword, value in values.items():
            if value is None:
                delattr(dataset, keyword)
            else:
                setattr(dataset, keyword, value)

    return change


def only(place: int, **values):
    """Return a change that sets attributes of one slice."""
    return lambda dataset, this: attributes(**values)(dataset, this) if this == place else None


@pytest.fixture
def series() -> Series:
    return Series(some_hu((7, 6, 9)))


@pytest.mark.parametrize("missing", [1, 4, 7])
def test_a_missing_slice(tmp_path, series, missing):
    (series.write(tmp_path, names=NAMED) / NAMED[missing]).unlink()
    refusal(tmp_path, MissingSliceError, f"{missing} and {missing + 1} of 8", "5 mm", "2.5 mm")


def test_two_adjacent_missing_slices(tmp_path, series):
    series.write(tmp_path, names=NAMED)
    for missing in (3, 4):
        (tmp_path / NAMED[missing]).unlink()
    refusal(tmp_path, MissingSliceError, "7.5 mm", "2.5 mm")


def test_several_slices_at_one_position(tmp_path, series):
    series.write(tmp_path / "first", names=NAMED)
    phase = replace(series, hu=some_hu((7, 6, 9), seed=4))
    for number, dataset in enumerate(phase.datasets()):
        save(dataset, tmp_path / "second_phase" / f"{PATIENT}{number}")
    refusal(tmp_path, DuplicateSliceError, "18 slices", "9 positions")


def test_uneven_distances(tmp_path, series):
    series.write(tmp_path, moved(series, s6=0.6), NAMED)
    refusal(tmp_path, UnevenSlicesError, "slice 7 of 9", "0.6 mm")


def test_a_slice_distance_that_changes_within_the_series(tmp_path, series):
    series.write(tmp_path, moved(series, s6=1.25, s7=2.5, s8=3.75))
    refusal(tmp_path, UnevenSlicesError, "2.5 to 3.75 mm")


def test_a_slice_that_is_shifted_sideways(tmp_path, series):
    def change(dataset: Dataset, place: int) -> None:
        if place == 4:
            dataset.ImagePositionPatient[0] = float(dataset.ImagePositionPatient[0]) + 3

    series.write(tmp_path, change)
    refusal(tmp_path, UnevenSlicesError, "slice 5 of 9", "3 mm")


@pytest.mark.parametrize("digits", [1, 2, 3, 6])
def test_rounded_positions_are_accepted(tmp_path, digits):
    """One decimal cannot represent these spacings exactly."""
    series = replace(Series(some_hu((7, 6, 20))), spacing=(0.7, 0.7, 1.25), origin=(-100.0, -100.0, 17.03))

    def change(dataset: Dataset, place: int) -> None:
        dataset.ImagePositionPatient = [f"{value:.{digits}f}" for value in series.position(place)]

    volume = read_scan(series.write(tmp_path, change))
    last = (volume.affine @ (0, 0, 19, 1))[:3]
    np.testing.assert_allclose(last, series.world()[0, 0, 19], atol=0.5 * 10.0**-digits + 1e-9)


@pytest.mark.parametrize("degrees", [0.5, 12.0, -20.0])
def test_a_tilted_gantry(tmp_path, degrees):
    series = Series(some_hu((7, 6, 12)))
    sideways = np.array([0, np.tan(np.radians(degrees)) * series.spacing[2], 0])

    def change(dataset: Dataset, place: int) -> None:
        dataset.ImagePositionPatient = [round(float(value), 6) for value in series.position(place) + place * sideways]
        dataset.GantryDetectorTilt = degrees

    series.write(tmp_path, change)
    refusal(tmp_path, GantryTiltError, f"{abs(degrees)} degrees")


def test_a_localiser(tmp_path, series):
    series.write(tmp_path, attributes(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), NAMED)
    refusal(tmp_path, LocaliserError)


def test_a_localiser_in_the_series_of_the_scan_is_skipped(tmp_path, series):
    series.write(tmp_path)
    scout = replace(series, hu=some_hu((7, 6, 2)), orientation=(0.0, 1.0, 0.0, 0.0, 0.0, -1.0))
    scout.write(tmp_path / "scout", attributes(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]))
    assert read_scan(tmp_path).shape == (7, 6, 9)
    assert [one.uid for one in find_series(tmp_path)] == [series.uid] * 2


def test_secondary_captures(tmp_path, series):
    series.write(tmp_path, attributes(SOPClassUID="1.2.840.10008.5.1.4.1.1.7", ImagePositionPatient=None), NAMED)
    refusal(tmp_path, SecondaryCaptureError)


@pytest.mark.parametrize(("modality", "sop_class"), [("MR", "4"), ("PT", "128"), ("CT", "481.2"), ("US", "6.1")])
def test_other_modalities(tmp_path, series, modality, sop_class):
    sop_class = f"1.2.840.10008.5.1.4.1.1.{sop_class}"
    series.write(tmp_path, attributes(Modality=modality, SOPClassUID=sop_class, ImageOrientationPatient=None), NAMED)
    refusal(tmp_path, OtherModalityError)


@pytest.mark.parametrize(
    ("mixed", "values"),
    [
        ("studies", {"StudyInstanceUID": generate_uid()}),
        ("frames of reference", {"FrameOfReferenceUID": generate_uid()}),
        ("patients", {"PatientID": "id-4712"}),
        ("patients", {"PatientName": "Other^Name"}),
        ("patients", {"IssuerOfPatientID": "another hospital"}),
    ],
)
def test_one_series_with_several_patients_studies_or_frames_of_reference(tmp_path, series, mixed, values):
    series.write(tmp_path, only(3, **values), NAMED)
    refusal(tmp_path, MixedSeriesError, f"2 {mixed}")


def test_two_spellings_of_a_patient_name_are_one_patient(tmp_path, series):
    read_scan(series.write(tmp_path, only(3, PatientName="SECRETNAME^ADA^^^")))


FORMATS = {
    "inverted": ({"PhotometricInterpretation": "MONOCHROME1"}, "MONOCHROME1"),
    "colour": ({"PhotometricInterpretation": "RGB", "SamplesPerPixel": 3}, "RGB"),
    "two samples": ({"SamplesPerPixel": 2}, 2),
    "8 bits": ({"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7}, 8),
    "32 bits": ({"BitsAllocated": 32, "BitsStored": 32, "HighBit": 31}, 32),
    "high bit": ({"BitsStored": 12, "HighBit": 15}, 15),
    "no bits": ({"BitsStored": 0, "HighBit": 0}, 0),
}


@pytest.mark.parametrize("case", FORMATS)
def test_other_pixel_formats(tmp_path, series, case):
    values, named = FORMATS[case]
    refusal(series.write(tmp_path, attributes(**values)), PixelFormatError, named)


RESCALES = {
    "no slope": ({"RescaleSlope": None}, "RescaleSlope"),
    "no intercept": ({"RescaleIntercept": None}, "RescaleIntercept"),
    "zero": ({"RescaleSlope": 0}, 0),
    "negative": ({"RescaleSlope": -1}, -1),
    "unit": ({"RescaleType": "ED"}, "unit"),
    "table": ({"ModalityLUTSequence": Items([Dataset()])}, "table"),
}


@pytest.mark.parametrize("case", RESCALES)
def test_rescales_that_do_not_give_hu(tmp_path, series, case):
    values, named = RESCALES[case]
    refusal(series.write(tmp_path, attributes(**values)), RescaleError, named)


def test_one_slice_without_rescale(tmp_path, series):
    refusal(series.write(tmp_path, only(5, RescaleSlope=None)), RescaleError)


@pytest.mark.parametrize("missing", ["ImagePositionPatient", "PixelSpacing"])
def test_missing_position_or_spacing(tmp_path, series, missing):
    error = refusal(series.write(tmp_path, attributes(**{missing: None})), GeometryError, missing)
    assert "ImageOrientationPatient" not in error.message  # it is not missing


def test_missing_orientation(tmp_path, series):
    change = attributes(ImageOrientationPatient=None, ImageOrientationSlide=[1, 0, 0, 0, 1, 0])
    refusal(series.write(tmp_path, change), GeometryError, "ImageOrientationPatient")


def test_an_animal(tmp_path, series):
    refusal(series.write(tmp_path, attributes(AnatomicalOrientationType="QUADRUPED")), GeometryError, "animal")


@pytest.mark.parametrize("orientation", [[1, 0, 0, 0.1, 1, 0], [0.9, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0]])
def test_impossible_orientations(tmp_path, series, orientation):
    change = attributes(ImageOrientationPatient=orientation)
    refusal(series.write(tmp_path, change), GeometryError, "ImageOrientationPatient")


def test_a_voxel_of_an_impossible_size(tmp_path, series):
    named = "PixelSpacing (0028,0030) is not positive in 9 of 9 slices"
    refusal(series.write(tmp_path, attributes(PixelSpacing=[0, 0])), GeometryError, named)


@pytest.mark.parametrize("syntax", [JPEGExtended12Bit, "1.2.3.4.5", "1.2.840.10008.1.2.4.102"])
def test_encodings_without_a_decoder(tmp_path, series, syntax):
    for place, dataset in enumerate(series.datasets()):
        dataset.file_meta.TransferSyntaxUID = syntax
        dataset.PixelData = b"\xfe\xff\x00\xe0\x00\x00\x00\x00\xfe\xff\xdd\xe0\x00\x00\x00\x00"
        dataset["PixelData"].is_undefined_length = True
        dataset.save_as(tmp_path / NAMED[place], implicit_vr=False, little_endian=True)
    error = refusal(tmp_path, NoDecoderError, syntax)
    assert "uncompressed" in error.remedy


def test_a_decoder_that_is_not_installed_is_named(tmp_path, series, monkeypatch):
    class Nothing:
        available_plugins = ()

    monkeypatch.setattr(pixels, "get_decoder", lambda _: Nothing())
    for place, dataset in enumerate(series.datasets()):
        dataset.compress(RLELossless, generate_instance_uid=False)
        dataset.file_meta.TransferSyntaxUID = JPEGLosslessSV1
        save(dataset, tmp_path / NAMED[place])
    error = refusal(tmp_path, NoDecoderError, JPEGLosslessSV1)
    assert "fseft-edge[jpeg]" in error.remedy


@pytest.mark.parametrize("place", [0, 5, 8])
def test_a_file_that_is_truncated_anywhere_in_its_header(tmp_path, series, place):
    path = series.write(tmp_path, names=NAMED) / NAMED[place]
    whole = path.read_bytes()
    for keep in range(132, whole.index(b"\xe0\x7f\x10\x00"), 37):
        path.write_bytes(whole[:keep])
        refusal(tmp_path, UnreadableFileError, "1 of 9")


def test_missing_geometry_of_the_last_slice(tmp_path, series):
    for missing in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"):
        series.write(tmp_path, only(8, **{missing: None}))
        refusal(tmp_path, GeometryError, missing)


def test_a_file_that_is_truncated_in_its_pixels(tmp_path, series):
    path = series.write(tmp_path, names=NAMED) / NAMED[6]
    path.write_bytes(path.read_bytes()[:-5])
    refusal(tmp_path, UnreadableFileError, "Slice 7 of 9")


def test_fewer_pixels_than_rows_and_columns(tmp_path, series):
    series.write(tmp_path, lambda dataset, _: setattr(dataset, "PixelData", dataset.PixelData[:-14]), NAMED)
    refusal(tmp_path, UnreadableFileError, "Slice 1 of 9")


def test_no_pixels_at_all(tmp_path, series):
    series.write(tmp_path, attributes(PixelData=None), NAMED)
    refusal(tmp_path, UnreadableFileError, "9 of 9")


def test_a_compressed_slice_of_another_size(tmp_path, series):
    for place, dataset in enumerate(series.datasets()):
        dataset.compress(RLELossless, generate_instance_uid=False)
        dataset.Rows += 1
        save(dataset, tmp_path / NAMED[place])
    refusal(tmp_path, UnreadableFileError, "Slice 1 of 9")


@pytest.mark.parametrize(
    ("syntax", "plugin", "marker", "rows_at"),
    [(JPEGLSLossless, "pyjpegls", b"\xff\xf7", 5), (JPEG2000Lossless, "pylibjpeg", b"\xff\x51", 10)],
)
def test_a_frame_of_another_size_is_never_decoded(tmp_path, monkeypatch, syntax, plugin, marker, rows_at):
    """A decoder would allocate memory for the size in the frame, here at least 65535 rows."""
    series = Series(some_hu((64, 64, 3)))
    for place, dataset in enumerate(series.datasets()):
        dataset.compress(syntax, encoding_plugin=plugin, generate_instance_uid=False)
        raw = bytearray(save(dataset, tmp_path / NAMED[place]).read_bytes())
        if place == 0:
            at = raw.index(marker, raw.index(b"\xe0\x7f\x10\x00")) + rows_at
            raw[at : at + 4 if syntax == JPEG2000Lossless else at + 2] = b"\xff\xff"
            (tmp_path / NAMED[place]).write_bytes(raw)
    monkeypatch.setattr(Decoder, "iter_array", lambda *_, **__: pytest.fail("a decoder was called"))
    refusal(tmp_path, UnreadableFileError, "Slice 1 of 3")


def test_an_enhanced_image_with_missing_frames(tmp_path, series):
    dataset = series.enhanced()
    dataset.NumberOfFrames = 12
    refusal(save(dataset, tmp_path / "a.dcm"), UnreadableFileError, "1 of 1")


def test_an_ordinary_ct_image_with_several_frames(tmp_path, series):
    dataset = series.datasets()[0]
    dataset.NumberOfFrames = 9
    refusal(save(dataset, tmp_path / "a.dcm"), NotACtError, "9 frames")


def test_paths_without_dicom(tmp_path):
    (tmp_path / "empty").mkdir()
    refusal(tmp_path / "empty", NoSeriesError)
    (tmp_path / "notes.txt").write_text("nothing")
    refusal(tmp_path / "notes.txt", NoSeriesError)
    refusal(tmp_path / "missing", UnreadableFileError)


# Selection of a series


def pair(folder: Path, first: Series, second: Series, change=None) -> list[Series]:
    """Write two series of one study and return them in the order of the list in error messages."""
    second = replace(second, study=first.study)
    first.write(folder / "a")
    second.write(folder / "b", change)
    return sorted([first, second], key=lambda one: one.uid)


def test_the_series_with_the_most_slices_is_selected(tmp_path):
    pair(tmp_path, Series(some_hu((5, 5, 4))), Series(some_hu((6, 5, 7))))
    assert read_scan(tmp_path).shape == (6, 5, 7)


def test_a_series_is_selected_by_number_uid_or_end_of_uid(tmp_path):
    a = Series(some_hu((5, 5, 4)), uid="1.2.3.777")
    b = Series(some_hu((6, 5, 7)), uid="1.2.3.778")
    first, second = pair(tmp_path, a, b)
    for wanted in ("1", first.uid, ".777"):
        assert read_scan(tmp_path, wanted).shape == first.hu.shape
    for wanted in ("2", second.uid, "8"):
        assert read_scan(tmp_path, wanted).shape == second.hu.shape
    for wanted in ("3", "1.2.3", "", "0", "999"):
        refusal(tmp_path, ChooseSeriesError, "2: CT, 7 slices", series=wanted)


def test_equal_numbers_of_slices_are_refused_with_a_list(tmp_path):
    pair(tmp_path, Series(some_hu()), Series(some_hu()))
    error = refusal(tmp_path, ChooseSeriesError, "2 series of 5 slices")
    assert error.message.splitlines()[1:] == [
        f"  {number}: CT, 5 slices of 7x6, 0.75 x 0.50 x 2.50 mm, axial, kernel B30f" for number in (1, 2)
    ]
    assert "--series" in error.remedy


def test_different_matrix_sizes_are_several_series_with_one_uid(tmp_path):
    first = Series(some_hu((7, 6, 5)))
    second = replace(Series(some_hu((9, 6, 4))), uid=first.uid, frame_of_reference=first.frame_of_reference)
    pair(tmp_path, first, second)
    assert read_scan(tmp_path).shape == (7, 6, 5)
    refusal(tmp_path, ChooseSeriesError, "2 series", series=first.uid)
    assert {read_scan(tmp_path, number).shape for number in "12"} == {(7, 6, 5), (9, 6, 4)}


def test_a_smaller_series_does_not_replace_a_broken_series(tmp_path):
    large = Series(some_hu((7, 6, 9)))
    small = Series(some_hu((5, 5, 4)))
    pair(tmp_path, small, large, moved(large, s4=0.7))
    error = refusal(tmp_path, UnevenSlicesError, "CT, 9 slices", "CT, 4 slices")
    assert "--series" in error.remedy
    numbers = {one.shape: str(one.number) for one in find_series(tmp_path)}
    assert read_scan(tmp_path, numbers[5, 5, 4]).shape == (5, 5, 4)


def test_a_smaller_broken_series_is_skipped(tmp_path):
    small = Series(some_hu((5, 5, 4)))
    pair(tmp_path, Series(some_hu((7, 6, 9))), small, moved(small, s2=0.7))
    assert read_scan(tmp_path).shape == (7, 6, 9)


def test_other_modalities_of_the_study_are_skipped(tmp_path):
    change = attributes(Modality="PT", SOPClassUID="1.2.840.10008.5.1.4.1.1.128")
    pair(tmp_path, Series(some_hu((5, 5, 4))), Series(some_hu((7, 6, 9))), change)
    assert read_scan(tmp_path).shape == (5, 5, 4)


def test_only_other_modalities(tmp_path):
    mr = attributes(Modality="MR", SOPClassUID="1.2.840.10008.5.1.4.1.1.4")
    first, second = Series(some_hu()), Series(some_hu())
    first.write(tmp_path / "a", mr)
    replace(second, study=first.study).write(tmp_path / "b", mr)
    error = refusal(tmp_path, NoSeriesError)
    assert error.message.count("MR, 5 slices") == 2


def test_two_patients_in_one_folder(tmp_path):
    Series(some_hu((7, 6, 9))).write(tmp_path / "a")
    Series(some_hu((5, 5, 4))).write(tmp_path / "b", attributes(PatientID="id-4712", PatientName="Secretname^Bea"))
    error = refusal(tmp_path, SeveralPatientsError, "2 patients")
    assert "patient 1: CT" in error.message
    assert "patient 2: CT" in error.message
    numbers = {one.shape: str(one.number) for one in find_series(tmp_path)}
    assert read_scan(tmp_path, numbers[5, 5, 4]).shape == (5, 5, 4)


def test_a_picture_of_another_patient_beside_the_ct_is_named(tmp_path):
    Series(some_hu((7, 6, 9))).write(tmp_path / "a")
    other = attributes(PatientID="id-4712", Modality="US", SOPClassUID="1.2.840.10008.5.1.4.1.1.6.1")
    Series(some_hu((5, 5, 4))).write(tmp_path / "b", other)
    scan = read_scan(tmp_path)
    assert scan.shape == (7, 6, 9)
    assert scan.warnings == (
        "4 images of another patient were left out: PatientID (0010,0020) or PatientName (0010,0010) differs.",
    )


# Archives


def test_an_encrypted_archive(tmp_path, series):
    packed = zipped(series.write(tmp_path / "in"), tmp_path / "scan.zip")
    raw = bytearray(packed.read_bytes())
    at = 0
    while (at := raw.find(b"PK\x01\x02", at)) >= 0:  # flags of every entry in the central directory
        raw[at + 8] |= 1
        at += 4
    packed.write_bytes(raw)
    refusal(packed, ArchiveError, "encrypted")


def test_an_archive_with_a_too_large_unpacked_size(tmp_path, series):
    packed = zipped(series.write(tmp_path / "in"), tmp_path / "scan.zip")
    raw = bytearray(packed.read_bytes())
    at = 0
    while (at := raw.find(b"PK\x01\x02", at)) >= 0:
        raw[at + 24 : at + 28] = struct.pack("<I", 0xFFFFFFF0)
        at += 4
    packed.write_bytes(raw)
    refusal(packed, ArchiveError, "9 files", "36.0 GiB")


def test_an_archive_with_too_many_files(tmp_path, series, monkeypatch):
    packed = zipped(series.write(tmp_path / "in"), tmp_path / "scan.zip")
    assert files.MAX_ARCHIVE_BYTES == 16 * 2**30
    monkeypatch.setattr(files, "MAX_ARCHIVE_MEMBERS", 8)
    refusal(packed, ArchiveError, "8 files", "16 GiB")


def test_an_archive_that_is_larger_than_its_directory_states(tmp_path):
    bomb = tmp_path / "bomb.zip"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("a", bytes(128) + b"DICM" + bytes(50 << 20))
    raw = bytearray(bomb.read_bytes())
    at = raw.find(b"PK\x01\x02")
    raw[at + 24 : at + 28] = struct.pack("<I", 2000)
    bomb.write_bytes(raw)
    with pytest.raises(InputError):
        read_scan(bomb)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_damaged_member_of_an_archive(tmp_path, series, compression):
    series.write(tmp_path / "in")
    with zipfile.ZipFile(tmp_path / "scan.zip", "w", compression) as packed:
        for number, path in enumerate(sorted((tmp_path / "in").iterdir())):
            packed.write(path, NAMED[number])
        last = packed.infolist()[8]
    raw = bytearray((tmp_path / "scan.zip").read_bytes())
    raw[last.header_offset + 30 + len(last.filename) + last.compress_size - 9] ^= 0x55  # within the last pixels
    (tmp_path / "scan.zip").write_bytes(raw)
    refusal(tmp_path / "scan.zip", ArchiveError)


def test_a_truncated_archive(tmp_path, series):
    packed = zipped(series.write(tmp_path / "in"), tmp_path / "scan.zip")
    packed.write_bytes(packed.read_bytes()[:-200])
    with pytest.raises(InputError):
        read_scan(packed)


# Random damage


def outcome(path: Path) -> str:
    """Read a damaged scan and return ``read``, ``refused``, or ``leaked`` if the error contains a patient name."""
    try:
        read_scan(path)
    except FseftEdgeError as error:
        return "leaked" if "Secretname" in str(error) else "refused"
    return "read"


FUZZ = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,  # a crash of a C decoder ends the test run, so it must be reproducible
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """Return, for each kind of file, the path of a scan and the file in it that the tests damage."""
    root = tmp_path_factory.mktemp("fuzz")
    series = Series(some_hu((8, 8, 4)))
    for place, dataset in enumerate(series.datasets()):
        save(dataset, root / "native" / f"{place}")
        dataset.compress(RLELossless, generate_instance_uid=False)
        save(dataset, root / "rle" / f"{place}")
        for name, syntax, plugin in (
            ("jpeg_2000", JPEG2000Lossless, "pylibjpeg"),
            ("jpeg_ls", JPEGLSLossless, "pyjpegls"),
        ):
            larger = replace(series, hu=some_hu((32, 32, 4))).datasets()[place]
            larger.compress(syntax, encoding_plugin=plugin, generate_instance_uid=False)
            save(larger, root / name / f"{place}")
    save(series.enhanced(), root / "enhanced" / "0")
    (root / "zip").mkdir()
    zipped(root / "native", root / "zip" / "0.zip")
    return {
        "native": (root / "native", root / "native" / "1"),
        "rle": (root / "rle", root / "rle" / "1"),
        "jpeg_2000": (root / "jpeg_2000", root / "jpeg_2000" / "1"),
        "jpeg_ls": (root / "jpeg_ls", root / "jpeg_ls" / "1"),
        "enhanced": (root / "enhanced", root / "enhanced" / "0"),
        "zip": (root / "zip" / "0.zip", root / "zip" / "0.zip"),
    }


@FUZZ
@given(data=st.data())
@pytest.mark.parametrize("kind", ["native", "rle", "jpeg_2000", "jpeg_ls", "enhanced", "zip"])
def test_flipped_bits_and_truncation_are_harmless_or_refused(whole, kind, data):
    folder, file = whole[kind]
    original = file.read_bytes()
    raw = bytearray(original)
    for _ in range(data.draw(st.integers(0, 6), label="flips")):
        raw[data.draw(st.integers(0, len(raw) - 1), label="byte")] ^= 1 << data.draw(st.integers(0, 7), label="bit")
    if data.draw(st.booleans(), label="cut"):
        raw = raw[: data.draw(st.integers(0, len(raw)), label="kept")]
    try:
        file.write_bytes(raw)
        assert outcome(folder) != "leaked"
    finally:
        file.write_bytes(original)


@FUZZ
@given(content=st.binary(max_size=600), explicit=st.booleans())
def test_random_bytes_after_the_magic_are_refused(tmp_path, content, explicit):
    meta = b"\x02\x00\x10\x00UI\x14\x001.2.840.10008.1.2.1\x00" if explicit else b""
    (tmp_path / "a").write_bytes(bytes(128) + b"DICM" + meta + content)
    assert outcome(tmp_path / "a") == "refused"


@FUZZ
@given(content=st.binary(max_size=600))
def test_random_bytes_in_an_archive_are_refused(tmp_path, content):
    (tmp_path / "a.zip").write_bytes(b"PK\x03\x04" + content + b"PK\x05\x06" + bytes(18))
    assert outcome(tmp_path / "a.zip") == "refused"


def test_an_undamaged_file_of_each_kind_is_read(whole):
    assert [outcome(folder) for folder, _ in whole.values()] == ["read"] * 6


def test_selecting_a_broken_series_raises_its_problem(tmp_path, series):
    (found,) = find_series(series.write(tmp_path, attributes(RescaleSlope=None)))
    for wanted in (None, "1", found.uid):
        with refused(RescaleError, tmp_path):
            choose_series([found], wanted)
