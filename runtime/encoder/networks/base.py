"""Common interface of all encoder networks: from CT windows to feature pyramids."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fseft_edge.runtime.encoder.networks.recomputation import recomputed


@dataclass(frozen=True)
class FeatureLevel:
    """One level of a feature pyramid.

    Attributes:
        stride: voxels of the grid per voxel of this level, the same along every axis.
        channels: number of feature channels.
    """

    stride: int
    channels: int


@dataclass(frozen=True)
class WholeScan:
    """Properties of an encoder that computes a whole scan in one pass, without windows.

    The features of such an encoder depend on the surroundings of a voxel alone. The network computes grids of any size.
    A level with stride ``s`` has ``ceil(X / s)`` voxels along an axis of ``X`` voxels.

    Attributes:
        multiple: stride of the network's coarsest inner level. The features of a part of the grid equal those of the
            grid only if the part begins at a multiple of this number of voxels.
        context: a feature depends on no voxel of the grid that is further away than this number of voxels along an
            axis; a multiple of ``multiple``.
        outside: what the network assumes outside the grid: air, so that features do not tell the distance from the
            border of a scan.
    """

    multiple: int
    context: int
    outside: Literal["air"] = "air"


class FeatureNetwork(nn.Module):
    """A network without its classifier.

    Attributes:
        levels: levels of the feature pyramid, finest level (stride 1) first.
        gradient_checkpointing: whether to store only the tensors between the network's parts, and to compute the other
            tensors again for the gradients. This needs less memory and more time, and gives the same gradients.
        decoder_parts: names of the submodules of the decoder.
        bridge_parts: names of the submodules between encoder and decoder that self-supervised checkpoints do not
            contain.
    """

    levels: tuple[FeatureLevel, ...]
    gradient_checkpointing: bool = False
    decoder_parts: ClassVar[tuple[str, ...]] = ()
    bridge_parts: ClassVar[tuple[str, ...]] = ()

    @property
    def whole_scan(self) -> WholeScan | None:
        """How the network computes a whole scan in one pass; None if its features depend on the size of a window."""
        return None

    @abstractmethod
    def forward(self, windows: Tensor) -> list[Tensor]:
        """Return the feature pyramid of CT windows, finest level first.

        Args:
            windows: CT windows, ``[n, 1, X, Y, Z]``, scaled to 0..1 by the grid.

        Returns:
            One tensor per level, ``[n, C_l, X / s_l, Y / s_l, Z / s_l]``.
        """

    def _part(self, part: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """Return ``part(*inputs)``; gradient checkpointing computes this part of the forward pass again."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return recomputed(part, *inputs, owner=self)
        return part(*inputs)
