"""Encode a grid window by window, and yield its blended features section by section.

The blend streams along z. Windows with the same z origin form a *row*. After a row is added, the slices below the
origin of the next row are final. Therefore the sums ``Σ w f`` only cover the depth of one window, for scans of any
length.

Two optimisations do not change the features: windows that contain only air are encoded only once, and if memory runs
out, encoding continues with smaller batches or with the sums in a slower place.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fseft_edge.runtime.encoder.blend import PLACES, Blend, Place, shift_down
from fseft_edge.runtime.encoder.window_encoder import (
    Window,
    WindowEncoder,
    first_batch,
    out_of_memory,
    row_of_windows,
)
from fseft_edge.runtime.encoder.windows import WindowLayout
from fseft_edge.runtime.system.memory import is_out_of_memory

if TYPE_CHECKING:
    from fseft_edge.runtime.encoder.backends.base import EncoderSession

_log = logging.getLogger(__name__)

SECTION_SLICES = 16
"""Number of slices of a section. It limits the memory of the consumer, in addition to the sums of the blend."""

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class FeatureSection:
    """Final features of some slices.

    Attributes:
        z0: first slice, in voxels of the padded grid; a multiple of the coarsest stride.
        z1: one past the last slice, in voxels of the padded grid; a multiple of the coarsest stride, or the end.
        levels: features of each level, finest first, float32 ``[C_l, X / s, Y / s, (z1 - z0) / s]`` over the padded
            grid, sizes rounded up, on the device of the session. They are valid until the next section is requested.
    """

    z0: int
    z1: int
    levels: list[Tensor]


def stream_features(
    read_section: Callable[[int, int], NDArray[np.float32]],
    layout: WindowLayout,
    session: EncoderSession,
    *,
    batch: int | None = None,
    place: Place = "device",
    section_slices: int = SECTION_SLICES,
) -> Iterator[FeatureSection]:
    """Encode a grid window by window, and yield its blended feature pyramid section by section.

    The sections are contiguous, in ascending order, and cover the padded grid from slice 0 to
    ``layout.padded_shape[2]``. Outside the grid, the input of the encoder is 0, the lower end of the HU window (air).
    Every slice of the grid is read once, in order.

    Memory: the sums of each level over the depth of one window (``4 Σ C_l X Y depth / s_l^3`` bytes), one section, and
    one batch of windows; see :mod:`fseft_edge.runtime.encoder.encoding_plan`. If memory runs out, fewer windows are
    encoded at a time. If that is not sufficient, the sums move from the GPU to main memory, and from there to a file. A
    warning at the end reports these changes.

    Args:
        read_section: function that returns the grid's slices ``z0:z1`` for ``(z0, z1)``, float32 ``[X, Y, z1 - z0]``
            scaled to 0..1.
        layout: layout for the session's window and coarsest stride.
        session: open session.
        batch: number of windows to encode at a time; None means the session's ``max_batch``.
        place: place of the sums.
        section_slices: number of slices of a section, rounded down to a multiple of the layout's lattice, but at least
            one lattice step.

    Raises:
        OutOfMemoryError: memory ran out, and the work cannot be reduced further.
        OutOfSpaceError: there is not enough free disk space for a temporary file.
    """
    grid_x, grid_y, grid_z = layout.grid_shape
    padded_x, padded_y, padded_z = layout.padded_shape
    depth = layout.window[2]
    image = torch.zeros(padded_x, padded_y, depth)
    encoder = _RowEncoder(layout, session, batch or session.max_batch, place)
    rows = layout.origins[2]
    read_up_to = 0
    for row, following in itertools.zip_longest(rows, rows[1:], fillvalue=padded_z):
        stop = min(row + depth, grid_z)
        for z0 in range(read_up_to, stop, SECTION_SLICES):
            z1 = min(z0 + SECTION_SLICES, stop)
            section = encoder.within_memory(read_section, z0, z1)
            image[:grid_x, :grid_y, z0 - row : z1 - row] = torch.from_numpy(section)
        read_up_to = stop
        encoder.add_row(image)
        final = following - row
        thickness = max(section_slices // layout.lattice, 1) * layout.lattice
        for z0 in range(0, final, thickness):
            z1 = min(z0 + thickness, final)
            yield FeatureSection(row + z0, row + z1, encoder.blended(row, z0, z1))
        if following < padded_z:
            shift_down(image, final)
            encoder.advance(final)
    encoder.report()


class _RowEncoder:
    """Encoder of rows of windows into a blend. It reduces its memory if memory runs out."""

    def __init__(self, layout: WindowLayout, session: EncoderSession, batch: int, place: Place) -> None:
        self._layout = layout
        self._session = session
        self._device = torch.device(session.device)
        self._encoder = WindowEncoder(layout, session, batch)
        self._places = list(PLACES[PLACES.index(place) :])
        if self._device.type == "cpu" and place == "device":
            self._places.remove("memory")  # on a CPU, "device" already means main memory
        self._windows = self._air_windows = 0
        self._reduced = False
        self._blend: Blend | None = None
        self._blend = self.within_memory(self._new_blend)

    @torch.no_grad()
    def add_row(self, image: Tensor) -> None:
        """Encode the row of windows that spans ``image`` ``[X, Y, depth]`` and add it to the blend."""
        windows = row_of_windows(image, self._layout)
        self._windows += len(windows)
        self._air_windows += sum(window.is_air for window in windows)
        while windows:
            encoded = self.within_memory(self._encode, windows)
            for window, pyramid in zip(windows, encoded, strict=False):
                self._sums.add(pyramid, window.corner)
                self._encoder.release()
            del windows[: len(encoded)]
            del encoded, pyramid  # freed before the next windows are encoded, because memory peaks there

    def blended(self, row: int, z0: int, z1: int) -> list[Tensor]:
        """Return the blended features of final slices (arguments as in :meth:`Blend.blended`)."""
        return self.within_memory(self._sums.blended, row, z0, z1)

    def advance(self, slices: int) -> None:
        """Go to the next row of windows (arguments as in :meth:`Blend.advance`)."""
        self._sums.advance(slices)

    def report(self) -> None:
        """Log the number of windows that contain only air and, as a warning, a reduction of memory."""
        _log.info("%d of %d windows contained only air", self._air_windows, self._windows)
        if self._reduced:
            _log.warning(
                "Memory ran out while encoding. Encoding continued with %d window%s at a time and with the sums %s.",
                self._encoder.batch,
                "s" if self._encoder.batch > 1 else "",
                {"device": "on the same device", "memory": "in main memory", "disk": "in a temporary file"}[
                    self._places[0]
                ],
            )

    @property
    def _sums(self) -> Blend:
        assert self._blend is not None  # noqa: S101 - set by the constructor
        return self._blend

    def _new_blend(self) -> Blend:
        return Blend(self._session.levels, self._layout, self._device, self._places[0])

    def _encode(self, windows: Sequence[Window]) -> list[list[Tensor]]:
        """Return the pyramids of the first windows."""
        return self._encoder.encode(first_batch(windows, self._encoder.batch))

    def within_memory(self, work: Callable[..., _Result], *arguments: object) -> _Result:
        """Return the result of a function. If memory runs out, reduce the memory and call the function again.

        Raises:
            OutOfMemoryError: memory ran out, and the work cannot be reduced further.
        """
        while True:
            try:
                return work(*arguments)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if not self._can_reduce(work):
                    raise out_of_memory() from error
            self._reduce(work)  # outside the handler, so that the memory of the failed attempt is already freed

    def _can_reduce(self, work: Callable[..., object]) -> bool:
        return len(self._places) > 1 or (self._encoder.batch > 1 and work == self._encode)

    def _reduce(self, work: Callable[..., object]) -> None:
        """Halve the batch if the work depends on the batch, else move the sums to the next slower place."""
        self._reduced = True
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        if self._encoder.batch > 1 and work == self._encode:
            self._encoder.batch //= 2
            return
        self._places.pop(0)
        if self._blend is not None:
            self.within_memory(self._move_sums)

    def _move_sums(self) -> None:
        self._sums.move(self._places[0])
