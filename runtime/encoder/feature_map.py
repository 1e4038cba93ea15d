"""Feature maps: a feature pyramid on disk, written once as a stream of sections and then read in boxes of any position.

A feature map is a folder with ``index.json``, one file per level, and ``SHA256SUMS``. A level file is a sequence of
Blosc2 frames, one per section; each frame is an array ``[C, X, Y, n]``. Frames are compressed in memory and written
with ordinary file writes. Therefore a full disk immediately gives an ``OSError``, and the checksums are computed from
the data in memory, not from the data on the disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
from bisect import bisect_right
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from fseft_edge.runtime.encoder.feature_frames import StorageType, compressed, opened, stored
from fseft_edge.runtime.encoder.networks.base import FeatureLevel

if TYPE_CHECKING:
    from fseft_edge.runtime.encoder.streaming import FeatureSection

SCHEMA_VERSION: Final = 1

Range = tuple[int, int]
"""First voxel and one past the last along an axis."""

Ranges = tuple[Range, Range, Range]
"""A box: its ranges along x, y and z."""

_INDEX = "index.json"
_CHECKSUMS = "SHA256SUMS"


class DamagedFeatureMapError(Exception):
    """A stored feature map is incomplete, has changed, or has an unknown schema version; the store builds it again."""


class FeatureMapMeta(BaseModel):
    """Metadata of a feature map; contains nothing that identifies the scan or the patient.

    Attributes:
        grid_shape: shape of the encoded grid, in voxels.
        padded_shape: shape of the padded grid that the features cover, in voxels. A level with stride ``s`` has
            ``ceil(X / s)`` voxels along an axis of ``X`` voxels.
        levels: levels of the feature pyramid, finest first.
        dtype: stored number format. Features beyond the range of float16 are refused, not clamped.
        encoder_id: sha256 of everything in the encoder that determines the features.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    grid_shape: tuple[int, int, int]
    padded_shape: tuple[int, int, int]
    levels: tuple[FeatureLevel, ...]
    dtype: StorageType = "float16"
    encoder_id: str

    def level_shape(self, level: int) -> tuple[int, int, int]:
        """Return the shape of a level along x, y, z, in the level's own voxels."""
        x, y, z = (-(-size // self.levels[level].stride) for size in self.padded_shape)
        return x, y, z

    def check_box(self, level: int, x: Range, y: Range, z: Range) -> None:
        """Raise a ValueError if a box of a level is empty or not inside the level."""
        for (start, stop), size in zip((x, y, z), self.level_shape(level), strict=True):
            if not 0 <= start < stop <= size:
                raise ValueError(f"box {x}, {y}, {z} is not inside level {level} {self.level_shape(level)}")


class Features(Protocol):
    """What reads a feature pyramid box by box: a :class:`FeatureMap`, or a map whose windows are encoded on demand."""

    @property
    def meta(self) -> FeatureMapMeta:
        """Metadata of the map."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of the encoded grid, in voxels."""

    @property
    def padded_shape(self) -> tuple[int, int, int]:
        """Shape of the padded grid, which level 0 covers, in voxels."""

    @property
    def levels(self) -> tuple[FeatureLevel, ...]:
        """Levels of the feature pyramid, finest first."""

    def read(self, level: int, x: Range, y: Range, z: Range) -> torch.Tensor:
        """Return the features of a box of a level (:meth:`FeatureMap.read`)."""


class _Frame(BaseModel):
    """Position of the slices ``z0:z1`` of a level (in the level's own voxels) in the level's file, in bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    z0: int
    z1: int
    offset: int
    size: int


class _Index(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1]
    key: str
    meta: FeatureMapMeta
    frames: tuple[tuple[_Frame, ...], ...]


class FeatureMap:
    """A feature pyramid on disk. :meth:`open` creates the object; usually the store calls :meth:`open`.

    Files are memory-mapped, so that an open map stays readable when another process deletes its cache entry. Several
    threads may read; their reads run one after the other. With one decompression thread (the default), reading also
    works in a forked process.
    """

    def __init__(self, meta: FeatureMapMeta, levels: list[_LevelReader]) -> None:
        self.meta = meta
        self._levels = levels

    @classmethod
    def open(cls, folder: Path, key: str, *, threads: int = 1) -> FeatureMap:
        """Open a stored feature map after comparing every file with its checksum (about 1 s per 1.5 GB).

        Args:
            folder: folder that :func:`write_feature_map` wrote.
            key: expected key of the map.
            threads: number of decompression threads per read.

        Raises:
            DamagedFeatureMapError: a file is missing or has changed, or the map has another schema version or key.
        """
        try:
            checksums = dict(line.split("  ")[::-1] for line in (folder / _CHECKSUMS).read_text().splitlines())
            for name, expected in checksums.items():
                with (folder / name).open("rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                        raise DamagedFeatureMapError(f"{name} differs from its checksum")
            index = _Index.model_validate_json((folder / _INDEX).read_bytes())
            if index.key != key:
                raise DamagedFeatureMapError(f"{_INDEX} contains another key")
            names = [_level_file(level) for level in range(len(index.meta.levels))]
            if set(checksums) != {_INDEX, *names}:
                raise DamagedFeatureMapError(f"{_CHECKSUMS} does not list the files of {_INDEX}")
            levels = [
                _LevelReader(folder / name, frames, threads) for name, frames in zip(names, index.frames, strict=True)
            ]
        except ValidationError as error:
            raise DamagedFeatureMapError(f"{_INDEX} has an unknown schema") from error
        except (OSError, ValueError, RuntimeError) as error:  # Blosc2 raises RuntimeError if the bytes are not a frame
            raise DamagedFeatureMapError(str(error)) from error
        return cls(index.meta, levels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of the encoded grid, in voxels."""
        return self.meta.grid_shape

    @property
    def padded_shape(self) -> tuple[int, int, int]:
        """Shape of the padded grid, which level 0 covers, in voxels."""
        return self.meta.padded_shape

    @property
    def levels(self) -> tuple[FeatureLevel, ...]:
        """Levels of the feature pyramid, finest first."""
        return self.meta.levels

    def read(self, level: int, x: Range, y: Range, z: Range) -> torch.Tensor:
        """Return the features of a box, ``[C_l, x1 - x0, y1 - y0, z1 - z0]`` in the stored number format.

        Args:
            level: index into ``levels``.
            x: first voxel and one past the last along x, in the level's own voxels.
            y: first voxel and one past the last along y, in the level's own voxels.
            z: first voxel and one past the last along z, in the level's own voxels.

        Raises:
            ValueError: the box is empty or not inside the level.
        """
        self.meta.check_box(level, x, y, z)
        channels = self.levels[level].channels
        box = np.empty((channels, x[1] - x[0], y[1] - y[0], z[1] - z[0]), dtype=self.meta.dtype)
        self._levels[level].read_into(box, slice(*x), slice(*y), z)
        return torch.from_numpy(box)


class _LevelReader:
    """Memory-mapped file of one level, with the frames of this file."""

    def __init__(self, path: Path, frames: tuple[_Frame, ...], threads: int) -> None:
        with path.open("rb") as file:
            self._mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        content = memoryview(self._mapping)
        self._starts = [frame.z0 for frame in frames]
        self._stops = [frame.z1 for frame in frames]
        self._arrays = [opened(content[frame.offset : frame.offset + frame.size], threads) for frame in frames]

    def read_into(self, box: NDArray[np.floating[Any]], x: slice, y: slice, z: Range) -> None:
        """Fill ``box`` with the features of ``x``, ``y``, ``z``."""
        for number in range(bisect_right(self._stops, z[0]), len(self._arrays)):
            start, stop = max(z[0], self._starts[number]), min(z[1], self._stops[number])
            if start >= stop:
                break
            inside = slice(start - self._starts[number], stop - self._starts[number])
            box[..., start - z[0] : stop - z[0]] = self._arrays[number][:, x, y, inside]
        # Without this call, all pages that were ever read would count as memory of the process. The pages stay in the
        # operating system's file cache.
        self._mapping.madvise(mmap.MADV_DONTNEED)


def write_feature_map(
    folder: Path, key: str, meta: FeatureMapMeta, sections: Iterable[FeatureSection], *, threads: int = 1
) -> None:
    """Write a feature map into an existing, empty folder, section by section.

    Args:
        folder: folder to write into; the caller is responsible for making the folder appear atomically.
        key: key of the map.
        meta: metadata of the map.
        sections: contiguous sections in ascending order, from slice 0 to the end of the padded grid.
        threads: number of compression threads.

    Raises:
        EncoderBundleError: a feature is not finite, or is beyond the range of ``meta.dtype``.
        ValueError: the shapes of the sections do not match ``meta``.
        OSError: the disk is full or not writable.
    """
    with contextlib.ExitStack() as files:
        writers = [
            _LevelWriter(files.enter_context((folder / _level_file(number)).open("wb")), threads)
            for number in range(len(meta.levels))
        ]
        reached = 0
        for section in sections:
            if section.z0 != reached:
                raise ValueError(f"section {section.z0}:{section.z1} does not continue at slice {reached}")
            reached = section.z1
            if len(section.levels) != len(writers):
                raise ValueError(f"a section has {len(section.levels)} levels instead of {len(writers)}")
            for number, writer in enumerate(writers):
                expected = _section_shape(meta, number, section)
                if section.levels[0].shape != expected:
                    raise ValueError(f"level {number} has shape {tuple(section.levels[0].shape)} instead of {expected}")
                # pop() removes the level from the section, so that its memory is freed as soon as it is converted.
                writer.append(stored(section.levels.pop(0), meta.dtype))
    if reached != meta.padded_shape[2]:
        raise ValueError(f"sections end at slice {reached} of {meta.padded_shape[2]}")
    frames = tuple(tuple(writer.frames) for writer in writers)
    index = _Index(schema_version=SCHEMA_VERSION, key=key, meta=meta, frames=frames).model_dump_json(indent=1).encode()
    (folder / _INDEX).write_bytes(index)
    checksums = {_INDEX: hashlib.sha256(index).hexdigest()}
    checksums |= {_level_file(number): writer.checksum.hexdigest() for number, writer in enumerate(writers)}
    (folder / _CHECKSUMS).write_text("".join(f"{checksum}  {name}\n" for name, checksum in checksums.items()))


class _LevelWriter:
    """Writer that appends frames to one level's file and records their positions."""

    def __init__(self, file: BinaryIO, threads: int) -> None:
        self._file = file
        self._threads = threads
        self.frames: list[_Frame] = []
        self.checksum = hashlib.sha256()

    def append(self, features: NDArray[np.floating[Any]]) -> None:
        """Compress and write the features ``[C, X, Y, n]`` of the next ``n`` slices."""
        frame = compressed(features, self._threads)
        z0 = self.frames[-1].z1 if self.frames else 0
        self.frames.append(_Frame(z0=z0, z1=z0 + features.shape[3], offset=self._file.tell(), size=len(frame)))
        self._file.write(frame)
        self.checksum.update(frame)


def _level_file(level: int) -> str:
    return f"level-{level}.blosc2"


def _section_shape(meta: FeatureMapMeta, level: int, section: FeatureSection) -> tuple[int, int, int, int]:
    width, height, _ = meta.level_shape(level)
    pyramid_level = meta.levels[level]
    start, stop = (-(-slices // pyramid_level.stride) for slices in (section.z0, section.z1))
    return pyramid_level.channels, width, height, stop - start
