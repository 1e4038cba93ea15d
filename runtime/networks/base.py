"""What every encoder network promises: a CT window in, a feature pyramid out."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class FeatureLevel:
    """One level of a feature pyramid.

    Attributes:
        stride: voxels of the grid per voxel of this level, the same along every axis.
        channels: number of feature channels.
    """

    stride: int
    channels: int


class FeatureNetwork(nn.Module):
    """A network without its classifier.

    Attributes:
        levels: the pyramid, finest level (stride 1) first.
    """

    levels: tuple[FeatureLevel, ...]

    @abstractmethod
    def forward(self, windows: Tensor) -> list[Tensor]:
        """Return the pyramid of CT windows.

        Args:
            windows: ``[n, 1, X, Y, Z]``, scaled to 0..1 by the grid.

        Returns:
            One tensor a level, ``[n, C_l, X / s_l, Y / s_l, Z / s_l]``.
        """
