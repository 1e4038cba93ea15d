"""Med-Adapter: inserts of Med-Tuning at the end of an encoder's stages.

Med-Tuning, arXiv 2304.10880, and the authors' released code. In the released code, slices are the first axis; here they
are the last axis, Z. Other differences from the released code:

- There is one adapter at the end of each stage. The released code has one adapter after every block, and only the last
  adapter of a stage uses the features of the stage before.
- There is no batch normalisation after the depthwise convolutions. With fixed statistics, as at inference, batch
  normalisation is a scale and a shift per channel, and the convolution can learn both. In training, batch normalisation
  also prevents ReLUs that are always 0. Here, the initial values do this: convolutions start as the identity, and a
  bias lifts the least value of the preceding GELU above 0. With random initial values, many ReLUs stay 0 forever if the
  narrow path has only one channel.
- The frequency filter (:mod:`fseft_edge.runtime.encoder.networks.frequency_filter`) has a gain for each channel along
  all three axes, and works for any size. The released filter has a gain and an offset along the slices only, shared by
  all channels, for one size, and takes absolute values.
- There is no GELU after the up-projection, because with a GELU features could not decrease by more than 0.17. The
  up-projection starts at zero, so that the untrained adapter does not change the features.
- The resolution halves along all three axes from one stage to the next, so the path between stages has stride 2 along
  all axes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fseft_edge.runtime.encoder.networks.frequency_filter import FrequencyFilter

NAME = "med_adapter"
"""Name of the network's submodule with the adapters, one per stage."""

_REDUCTION = 6
_INITIAL_BIAS = 0.2  # GELU is never below -0.17


class MedAdapter(nn.Module):
    """Adapter that adds the output of a narrow path of local and global filters to a stage's features.

    Args:
        channels: number of channels of the stage's features.
        before: number of channels of the stage before, which has twice the resolution; ``None`` for the first stage.
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
        """Return the adapted features of a stage, and the narrow features for the next stage's adapter.

        Args:
            x: features of the stage, ``[n, C, X, Y, Z]``.
            before: narrow features from the adapter of the stage before, ``[n, h', 2X, 2Y, 2Z]`` or one voxel less
                along an axis; ``None`` for the first stage.
            part: function that calls a part of the forward pass; gradient checkpointing may compute this part again.

        Returns:
            Adapted features ``[n, C, X, Y, Z]`` and narrow features ``[n, h, X, Y, Z]``.
        """
        reduced = F.gelu(self.down(x))
        mixed = part(self._mixed, reduced) if before is None else part(self._mixed, reduced, before)
        raised: Tensor = self.up(reduced + mixed).to(x.dtype)  # in training, autocast may project in lower precision
        raised += x
        return raised, mixed

    def _mixed(self, reduced: Tensor, before: Tensor | None = None) -> Tensor:
        """Return the filtered narrow features ``[n, h, X, Y, Z]``."""
        mixed: Tensor = self.mix(self.near(reduced) + self.wide(reduced) + self.everywhere(reduced))
        if self.between is None:
            return mixed
        joined: Tensor = self.join(torch.cat([mixed, self.between(before)], dim=1))
        return joined


class _Depthwise(nn.Module):
    """A depthwise convolution in the plane of slices, a depthwise convolution across slices, and a ReLU."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        half = kernel // 2
        self.plane = nn.Conv3d(channels, channels, (kernel, kernel, 1), padding=(half, half, 0), groups=channels)
        self.across = nn.Conv3d(channels, channels, (1, 1, kernel), padding=(0, 0, half), groups=channels)
        for convolution in (self.plane, self.across):
            nn.init.dirac_(convolution.weight, groups=channels)
            nn.init.zeros_(cast(Tensor, convolution.bias))
        nn.init.constant_(cast(Tensor, self.across.bias), _INITIAL_BIAS)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu_(self.across(self.plane(x)))


def hidden_channels(channels: int) -> int:
    """Return the number of channels of the narrow path for a stage with ``channels`` channels."""
    return max(channels // _REDUCTION, 1)


def med_adapters(network: nn.Module) -> list[MedAdapter]:
    """Return a network's adapters, one per stage, or an empty list if the network has no adapters."""
    return [cast(MedAdapter, adapter) for adapter in getattr(network, NAME, ())]
