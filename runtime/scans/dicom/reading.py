"""A DICOM series as a Volume: its slices decoded one after the other into an unnamed file, which is then mapped."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from fseft_edge.runtime.errors import FseftEdgeError, UnreadableFileError
from fseft_edge.runtime.scans.dicom.files import DicomFile, DicomSource
from fseft_edge.runtime.scans.dicom.headers import SliceHeader
from fseft_edge.runtime.scans.dicom.pixels import Storage, decoded, storage_of, values_of
from fseft_edge.runtime.scans.dicom.series import DicomSeries
from fseft_edge.runtime.scans.hounsfield import check_hounsfield
from fseft_edge.runtime.scans.volume import Volume
from fseft_edge.runtime.system.unnamed_file import no_room_to_unpack, unnamed_file


def read_series(series: DicomSeries) -> Volume:
    """Read a CT series without loading it as a whole: the array is a read-only memory map.

    ``array[x, y, z]`` has a row's pixels along x, the rows along y and the slices along z, in the order of their
    place along the slices' normal; values as stored, with padding turned into air. It lies in an unnamed file in the
    system's temporary folder (``TMPDIR``), which disappears with the volume. The intensities must look like HU
    (:func:`fseft_edge.runtime.scans.hounsfield.check_hounsfield`).

    Raises:
        InputError: the series has a problem, which says why.
        UnreadableFileError: a slice is truncated or damaged, or has changed since the series was found.
        ArchiveError: the archive is damaged.
        NotACtError: intensities that are no HU.
        GeometryError: voxels of an implausible size.
        OutOfSpaceError: no room to unpack the series.
    """
    affine, storage = series.affine, storage_of(series.slices)
    in_file: dict[DicomFile, list[int]] = defaultdict(list)
    for place, slice_ in enumerate(series.slices):
        in_file[slice_.file].append(place)
    with unnamed_file(series.source) as file, DicomSource(series.source) as source:
        unpacked = _Unpacked(series, storage, file)
        for places in in_file.values():
            unpacked.add(source, sorted(places, key=lambda place: series.slices[place].frame))
        array = unpacked.mapped()
    volume = Volume(array, affine, storage.slope, storage.intercept, source=series.source)
    check_hounsfield(volume)
    return volume


@dataclass(frozen=True)
class _Unpacked:
    """A series' values in a file, slice by slice in the order of their place."""

    series: DicomSeries
    storage: Storage
    file: IO[bytes]

    def add(self, source: DicomSource, places: Sequence[int]) -> None:
        """Decode the slices of one DICOM file, given by their places in the order of the file's frames."""
        slices = [self.series.slices[place] for place in places]
        source.verify(slices[0].file)
        with (
            source.open(slices[0].file) as stream,
            closing(decoded(slices, stream, self.series.source)) as frames,
        ):
            for place, slice_ in zip(places, slices, strict=True):
                try:
                    encoded = _checked(next(frames), slice_)
                except FseftEdgeError:
                    raise
                except Exception:  # decoders raise many kinds on damage, and their messages may quote the header
                    raise UnreadableFileError(
                        f"Slice {place + 1} of {len(self.series.slices)} in {self.series.source} has truncated or "
                        "damaged pixels.",
                        remedy="Copy the series again from where it came.",
                    ) from None
                self._write(place, values_of(encoded, slice_.pixels, self.storage))

    def mapped(self) -> NDArray[Any]:
        """Map the whole, read-only, ``[x, y, z]``."""
        try:
            self.file.flush()
        except OSError as error:
            raise no_room_to_unpack(self.series.source) from error
        return np.asarray(np.memmap(self.file, self.storage.dtype, mode="r", shape=self.series.shape, order="F"))

    def _write(self, place: int, values: NDArray[Any]) -> None:
        try:
            self.file.seek(place * values.nbytes)
            self.file.write(values.tobytes())
        except OSError as error:
            raise no_room_to_unpack(self.series.source) from error


def _checked(encoded: NDArray[Any], slice_: SliceHeader) -> NDArray[Any]:
    expected = (slice_.rows, slice_.columns)
    if encoded.shape != expected or encoded.dtype.kind not in "iu" or encoded.dtype.itemsize > 2:
        raise ValueError("not the pixels that the header promises")
    return encoded
