"""Compact encoder for CPUs: a residual 3D U-Net with batch normalisation.

Batch statistics are fixed at inference. Therefore the features of a voxel only depend on its neighbourhood and not on
the rest of the window, and every normalisation can be folded into the preceding convolution.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from fseft_edge.runtime.encoder.networks.base import FeatureLevel, FeatureNetwork, WholeScan
from fseft_edge.runtime.encoder.networks.med_adapter import med_adapters


class ConvolutionNorm(nn.Module):
    """A convolution without bias, followed by batch normalisation; :meth:`fold` merges both into one convolution."""

    def __init__(self, inputs: int, outputs: int, *, kernel: int = 3, stride: int = 1) -> None:
        super().__init__()
        self.convolution = nn.Conv3d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        self.norm: nn.Module = nn.BatchNorm3d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised convolution of ``x`` ``[n, C, X, Y, Z]``."""
        normalised: Tensor = self.norm(self.convolution(x))
        return normalised

    def fold(self) -> None:
        """Fold the batch normalisation into the convolution, in place."""
        if isinstance(self.norm, nn.BatchNorm3d):
            self.convolution = fuse_conv_bn_eval(self.convolution, self.norm)
            self.norm = nn.Identity()


class AirRectifier(nn.Module):
    """A rectifier ``max(x + bias, floor)`` of tensors that are shifted so that they are 0 far outside a scan.

    Let ``P`` be what the convolutions before the rectifier give far outside, in air without an end. The shifted tensors
    are ``x = y - P`` before and ``ReLU(y) - ReLU(P)`` after the rectifier. ``P`` is periodic, because the upsampled
    features of a coarser voxel differ between its eight finer voxels.

    Attributes:
        bias: ``min(P, 0)``, one period ``[C, p, p, p]``.
        floor: ``-max(P, 0)``, one period ``[C, p, p, p]``.
    """

    bias: Tensor
    floor: Tensor

    def __init__(self, outside: Tensor) -> None:
        super().__init__()
        self.register_buffer("bias", outside.clamp(max=0).float())
        self.register_buffer("floor", -outside.clamp(min=0).float())

    def forward(self, x: Tensor) -> Tensor:
        """Return the rectified ``x`` ``[n, C, X, Y, Z]``."""
        return torch.maximum(x + repeated(self.bias, x), repeated(self.floor, x))

    def unshifted(self, x: Tensor) -> Tensor:
        """Return a rectified tensor without the shift."""
        return x - repeated(self.floor, x)


def repeated(period: Tensor, like: Tensor) -> Tensor:
    """Return a period ``[C, p, p, p]`` repeated to the size of ``like`` ``[n, C, X, Y, Z]``."""
    length = period.shape[-1]
    if length == 1:
        return period
    x, y, z = like.shape[2:]
    return period.repeat(1, *(-(-side // length) for side in (x, y, z)))[:, :x, :y, :z]


class ResidualBlock(nn.Module):
    """Residual block ``ReLU(shortcut(x) + N(C3(ReLU(N(C3(x))))))``.

    The shortcut is a 1x1x1 convolution if the width or the stride changes, else the identity.
    """

    def __init__(self, inputs: int, outputs: int, *, stride: int = 1) -> None:
        super().__init__()
        self.first = ConvolutionNorm(inputs, outputs, stride=stride)
        self.second = ConvolutionNorm(outputs, outputs)
        self.shortcut: nn.Module = (
            nn.Identity()
            if inputs == outputs and stride == 1
            else ConvolutionNorm(inputs, outputs, kernel=1, stride=stride)
        )
        self.inner_rectifier: nn.Module = nn.ReLU(inplace=True)
        self.rectifier: nn.Module = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's features ``[n, outputs, X / stride, Y / stride, Z / stride]``."""
        inner: Tensor = self.second(self.inner_rectifier(self.first(x)))
        inner += self.shortcut(x)
        rectified: Tensor = self.rectifier(inner)
        return rectified

    def surround(self, outside: Tensor) -> Tensor:
        """Change a folded block so that its input continues beyond the grid as given, in place.

        The block then computes with shifted tensors (:class:`AirRectifier`), in which this continuation is 0, and its
        convolutions need no bias.

        Args:
            outside: one period of the continuation of the unshifted input, float64 ``[C, p, p, p]``.

        Returns:
            One period of the continuation of the unshifted result, float64 ``[C', p, p, p]``.
        """
        inner = _periodic(self.first.convolution, outside)
        result = _periodic(self.second.convolution, inner.relu())
        if isinstance(self.shortcut, ConvolutionNorm):
            result += _periodic(self.shortcut.convolution, outside)
            self.shortcut.convolution.bias = None
        else:
            result += outside
        self.first.convolution.bias = self.second.convolution.bias = None
        self.inner_rectifier, self.rectifier = AirRectifier(inner), AirRectifier(result)
        return result.relu()


def _periodic(convolution: nn.Conv3d, period: Tensor) -> Tensor:
    """Return one period of the convolution of a periodic tensor, float64; a stride needs a period of one voxel."""
    side = convolution.kernel_size[0] // 2
    padded = nn.functional.pad(period[None], [side] * 6, mode="circular")
    bias = None if convolution.bias is None else convolution.bias.detach().double()
    return nn.functional.conv3d(padded, convolution.weight.detach().double(), bias, convolution.stride)[0]


class ResidualUNet(FeatureNetwork):
    """U-Net of residual blocks. The feature pyramid consists of the decoder levels, without the bottleneck.

    Args:
        channels: number of channels of each encoder stage, with strides 1, 2, 4, ...; the last stage is the bottleneck.
            Level ``l`` of the pyramid has stride ``2**l`` and ``channels[l]`` channels.

    Raises:
        ValueError: there are fewer than two stages, or a stage has no channel.
    """

    decoder_parts: ClassVar = ("up", "merge")

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        widths = list(channels)
        if len(widths) < 2 or min(widths) < 1:
            raise ValueError(f"channels is {widths}, but an encoder has at least two stages of at least one channel")
        self.levels = tuple(FeatureLevel(2**level, width) for level, width in enumerate(widths[:-1]))
        self.down = nn.ModuleList(
            ResidualBlock(1 if level == 0 else widths[level - 1], width, stride=1 if level == 0 else 2)
            for level, width in enumerate(widths)
        )
        self.up = nn.ModuleList(
            nn.ConvTranspose3d(deeper, width, kernel_size=2, stride=2) for width, deeper in pairwise(widths)
        )
        self.merge = nn.ModuleList(ResidualBlock(2 * width, width) for width in widths[:-1])

    def forward(self, windows: Tensor) -> list[Tensor]:
        """Return the feature pyramid, finest level first (:meth:`FeatureNetwork.forward`)."""
        skips: list[Tensor] = []
        x = windows
        adapters, narrow = med_adapters(self), None
        for level, block in enumerate(self.down):
            x = self._part(block, x)
            if adapters:
                x, narrow = adapters[level](x, narrow, self._part)
            skips.append(x)
        pyramid: list[Tensor] = []
        for level in reversed(range(len(self.merge))):
            x = self._part(partial(_merged, self.up[level], self.merge[level]), x, skips[level])
            rectifier = cast(ResidualBlock, self.merge[level]).rectifier
            pyramid.append(rectifier.unshifted(x) if isinstance(rectifier, AirRectifier) else x)
        return pyramid[::-1]

    @property
    def whole_scan(self) -> WholeScan | None:
        """How the network computes a whole scan; None with Med-Adapters, whose frequency filter spans the window."""
        if med_adapters(self):
            return None
        # Radius of the receptive field: two convolutions of the first stage; in each further stage, one convolution on
        # the finer level and one on its own; two convolutions in each decoder level.
        stages = len(self.down)
        strides = [2**level for level in range(stages)]
        down = 2 + sum(finer + own for finer, own in pairwise(strides))
        up = sum(2 * stride for stride in strides[:-1])
        multiple = strides[-1]
        # An upsampled voxel depends on the whole voxel of the coarser level.
        return WholeScan(multiple, math.ceil((down + up + multiple - 1) / multiple) * multiple)

    def stage_widths(self) -> list[int]:
        """Return the number of channels at the end of each encoder stage, where inserts are added."""
        return [cast(ResidualBlock, block).second.convolution.out_channels for block in self.down]

    def in_air(self) -> ResidualUNet:
        """Return a folded copy that computes a scan as if air without an end surrounded it.

        Convolutions that are padded with zeros tell a voxel how far away the border of the scan is. Classifiers learn
        this from a few scans, and then miss organs in a scan that is cut elsewhere. The copy pads every convolution
        with what air (input 0) gives far outside the scan, at no cost.

        If the outer voxels of the scan are air, as many as the stride of the deepest stage, its features are those
        inside a much larger grid of air, but for rounding. If the body reaches the border, they are close to these:
        the air beside the scan then has the features of air far outside.
        """
        network = self.folded()
        outside = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
        skips: list[Tensor] = []
        with torch.no_grad():
            for block in network.down:
                outside = cast(ResidualBlock, block).surround(outside)
                skips.append(outside)
            for level in reversed(range(len(network.merge))):
                up, merge = cast(nn.ConvTranspose3d, network.up[level]), cast(ResidualBlock, network.merge[level])
                bias = None if up.bias is None else up.bias.double()
                upsampled = nn.functional.conv_transpose3d(outside[None], up.weight.double(), bias, stride=2)[0]
                up.bias = None
                outside = merge.surround(torch.cat([upsampled, skips[level].expand(-1, *upsampled.shape[1:])]))
        return network

    def folded(self) -> ResidualUNet:
        """Return a copy for inference with all batch normalisations folded; the copy computes the same features."""
        network = copy.deepcopy(self).eval()
        for module in network.modules():
            if isinstance(module, ConvolutionNorm):
                module.fold()
        return network


def _merged(up: nn.Module, merge: nn.Module, deeper: Tensor, skip: Tensor) -> Tensor:
    """Return the features of a decoder level, from the next deeper level and the skip of the same resolution."""
    x, y, z = skip.shape[2:]
    # The upsampled features are longer by one voxel along an odd axis.
    merged: Tensor = merge(torch.cat([up(deeper)[:, :, :x, :y, :z], skip], dim=1))
    return merged
