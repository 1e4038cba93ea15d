"""A feature pyramid on disk: written once as a stream of sections, then read in arbitrary boxes.

A folder holds ``index.json``, one file per level and ``SHA256SUMS``. A level file is a sequence of Blosc2 frames, one
per section, each an array ``[C, X, Y, n]``. Frames are compressed in memory and written by ordinary file writes: a full
disk is an ``OSError`` at once, and the checksums are those of what was meant, not of what the disk made of it.

Codec and block shape are measured, on float16 ReLU features ``[16, 168, 160, 96]`` of an abdominal CT and one core: a
random 36x36x36 box takes 1.7 ms with LZ4 behind a byte shuffle and 4.2 ms with Zstandard; they compress 1.6 and 2.3
times. Blocks hold all channels of a small cube, since every reader wants all channels: one channel a block is two to
three times slower. The size of the chunks above them makes no difference.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import mmap
from bisect import bisect_right
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, Literal

import blosc2  # type: ignore[import-untyped]  # ships no types
import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from fseft_edge.runtime.encoder.networks.base import FeatureLevel
from fseft_edge.runtime.errors import EncoderBundleError

if TYPE_CHECKING:
    from fseft_edge.runtime.encoder.streaming import FeatureSection

SCHEMA_VERSION: Final = 1

StorageType = Literal["float16", "float32"]

_INDEX = "index.json"
_CHECKSUMS = "SHA256SUMS"
_CHUNK_SIDE = 32
# Blosc2 decompresses whole blocks. 64 KiB keeps one within a core's level-2 cache and a small box cheap.
_BLOCK_SIDES = (8, 4, 2)
_BLOCK_BYTES = 64 << 10


class DamagedFeatureMapError(Exception):
    """A stored feature map is incomplete, changed, or of an unknown schema; the store rebuilds it."""


class FeatureMapMeta(BaseModel):
    """What a feature map is, without a word about whose scan it came from.

    Attributes:
        grid_shape: voxels of the grid that was encoded.
        padded_shape: voxels of the padded grid that the features cover; a multiple of the coarsest stride.
        levels: the pyramid, finest level first.
        dtype: stored precision. Features beyond float16's range are refused, not clamped.
        encoder_id: sha256 of what determines the features.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    grid_shape: tuple[int, int, int]
    padded_shape: tuple[int, int, int]
    levels: tuple[FeatureLevel, ...]
    dtype: StorageType = "float16"
    encoder_id: str

    def level_shape(self, level: int) -> tuple[int, int, int]:
        """Voxels of a level along x, y, z."""
        x, y, z = (size // self.levels[level].stride for size in self.padded_shape)
        return x, y, z


class _Frame(BaseModel):
    """Where slices ``z0:z1`` of a level (in its own voxels) lie in the level's file."""

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
    """A feature pyramid on disk. Made by :meth:`open`, usually through the store.

    Files are memory-mapped: a map that is open stays readable when another process evicts its entry. Reading is safe
    from several threads, which take turns; with one decompression thread (the default) also after a fork.
    """

    def __init__(self, meta: FeatureMapMeta, levels: list[_LevelReader]) -> None:
        self.meta = meta
        self._levels = levels

    @classmethod
    def open(cls, folder: Path, key: str, *, threads: int = 1) -> FeatureMap:
        """Open a stored map after comparing every file with its checksum (about 1 s per 1.5 GB).

        Args:
            folder: what :func:`write_feature_map` wrote.
            key: the key it must have been stored under.
            threads: decompression threads per read.

        Raises:
            DamagedFeatureMapError: a file is missing or changed, or the map has another schema or key.
        """
        try:
            checksums = dict(line.split("  ")[::-1] for line in (folder / _CHECKSUMS).read_text().splitlines())
            for name, expected in checksums.items():
                with (folder / name).open("rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                        raise DamagedFeatureMapError(f"{name} differs from its checksum")
            index = _Index.model_validate_json((folder / _INDEX).read_bytes())
            if index.key != key:
                raise DamagedFeatureMapError("it belongs to another key")
            names = [_level_file(level) for level in range(len(index.meta.levels))]
            if set(checksums) != {_INDEX, *names}:
                raise DamagedFeatureMapError("its files are not those of its index")
            levels = [
                _LevelReader(folder / name, frames, threads) for name, frames in zip(names, index.frames, strict=True)
            ]
        except ValidationError as error:
            raise DamagedFeatureMapError("its schema is unknown") from error
        except (OSError, ValueError, RuntimeError) as error:  # Blosc2 raises RuntimeError for what is no frame
            raise DamagedFeatureMapError(str(error)) from error
        return cls(index.meta, levels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels of the grid that was encoded."""
        return self.meta.grid_shape

    @property
    def padded_shape(self) -> tuple[int, int, int]:
        """Voxels of the padded grid that level 0 covers."""
        return self.meta.padded_shape

    @property
    def levels(self) -> tuple[FeatureLevel, ...]:
        """The pyramid, finest level first."""
        return self.meta.levels

    def read(self, level: int, x: tuple[int, int], y: tuple[int, int], z: tuple[int, int]) -> torch.Tensor:
        """Return the features of a box, ``[C_l, x1 - x0, y1 - y0, z1 - z0]`` in the stored precision.

        Args:
            level: index into ``levels``.
            x: first voxel and one past the last, in the level's own voxels.
            y: as ``x``.
            z: as ``x``.

        Raises:
            ValueError: the box is empty or not inside the level.
        """
        for (start, stop), size in zip((x, y, z), self.meta.level_shape(level), strict=True):
            if not 0 <= start < stop <= size:
                raise ValueError(f"box {x}, {y}, {z} is not inside level {level} {self.meta.level_shape(level)}")
        channels = self.levels[level].channels
        box = np.empty((channels, x[1] - x[0], y[1] - y[0], z[1] - z[0]), dtype=self.meta.dtype)
        self._levels[level].read_into(box, slice(*x), slice(*y), z)
        return torch.from_numpy(box)


class _LevelReader:
    """One level's file, mapped, and the frames in it."""

    def __init__(self, path: Path, frames: tuple[_Frame, ...], threads: int) -> None:
        with path.open("rb") as file:
            self._mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        content = memoryview(self._mapping)
        self._starts = [frame.z0 for frame in frames]
        self._stops = [frame.z1 for frame in frames]
        self._arrays = [_opened(content[frame.offset : frame.offset + frame.size], threads) for frame in frames]

    def read_into(self, box: NDArray[np.floating[Any]], x: slice, y: slice, z: tuple[int, int]) -> None:
        """Fill ``box`` with the features of ``x``, ``y``, ``z``."""
        for number in range(bisect_right(self._stops, z[0]), len(self._arrays)):
            start, stop = max(z[0], self._starts[number]), min(z[1], self._stops[number])
            if start >= stop:
                break
            inside = slice(start - self._starts[number], stop - self._starts[number])
            box[..., start - z[0] : stop - z[0]] = self._arrays[number][:, x, y, inside]
        # The pages stay in the system's file cache; without this, reading a map through would count as resident memory.
        self._mapping.madvise(mmap.MADV_DONTNEED)


def write_feature_map(
    folder: Path, key: str, meta: FeatureMapMeta, sections: Iterable[FeatureSection], *, threads: int = 1
) -> None:
    """Write a feature map into an existing, empty folder while its sections arrive.

    Args:
        folder: where to write; the caller makes its appearance atomic.
        key: what the map is stored under.
        meta: what it is.
        sections: contiguous, ascending from slice 0 to the padded grid's end.
        threads: compression threads.

    Raises:
        EncoderBundleError: a feature is not finite, or beyond the range of ``meta.dtype``.
        ValueError: the sections are not those of ``meta``.
        OSError: the disk refuses.
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
                # Taken out of the section, so that each level's memory is free as soon as it is converted.
                writer.append(_stored(section.levels.pop(0), meta.dtype))
    if reached != meta.padded_shape[2]:
        raise ValueError(f"sections end at slice {reached} of {meta.padded_shape[2]}")
    frames = tuple(tuple(writer.frames) for writer in writers)
    index = _Index(schema_version=SCHEMA_VERSION, key=key, meta=meta, frames=frames).model_dump_json(indent=1).encode()
    (folder / _INDEX).write_bytes(index)
    checksums = {_INDEX: hashlib.sha256(index).hexdigest()}
    checksums |= {_level_file(number): writer.checksum.hexdigest() for number, writer in enumerate(writers)}
    (folder / _CHECKSUMS).write_text("".join(f"{checksum}  {name}\n" for name, checksum in checksums.items()))


class _LevelWriter:
    """Appends frames to one level's file and keeps count of them."""

    def __init__(self, file: BinaryIO, threads: int) -> None:
        self._file = file
        self._threads = threads
        self.frames: list[_Frame] = []
        self.checksum = hashlib.sha256()

    def append(self, features: NDArray[np.floating[Any]]) -> None:
        """Compress and write features ``[C, X, Y, n]`` of the next ``n`` slices."""
        channels, *size = features.shape
        bytes_per_voxel = channels * features.itemsize
        side = next((side for side in _BLOCK_SIDES if bytes_per_voxel * side**3 <= _BLOCK_BYTES), _BLOCK_SIDES[-1])
        frame: bytes = blosc2.asarray(
            features,
            chunks=(channels, *(min(_CHUNK_SIDE, voxels) for voxels in size)),
            blocks=(channels, *(min(side, voxels) for voxels in size)),
            cparams=blosc2.CParams(
                codec=blosc2.Codec.LZ4, clevel=5, filters=[blosc2.Filter.SHUFFLE], nthreads=self._threads
            ),
            dparams=blosc2.DParams(nthreads=self._threads),
        ).to_cframe()
        z0 = self.frames[-1].z1 if self.frames else 0
        self.frames.append(_Frame(z0=z0, z1=z0 + size[2], offset=self._file.tell(), size=len(frame)))
        self._file.write(frame)
        self.checksum.update(frame)


def _opened(frame: memoryview, threads: int) -> blosc2.NDArray:
    array = blosc2.ndarray_from_cframe(frame)
    array.schunk.dparams = blosc2.DParams(nthreads=threads)
    return array


def _level_file(level: int) -> str:
    return f"level-{level}.blosc2"


def _section_shape(meta: FeatureMapMeta, level: int, section: FeatureSection) -> tuple[int, int, int, int]:
    width, height, _ = meta.level_shape(level)
    pyramid_level = meta.levels[level]
    return pyramid_level.channels, width, height, (section.z1 - section.z0) // pyramid_level.stride


def _stored(features: torch.Tensor, dtype: StorageType) -> NDArray[np.floating[Any]]:
    """Return features in the stored precision, on the host.

    Raises:
        EncoderBundleError: a feature is not finite, or beyond the range of ``dtype``.
    """
    precision = {"float16": torch.float16, "float32": torch.float32}[dtype]
    lowest, highest = (bound.item() for bound in torch.aminmax(features))
    if not (math.isfinite(lowest) and math.isfinite(highest)):
        raise EncoderBundleError(
            "The encoder returned features that are not finite.",
            remedy="Export it again at float32 precision; if that does not help, its checkpoint is damaged.",
        )
    if max(-lowest, highest) > torch.finfo(precision).max:
        raise EncoderBundleError(
            f"The encoder's features reach {max(-lowest, highest):.3g}, beyond what {dtype} can hold.",
            remedy="Store its features as float32.",
        )
    return features.to(precision).cpu().contiguous().numpy()
