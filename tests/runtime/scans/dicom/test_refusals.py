"""What is no even stack of CT slices is refused: by an error of its own kind, with a remedy and without a name."""

from __future__ import annotations

import struct
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from doubles.dicom import PATIENT, Series, save, some_hu, zipped
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as Items
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
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
"""File names as some archives give them."""


def refused(
    path: Path, kind: type[FseftEdgeError], match: str | None = None, series: str | None = None
) -> FseftEdgeError:
    with pytest.raises(kind, match=match) as caught:
        read_scan(path, series)
    error = caught.value
    assert type(error) is kind
    assert error.exit_code == 3
    assert error.remedy
    chain: BaseException | None = error
    while chain is not None:
        assert "Secretname" not in f"{chain!r} {chain}"
        assert "4711" not in str(chain)
        chain = chain.__cause__
    return error


def moved(series: Series, **offsets_mm):
    """Change positions of slices (``s3=0.5``) along the normal."""

    def change(dataset: Dataset, place: int) -> None:
        off = offsets_mm.get(f"s{place}", 0.0) * series.normal
        dataset.ImagePositionPatient = [round(float(value), 6) for value in series.position(place) + off]

    return change


def attributes(**values):
    """Set attributes of every slice; None removes one."""

    def change(dataset: Dataset, _: int) -> None:
        for keyword, value in values.items():
            if value is None:
                delattr(dataset, keyword)
            else:
                setattr(dataset, keyword, value)

    return change


def only(place: int, **values):
    """Set attributes of one slice."""
    return lambda dataset, this: attributes(**values)(dataset, this) if this == place else None


@pytest.fixture
def series() -> Series:
    return Series(some_hu((7, 6, 9)))


@pytest.mark.parametrize("gone", [1, 4, 7])
def test_a_missing_slice(tmp_path, series, gone):
    (series.write(tmp_path, names=NAMED) / NAMED[gone]).unlink()
    refused(tmp_path, MissingSliceError, f"slice {gone} and slice {gone + 1} of 8 there are 5 mm instead of 2.5")


def test_two_missing_slices_in_one_place(tmp_path, series):
    series.write(tmp_path, names=NAMED)
    for gone in (3, 4):
        (tmp_path / NAMED[gone]).unlink()
    refused(tmp_path, MissingSliceError, "7.5 mm instead of 2.5")


def test_slices_at_one_place(tmp_path, series):
    series.write(tmp_path / "first", names=NAMED)
    for number, dataset in enumerate(series.datasets()):
        save(dataset, tmp_path / "second_phase" / f"{PATIENT}{number}")
    refused(tmp_path, DuplicateSliceError, "18 slices at 9 places")


def test_uneven_distances(tmp_path, series):
    series.write(tmp_path, moved(series, s6=0.6), NAMED)
    refused(tmp_path, UnevenSlicesError, "slice 7 of 9 is 0.6 mm off")


def test_distances_that_change_half_way(tmp_path, series):
    series.write(tmp_path, moved(series, s6=1.25, s7=2.5, s8=3.75))
    refused(tmp_path, UnevenSlicesError, "2.5 to 3.75 mm")


def test_slices_beside_one_another(tmp_path, series):
    def change(dataset: Dataset, place: int) -> None:
        if place == 4:
            dataset.ImagePositionPatient[0] = float(dataset.ImagePositionPatient[0]) + 3

    series.write(tmp_path, change)
    refused(tmp_path, UnevenSlicesError, "slice 5 of 9 is 3 mm off")


@pytest.mark.parametrize("digits", [1, 2, 3, 6])
def test_rounding_of_positions_is_forgiven(tmp_path, digits):
    """Spacings that one decimal cannot hold."""
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

    series.write(tmp_path, change)
    refused(tmp_path, GantryTiltError, f"by {abs(degrees)} degrees")


def test_a_localiser(tmp_path, series):
    series.write(tmp_path, attributes(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), NAMED)
    refused(tmp_path, LocaliserError, "localiser")


def test_a_localiser_beside_the_scan_in_one_series_is_passed_over(tmp_path, series):
    series.write(tmp_path)
    scout = replace(series, hu=some_hu((7, 6, 2)), orientation=(0.0, 1.0, 0.0, 0.0, 0.0, -1.0))
    scout.write(tmp_path / "scout", attributes(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]))
    assert read_scan(tmp_path).shape == (7, 6, 9)
    assert [one.uid for one in find_series(tmp_path)] == [series.uid] * 2


def test_secondary_captures(tmp_path, series):
    series.write(tmp_path, attributes(SOPClassUID="1.2.840.10008.5.1.4.1.1.7", ImagePositionPatient=None), NAMED)
    refused(tmp_path, SecondaryCaptureError, "pictures of a screen")


@pytest.mark.parametrize(("modality", "sop_class"), [("MR", "4"), ("PT", "128"), ("CT", "481.2"), ("US", "6.1")])
def test_other_modalities(tmp_path, series, modality, sop_class):
    sop_class = f"1.2.840.10008.5.1.4.1.1.{sop_class}"
    series.write(tmp_path, attributes(Modality=modality, SOPClassUID=sop_class, ImageOrientationPatient=None), NAMED)
    refused(tmp_path, OtherModalityError, "no CT")


@pytest.mark.parametrize(
    ("what", "values"),
    [
        ("studies", {"StudyInstanceUID": generate_uid()}),
        ("frames of reference", {"FrameOfReferenceUID": generate_uid()}),
        ("patients", {"PatientID": "id-4712"}),
        ("patients", {"PatientName": "Other^Name"}),
        ("patients", {"IssuerOfPatientID": "another hospital"}),
    ],
)
def test_one_series_of_several(tmp_path, series, what, values):
    series.write(tmp_path, only(3, **values), NAMED)
    refused(tmp_path, MixedSeriesError, f"2 {what}")


def test_one_patient_written_in_two_ways_is_one(tmp_path, series):
    read_scan(series.write(tmp_path, only(3, PatientName="SECRETNAME^ADA^^^")))


FORMATS = {
    "inverted": ({"PhotometricInterpretation": "MONOCHROME1"}, "MONOCHROME1"),
    "colour": ({"PhotometricInterpretation": "RGB", "SamplesPerPixel": 3}, "RGB with 3 values"),
    "8 bits": ({"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7}, "stores 8 bits"),
    "32 bits": ({"BitsAllocated": 32, "BitsStored": 32, "HighBit": 31}, "stores 32 bits"),
    "high bit": ({"BitsStored": 12, "HighBit": 15}, "up to bit 15"),
    "no bits": ({"BitsStored": 0, "HighBit": 0}, "stores 0 bits"),
}


@pytest.mark.parametrize("case", FORMATS)
def test_other_pixels(tmp_path, series, case):
    values, match = FORMATS[case]
    refused(series.write(tmp_path, attributes(**values)), PixelFormatError, match)


RESCALES = {
    "no slope": ({"RescaleSlope": None}, "nothing that says how"),
    "no intercept": ({"RescaleIntercept": None}, "nothing that says how"),
    "zero": ({"RescaleSlope": 0}, "slope of 0"),
    "negative": ({"RescaleSlope": -1}, "slope of -1"),
    "unit": ({"RescaleType": "ED"}, "another unit than HU"),
    "table": ({"ModalityLUTSequence": Items([Dataset()])}, "by a table how"),
}


@pytest.mark.parametrize("case", RESCALES)
def test_rescales_that_lead_to_no_hu(tmp_path, series, case):
    values, match = RESCALES[case]
    refused(series.write(tmp_path, attributes(**values)), RescaleError, match)


def test_a_rescale_that_one_slice_lacks(tmp_path, series):
    refused(series.write(tmp_path, only(5, RescaleSlope=None)), RescaleError)


@pytest.mark.parametrize("missing", ["ImagePositionPatient", "PixelSpacing"])
def test_no_place_in_the_patient(tmp_path, series, missing):
    refused(series.write(tmp_path, attributes(**{missing: None})), GeometryError, "does not say where")


def test_an_orientation_that_only_a_slide_has(tmp_path, series):
    change = attributes(ImageOrientationPatient=None, ImageOrientationSlide=[1, 0, 0, 0, 1, 0])
    refused(series.write(tmp_path, change), GeometryError, "does not say where")


def test_an_animal(tmp_path, series):
    refused(series.write(tmp_path, attributes(AnatomicalOrientationType="QUADRUPED")), GeometryError, "animal")


@pytest.mark.parametrize("orientation", [[1, 0, 0, 0.1, 1, 0], [0.9, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0]])
def test_impossible_orientations(tmp_path, series, orientation):
    refused(series.write(tmp_path, attributes(ImageOrientationPatient=orientation)), GeometryError, "perpendicular")


def test_a_voxel_of_an_impossible_size(tmp_path, series):
    refused(series.write(tmp_path, attributes(PixelSpacing=[0, 0])), GeometryError, "which no CT has")


@pytest.mark.parametrize("syntax", [JPEGExtended12Bit, "1.2.3.4.5", "1.2.840.10008.1.2.4.102"])
def test_encodings_without_a_decoder(tmp_path, series, syntax):
    for place, dataset in enumerate(series.datasets()):
        dataset.file_meta.TransferSyntaxUID = syntax
        dataset.PixelData = b"\xfe\xff\x00\xe0\x00\x00\x00\x00\xfe\xff\xdd\xe0\x00\x00\x00\x00"
        dataset["PixelData"].is_undefined_length = True
        dataset.save_as(tmp_path / NAMED[place], implicit_vr=False, little_endian=True)
    error = refused(tmp_path, NoDecoderError, str(syntax).replace(".", r"\."))
    assert "uncompressed" in error.remedy


def test_a_decoder_that_is_not_installed_is_named(tmp_path, series, monkeypatch):
    class Nothing:
        available_plugins = ()

    monkeypatch.setattr(pixels, "get_decoder", lambda _: Nothing())
    for place, dataset in enumerate(series.datasets()):
        dataset.compress(RLELossless, generate_instance_uid=False)
        dataset.file_meta.TransferSyntaxUID = JPEGLosslessSV1
        save(dataset, tmp_path / NAMED[place])
    error = refused(tmp_path, NoDecoderError, "JPEG Lossless")
    assert "fseft-edge[jpeg]" in error.remedy


def test_a_deflated_file_is_not_inflated(tmp_path, series):
    for place, dataset in enumerate(series.datasets()):
        dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
        save(dataset, tmp_path / NAMED[place])
    refused(tmp_path, UnreadableFileError, "9 of 9 DICOM files .* deflated")


@pytest.mark.parametrize("place", [0, 5, 8])
def test_a_file_that_is_truncated_in_its_header_wherever(tmp_path, series, place):
    path = series.write(tmp_path, names=NAMED) / NAMED[place]
    whole = path.read_bytes()
    for keep in range(132, whole.index(b"\xe0\x7f\x10\x00"), 11):
        path.write_bytes(whole[:keep])
        refused(tmp_path, UnreadableFileError, "1 of 9 DICOM files")


def test_a_place_that_the_last_slice_lacks(tmp_path, series):
    for missing in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"):
        series.write(tmp_path, only(8, **{missing: None}))
        refused(tmp_path, GeometryError, "does not say where")


def test_a_file_that_is_truncated_in_its_pixels(tmp_path, series):
    path = series.write(tmp_path, names=NAMED) / NAMED[6]
    path.write_bytes(path.read_bytes()[:-5])
    refused(tmp_path, UnreadableFileError, "Slice 7 of 9 .* truncated")


def test_fewer_pixels_than_rows_and_columns_say(tmp_path, series):
    series.write(tmp_path, lambda dataset, _: setattr(dataset, "PixelData", dataset.PixelData[:-14]), NAMED)
    refused(tmp_path, UnreadableFileError, "Slice 1 of 9")


def test_no_pixels_at_all(tmp_path, series):
    series.write(tmp_path, attributes(PixelData=None), NAMED)
    refused(tmp_path, UnreadableFileError, "9 of 9 DICOM files")


def test_a_compressed_slice_of_another_size(tmp_path, series):
    for place, dataset in enumerate(series.datasets()):
        dataset.compress(RLELossless, generate_instance_uid=False)
        dataset.Rows += 1
        save(dataset, tmp_path / NAMED[place])
    refused(tmp_path, UnreadableFileError, "Slice 1 of 9")


@pytest.mark.parametrize(
    ("syntax", "plugin", "marker", "rows_at"),
    [(JPEGLSLossless, "pyjpegls", b"\xff\xf7", 5), (JPEG2000Lossless, "pylibjpeg", b"\xff\x51", 10)],
)
def test_a_frame_that_claims_another_size_is_never_decoded(tmp_path, monkeypatch, syntax, plugin, marker, rows_at):
    """A decoder would set memory aside for it: 65535 rows, here."""
    series = Series(some_hu((64, 64, 3)))
    for place, dataset in enumerate(series.datasets()):
        dataset.compress(syntax, encoding_plugin=plugin, generate_instance_uid=False)
        raw = bytearray(save(dataset, tmp_path / NAMED[place]).read_bytes())
        if place == 0:
            at = raw.index(marker, raw.index(b"\xe0\x7f\x10\x00")) + rows_at
            raw[at : at + 4 if syntax == JPEG2000Lossless else at + 2] = b"\xff\xff"
            (tmp_path / NAMED[place]).write_bytes(raw)
    monkeypatch.setattr(pixels, "iter_pixels", lambda *_, **__: pytest.fail("a decoder was asked"))
    refused(tmp_path, UnreadableFileError, "Slice 1 of 3")


def test_an_enhanced_image_that_lacks_frames(tmp_path, series):
    dataset = series.enhanced()
    dataset.NumberOfFrames = 12
    refused(save(dataset, tmp_path / "a.dcm"), UnreadableFileError, "1 of 1 DICOM files")


def test_an_ordinary_ct_image_with_frames(tmp_path, series):
    dataset = series.datasets()[0]
    dataset.NumberOfFrames = 9
    refused(save(dataset, tmp_path / "a.dcm"), NotACtError, "not an enhanced CT")


def test_places_without_dicom(tmp_path):
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", NoSeriesError, "no DICOM file")
    (tmp_path / "notes.txt").write_text("nothing")
    refused(tmp_path / "notes.txt", NoSeriesError, "no DICOM file")
    refused(tmp_path / "missing", UnreadableFileError, "cannot be read")


# Choosing


def pair(folder: Path, first: Series, second: Series, change=None) -> list[Series]:
    """Write two series of one study and return them in the order in which they are listed."""
    second = replace(second, study=first.study)
    first.write(folder / "a")
    second.write(folder / "b", change)
    return sorted([first, second], key=lambda one: one.uid)


def test_the_series_with_most_slices_is_taken(tmp_path):
    pair(tmp_path, Series(some_hu((5, 5, 4))), Series(some_hu((6, 5, 7))))
    assert read_scan(tmp_path).shape == (6, 5, 7)


def test_a_series_is_chosen_by_number_uid_and_end_of_uid(tmp_path):
    a = Series(some_hu((5, 5, 4)), uid="1.2.3.777")
    b = Series(some_hu((6, 5, 7)), uid="1.2.3.778")
    first, second = pair(tmp_path, a, b)
    for wanted in ("1", first.uid, ".777"):
        assert read_scan(tmp_path, wanted).shape == first.hu.shape
    for wanted in ("2", second.uid, "8"):
        assert read_scan(tmp_path, wanted).shape == second.hu.shape
    for wanted in ("3", "1.2.3", "", "0", "999"):
        refused(tmp_path, ChooseSeriesError, "No series", wanted)


def test_equally_many_slices_are_refused_with_a_list(tmp_path):
    pair(tmp_path, Series(some_hu()), Series(some_hu()))
    error = refused(tmp_path, ChooseSeriesError, "2 series of 5 slices")
    assert error.message.splitlines()[1:] == [
        f"  {number}: CT, 5 slices of 7x6, 0.75 x 0.50 x 2.50 mm, axial, kernel B30f" for number in (1, 2)
    ]
    assert "--series" in error.remedy


def test_mixed_matrices_are_several_series_of_one_uid(tmp_path):
    first = Series(some_hu((7, 6, 5)))
    second = replace(Series(some_hu((9, 6, 4))), uid=first.uid, frame_of_reference=first.frame_of_reference)
    pair(tmp_path, first, second)
    assert read_scan(tmp_path).shape == (7, 6, 5)
    refused(tmp_path, ChooseSeriesError, "Several series", first.uid)
    assert {read_scan(tmp_path, number).shape for number in "12"} == {(7, 6, 5), (9, 6, 4)}


def test_a_broken_series_is_not_passed_over_for_a_smaller_one(tmp_path):
    large = Series(some_hu((7, 6, 9)))
    small = Series(some_hu((5, 5, 4)))
    pair(tmp_path, small, large, moved(large, s4=0.7))
    error = refused(tmp_path, UnevenSlicesError, "cannot be read")
    assert "--series" in error.remedy
    numbers = {one.shape: str(one.number) for one in find_series(tmp_path)}
    assert read_scan(tmp_path, numbers[5, 5, 4]).shape == (5, 5, 4)


def test_a_smaller_broken_series_is_passed_over(tmp_path):
    small = Series(some_hu((5, 5, 4)))
    pair(tmp_path, Series(some_hu((7, 6, 9))), small, moved(small, s2=0.7))
    assert read_scan(tmp_path).shape == (7, 6, 9)


def test_other_modalities_of_the_study_are_passed_over(tmp_path):
    change = attributes(Modality="PT", SOPClassUID="1.2.840.10008.5.1.4.1.1.128")
    pair(tmp_path, Series(some_hu((5, 5, 4))), Series(some_hu((7, 6, 9))), change)
    assert read_scan(tmp_path).shape == (5, 5, 4)


def test_nothing_but_what_is_no_ct(tmp_path):
    mr = attributes(Modality="MR", SOPClassUID="1.2.840.10008.5.1.4.1.1.4")
    first, second = Series(some_hu()), Series(some_hu())
    first.write(tmp_path / "a", mr)
    replace(second, study=first.study).write(tmp_path / "b", mr)
    error = refused(tmp_path, NoSeriesError, "no CT scan that can be read")
    assert error.message.count("MR, 5 slices") == 2


def test_two_patients_in_one_folder(tmp_path):
    Series(some_hu((7, 6, 9))).write(tmp_path / "a")
    Series(some_hu((5, 5, 4))).write(tmp_path / "b", attributes(PatientID="id-4712", PatientName="Secretname^Bea"))
    error = refused(tmp_path, SeveralPatientsError, "2 patients")
    assert "patient 1: CT" in error.message
    assert "patient 2: CT" in error.message
    numbers = {one.shape: str(one.number) for one in find_series(tmp_path)}
    assert read_scan(tmp_path, numbers[5, 5, 4]).shape == (5, 5, 4)


# Archives


def test_an_encrypted_archive(tmp_path, series):
    packed = zipped(series.write(tmp_path / "in"), tmp_path / "scan.zip")
    raw = bytearray(packed.read_bytes())
    at = 0
    while (at := raw.find(b"PK\x01\x02", at)) >= 0:  # the flags of every entry in the central directory
        raw[at + 8] |= 1
        at += 4
    packed.write_bytes(raw)
    refused(packed, ArchiveError, "encrypted")


def test_an_archive_that_claims_to_hold_too_much(tmp_path, series):
    packed = zipped(series.write(tmp_path / "in"), tmp_path / "scan.zip")
    raw = bytearray(packed.read_bytes())
    at = 0
    while (at := raw.find(b"PK\x01\x02", at)) >= 0:
        raw[at + 24 : at + 28] = struct.pack("<I", 0xFFFFFFF0)
        at += 4
    packed.write_bytes(raw)
    refused(packed, ArchiveError, "9 files of 36.0 GiB")


def test_an_archive_of_too_many_or_too_large_files(tmp_path, series, monkeypatch):
    packed = zipped(series.write(tmp_path / "in"), tmp_path / "scan.zip")
    assert files.MAX_ARCHIVE_BYTES == 16 * 2**30
    monkeypatch.setattr(files, "MAX_ARCHIVE_MEMBERS", 8)
    refused(packed, ArchiveError, "at most 8 of 16 GiB")


def test_an_archive_that_unpacks_to_more_than_it_claims_is_damaged(tmp_path):
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
    raw[last.header_offset + 30 + len(last.filename) + last.compress_size - 9] ^= 0x55  # among the last pixels
    (tmp_path / "scan.zip").write_bytes(raw)
    refused(tmp_path / "scan.zip", ArchiveError, "damaged zip archive")


def test_a_truncated_archive(tmp_path, series):
    packed = zipped(series.write(tmp_path / "in"), tmp_path / "scan.zip")
    packed.write_bytes(packed.read_bytes()[:-200])
    with pytest.raises(InputError):
        read_scan(packed)


# Anything at all


def outcome(path: Path) -> str:
    """Read what was damaged: it reads, or ends in one of our errors, whose text holds no name."""
    try:
        read_scan(path)
    except FseftEdgeError as error:
        return "leaked" if "Secretname" in str(error) else "refused"
    return "read"


FUZZ = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,  # a decoder in C that crashed would take all tests with it: the same examples on every run
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """A folder of each kind, and the file in it that is going to be damaged."""
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
def test_flipped_bits_and_lost_ends_never_end_in_anything_but_an_error_of_ours(whole, kind, data):
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
def test_random_bytes_behind_the_magic(tmp_path, content, explicit):
    meta = b"\x02\x00\x10\x00UI\x14\x001.2.840.10008.1.2.1\x00" if explicit else b""
    (tmp_path / "a").write_bytes(bytes(128) + b"DICM" + meta + content)
    assert outcome(tmp_path / "a") == "refused"


@FUZZ
@given(content=st.binary(max_size=600))
def test_random_bytes_as_an_archive(tmp_path, content):
    (tmp_path / "a.zip").write_bytes(b"PK\x03\x04" + content + b"PK\x05\x06" + bytes(18))
    assert outcome(tmp_path / "a.zip") == "refused"


def test_a_whole_file_of_each_kind_reads_before_it_is_damaged(whole):
    assert [outcome(folder) for folder, _ in whole.values()] == ["read"] * 6


def test_choosing_raises_what_is_wrong_with_the_one_that_is_named(tmp_path, series):
    (found,) = find_series(series.write(tmp_path, attributes(RescaleSlope=None)))
    for wanted in (None, "1", found.uid):
        with pytest.raises(RescaleError):
            choose_series([found], wanted)
