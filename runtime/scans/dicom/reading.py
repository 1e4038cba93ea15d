"""Reading of a DICOM series as a Volume: the slices are decoded one by one into an unnamed file, then memory-mapped."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from fseft_edge.runtime.errors import FseftEdgeError, UnreadableFileError
from fseft_edge.runtime.scans.dicom.elements import element_name
from fseft_edge.runtime.scans.dicom.files import DicomFile, DicomSource
from fseft_edge.runtime.scans.dicom.headers import SliceHeader
from fseft_edge.runtime.scans.dicom.pixels import (
    ShortPixelsError,
    Storage,
    choose_storage,
    decode_slices,
    stored_values,
)
from fseft_edge.runtime.scans.dicom.series import DicomSeries
from fseft_edge.runtime.scans.hounsfield import check_hounsfield
from fseft_edge.runtime.scans.volume import Volume
from fseft_edge.runtime.system.unnamed_file import no_space_to_unpack, unnamed_file


def read_series(series: DicomSeries) -> Volume:
    """Read a CT series as a read-only memory map, without loading all voxels into memory.

    In ``array[x, y, z]``, x is the position within a row, y is the row, and z is the slice in the order along the slice
    normal. Values are as stored, with padding replaced by air. The array is in an unnamed file in the temporary folder
    of the system (``TMPDIR``). The operating system deletes this file together with the volume. The intensities must be
    plausible HU (:func:`fseft_edge.runtime.scans.hounsfield.check_hounsfield`).

    Raises:
        InputError: the series is not readable; this is ``series.problem``.
        UnreadableFileError: a slice is truncated or damaged, or was changed after the search for series.
        ArchiveError: the archive is damaged.
        NotACtError: the intensities are not in HU.
        GeometryError: the voxel spacing is implausible.
        OutOfSpaceError: the temporary folder has too little disk space for the unpacked series.
    """
    affine, storage = series.affine, choose_storage(series.slices)
    in_file: dict[DicomFile, list[int]] = defaultdict(list)
    for place, slice_ in enumerate(series.slices):
        in_file[slice_.file].append(place)
    with unnamed_file(series.source) as file, DicomSource(series.source) as source:
        unpacked = _UnpackedSeries(series, storage, file)
        for places in in_file.values():
            unpacked.add(source, sorted(places, key=lambda place: series.slices[place].frame))
        array = unpacked.mapped()
    volume = Volume(array, affine, storage.slope, storage.intercept, source=series.source, warnings=series.warnings)
    check_hounsfield(volume)
    return volume


@dataclass(frozen=True)
class _UnpackedSeries:
    """File with the stored values of a series, slice by slice in the order along the slice normal."""

    series: DicomSeries
    storage: Storage
    file: IO[bytes]

    def add(self, source: DicomSource, places: Sequence[int]) -> None:
        """Decode slices of one DICOM file.

        Args:
            source: the opened file, folder or archive.
            places: positions of these slices in the series, in the order of the frames in the file.
        """
        slices = [self.series.slices[place] for place in places]
        source.verify(slices[0].file)
        with (
            source.open(slices[0].file) as stream,
            closing(decode_slices(slices, stream, self.series.source)) as frames,
        ):
            for place, slice_ in zip(places, slices, strict=True):
                try:
                    encoded = _check_decoded(next(frames), slice_)
                except FseftEdgeError:
                    raise
                except ShortPixelsError as error:
                    raise self._damaged(place, str(error)) from None
                except Exception:  # decoders raise many kinds of exception, and their messages may quote the header
                    raise self._damaged(place, "is truncated or damaged") from None
                self._write(place, stored_values(encoded, slice_.pixels, self.storage))

    def mapped(self) -> NDArray[Any]:
        """Return a read-only memory map of the complete file, ``[x, y, z]``."""
        try:
            self.file.flush()
        except OSError as error:
            raise no_space_to_unpack(self.series.source) from error
        return np.asarray(np.memmap(self.file, self.storage.dtype, mode="r", shape=self.series.shape, order="F"))

    def _damaged(self, place: int, what: str) -> UnreadableFileError:
        return UnreadableFileError(
            f"Slice {place + 1} of {len(self.series.slices)} in {self.series.source} is not readable: its "
            f"{element_name('PixelData')} {what}.",
            remedy="Copy this slice again from its source, or export the series again from the PACS.",
        )

    def _write(self, place: int, values: NDArray[Any]) -> None:
        try:
            self.file.seek(place * values.nbytes)
            self.file.write(values.tobytes())
        except OSError as error:
            raise no_space_to_unpack(self.series.source) from error


def _check_decoded(encoded: NDArray[Any], slice_: SliceHeader) -> NDArray[Any]:
    expected = (slice_.rows, slice_.columns)
    if encoded.shape != expected or encoded.dtype.kind not in "iu" or encoded.dtype.itemsize > 2:
        raise ValueError("the decoded pixels do not match the header")
    return encoded
