"""Parts of a feature map: the cells of the map that are final, while other cells are not encoded yet.

A part is one file with some cells of all levels: Blosc2 frames, one after the other, then an index in JSON, the length
of the index (8 bytes, little-endian), and the sha256 of everything before it (32 bytes). A cell has several frames for
each level, one for each range of slices. Parts of one scan are in one folder and are numbered. A part never changes.
"""

from __future__ import annotations

import hashlib
import logging
import mmap
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from fseft_edge.runtime.encoder.feature_frames import compressed, opened, stored
from fseft_edge.runtime.encoder.feature_map import DamagedFeatureMapError, FeatureMapMeta, Ranges
from fseft_edge.runtime.errors import EnvironmentProblemError
from fseft_edge.runtime.system.atomic import atomic_path

_log = logging.getLogger(__name__)

_SCHEMA_VERSION: Final = 1
_FILES: Final = "[0-9]" * 6 + ".part"
_LENGTH_BYTES: Final = 8
_DIGEST_BYTES: Final = 32


class CellSection(NamedTuple):
    """Final features of some slices of a cell.

    Attributes:
        box: the slices, in voxels of level 0.
        levels: features of each level, finest first, float32 ``[C_l, x, y, z]``.
    """

    box: Ranges
    levels: list[Tensor]


class _Frame(BaseModel):
    """Position of a frame in the file, in bytes, and its box in the level's own voxels."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    level: int
    box: Ranges
    offset: int
    size: int


class _Index(BaseModel):
    """Content of a part: ``cells`` are the boxes of its cells, in voxels of level 0."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1]
    key: str
    meta: FeatureMapMeta
    cells: tuple[Ranges, ...]
    frames: tuple[_Frame, ...]


class FeatureParts:
    """The parts of one scan. Several threads may read; only the holder of the key's lock adds or deletes parts.

    Files are memory-mapped, so that open parts stay readable when another process deletes them.

    Args:
        folder: folder of the parts; created by the first part.
        key: key of the map.
        meta: metadata of the map.
        threads: number of threads for compression and decompression.
    """

    def __init__(self, folder: Path, key: str, meta: FeatureMapMeta, *, threads: int = 1) -> None:
        self._folder = folder
        self._key = key
        self._meta = meta
        self._threads = threads
        self._open: dict[str, _Part] = {}
        self._lock = threading.Lock()

    def refresh(self) -> None:
        """Open the parts that were added since the last call. The caller has the key's lock.

        Every part is compared with its checksum. A damaged part is deleted with a warning.
        """
        for path in sorted(self._folder.glob(_FILES)):
            if path.name in self._open:
                continue
            try:
                part = _Part(path, self._key, self._meta, self._threads)
            except DamagedFeatureMapError as error:
                _log.warning("The cached features %s are deleted because they are damaged: %s.", path, error)
                path.unlink(missing_ok=True)
                continue
            with self._lock:
                self._open[path.name] = part

    def cells(self) -> set[Ranges]:
        """Return the boxes of all cells in open parts, in voxels of level 0."""
        with self._lock:
            return {cell for part in self._open.values() for cell in part.cells}

    def read_into(self, box: NDArray[np.floating[Any]], level: int, where: Ranges) -> None:
        """Fill the features of a box that are in open parts.

        Args:
            box: array to fill, ``[C_l, x, y, z]`` in the stored number format.
            level: index of the level.
            where: position of the box, in the level's own voxels.
        """
        with self._lock:
            for part in self._open.values():
                part.read_into(box, level, where)

    def add(self, cells: Iterable[Iterable[CellSection]]) -> None:
        """Write a new part, and open it. The caller has the key's lock.

        Args:
            cells: sections of each cell, contiguous and in ascending order.

        Raises:
            EncoderBundleError: a feature is not finite, or is beyond the range of the stored number format.
            EnvironmentProblemError: the written file differs from the data in memory.
            OutOfSpaceError: the disk is full or not writable.
        """
        taken = {path.name for path in self._folder.glob(_FILES)} | set(self._open)
        path = self._folder / f"{1 + max((int(name[:6]) for name in taken), default=0):06d}.part"
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            writer = _PartWriter(file, self._meta, self._threads)
            for sections in cells:
                writer.append(sections)
            writer.finish(self._key)
        self.refresh()
        if path.name not in self._open:
            raise EnvironmentProblemError(
                f"The features that were written to {path} are different when they are read again.",
                remedy="Check the disk, or move the cache to another disk.",
            )


class _Part:
    """An open part.

    Attributes:
        cells: boxes of the cells, in voxels of level 0.

    Raises:
        DamagedFeatureMapError: the file has changed, or belongs to another map or schema version.
    """

    def __init__(self, path: Path, key: str, meta: FeatureMapMeta, threads: int) -> None:
        try:
            with path.open("rb") as file:
                self._mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            content = memoryview(self._mapping)
            body, digest = content[:-_DIGEST_BYTES], content[-_DIGEST_BYTES:]
            if hashlib.sha256(body).digest() != digest:
                raise DamagedFeatureMapError("the file differs from its checksum")
            end = len(body) - _LENGTH_BYTES
            index = _Index.model_validate_json(bytes(body[end - int.from_bytes(body[end:], "little") : end]))
            if index.key != key or index.meta != meta:
                raise DamagedFeatureMapError("the file belongs to another feature map")
            arrays = [opened(content[frame.offset : frame.offset + frame.size], threads) for frame in index.frames]
        except ValidationError as error:
            raise DamagedFeatureMapError("the file has an unknown schema") from error
        except (OSError, ValueError, RuntimeError) as error:  # Blosc2 raises RuntimeError if the bytes are not a frame
            raise DamagedFeatureMapError(str(error)) from error
        self.cells = index.cells
        self._levels = [
            [(frame.box, array) for frame, array in zip(index.frames, arrays, strict=True) if frame.level == level]
            for level in range(len(meta.levels))
        ]
        self._bounds = [np.array([box for box, _ in frames]).reshape(-1, 3, 2) for frames in self._levels]
        self._release()

    def read_into(self, box: NDArray[np.floating[Any]], level: int, where: Ranges) -> None:
        """Fill the features of a box (arguments as in :meth:`FeatureParts.read_into`)."""
        wanted = np.array(where)
        bounds = self._bounds[level]
        overlaps = (bounds[..., 0] < wanted[:, 1]).all(1) & (bounds[..., 1] > wanted[:, 0]).all(1)
        for number in np.flatnonzero(overlaps):
            frame, array = self._levels[level][number]
            common = [(max(a[0], b[0]), min(a[1], b[1])) for a, b in zip(frame, where, strict=True)]
            target, source = (
                tuple(slice(low - start, high - start) for (low, high), (start, _) in zip(common, origin, strict=True))
                for origin in (where, frame)
            )
            box[:, *target] = array[:, *source]
        if overlaps.any():
            self._release()

    def _release(self) -> None:
        # Without this call, all pages that were ever read would count as memory of the process. The pages stay in the
        # operating system's file cache.
        self._mapping.madvise(mmap.MADV_DONTNEED)


class _PartWriter:
    """Writer of one part."""

    def __init__(self, file: BinaryIO, meta: FeatureMapMeta, threads: int) -> None:
        self._file = file
        self._meta = meta
        self._threads = threads
        self._cells: list[Ranges] = []
        self._frames: list[_Frame] = []
        self._checksum = hashlib.sha256()

    def append(self, sections: Iterable[CellSection]) -> None:
        """Compress and write a cell."""
        boxes = []
        for section in sections:
            boxes.append(section.box)
            for number, level in enumerate(self._meta.levels):
                # pop() removes the level from the section, so that its memory is freed as soon as it is converted.
                frame = compressed(stored(section.levels.pop(0), self._meta.dtype), self._threads)
                x, y, z = ((low // level.stride, high // level.stride) for low, high in section.box)
                self._frames.append(_Frame(level=number, box=(x, y, z), offset=self._file.tell(), size=len(frame)))
                self._write(frame)
        x, y, (z0, _) = boxes[0]
        self._cells.append((x, y, (z0, boxes[-1][2][1])))

    def finish(self, key: str) -> None:
        """Write the index and the checksum."""
        index = _Index(
            schema_version=_SCHEMA_VERSION,
            key=key,
            meta=self._meta,
            cells=tuple(self._cells),
            frames=tuple(self._frames),
        )
        content = index.model_dump_json().encode()
        self._write(content)
        self._write(len(content).to_bytes(_LENGTH_BYTES, "little"))
        self._file.write(self._checksum.digest())

    def _write(self, content: bytes) -> None:
        self._file.write(content)
        self._checksum.update(content)
