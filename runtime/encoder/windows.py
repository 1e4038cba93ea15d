"""Where encoder windows lie on a grid, and how much each of their voxels counts in the blend of their features.

Windows are blended in feature space, ``F = Σ w f / Σ w`` with a Gaussian importance ``w``. The sum is linear, so for a
1x1x1 head this equals blending the logits; for everything with a larger receptive field it removes window borders.
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

    @property
    def windows(self) -> int:
        """How many windows there are."""
        return math.prod(len(along) for along in self.origins)


class _AxisPlan(NamedTuple):
    interval: int
    padded: int
    origins: tuple[int, ...]


def _plan_axis(voxels: int, window: int, lattice: int, overlap: float) -> _AxisPlan:
    padded = max(window, math.ceil(voxels / lattice) * lattice)
    interval = max(int(window * (1 - overlap)) // lattice, 1) * lattice
    return _AxisPlan(interval, padded, (*range(0, padded - window, interval), padded - window))
