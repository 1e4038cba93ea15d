"""Med-Adapter: what Med-Tuning inserts at the end of an encoder's stages.

Med-Tuning, arXiv 2304.10880, and its authors' released code, which has slices first where Z is last here. What differs:

- One adapter stands at the end of each stage. The released code has one behind every block, and gives the stage before
  to a stage's last one alone.
- No batch normalisation behind the depthwise convolutions. With fixed statistics, as at inference, it is a scale and a
  shift a channel, which the convolution can learn itself: the same functions, without statistics of a batch of one.
  What it did for training, that no ReLU is shut, is done by how the convolutions start: as the identity, raised above
  the least value of the GELU before. Drawn at random, they shut many for good where the path has one channel.
- The frequency filter (:mod:`fseft_edge.runtime.encoder.networks.frequency_filter`) has a gain for each channel along
  all three axes and works on any size. The released one has a gain and an offset along the slices alone, shared by
  channels, for one size, and takes absolute values.
- No GELU behind the up-projection, which would let features fall by no more than 0.17. The projection starts at zero,
  so that the network first computes what it did.
- Resolution halves along all three axes from one stage to the next, so the path between stages has a stride along all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fseft_edge.runtime.encoder.networks.frequency_filter import FrequencyFilter

NAME = "med_adapter"
"""Of the network's submodule that holds the adapters, one a stage."""

_REDUCTION = 6
_OPEN = 0.2  # GELU is nowhere below -0.17


class MedAdapter(nn.Module):
    """Adds to a stage's features what a narrow path of local and global filters makes of them.

    Args:
        channels: of the stage's features.
        before: channels of the stage before, twice as fine; ``None`` for the first stage.
    """

    def __init__(self, channels: int, before: int | None) -> None:
        super().__init__()
        hidden = hidden_channels(channels)
        self.down = nn.Conv3d(channels, hidden, 1)
        self.near = _Depthwise(hidden, 3)
        self.wide = _Depthwise(hidden, 5)
        self.everywhere = FrequencyFilter(hidden)
        self.mix = nn.Conv3d(hidden, hidden, 1)
        self.between: nn.Module | None = None
        if before is not None:
            self.between = nn.Conv3d(hidden_channels(before), hidden, 3, stride=2, padding=1)
            self.join = nn.Conv3d(2 * hidden, hidden, 1)
        self.up = nn.Conv3d(hidden, channels, 1)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(cast(Tensor, self.up.bias))

    def forward(self, x: Tensor, before: Tensor | None, part: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        """Return a stage's features with what the adapter adds, and what the next stage's adapter is given.

        Args:
            x: ``[n, C, X, Y, Z]``.
            before: what the adapter of the stage before gave, ``[n, h', 2X, 2Y, 2Z]`` or one voxel less along an axis;
                ``None`` for the first stage.
            part: calls a piece of the forward pass that gradient checkpointing may compute again.

        Returns:
            ``[n, C, X, Y, Z]`` and the narrow features ``[n, h, X, Y, Z]``.
        """
        reduced = F.gelu(self.down(x))
        mixed = part(self._mixed, reduced) if before is None else part(self._mixed, reduced, before)
        raised: Tensor = self.up(reduced + mixed).to(x.dtype)  # training may project in fewer bits than features have
        raised += x
        return raised, mixed

    def _mixed(self, reduced: Tensor, before: Tensor | None = None) -> Tensor:
        """Return what the filters make of narrow features ``[n, h, X, Y, Z]``."""
        mixed: Tensor = self.mix(self.near(reduced) + self.wide(reduced) + self.everywhere(reduced))
        if self.between is None:
            return mixed
        joined: Tensor = self.join(torch.cat([mixed, self.between(before)], dim=1))
        return joined


class _Depthwise(nn.Module):
    """A depthwise convolution in the plane of slices, then one across slices, and a ReLU."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        half = kernel // 2
        self.plane = nn.Conv3d(channels, channels, (kernel, kernel, 1), padding=(half, half, 0), groups=channels)
        self.across = nn.Conv3d(channels, channels, (1, 1, kernel), padding=(0, 0, half), groups=channels)
        for convolution in (self.plane, self.across):
            nn.init.dirac_(convolution.weight, groups=channels)
            nn.init.zeros_(cast(Tensor, convolution.bias))
        nn.init.constant_(cast(Tensor, self.across.bias), _OPEN)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu_(self.across(self.plane(x)))


def hidden_channels(channels: int) -> int:
    """Return the width of the narrow path at a stage of some width."""
    return max(channels // _REDUCTION, 1)


def med_adapters(network: nn.Module) -> list[MedAdapter]:
    """Return a network's adapters, one a stage, or nothing where none were inserted."""
    return [cast(MedAdapter, adapter) for adapter in getattr(network, NAME, ())]
