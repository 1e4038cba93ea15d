"""Where encoder windows lie on a grid, how much each of their voxels counts, and the streaming blend of their features.

Windows are blended in feature space, ``F = Σ w f / Σ w`` with a Gaussian importance ``w``. The sum is linear, so for a
1x1x1 head this equals blending the logits; for everything with a larger receptive field it removes window borders.

The blend streams along Z. Windows of one Z origin form a *row*; once a row is added, the slices below the next row's
origin are final. Only one window depth of ``Σ w f`` is ever held, whatever the length of the scan.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fseft_edge.runtime.errors import EncoderBundleError, UsageError

if TYPE_CHECKING:
    from fseft_edge.runtime.networks.base import FeatureLevel
    from fseft_edge.runtime.session import EncoderSession

SIGMA_SCALE = 0.125
LEAST_IMPORTANCE = 1e-3

# Slices handed on at a time: bounds what a consumer holds next to the one window depth of the blend itself.
_SECTION_DEPTH = 16


def gaussian_importance(window: tuple[int, int, int], sigma_scale: float = SIGMA_SCALE) -> Tensor:
    """Return the weight of every voxel of a window in the blend, float32 ``[X, Y, Z]``, 1 at the centre.

    A Gaussian with ``sigma = sigma_scale * size`` per axis whose values are raised to at least 1e-3. Computed step by
    step as ``monai.data.utils.compute_importance_map`` (MONAI 1.6) does, so that the values are equal to the last bit.
    Because of the lower bound it is **not** a product of one-dimensional profiles.

    Args:
        window: voxels per axis.
        sigma_scale: standard deviation as a fraction of the window's size.
    """
    profiles = []
    for size in window:
        offset = torch.arange(start=-(size - 1) / 2.0, end=(size - 1) / 2.0 + 1, dtype=torch.float32)
        profiles.append(torch.exp(offset**2 / (-2 * (size * sigma_scale) ** 2)))
    x, y, z = profiles
    importance = (x[:, None] * y)[:, :, None] * z
    return importance.clamp_(min=max(importance.min().item(), LEAST_IMPORTANCE))


@dataclass(frozen=True)
class WindowLayout:
    """Where the windows of a grid lie. Made by :meth:`plan`.

    Attributes:
        grid_shape: voxels of the grid.
        window: voxels of a window; a multiple of ``lattice`` on every axis.
        lattice: stride of the coarsest feature level; every origin and size is a multiple of it, so every level blends
            exactly.
        interval: distance between neighbouring origins; the last two of an axis may lie closer.
        padded_shape: ``grid_shape`` enlarged at the high end to a window at least, and to a multiple of ``lattice``.
        origins: per axis, ascending first voxels of the windows; every combination is a window. The last window ends
            where the padded grid ends.
    """

    grid_shape: tuple[int, int, int]
    window: tuple[int, int, int]
    lattice: int
    interval: tuple[int, int, int]
    padded_shape: tuple[int, int, int]
    origins: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]

    @classmethod
    def plan(
        cls, grid_shape: tuple[int, int, int], window: tuple[int, int, int], lattice: int, overlap: float = 0.25
    ) -> WindowLayout:
        """Return the layout with the fewest windows that overlap by at least ``overlap`` of their size.

        The exception is an overlap of so nearly 1 that the interval would fall below the lattice: it is the lattice
        then. Where ``window * (1 - overlap)`` is a multiple of the lattice, the origins are those of
        ``monai.inferers.sliding_window_inference`` on the padded grid.

        Raises:
            EncoderBundleError: the window is not a multiple of the lattice.
            UsageError: the overlap is outside ``[0, 1)``.
        """
        if not 0.0 <= overlap < 1.0:
            raise UsageError(f"A window overlap of {overlap} is impossible.", remedy="Give a value from 0 to below 1.")
        if any(size < lattice or size % lattice for size in window):
            raise EncoderBundleError(
                f"The encoder's window {window} is not a multiple of its coarsest stride {lattice}.",
                remedy="Export the encoder with a window that is.",
            )
        x, y, z = (_plan_axis(*sizes, lattice, overlap) for sizes in zip(grid_shape, window, strict=True))
        return cls(
            grid_shape=grid_shape,
            window=window,
            lattice=lattice,
            interval=(x.interval, y.interval, z.interval),
            padded_shape=(x.padded, y.padded, z.padded),
            origins=(x.origins, y.origins, z.origins),
        )


class _AxisPlan(NamedTuple):
    interval: int
    padded: int
    origins: tuple[int, ...]


def _plan_axis(voxels: int, window: int, lattice: int, overlap: float) -> _AxisPlan:
    padded = max(window, math.ceil(voxels / lattice) * lattice)
    interval = max(int(window * (1 - overlap)) // lattice, 1) * lattice
    return _AxisPlan(interval, padded, (*range(0, padded - window, interval), padded - window))


@dataclass(frozen=True)
class FeatureSection:
    """Blended features of some slices, final.

    Attributes:
        z0: first slice, in voxels of the padded grid; a multiple of the layout's lattice.
        z1: one past the last slice; a multiple of the lattice.
        levels: per level, finest first, float32 ``[C_l, X / s, Y / s, (z1 - z0) / s]`` of the padded grid, contiguous,
            on the session's device, owned by the receiver.
    """

    z0: int
    z1: int
    levels: list[Tensor]


def stream_features(
    read_section: Callable[[int, int], NDArray[np.float32]], layout: WindowLayout, session: EncoderSession
) -> Iterator[FeatureSection]:
    """Encode a grid window by window and yield its blended feature pyramid slab by slab.

    The sections are contiguous, ascend from 0 and end at ``layout.padded_shape[2]``; in-plane they span the padded
    grid. Beyond the grid the encoder sees 0, which is the lower end of the HU window (air). Every grid slice is read
    once, in order. The importance of a level is that of the window, average-pooled by the level's stride.

    Memory: one window depth of each level (``4 Σ C_l X Y depth / s_l^3`` bytes), one section, one batch of windows.

    Args:
        read_section: ``(z0, z1)`` to the grid's slices ``z0:z1``, float32 ``[X, Y, z1 - z0]`` scaled to 0..1.
        layout: made for the session's window and coarsest stride.
        session: open; encodes ``session.max_batch`` windows at a time.
    """
    grid_x, grid_y, grid_z = layout.grid_shape
    padded_x, padded_y, padded_z = layout.padded_shape
    depth = layout.window[2]
    image = torch.zeros(padded_x, padded_y, depth)
    blends = [_LevelBlend(level, layout, torch.device(session.device)) for level in session.levels]
    rows = layout.origins[2]
    read_up_to = 0
    for row, following in itertools.zip_longest(rows, rows[1:], fillvalue=padded_z):
        stop = min(row + depth, grid_z)
        for z0 in range(read_up_to, stop, _SECTION_DEPTH):
            z1 = min(z0 + _SECTION_DEPTH, stop)
            image[:grid_x, :grid_y, z0 - row : z1 - row] = torch.from_numpy(read_section(z0, z1))
        read_up_to = stop
        _add_row(image, layout, session, blends)
        final = following - row
        thickness = max(_SECTION_DEPTH // layout.lattice, 1) * layout.lattice
        for z0 in range(0, final, thickness):
            z1 = min(z0 + thickness, final)
            yield FeatureSection(row + z0, row + z1, [blend.blended(row, z0, z1) for blend in blends])
        if following < padded_z:
            _shift_down(image, final)
            for blend in blends:
                blend.advance(final)


@torch.no_grad()
def _add_row(image: Tensor, layout: WindowLayout, session: EncoderSession, blends: list[_LevelBlend]) -> None:
    """Encode the row of windows that spans ``image`` ``[X, Y, depth]`` and add it to the blends."""
    size_x, size_y, _ = layout.window
    corners = list(itertools.product(*layout.origins[:2]))
    for first in range(0, len(corners), session.max_batch):
        batch = corners[first : first + session.max_batch]
        windows = torch.stack([image[None, x : x + size_x, y : y + size_y] for x, y in batch])
        for blend, features in zip(blends, session.encode(windows), strict=True):
            for number, corner in enumerate(batch):
                blend.add(features[number], corner)
        del features  # not needed while the next windows are encoded, which is when memory peaks


class _LevelBlend:
    """``Σ w f`` of one level over one window depth, starting at the current row's origin."""

    def __init__(self, level: FeatureLevel, layout: WindowLayout, device: torch.device) -> None:
        self._stride = level.stride
        self._size = [size // level.stride for size in layout.window]
        self._origins = [[origin // level.stride for origin in origins] for origins in layout.origins]
        self._importance = F.avg_pool3d(gaussian_importance(layout.window)[None], level.stride)[0].to(device)
        # Channels last, as the engines for CPUs return features.
        width, height = (size // level.stride for size in layout.padded_shape[:2])
        self._features = torch.zeros(width, height, self._size[2], level.channels, device=device).movedim(-1, 0)

    def add(self, features: Tensor, corner: tuple[int, ...]) -> None:
        """Add one window's features ``[C, x, y, depth]`` at its in-plane origin, in voxels of the grid."""
        x, y = (origin // self._stride for origin in corner)
        under_window = self._features[:, x : x + self._size[0], y : y + self._size[1]]
        under_window.addcmul_(features, self._importance)

    @torch.no_grad()
    def blended(self, row: int, z0: int, z1: int) -> Tensor:
        """Return ``Σ w f / Σ w`` of the final slices ``z0:z1`` (voxels of the grid, from the row's origin ``row``)."""
        row, z0, z1 = (z // self._stride for z in (row, z0, z1))
        sums, weight = self._features[..., z0:z1], self._weight(row + z0, row + z1)
        features = torch.empty(sums.shape, device=sums.device)
        for x in range(sums.shape[1]):  # plane by plane, which the cache holds: from channels last to channels first
            torch.div(sums[:, x], weight[x], out=features[:, x])
        return features

    def _weight(self, z0: int, z1: int) -> Tensor:
        """Return ``Σ w`` of the slices ``z0:z1`` of the level; held for a few slices only, since it is soon made."""
        weight = torch.zeros(*self._features.shape[1:3], z1 - z0, device=self._features.device)
        size_x, size_y, depth = self._size
        for x, y, z in itertools.product(*self._origins):
            start, stop = max(z, z0), min(z + depth, z1)
            if start < stop:
                importance = self._importance[..., start - z : stop - z]
                weight[x : x + size_x, y : y + size_y, start - z0 : stop - z0].add_(importance)
        return weight

    def advance(self, slices: int) -> None:
        """Move on to the row that begins ``slices`` voxels of the grid later."""
        _shift_down(self._features, slices // self._stride)


@torch.no_grad()
def _shift_down(buffer: Tensor, slices: int) -> None:
    """Drop the first ``slices`` of the last axis, move the rest to the front and fill up with 0, all in place.

    Pieces of ``slices`` move one after the other: source and target of one copy never overlap, nothing is allocated.
    """
    kept = buffer.shape[-1] - slices
    for start in range(0, kept, slices):
        stop = min(start + slices, kept)
        buffer[..., start:stop] = buffer[..., start + slices : stop + slices]
    buffer[..., kept:] = 0
