"""The blend of overlapping windows' features over one window's depth, wherever memory allows it to lie.

``F = Σ w f / Σ w``, level by level, with the importance ``w`` of
:func:`fseft_edge.runtime.encoder.windows.gaussian_importance` average-pooled by the level's stride. The sums are the
largest thing that encoding holds. They lie on the session's device, in the machine's memory, or in an unnamed temporary
file that is mapped: of that, only what is being worked on is resident. Wherever they lie on a CPU, the same operations
meet the same numbers in the same order.
"""

from __future__ import annotations

import itertools
import math
import mmap
import os
import tempfile
from typing import TYPE_CHECKING, Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fseft_edge.runtime.encoder.windows import WindowLayout, gaussian_importance
from fseft_edge.runtime.errors import OutOfSpaceError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fseft_edge.runtime.encoder.networks.base import FeatureLevel

Place = Literal["device", "memory", "disk"]

PLACES: Final[tuple[Place, ...]] = ("device", "memory", "disk")
"""Where the sums may lie, fastest first."""

_CPU = torch.device("cpu")


class FileTensor:
    """A float32 tensor of zeros in an unnamed temporary file (``TMPDIR``), mapped; it disappears with the object.

    Attributes:
        tensor: the values, contiguous.

    Raises:
        OutOfSpaceError: there is no room for it.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        count = math.prod(shape)
        try:
            with tempfile.TemporaryFile() as file:
                # Blocks are claimed now: running out of them while writing to a mapping would end the process.
                os.posix_fallocate(file.fileno(), 0, 4 * count)
                self._mapping = mmap.mmap(file.fileno(), 4 * count)
        except OSError as error:
            raise OutOfSpaceError(
                f"There is no room in {tempfile.gettempdir()} for {4 * count >> 20} MiB of features.",
                remedy="Free some space, point TMPDIR elsewhere, or allow more --memory.",
            ) from error
        self.tensor = torch.frombuffer(self._mapping, dtype=torch.float32, count=count).reshape(*shape)

    def release(self) -> None:
        """Let go of the pages touched so far; what was written stays in the file, and is read again when next used."""
        self._mapping.madvise(mmap.MADV_DONTNEED)


class Blend:
    """The sums of all levels, beginning at the current row's origin.

    Args:
        levels: the pyramid, finest first.
        layout: where the windows lie.
        device: of the session.
        place: where the sums lie.
    """

    def __init__(
        self, levels: Sequence[FeatureLevel], layout: WindowLayout, device: torch.device, place: Place = "device"
    ) -> None:
        self._levels = [_LevelBlend(level, layout, device, place) for level in levels]

    def add(self, pyramid: Sequence[Tensor], corner: tuple[int, ...]) -> None:
        """Add one window's features, ``[C_l, x, y, depth]`` a level, at its in-plane origin in voxels of the grid."""
        for level, features in zip(self._levels, pyramid, strict=True):
            level.add(features, corner)

    def blended(self, row: int, z0: int, z1: int) -> list[Tensor]:
        """Return ``Σ w f / Σ w`` of final slices, float32 ``[C_l, x, y, (z1 - z0) / s]`` a level.

        Args:
            row: the current row's origin, in voxels of the grid.
            z0: first slice, counted from there.
            z1: one past the last.
        """
        return [level.blended(row, z0, z1) for level in self._levels]

    def advance(self, slices: int) -> None:
        """Move on to the row that begins ``slices`` voxels of the grid later."""
        for level in self._levels:
            level.advance(slices)

    def move(self, place: Place) -> None:
        """Move the sums to a place that is slower; a level that was moved before an error stays moved."""
        for level in self._levels:
            level.move(place)


class _LevelBlend:
    """``Σ w f`` of one level over one window depth."""

    def __init__(self, level: FeatureLevel, layout: WindowLayout, device: torch.device, place: Place) -> None:
        self._stride = level.stride
        self._size = [size // level.stride for size in layout.window]
        self._origins = [[origin // level.stride for origin in origins] for origins in layout.origins]
        self._importance = F.avg_pool3d(gaussian_importance(layout.window)[None], level.stride)[0]
        # Channels last, as the engines for CPUs return features.
        width, height = (size // level.stride for size in layout.padded_shape[:2])
        self._shape = (width, height, self._size[2], level.channels)
        self._file: FileTensor | None = None
        self._place: Place = place
        self._hold(self._room(place, device), device if place == "device" else _CPU)

    def add(self, features: Tensor, corner: tuple[int, ...]) -> None:
        """See :meth:`Blend.add`."""
        x, y = (origin // self._stride for origin in corner)
        under_window = self._sums[:, x : x + self._size[0], y : y + self._size[1]]
        under_window.addcmul_(features.to(self._sums.device), self._importance)
        self._release()

    @torch.no_grad()
    def blended(self, row: int, z0: int, z1: int) -> Tensor:
        """See :meth:`Blend.blended`."""
        row, z0, z1 = (z // self._stride for z in (row, z0, z1))
        sums, weight = self._sums[..., z0:z1], self._weight(row + z0, row + z1)
        features = torch.empty(sums.shape, device=sums.device)
        for x in range(sums.shape[1]):  # plane by plane, which the cache holds: from channels last to channels first
            torch.div(sums[:, x], weight[x], out=features[:, x])
            self._release()
        return features

    def advance(self, slices: int) -> None:
        """See :meth:`Blend.advance`."""
        for x in range(self._sums.shape[1]):
            shift_down(self._sums[:, x], slices // self._stride)
            self._release()

    def move(self, place: Place) -> None:
        """See :meth:`Blend.move`."""
        if place == self._place:
            return
        sums = self._sums.movedim(0, -1)
        there = self._room(place, _CPU)
        for x in range(len(there)):
            there[x] = sums[x]
            self._release()
        self._hold(there, _CPU)
        self._place = place

    def _room(self, place: Place, device: torch.device) -> Tensor:
        """Return zeros ``[x, y, depth, C]`` in a place."""
        if place != "disk":
            return torch.zeros(self._shape, device=device if place == "device" else _CPU)
        self._file = FileTensor(self._shape)
        return self._file.tensor

    def _hold(self, sums: Tensor, device: torch.device) -> None:
        self._sums = sums.movedim(-1, 0)
        self._importance = self._importance.to(device)

    def _release(self) -> None:
        if self._file is not None:
            self._file.release()

    def _weight(self, z0: int, z1: int) -> Tensor:
        """Return ``Σ w`` of the slices ``z0:z1`` of the level; held for a few slices only, since it is soon made."""
        weight = torch.zeros(*self._sums.shape[1:3], z1 - z0, device=self._sums.device)
        size_x, size_y, depth = self._size
        for x, y, z in itertools.product(*self._origins):
            start, stop = max(z, z0), min(z + depth, z1)
            if start < stop:
                importance = self._importance[..., start - z : stop - z]
                weight[x : x + size_x, y : y + size_y, start - z0 : stop - z0].add_(importance)
        return weight


@torch.no_grad()
def shift_down(buffer: Tensor, slices: int) -> None:
    """Drop the first ``slices`` of the last axis, move the rest to the front and fill up with 0, all in place.

    Pieces of ``slices`` move one after the other: source and target of one copy never overlap, nothing is allocated.
    """
    kept = buffer.shape[-1] - slices
    for start in range(0, kept, slices):
        stop = min(start + slices, kept)
        buffer[..., start:stop] = buffer[..., start + slices : stop + slices]
    buffer[..., kept:] = 0
