"""CT series with unusual or wrong headers, as scanners, archives and anonymisers write them; all are synthetic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from pydicom import dcmwrite
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset, FileDataset
from pydicom.tag import Tag
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, ImplicitVRLittleEndian, generate_uid

from doubles.dicom import CT_IMAGE, Change, Series, save, some_hu

SERIES = Series(some_hu((24, 20, 8)), spacing=(3.0, 3.0, 5.0), origin=(-36.0, -30.0, -400.0))

SERIES_CLASS = CT_IMAGE.encode()
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
ULTRASOUND = "1.2.840.10008.5.1.4.1.1.6.1"
AXIAL_DERIVED = ["DERIVED", "SECONDARY", "SCREEN SAVE"]


def raw(dataset: Dataset, keyword_or_tag: str | int, vr: str, value: bytes) -> None:
    """Put bytes into a header without a check."""
    tag = Tag(keyword_or_tag)
    padded = value + b" " * (len(value) % 2)
    dataset._dict[tag] = RawDataElement(tag, vr, len(padded), padded, 0, False, True)


def with_commas(dataset: Dataset, *keywords: str) -> None:
    """Write elements with decimal commas."""
    for keyword in keywords:
        values = dataset[keyword].value
        parts = values if not isinstance(values, str | float | int) else [values]
        raw(dataset, keyword, "DS", "\\".join(f"{float(part):.3f}".replace(".", ",") for part in parts).encode())


def without_preamble(folder: Path, *, meta: bool = True, implicit: bool = False, big: bool = False) -> Path:
    """Write the series without preamble, and without file meta information if ``meta`` is False."""
    folder.mkdir(parents=True)
    syntax = ExplicitVRBigEndian if big else ImplicitVRLittleEndian
    for place, dataset in enumerate(SERIES.datasets()):
        if implicit or big:
            dataset.file_meta.TransferSyntaxUID = syntax
        if big:
            dataset.PixelData = np.frombuffer(dataset.PixelData, "<u2").astype(">u2").tobytes()
        path = folder / f"{place:03d}"
        dcmwrite(path, dataset, implicit_vr=implicit, little_endian=not big, enforce_file_format=True)
        content = path.read_bytes()[132:]
        if not meta:  # the group length is the first element: 12 bytes, its value in the last 4
            content = content[12 + int.from_bytes(content[8:12], "little") :]
        path.write_bytes(content)
    return folder


def without_meta_but_preamble(folder: Path) -> Path:
    """Write the series with preamble and ``DICM``, but without file meta information."""
    without_preamble(folder, meta=False)
    for path in folder.iterdir():
        path.write_bytes(bytes(128) + b"DICM" + path.read_bytes())
    return folder


def sheet(**values: object) -> FileDataset:
    """Return one image of the series without position and orientation, such as a page of a dose report."""
    dataset = SERIES.datasets()[0]
    for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"):
        delattr(dataset, keyword)
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    for keyword, value in values.items():
        setattr(dataset, keyword, value)
    return dataset


def ultrasound() -> FileDataset:
    """Return an ultrasound picture of the study whose header contains nonsense."""
    dataset = sheet(Modality="US", SOPClassUID=ULTRASOUND, SeriesInstanceUID=generate_uid(), NumberOfFrames=3)
    dataset.file_meta.MediaStorageSOPClassUID = ULTRASOUND
    raw(dataset, "PixelSpacing", "DS", b"abc\\def ")
    raw(dataset, "PixelPaddingValue", "US", b"\x01")
    return dataset


def beside(dataset: Dataset, name: str = "zz_other") -> Callable[[Path], Path]:
    """Return a writer of the series with another data set beside it."""

    def write(folder: Path) -> Path:
        SERIES.write(folder)
        save(dataset, folder / name)
        return folder

    return write


def changed(change: Change) -> Callable[[Path], Path]:
    """Return a writer of the series after a change of each data set."""
    return lambda folder: SERIES.write(folder, change)


def each(**values: object) -> Callable[[Path], Path]:
    """Return a writer of the series with these values in each data set; None deletes an element."""

    def change(dataset: Dataset, _: int) -> None:
        for keyword, value in values.items():
            if value is None:
                delattr(dataset, keyword)
            else:
                setattr(dataset, keyword, value)

    return changed(change)


def _without_class(dataset: Dataset, _: int) -> None:
    del dataset.SOPClassUID


def _without_any_class(folder: Path) -> Path:
    changed(_without_class)(folder)
    for path in folder.iterdir():
        content = path.read_bytes()
        path.write_bytes(content.replace(SERIES_CLASS, bytes(len(SERIES_CLASS))))
    return folder


def _two_paddings(dataset: Dataset, _: int) -> None:
    raw(dataset, "PixelPaddingValue", "SS", np.array([-2000, -2000], "<i2").tobytes())


def table_drift(series: Series, millimetres: float = 0.01) -> Change:
    """Return a change that moves each slice sideways relative to the slice before."""

    def change(dataset: Dataset, place: int) -> None:
        x, y, z = series.position(place)
        dataset.ImagePositionPatient = [float(x), round(float(y) + millimetres * place, 6), float(z)]

    return change


def _rounded_cosines(dataset: Dataset, place: int) -> None:
    if place % 2:
        dataset.ImageOrientationPatient = [1, 0.0002, 0, -0.0002, 1, 0]


def _rounded_spacing(dataset: Dataset, place: int) -> None:
    if place % 2:
        dataset.PixelSpacing = ["3.0001", "3.0001"]


def _copied(folder: Path) -> Path:
    SERIES.write(folder)
    for name in ("IM002", "IM005"):
        (folder / f"{name}.copy").write_bytes((folder / name).read_bytes())
    return folder


def _sent_twice(folder: Path) -> Path:
    """Write the series twice, the second time with other UIDs of the instances, as some archives do."""
    SERIES.write(folder / "a")
    SERIES.write(folder / "b")
    return folder


def _deflated(folder: Path) -> Path:
    for place, dataset in enumerate(SERIES.datasets()):
        dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
        save(dataset, folder / f"{place:03d}")
    return folder


def _damaged_ultrasound(folder: Path) -> Path:
    beside(ultrasound())(folder)
    path = folder / "zz_other"
    content = path.read_bytes()
    path.write_bytes(content[: content.index(b"Secretname") + 3])
    return folder


READABLE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "decimal commas in PixelSpacing": (changed(lambda ds, _: with_commas(ds, "PixelSpacing")), "PixelSpacing"),
    "decimal commas everywhere": (
        changed(
            lambda ds, _: with_commas(
                ds, "PixelSpacing", "ImagePositionPatient", "ImageOrientationPatient", "RescaleSlope"
            )
        ),
        "ImagePositionPatient (0020,0032) has decimal commas",
    ),
    "no preamble": (without_preamble, ""),
    "no file meta, explicit": (lambda folder: without_preamble(folder, meta=False), "(0002,0010) is missing"),
    "no file meta, implicit": (
        lambda folder: without_preamble(folder, meta=False, implicit=True),
        "(0002,0010) is missing",
    ),
    "no file meta, big endian": (
        lambda folder: without_preamble(folder, meta=False, big=True),
        "in big-endian byte order",
    ),
    "no file meta but preamble": (without_meta_but_preamble, "(0002,0010) is missing"),
    "no SOPClassUID": (changed(_without_class), "SOPClassUID (0008,0016) is missing"),
    "no SOP class at all": (_without_any_class, "SOPClassUID (0008,0016) is missing"),
    "no Modality": (each(Modality=None), "Modality (0008,0060) is missing"),
    "copies of two slices": (_copied, "2 copies of slices"),
    "series sent twice": (_sent_twice, "8 copies of slices"),
    "a sheet without geometry": (beside(sheet()), "1 image with the SeriesInstanceUID"),
    "a screen capture": (
        beside(sheet(SOPClassUID=SECONDARY_CAPTURE, ImageType=AXIAL_DERIVED, PhotometricInterpretation="RGB")),
        "1 image with the SeriesInstanceUID",
    ),
    "ultrasound with nonsense": (beside(ultrasound()), ""),
    "truncated ultrasound": (_damaged_ultrasound, "1 DICOM file that is not readable"),
    "Hounsfield Unit": (each(RescaleType="Hounsfield Unit"), ""),
    "H.U.": (each(RescaleType="H.U. "), ""),
    "no SeriesInstanceUID": (each(SeriesInstanceUID=None), "SeriesInstanceUID (0020,000E) is missing"),
    "two padding values": (changed(_two_paddings), ""),
    "table drift": (changed(table_drift(SERIES, 0.02)), ""),
    "rounded cosines": (changed(_rounded_cosines), ""),
    "rounded spacing": (changed(_rounded_spacing), ""),
    "no BitsStored": (each(BitsStored=None, HighBit=None), "BitsStored (0028,0101) is missing"),
    "deflated": (_deflated, ""),
}
"""Series that have one right reading: that of ``SERIES``. Writer, and a part of the warning (empty: no warning)."""


def two_views(first_other: int, spacing: str = "4.0", **more: object) -> Callable[[Path], Path]:
    """Return a writer of the series in which the slices from one on have another PixelSpacing."""

    def change(dataset: Dataset, place: int) -> None:
        if place >= first_other:
            dataset.PixelSpacing = [spacing, spacing]
            for keyword, value in more.items():
                setattr(dataset, keyword, value)

    return changed(change)


def other_matrix(folder: Path) -> Path:
    """Write the series with a continuation of another matrix: 8 and 5 slices."""
    SERIES.write(folder / "a")
    rest = replace(SERIES, hu=some_hu((20, 20, 5)), origin=(-36.0, -30.0, -360.0))
    rest.write(folder / "b")
    return folder


def localiser_inside(folder: Path) -> Path:
    """Write the series with a localiser of the same SeriesInstanceUID."""
    SERIES.write(folder)
    scout = replace(SERIES, hu=some_hu((30, 40, 1)), orientation=(0.0, 1.0, 0.0, 0.0, 0.0, -1.0)).datasets()[0]
    scout.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    save(scout, folder / "scout")
    return folder


def enhanced_in_two_views(folder: Path) -> Path:
    """Write an enhanced CT in which the last three frames have another PixelSpacing."""
    dataset = SERIES.enhanced()
    shared = dataset.SharedFunctionalGroupsSequence[0]
    for place, group in enumerate(dataset.PerFrameFunctionalGroupsSequence):
        measures = Dataset()
        measures.PixelSpacing = [4, 4] if place >= 5 else [3, 3]
        group.PixelMeasuresSequence = [measures]
    del shared.PixelMeasuresSequence
    save(dataset, folder / "a.dcm")
    return folder
