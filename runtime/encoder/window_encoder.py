"""Encode the windows of a row. Windows that contain only air are encoded once, which does not change the features."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
from torch import Tensor

from fseft_edge.runtime.encoder.file_tensor import FileTensor
from fseft_edge.runtime.encoder.windows import WindowLayout
from fseft_edge.runtime.errors import OutOfMemoryError
from fseft_edge.runtime.system.memory import is_out_of_memory

if TYPE_CHECKING:
    from fseft_edge.runtime.encoder.backends.base import EncoderSession

_log = logging.getLogger(__name__)

_Result = TypeVar("_Result")


class Window(NamedTuple):
    """A window of a row.

    Attributes:
        corner: in-plane origin of the window, in voxels of the grid.
        voxels: content of the window, ``[x, y, depth]``.
        is_air: whether all voxels are 0.
    """

    corner: tuple[int, int]
    voxels: Tensor
    is_air: bool


def row_of_windows(image: Tensor, layout: WindowLayout) -> list[Window]:
    """Return the windows of an image ``[X, Y, depth]``, in the order of blending."""
    size_x, size_y, _ = layout.window
    windows = []
    for x, y in itertools.product(*layout.origins[:2]):
        voxels = image[x : x + size_x, y : y + size_y]
        windows.append(Window((x, y), voxels, is_air=not bool(voxels.any())))
    return windows


def out_of_memory() -> OutOfMemoryError:
    """Return the error for memory that ran out although the work cannot be reduced further."""
    return OutOfMemoryError(
        "Memory ran out while encoding, although only the smallest part of the scan was encoded at a time.",
        remedy="Close other programs, use an encoder with a smaller window, or use a machine with more memory.",
    )


def first_batch(windows: Sequence[Window], batch: int) -> list[Window]:
    """Return the first windows of a row: at most one batch of windows to encode, and any windows of air."""
    stop, full = 0, 0
    while stop < len(windows) and (windows[stop].is_air or full < batch):
        full += not windows[stop].is_air
        stop += 1
    return list(windows[:stop])


class WindowEncoder:
    """Encoder of the windows of one scan.

    Args:
        layout: positions of the windows.
        session: open session.
        batch: number of windows to encode at a time.

    Attributes:
        batch: number of windows to encode at a time; may be reduced at any time.
    """

    def __init__(self, layout: WindowLayout, session: EncoderSession, batch: int) -> None:
        self._layout = layout
        self._session = session
        self.batch = batch
        self._air: list[FileTensor] = []

    def encode(self, windows: Sequence[Window]) -> list[list[Tensor]]:
        """Return the pyramids of windows, ``[C_l, x, y, depth]`` for each level; :func:`first_batch` chooses windows.

        Raises:
            OutOfSpaceError: there is not enough free disk space for a temporary file.
        """
        if any(window.is_air for window in windows):
            self._air_pyramid()  # encoded now, so that its memory and that of the batch are not needed together
        full = [window.voxels for window in windows if not window.is_air]
        features = self._session.encode(torch.stack(full)[:, None]) if full else []
        encoded = (list(pyramid) for pyramid in zip(*features, strict=True))
        return [self._air_pyramid() if window.is_air else next(encoded) for window in windows]

    def encode_within_memory(self, windows: Sequence[Window]) -> list[list[Tensor]] | None:
        """Return the pyramids of windows (:meth:`encode`); if memory runs out, halve the batch and return None.

        Raises:
            OutOfMemoryError: memory ran out although only one window was encoded at a time.
            OutOfSpaceError: there is not enough free disk space for a temporary file.
        """
        return self._attempt(lambda: self.encode(windows))

    def air_within_memory(self) -> list[Tensor]:
        """Return the pyramid of a window of air; if memory runs out, halve the batch and try again.

        Raises:
            OutOfMemoryError: memory ran out although only one window was encoded at a time.
            OutOfSpaceError: there is not enough free disk space for a temporary file.
        """
        while (pyramid := self._attempt(self._air_pyramid)) is None:
            pass
        return pyramid

    def _attempt(self, work: Callable[[], _Result]) -> _Result | None:
        try:
            return work()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if self.batch == 1:
                raise out_of_memory() from error
        self.batch //= 2  # outside the handler, so that the memory of the failed attempt is already freed
        _log.warning("Memory ran out while encoding. Encoding continues with fewer windows at a time: %d.", self.batch)
        return None

    @property
    def knows_air(self) -> bool:
        """Whether the features of a window of air are already computed."""
        return bool(self._air)

    def release(self) -> None:
        """Release the memory of the features of air; they are read from a file when they are needed again."""
        for level in self._air:
            level.release()

    def _air_pyramid(self) -> list[Tensor]:
        """Return the features of a window of zeros. They are encoded once and stored in a temporary file.

        The window is encoded in a batch of the same size as other windows, because features may depend on this size.
        """
        if not self._air:
            pyramid = self._session.encode(torch.zeros(self.batch, 1, *self._layout.window))
            for features in pyramid:
                kept = features[0].movedim(0, -1)
                file = FileTensor(kept.shape)
                file.tensor.copy_(kept)
                file.release()
                self._air.append(file)
        return [file.tensor.movedim(-1, 0) for file in self._air]
