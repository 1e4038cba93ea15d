"""The 3D U-Net of Models Genesis without its classifier: the network of SuPreM's U-Net, under its parameter names.

Zhou et al., "Models Genesis", Medical Image Analysis 67 (2021) 101840; Li et al., "How Well Do Supervised 3D Models
Transfer to Medical Imaging Tasks?", ICLR 2024. Their batch normalisation takes its statistics from the input in
evaluation too (``training=True`` in every call), and they evaluate one window at a time. Over a single window that is
instance normalisation with scale and shift, which is what stands here: a window's features do not depend on what else
is in its batch, and running statistics, which the authors' network never reads, are not part of it.
"""

from __future__ import annotations

from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fseft_edge.runtime.encoder.networks.base import FeatureLevel, FeatureNetwork
from fseft_edge.runtime.encoder.networks.med_adapter import med_adapters

_LEVELS = ("64", "128", "256", "512")
"""How the release names its levels, finest first: by their channels."""


class GenesisUnetFeatures(FeatureNetwork):
    """The feature pyramid of that U-Net: its three decoder levels, strides 1, 2, 4, and the bottleneck, stride 8.

    Input windows have sides that are multiples of 8, not all of them 8: the bottleneck normalises over its voxels.

    Args:
        width: channels of the first convolution; level ``l`` has ``2 width 2**l`` channels. 32 in every published
            checkpoint.
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
        """Return the pyramid, finest level first (see :class:`FeatureNetwork`)."""
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
        """Return the channels at the end of each encoder stage, which is where inserts go."""
        return [level.channels for level in self.levels]

    def _block(self, name: str, *inputs: Tensor) -> Tensor:
        output: Tensor = self._part(self.get_submodule(name), *inputs)
        return output


class _Down(nn.Module):
    """Two convolutions, the second twice as wide as the first; pooling is the caller's, which keeps the result."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.ops = nn.Sequential(_NormedConvolution(inputs, outputs // 2), _NormedConvolution(outputs // 2, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.ops(x))


class _Up(nn.Module):
    """Upsampling that keeps the width, the skip beside it, two convolutions."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.up_conv = nn.ConvTranspose3d(2 * outputs, 2 * outputs, kernel_size=2, stride=2)
        self.ops = nn.Sequential(_NormedConvolution(3 * outputs, outputs), _NormedConvolution(outputs, outputs))

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        # One call for both convolutions would hold the three-fold wide tensor to its end.
        first, second = self.ops
        return cast(Tensor, second(first(torch.cat([self.up_conv(x), skip], dim=1))))


class _NormedConvolution(nn.Module):
    """``ReLU(N(C3(x)))``, with the release's names for its two parts."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(inputs, outputs, kernel_size=3, padding=1)
        self.bn1 = nn.InstanceNorm3d(outputs, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu_(self.bn1(self.conv1(x)))
