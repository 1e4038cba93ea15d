"""What RT Structure Sets and DICOM Segmentations have in common: their kind, and the CT to which they refer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, Literal

from pydicom.charset import python_encoding
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.filereader import read_dataset
from pydicom.uid import UID

from fseft_edge.runtime.errors import FseftEdgeError, UnreadableFileError
from fseft_edge.runtime.scans.dicom.elements import Header, open_data_set, read_elements, read_encoding
from fseft_edge.runtime.scans.dicom.files import DicomFile, DicomSource
from fseft_edge.runtime.scans.structures import Structure

STRUCTURE_SET = "1.2.840.10008.5.1.4.1.1.481.3"
SEGMENTATIONS = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")
"""Segmentation Storage and Label Map Segmentation Storage (PS3.4 B.5)."""

MOST_BYTES = 2 << 30
"""Largest accepted annotation file. The largest structure sets of a clinic have some hundred MiB."""

AnnotationKind = Literal["rtstruct", "seg"]

_SOP_CLASS, _MEDIA_SOP_CLASS = 0x00080016, 0x00020002
_COPY_AGAIN = "Copy the file again from its source, or export the annotation again."


@dataclass(frozen=True, eq=False, kw_only=True)
class AnnotationObject:
    """An RT Structure Set or a DICOM Segmentation.

    Attributes:
        kind: ``rtstruct`` or ``seg``.
        file: place of the file.
        sop_instance_uid: SOP Instance UID; empty if missing.
        series_uid: SeriesInstanceUID; empty if missing.
        study_uid: StudyInstanceUID; empty if missing.
        frames_of_reference: UIDs of all frames of reference that the object names, without repetitions.
        images: SOP Instance UIDs of all images to which the object refers.
        series: Series Instance UIDs of all series to which the object refers.
        label: StructureSetLabel or ContentLabel. It may contain a name: no message prints it unless the user asks.
        date: StructureSetDate or ContentDate, ``YYYYMMDD``; empty if missing.
        time: StructureSetTime or ContentTime, ``HHMMSS``, perhaps with a fraction; empty if missing.
        approval: ApprovalStatus: ``APPROVED``, ``UNAPPROVED``, ``REJECTED``, or empty if missing or another value.
        structures: all ROIs or segments, in the order of the file.
        warnings: what was left out, corrected or assumed in the object as a whole.
    """

    kind: AnnotationKind
    file: DicomFile = field(repr=False)
    sop_instance_uid: str
    series_uid: str
    study_uid: str
    frames_of_reference: tuple[str, ...]
    images: frozenset[str] = field(repr=False)
    series: frozenset[str] = field(repr=False)
    label: str = field(repr=False)
    date: str
    time: str
    approval: str
    structures: Sequence[Structure] = field(repr=False)
    warnings: tuple[str, ...]

    @property
    def path(self) -> Path:
        """The file, or the archive that contains it."""
        return self.file.path


def kind_of(header: Header) -> AnnotationKind | None:
    """Return the kind of an annotation by its SOP class; None for other objects.

    Args:
        header: header with the element SOPClassUID (0008,0016).
    """
    for elements, tag in ((header.elements, _SOP_CLASS), (header.encoding.meta, _MEDIA_SOP_CLASS)):
        value = elements.get(tag)
        if value is not None and value.data:
            sop_class = value.data.decode("ascii", "replace").strip(" \0")
            return "rtstruct" if sop_class == STRUCTURE_SET else "seg" if sop_class in SEGMENTATIONS else None
    return None


def read_kind(stream: BinaryIO) -> AnnotationKind | None:
    """Return the kind of the annotation in a DICOM file; None for other objects and damaged files.

    Only the header is walked through, and no value but the SOP class is kept.

    Args:
        stream: the file, open for reading at its start.
    """
    try:
        encoding = read_encoding(stream)
    except EOFError:
        return None
    return kind_of(read_elements(stream, encoding, frozenset({_SOP_CLASS})))


def damaged(path: Path, what: str) -> UnreadableFileError:
    """Return the error for an annotation that cannot be read.

    Args:
        path: path as given by the user.
        what: what is wrong, without values of the header.
    """
    return UnreadableFileError(f"An annotation in {path} cannot be read: {what}.", remedy=_COPY_AGAIN)


def read_data_set(file: DicomFile, source: DicomSource) -> Dataset:
    """Read an annotation as a pydicom data set whose elements are still bytes, with its transfer syntax.

    The structure of the file is checked before, because pydicom reads a truncated file without an error.

    Raises:
        UnreadableFileError: the file is damaged, truncated or larger than ``MOST_BYTES``.
        ArchiveError: the archive is damaged.
    """
    source.verify(file)
    with source.open(file) as stream:
        try:
            encoding = read_encoding(stream)
        except EOFError:
            raise damaged(source.path, "it ends within its file meta information") from None
        header = read_elements(stream, encoding, frozenset({_SOP_CLASS}))
        if header.damage:
            raise damaged(source.path, header.damage)
    with source.open(file) as stream:
        data = stream.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise damaged(source.path, f"it has more than {MOST_BYTES >> 30} GiB")
    with open_data_set(BytesIO(data), encoding) as unpacked:
        try:
            dataset = read_dataset(unpacked, encoding.implicit, encoding.little_endian)
            dataset.file_meta = FileMetaDataset()
            dataset.file_meta.TransferSyntaxUID = UID(encoding.syntax)
            return dataset
        except FseftEdgeError:
            raise
        except Exception:  # pydicom raises many kinds of exception, whose messages quote header values
            raise damaged(source.path, "its elements are damaged") from None


class Texts:
    """Reading of text elements in the character set of a file.

    Bytes beyond ASCII in a file without a known character set are read as UTF-8 if they are valid, else as Latin 1.

    Args:
        dataset: the whole data set.
    """

    def __init__(self, dataset: Dataset) -> None:
        raw = getattr(dataset.get_item("SpecificCharacterSet"), "value", None) or b""
        stated = raw.decode("latin-1") if isinstance(raw, bytes) else "\\".join([raw] if isinstance(raw, str) else raw)
        names = [name.strip(" \0") for name in stated.split("\\")]
        self.known = any(names) and all(name in python_encoding for name in names)

    def __call__(self, item: Dataset, keyword: str) -> str:
        """Return the text of an element; empty if it is missing or unreadable."""
        raw = getattr(item.get_item(keyword), "value", None)
        if not isinstance(raw, bytes):
            return str(raw or "").strip(" \0")
        if self.known and not raw.isascii():
            try:
                return str(item.get(keyword) or "").strip(" \0")
            except Exception:  # pydicom raises many kinds of exception for text that is not valid
                return raw.decode("latin-1").strip(" \0")
        try:
            return raw.decode("utf-8").strip(" \0")
        except UnicodeDecodeError:
            return raw.decode("latin-1").strip(" \0")


def items_of(dataset: Dataset, keyword: str) -> list[Dataset]:
    """Return the items of a sequence; none if it is missing or no sequence."""
    try:
        value = dataset.get(keyword)
    except Exception:  # pydicom raises many kinds of exception for an element that is not valid
        return []
    return list(value) if isinstance(value, Sequence) else []


def whole_number(dataset: Dataset, keyword: str) -> int | None:
    """Return the whole number of an element; None if it is missing or no whole number."""
    try:
        return int(dataset.get(keyword))
    except Exception:  # pydicom raises many kinds of exception for an element that is not valid
        return None


def uids(items: Iterable[Dataset], keyword: str, texts: Texts) -> list[str]:
    """Return the UIDs of items without repetitions, in their order."""
    return [uid for uid in dict.fromkeys(texts(item, keyword) for item in items) if uid]
