"""What every encoder network promises: a CT window in, a feature pyramid out."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

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


class FeatureNetwork(nn.Module):
    """A network without its classifier.

    Attributes:
        levels: the pyramid, finest level (stride 1) first.
        gradient_checkpointing: where gradients are wanted, keep only what passes between the network's parts and
            compute the rest again for them: less memory, more time, the same gradients.
        decoder_parts: names of the submodules that make the pyramid from what the others found; the paper's "decoder".
        bridge_parts: names of those between encoder and decoder that a self-supervised checkpoint has no weights for.
    """

    levels: tuple[FeatureLevel, ...]
    gradient_checkpointing: bool = False
    decoder_parts: ClassVar[tuple[str, ...]] = ()
    bridge_parts: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def forward(self, windows: Tensor) -> list[Tensor]:
        """Return the pyramid of CT windows.

        Args:
            windows: ``[n, 1, X, Y, Z]``, scaled to 0..1 by the grid.

        Returns:
            One tensor a level, ``[n, C_l, X / s_l, Y / s_l, Z / s_l]``.
        """

    def _part(self, part: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """Return ``part(*inputs)``, a piece of the forward pass that gradient checkpointing computes again."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return recomputed(part, *inputs, owner=self)
        return part(*inputs)
