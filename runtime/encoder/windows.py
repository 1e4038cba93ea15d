"""Positions of encoder windows on a grid, and the weights of their voxels in the blend of their features.

Windows are blended in feature space, ``F = Σ w f / Σ w`` with a Gaussian importance ``w``. The sum is linear, so for a
1x1x1 head this is equal to blending the logits. For heads with a larger receptive field, blending features avoids
artefacts at window borders.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fseft_edge.runtime.errors import EncoderBundleError, UsageError

SIGMA_SCALE = 0.125
LEAST_IMPORTANCE = 1e-3


def gaussian_importance(window: tuple[int, int, int], sigma_scale: float = SIGMA_SCALE) -> Tensor:
    """Return the weight of each voxel of a window in the blend, float32 ``[X, Y, Z]``, 1 at the centre.

    The weights are a Gaussian with ``sigma = sigma_scale * size`` per axis; values below 1e-3 become 1e-3. The steps of
    the computation are those of ``monai.data.utils.compute_importance_map`` (MONAI 1.6), so that all bits are equal.
    Because of the lower bound, the result is **not** a product of one-dimensional profiles.

    Args:
        window: size of the window, in voxels per axis.
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
    """Positions of the windows on a grid. :meth:`plan` creates a layout.

    Attributes:
        grid_shape: shape of the grid, in voxels.
        window: size of a window, in voxels; a multiple of ``lattice`` on every axis.
        lattice: stride of the coarsest feature level. Every origin and size is a multiple of ``lattice``, so that every
            level blends exactly.
        interval: distance between neighbouring origins of each axis; the last two origins may be closer.
        padded_shape: ``grid_shape``, enlarged at the high end to at least one window and to a multiple of ``lattice``.
        origins: first voxels of the windows along each axis, ascending; every combination is a window. The last window
            of an axis ends at the end of the padded grid.
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

        The interval is never less than the lattice, so for overlaps close to 1 the actual overlap may be smaller. If
        ``window * (1 - overlap)`` is a multiple of the lattice, the origins are those of
        ``monai.inferers.sliding_window_inference`` on the padded grid.

        Args:
            grid_shape: shape of the grid, in voxels.
            window: size of a window, in voxels.
            lattice: stride of the coarsest feature level.
            overlap: overlap of neighbouring windows as a fraction of their size, from 0 to below 1.

        Raises:
            EncoderBundleError: the window is not a multiple of the lattice.
            UsageError: the overlap is outside ``[0, 1)``.
        """
        if not 0.0 <= overlap < 1.0:
            raise UsageError(
                f"The window overlap is {overlap}, but must be at least 0 and below 1.",
                remedy="Give an overlap of at least 0 and below 1.",
            )
        if any(size < lattice or size % lattice for size in window):
            raise EncoderBundleError(
                f"The encoder's window {window} is not a multiple of the encoder's coarsest stride {lattice}.",
                remedy=f"Export the encoder again with a window whose sides are multiples of {lattice}.",
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

    @property
    def windows(self) -> int:
        """Number of windows."""
        return math.prod(len(along) for along in self.origins)


class _AxisPlan(NamedTuple):
    interval: int
    padded: int
    origins: tuple[int, ...]


def _plan_axis(voxels: int, window: int, lattice: int, overlap: float) -> _AxisPlan:
    padded = max(window, math.ceil(voxels / lattice) * lattice)
    interval = max(int(window * (1 - overlap)) // lattice, 1) * lattice
    return _AxisPlan(interval, padded, (*range(0, padded - window, interval), padded - window))
