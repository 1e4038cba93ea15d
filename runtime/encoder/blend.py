"""Blend the features of overlapping windows over the depth of one window.

For each level, ``F = Σ w f / Σ w``, where ``w`` is the importance of
:func:`fseft_edge.runtime.encoder.windows.gaussian_importance`, average-pooled by the level's stride. The sums are the
largest data of encoding. They are stored on the session's device, in main memory, or in a memory-mapped unnamed
temporary file. For the file, only the part that is currently used is in memory. In main memory and in a file, the same
operations are applied to the same numbers in the same order.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fseft_edge.runtime.encoder.file_tensor import FileTensor
from fseft_edge.runtime.encoder.windows import WindowLayout, gaussian_importance

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fseft_edge.runtime.encoder.networks.base import FeatureLevel

Place = Literal["device", "memory", "disk"]

PLACES: Final[tuple[Place, ...]] = ("device", "memory", "disk")
"""Places for the sums, fastest first: the session's device, main memory, or a temporary file."""

_CPU = torch.device("cpu")


class Blend:
    """Sums of all levels; their first slice is the origin of the current row of windows.

    Args:
        levels: levels of the feature pyramid, finest first.
        layout: positions of the windows.
        device: device of the session.
        place: place of the sums.
    """

    def __init__(
        self, levels: Sequence[FeatureLevel], layout: WindowLayout, device: torch.device, place: Place = "device"
    ) -> None:
        self._levels = [_LevelBlend(level, layout, device, place) for level in levels]

    def add(self, pyramid: Sequence[Tensor], corner: tuple[int, ...]) -> None:
        """Add the features of one window.

        Args:
            pyramid: features of the window, ``[C_l, x, y, depth]`` for each level.
            corner: in-plane origin of the window, in voxels of the grid.
        """
        for level, features in zip(self._levels, pyramid, strict=True):
            level.add(features, corner)

    def blended(self, row: int, z0: int, z1: int) -> list[Tensor]:
        """Return ``Σ w f / Σ w`` of final slices, float32 ``[C_l, x, y, (z1 - z0) / s]`` for each level.

        Args:
            row: origin of the current row of windows, in voxels of the grid.
            z0: first slice, counted from the origin of the row.
            z1: one past the last slice, counted from the origin of the row.
        """
        return [level.blended(row, z0, z1) for level in self._levels]

    def advance(self, slices: int) -> None:
        """Go to the next row of windows, whose origin is ``slices`` voxels of the grid further along z."""
        for level in self._levels:
            level.advance(slices)

    def move(self, place: Place) -> None:
        """Move the sums to a slower place. If an error occurs, the levels that are already moved stay moved."""
        for level in self._levels:
            level.move(place)


class _LevelBlend:
    """Sums ``Σ w f`` of one level over the depth of one window."""

    def __init__(self, level: FeatureLevel, layout: WindowLayout, device: torch.device, place: Place) -> None:
        self._stride = level.stride
        self._size = [size // level.stride for size in layout.window]
        self._origins = [[origin // level.stride for origin in origins] for origins in layout.origins]
        self._importance = _importance(level, layout)
        # Channels last, because the engines for CPUs return features in this order.
        width, height = (size // level.stride for size in layout.padded_shape[:2])
        self._shape = (width, height, self._size[2], level.channels)
        self._file: FileTensor | None = None
        self._place: Place = place
        self._set_sums(self._zeros(place, device), device if place == "device" else _CPU)

    def add(self, features: Tensor, corner: tuple[int, ...]) -> None:
        """Add the features of one window (arguments as in :meth:`Blend.add`)."""
        x, y = (origin // self._stride for origin in corner)
        under_window = self._sums[:, x : x + self._size[0], y : y + self._size[1]]
        under_window.addcmul_(features.to(self._sums.device), self._importance)
        self._release()

    @torch.no_grad()
    def blended(self, row: int, z0: int, z1: int) -> Tensor:
        """Return the blended features of final slices (arguments as in :meth:`Blend.blended`)."""
        row, z0, z1 = (z // self._stride for z in (row, z0, z1))
        sums, weight = self._sums[..., z0:z1], self._weight(row + z0, row + z1)
        features = torch.empty(sums.shape, device=sums.device)
        for x in range(sums.shape[1]):  # plane by plane, so that reordering the channels works within the CPU cache
            torch.div(sums[:, x], weight[x], out=features[:, x])
            self._release()
        return features

    def advance(self, slices: int) -> None:
        """Go to the next row of windows (arguments as in :meth:`Blend.advance`)."""
        for x in range(self._sums.shape[1]):
            shift_down(self._sums[:, x], slices // self._stride)
            self._release()

    def move(self, place: Place) -> None:
        """Move the sums to a slower place (arguments as in :meth:`Blend.move`)."""
        if place == self._place:
            return
        sums = self._sums.movedim(0, -1)
        moved = self._zeros(place, _CPU)
        for x in range(len(moved)):
            moved[x] = sums[x]
            self._release()
        self._set_sums(moved, _CPU)
        self._place = place

    def _zeros(self, place: Place, device: torch.device) -> Tensor:
        """Return zeros ``[x, y, depth, C]`` that are stored in a place."""
        if place != "disk":
            return torch.zeros(self._shape, device=device if place == "device" else _CPU)
        self._file = FileTensor(self._shape)
        return self._file.tensor

    def _set_sums(self, sums: Tensor, device: torch.device) -> None:
        self._sums = sums.movedim(-1, 0)
        self._importance = self._importance.to(device)

    def _release(self) -> None:
        if self._file is not None:
            self._file.release()

    def _weight(self, z0: int, z1: int) -> Tensor:
        """Return ``Σ w`` of the slices ``z0:z1`` of the level.

        The weights are computed again for every few slices, because storing them costs more than computing them.
        """
        weight = torch.zeros(*self._sums.shape[1:3], z1 - z0, device=self._sums.device)
        size_x, size_y, depth = self._size
        for x, y, z in itertools.product(*self._origins):
            start, stop = max(z, z0), min(z + depth, z1)
            if start < stop:
                importance = self._importance[..., start - z : stop - z]
                weight[x : x + size_x, y : y + size_y, start - z0 : stop - z0].add_(importance)
        return weight


class CellBlend:
    """Blend of boxes over which the same windows lie everywhere, from the stored features of these windows.

    The operations on each number, and their order, are those of :class:`Blend` whose windows arrive in the order of
    encoding, so that all bits of the result are equal.

    Args:
        levels: levels of the feature pyramid, finest first.
        layout: positions of the windows.
        device: device of the session.
    """

    def __init__(self, levels: Sequence[FeatureLevel], layout: WindowLayout, device: torch.device) -> None:
        self._levels = [(level, _importance(level, layout).to(device)) for level in levels]
        self._device = device

    @torch.no_grad()
    def blended(
        self, box: Sequence[tuple[int, int]], windows: Sequence[tuple[tuple[int, int, int], Sequence[Tensor]]]
    ) -> list[Tensor]:
        """Return ``Σ w f / Σ w`` of a box, float32 ``[C_l, x, y, z]`` for each level, on the device of the session.

        Args:
            box: ranges along x, y, z in voxels of the grid, multiples of the layout's lattice.
            windows: origin and pyramid (``[C_l, X, Y, Z]`` for each level) of all windows over the box, in the order
                of encoding: sorted by the origins along z, then x, then y.
        """
        return [self._level(number, box, windows) for number in range(len(self._levels))]

    def _level(
        self,
        number: int,
        box: Sequence[tuple[int, int]],
        windows: Sequence[tuple[tuple[int, int, int], Sequence[Tensor]]],
    ) -> Tensor:
        level, importance = self._levels[number]
        shape = [(high - low) // level.stride for low, high in box]
        # Channels last, because stored features are in this order.
        sums = torch.zeros(*shape, level.channels, device=self._device).movedim(-1, 0)
        weights = {}
        for origin, pyramid in windows:
            x, y, z = (
                slice((low - start) // level.stride, (high - start) // level.stride)
                for (low, high), start in zip(box, origin, strict=True)
            )
            weights[origin] = importance[x, y, z]
            sums.addcmul_(pyramid[number][:, x, y, z].to(self._device), weights[origin])
        weight = torch.zeros(*shape, device=self._device)
        for origin in sorted(weights):
            weight.add_(weights[origin])
        features = torch.empty(sums.shape, device=self._device)
        for plane in range(shape[0]):  # plane by plane, so that reordering the channels works within the CPU cache
            torch.div(sums[:, plane], weight[plane], out=features[:, plane])
        return features


def _importance(level: FeatureLevel, layout: WindowLayout) -> Tensor:
    """Return the importance of the voxels of a window at a level, float32 ``[x, y, z]``."""
    return F.avg_pool3d(gaussian_importance(layout.window)[None], level.stride)[0]


@torch.no_grad()
def shift_down(buffer: Tensor, slices: int) -> None:
    """Delete the first ``slices`` of the last axis, move the rest to the front and fill the end with 0, all in place.

    The rest is moved in pieces of ``slices``, so that source and target of one copy never overlap and no memory is
    allocated.
    """
    kept = buffer.shape[-1] - slices
    for start in range(0, kept, slices):
        stop = min(start + slices, kept)
        buffer[..., start:stop] = buffer[..., start + slices : stop + slices]
    buffer[..., kept:] = 0
