"""Tensors in unnamed temporary files, which take no memory while they are not used."""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from collections.abc import Sequence

import torch

from fseft_edge.runtime.errors import OutOfSpaceError


class FileTensor:
    """A float32 tensor of zeros in a memory-mapped, unnamed temporary file in ``TMPDIR``.

    The file disappears with the object.

    Attributes:
        tensor: values of the tensor, contiguous.

    Raises:
        OutOfSpaceError: there is not enough free disk space for the file.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        count = math.prod(shape)
        try:
            with tempfile.TemporaryFile() as file:
                # Disk blocks are allocated now, because a full disk during a write to a mapping would end the process.
                os.posix_fallocate(file.fileno(), 0, 4 * count)
                self._mapping = mmap.mmap(file.fileno(), 4 * count)
        except OSError as error:
            raise OutOfSpaceError(
                f"The temporary folder {tempfile.gettempdir()} has not enough free disk space for a file of "
                f"{4 * count >> 20} MiB.",
                remedy="Free disk space, set TMPDIR to a folder on another disk, or increase --memory.",
            ) from error
        self.tensor = torch.frombuffer(self._mapping, dtype=torch.float32, count=count).reshape(*shape)

    def release(self) -> None:
        """Release the memory pages of the mapping; the values stay in the file and are read again when needed."""
        self._mapping.madvise(mmap.MADV_DONTNEED)
