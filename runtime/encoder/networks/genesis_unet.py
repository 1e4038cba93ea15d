"""The 3D U-Net of Models Genesis without its classifier. SuPreM's U-Net has the same layers and parameter names.

Zhou et al., "Models Genesis", Medical Image Analysis 67 (2021) 101840; Li et al., "How Well Do Supervised 3D Models
Transfer to Medical Imaging Tasks?", ICLR 2024. In the authors' code, batch normalisation computes its statistics from
the input also in evaluation (``training=True`` in every call), and the authors evaluate one window at a time. For a
single window, this is equal to instance normalisation with scale and shift. This module uses instance normalisation, so
that the features of a window do not depend on other windows in the batch. Running statistics, which the authors'
network never uses, are not part of this network.
"""

from __future__ import annotations

from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fseft_edge.runtime.encoder.networks.base import FeatureLevel, FeatureNetwork
from fseft_edge.runtime.encoder.networks.med_adapter import med_adapters

_LEVELS = ("64", "128", "256", "512")
"""Names of the levels in the release, finest first: their numbers of channels."""


class GenesisUnetFeatures(FeatureNetwork):
    """U-Net that returns its feature pyramid: three decoder levels (strides 1, 2, 4) and the bottleneck (stride 8).

    All sides of an input window must be multiples of 8, and at least one side must be larger than 8, because the
    bottleneck normalises over its voxels.

    Args:
        width: number of channels of the first convolution; level ``l`` has ``2 width 2**l`` channels. All published
            checkpoints have 32.
    """

    decoder_parts: ClassVar = ("up_tr64", "up_tr128", "up_tr256")

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        channels = [2 * width * 2**level for level in range(len(_LEVELS))]
        self.levels = tuple(FeatureLevel(2**level, count) for level, count in enumerate(channels))
        inputs = 1
        for name, count in zip(_LEVELS, channels, strict=True):
            self.add_module(f"down_tr{name}", _Down(inputs, count))
            inputs = count
        for name, count in zip(_LEVELS[:-1], channels[:-1], strict=True):
            self.add_module(f"up_tr{name}", _Up(count))

    def forward(self, windows: Tensor) -> list[Tensor]:
        """Return the feature pyramid, finest level first (:meth:`FeatureNetwork.forward`)."""
        skips: list[Tensor] = []
        x = windows
        adapters, narrow = med_adapters(self), None
        for level, name in enumerate(_LEVELS):
            x = self._block(f"down_tr{name}", F.max_pool3d(x, 2) if level else x)
            if adapters:
                x, narrow = adapters[level](x, narrow, self._part)
            skips.append(x)
        pyramid = [skips.pop()]
        for name in reversed(_LEVELS[:-1]):
            x = self._block(f"up_tr{name}", x, skips.pop())
            pyramid.append(x)
        return pyramid[::-1]

    def stage_widths(self) -> list[int]:
        """Return the number of channels at the end of each encoder stage, where inserts are added."""
        return [level.channels for level in self.levels]

    def _block(self, name: str, *inputs: Tensor) -> Tensor:
        output: Tensor = self._part(self.get_submodule(name), *inputs)
        return output


class _Down(nn.Module):
    """Two convolutions, the second twice as wide as the first. The caller does the pooling and keeps the skip."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.ops = nn.Sequential(_NormedConvolution(inputs, outputs // 2), _NormedConvolution(outputs // 2, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.ops(x))


class _Up(nn.Module):
    """Upsampling with unchanged width, concatenation with the skip, and two convolutions."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.up_conv = nn.ConvTranspose3d(2 * outputs, 2 * outputs, kernel_size=2, stride=2)
        self.ops = nn.Sequential(_NormedConvolution(3 * outputs, outputs), _NormedConvolution(outputs, outputs))

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        # A single call of self.ops would keep the concatenated tensor in memory during the second convolution.
        first, second = self.ops
        return cast(Tensor, second(first(torch.cat([self.up_conv(x), skip], dim=1))))


class _NormedConvolution(nn.Module):
    """Convolution, normalisation and ReLU, with the release's parameter names."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(inputs, outputs, kernel_size=3, padding=1)
        self.bn1 = nn.InstanceNorm3d(outputs, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu_(self.bn1(self.conv1(x)))
