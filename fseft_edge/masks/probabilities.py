"""Probabilities of the organs on the lattice of the scan, as NIfTI files. Memory holds one piece of the scan."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from fseft_edge.adapters.network import Adapter
from fseft_edge.runtime.scans.nifti import write_ct
from fseft_edge.runtime.scans.source_pieces import SourcePiece
from fseft_edge.runtime.scans.volume import Volume
from fseft_edge.runtime.system.threads import side_by_side

STEPS: Final = 65535
"""A probability is stored as a whole number of steps of 1/65535 in uint16; ``scl_slope`` of the file is the step."""

MOST_FILES_AT_A_TIME: Final = 2
"""Number of files of organs that are compressed side by side; each needs up to two bytes for each voxel of the scan."""


class ProbabilityFiles:
    """Collects the probabilities of each organ piece by piece, and writes them.

    The pieces are kept in unnamed files, with two bytes for each voxel and organ. This is a context manager; leaving
    the context deletes these files.

    Args:
        folder: folder for the unnamed files, on the disk of the results.
        shape: voxels of the scan along its axes.
        adapters: adapters in the order of the classes.

    Raises:
        OSError: the disk has too little free space.
    """

    def __init__(self, folder: Path, shape: tuple[int, int, int], adapters: Sequence[Adapter]) -> None:
        self._shape = shape
        self._channels = organ_channels(adapters)
        self._files: list[IO[bytes]] = []
        with ExitStack() as stack:
            for _ in self._channels:
                file = stack.enter_context(tempfile.TemporaryFile(dir=folder))
                # Space is reserved now: a write to a mapped file on a full disk would end the process.
                os.posix_fallocate(file.fileno(), 0, 2 * int(np.prod(shape, dtype=np.int64)))
                self._files.append(file)
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def add(self, piece: SourcePiece) -> None:
        """Keep the probabilities of a piece of the scan. A piece that is added again replaces the earlier one."""
        where = [slice(None)] * 3
        where[piece.axis] = slice(piece.start, piece.stop)
        for file, channel in zip(self._files, self._channels, strict=True):
            mapped = self._mapped(file)  # unmapped after each piece, so that its pages do not stay in memory
            mapped[tuple(where)] = np.rint(piece.probabilities[channel] * np.float32(STEPS))

    def write(self, paths: Sequence[Path], scan: Volume) -> None:
        """Write the probabilities of each organ on the lattice of the scan.

        Args:
            paths: NIfTI file of each organ, in the order of the adapters and of their organs.
            scan: the scan.

        Raises:
            OutOfSpaceError: the disk is full, or the folder is not writable.
        """
        step = float(np.float32(1 / STEPS))

        def write(named: tuple[Path, IO[bytes]]) -> None:
            path, file = named
            write_ct(path, replace(scan, array=self._mapped(file), slope=step, intercept=0.0, source=None, warnings=()))

        side_by_side(write, zip(paths, self._files, strict=True), MOST_FILES_AT_A_TIME)

    def _mapped(self, file: IO[bytes]) -> NDArray[Any]:
        return np.memmap(file, np.uint16, "r+", shape=self._shape, order="F")


def organ_channels(adapters: Sequence[Adapter]) -> tuple[int, ...]:
    """Return the index of the class of each organ among the classes of all adapters, without their backgrounds."""
    channels: list[int] = []
    first = 0
    for adapter in adapters:
        channels += range(first + adapter.backgrounds, first + adapter.classes)
        first += adapter.classes
    return tuple(channels)


def file_stems(organs: Sequence[str]) -> Mapping[str, str]:
    """Return a file name without suffix for each organ name.

    Names from adapters can contain any character; a file name contains only letters, digits, ``_`` and ``-``. Names
    that would be equal on a disk that ignores case get a number.
    """
    stems: dict[str, str] = {}
    taken: set[str] = set()
    for organ in organs:
        plain = "".join(
            letter if letter.isascii() and (letter.isalnum() or letter in "_-") else "_" for letter in organ
        )
        stem, number = plain or "_", 1
        while stem.casefold() in taken:
            number += 1
            stem = f"{plain}_{number}"
        taken.add(stem.casefold())
        stems[organ] = stem
    return stems
