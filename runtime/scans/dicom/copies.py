"""Copies of slices: images at the same position with the same bytes of pixel data, of which one is used."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

from fseft_edge.runtime.scans.dicom.deflated import DeflateError
from fseft_edge.runtime.scans.dicom.elements import UNDEFINED_LENGTH
from fseft_edge.runtime.scans.dicom.files import DicomFile, DicomSource
from fseft_edge.runtime.scans.dicom.headers import SliceHeader
from fseft_edge.runtime.scans.dicom.pixels import open_pixels

_PIECE_BYTES = 1 << 20


def without_copies(slices: Sequence[SliceHeader], source: DicomSource) -> list[SliceHeader]:
    """Return the slices without copies of other slices, in the given order; the first of equal slices stays.

    Two slices are equal if they agree in position, orientation, pixel spacing, pixel format, rescale, encoding, and
    every byte of the pixel data of their files. Pixel data are only read if several slices have the same position.

    Args:
        slices: slices of one series.
        source: the opened file, folder or archive of the slices.

    Raises:
        UnreadableFileError: a file is not readable.
        ArchiveError: the archive is damaged.
    """
    places = Counter(slice_.position for slice_ in slices)
    if len(places) == len(slices):
        return list(slices)
    digests: dict[DicomFile, bytes] = {}
    kept, found = [], set()
    for slice_ in slices:
        if slice_.position is not None and places[slice_.position] > 1:
            if slice_.file not in digests:
                digests[slice_.file] = _digest(slice_, source)
            geometry = (slice_.position, slice_.orientation, slice_.spacing, slice_.rows, slice_.columns)
            key = (geometry, slice_.frame, slice_.pixels, slice_.syntax, digests[slice_.file])
            if key in found:
                continue
            found.add(key)
        kept.append(slice_)
    return kept


def _digest(slice_: SliceHeader, source: DicomSource) -> bytes:
    """Return a hash of the pixel data of a file; of the name of the file if the pixel data are damaged."""
    digest = hashlib.sha256()
    try:
        with source.open(slice_.file) as stream:
            data, left = open_pixels(stream, slice_.location), slice_.location.length
            while left and (piece := data.read(min(left, _PIECE_BYTES))):
                digest.update(piece)
                left -= len(piece) if slice_.location.length != UNDEFINED_LENGTH else 0
    except DeflateError:
        digest.update(repr(slice_.file).encode("utf-8", "surrogateescape"))
    return digest.digest()
