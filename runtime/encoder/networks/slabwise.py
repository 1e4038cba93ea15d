"""Forward pass of the compact encoder in slabs, which needs a third of the memory and less time on a CPU.

The finest levels need nearly all memory of a U-Net, because a residual block has five tensors of the window's size at
once. This module computes the finest levels in slabs along X. Each slab includes the neighbouring planes that its two
convolutions need, and the decoder's features replace the skip features in place. The intermediate tensors of a slab fit
into the CPU cache, and all slabs use the same memory.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fseft_edge.runtime.encoder.networks.base import FeatureNetwork
from fseft_edge.runtime.encoder.networks.med_adapter import med_adapters
from fseft_edge.runtime.encoder.networks.residual_unet import ConvolutionNorm, ResidualBlock, ResidualUNet

# Thickness of a slab in voxels along X. For edge_base, 4 to 16 voxels take the same time, and 4 need the least memory.
_SLAB = 4
# Number of levels that are computed in slabs; coarser levels need little memory.
_FINE_LEVELS = 2


class SlabwiseResidualUNet(FeatureNetwork):
    """Network for inference that computes the features of a folded :class:`ResidualUNet`, except for rounding.

    Args:
        network: network with folded normalisations; its parameters are shared.
    """

    def __init__(self, network: ResidualUNet) -> None:
        super().__init__()
        self.levels = network.levels
        self._first = _SlabwiseBlock(_residual_block(network.down[0]))
        self._second = _SlabwiseStridedBlock(_residual_block(network.down[1]))
        self._down = network.down[2:]
        self._adapters = nn.ModuleList(med_adapters(network))
        self._up = nn.ModuleList(_Upsampling(layer) for layer in network.up)
        fine, self._merge_coarse = network.merge[:_FINE_LEVELS], network.merge[_FINE_LEVELS:]
        self._merge_fine = nn.ModuleList(_SlabwiseBlock(_residual_block(block)) for block in fine)

    def forward(self, windows: Tensor) -> list[Tensor]:
        """Return the feature pyramid, finest level first (:meth:`FeatureNetwork.forward`)."""
        count, _, *size = windows.shape
        x = windows.new_empty(count, *size, self.levels[0].channels).movedim(-1, 1)
        self._first(lambda start, stop, target: target.copy_(windows[:, :, start:stop]), x)
        x, narrow = self._adapted(0, x, None)
        skips = [x]
        for stage, block in enumerate((self._second, *self._down), start=1):
            x, narrow = self._adapted(stage, block(x), narrow)
            skips.append(x)
        skips.pop()
        pyramid: list[Tensor] = []
        for level in reversed(range(len(skips))):
            skip = skips.pop()
            if level < len(self._merge_fine):
                self._merge_in_place(level, x, skip)
                x = skip
            else:
                channels = skip.shape[1]
                merged = skip.new_empty(count, *skip.shape[2:], 2 * channels).movedim(-1, 1)
                self._up[level](x, merged[:, :channels])
                merged[:, channels:] = skip
                x = self._merge_coarse[level - len(self._merge_fine)](merged)
                del merged  # freed before the finest levels, because memory peaks there
            pyramid.append(x)
        return pyramid[::-1]

    def _adapted(self, stage: int, x: Tensor, narrow: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return a stage's features after its Med-Adapter, if there is one, and the adapter's narrow features."""
        if not self._adapters:
            return x, None
        adapted: tuple[Tensor, Tensor] = self._adapters[stage](x, narrow, self._part)
        return adapted

    def _merge_in_place(self, level: int, coarser: Tensor, skip: Tensor) -> None:
        channels = skip.shape[1]

        def upsampled_beside_skip(start: int, stop: int, target: Tensor) -> None:
            self._up[level](coarser[:, :, start // 2 : stop // 2], target[:, :channels])
            target[:, channels:] = skip[:, :, start:stop]

        self._merge_fine[level](upsampled_beside_skip, skip)


class _SlabwiseBlock(nn.Module):
    """A folded residual block of stride 1, computed slab by slab. No value is computed twice."""

    def __init__(self, block: ResidualBlock) -> None:
        super().__init__()
        self._first = _unpadded_along_x(block.first)
        self._second = _unpadded_along_x(block.second)
        self._shortcut = block.shortcut
        self._inputs = block.first.convolution.in_channels

    def forward(self, fill: Callable[[int, int, Tensor], object], output: Tensor) -> None:
        """Compute the whole block.

        Args:
            fill: function that writes the planes ``start`` to ``stop`` along X of the block's input into a tensor. It
                is called with ascending, adjacent, even ranges, always before the output of these planes is written.
            output: tensor for the block's features, ``[n, C, X, Y, Z]``, channels last, X even.
        """
        count, channels, length, *plane = output.shape
        depth = math.gcd(length, _SLAB)
        # The output at x needs the inner tensor at x - 1 to x + 1, which needs the input at x - 2 to x + 2. For a slab
        # that begins at `start`, `slab` contains the input from `start` on, and `inner` the inner tensor from
        # `start - 1` on.
        slab = output.new_empty(count, depth + 2, *plane, self._inputs).movedim(-1, 1)
        inner = output.new_empty(count, depth + 2, *plane, channels).movedim(-1, 1)
        first_planes = slab.new_zeros(count, 3, *plane, self._inputs).movedim(-1, 1)
        fill(0, 2, slab[:, :, depth:])
        first_planes[:, :, 1:] = slab[:, :, depth:]
        inner[:, :, depth] = 0
        torch.clamp_min(self._first(first_planes), 0, out=inner[:, :, depth + 1 :])
        for start in range(0, length, depth):
            stop = start + depth
            slab[:, :, :2] = slab[:, :, depth:].clone()
            inner[:, :, :2] = inner[:, :, depth:].clone()
            filled = min(stop + 2, length)
            if filled > start + 2:
                fill(start + 2, filled, slab[:, :, 2 : filled - start])
            slab[:, :, filled - start :] = 0
            torch.clamp_min(self._first(slab), 0, out=inner[:, :, 2:])
            if stop == length:  # outside the window, the second convolution needs zeros as inner tensor
                inner[:, :, -1] = 0
            result = self._second(inner)
            result += self._shortcut(slab[:, :, :depth])
            torch.clamp_min(result, 0, out=output[:, :, start:stop])


class _SlabwiseStridedBlock(nn.Module):
    """A folded residual block of stride 2, computed slab by slab from a complete input."""

    def __init__(self, block: ResidualBlock) -> None:
        super().__init__()
        self._first = _unpadded_along_x(block.first)
        self._second = _unpadded_along_x(block.second)
        self._shortcut = block.shortcut
        self._outputs = block.second.convolution.out_channels

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's features ``[n, C', X / 2, Y / 2, Z / 2]`` for an input ``[n, C, X, Y, Z]``."""
        count, _, *size = x.shape
        length, *plane = (voxels // 2 for voxels in size)
        depth = math.gcd(length, _SLAB)
        output = x.new_empty(count, length, *plane, self._outputs).movedim(-1, 1)
        # `inner` contains the inner tensor from plane `start - 1` on; outside the window, it is zero.
        inner = x.new_zeros(count, depth + 2, *plane, self._outputs).movedim(-1, 1)
        torch.clamp_min(self._first(F.pad(x[:, :, :2], (0, 0, 0, 0, 1, 0))), 0, out=inner[:, :, depth + 1 :])
        for start in range(0, length, depth):
            stop = start + depth
            inner[:, :, :2] = inner[:, :, depth:].clone()
            inner[:, :, 2:] = 0
            below = x[:, :, 2 * start + 1 : 2 * stop + 2]
            if below.shape[2] >= 3:
                new = self._first(below)
                torch.clamp_min(new, 0, out=inner[:, :, 2 : 2 + new.shape[2]])
            result = self._second(inner)
            result += self._shortcut(x[:, :, 2 * start : 2 * stop])
            torch.clamp_min(result, 0, out=output[:, :, start:stop])
        return output


class _Upsampling(nn.Module):
    """A transposed convolution with kernel 2 and stride 2, computed as one matrix product of channels-last features."""

    def __init__(self, convolution: nn.Module) -> None:
        super().__init__()
        assert isinstance(convolution, nn.ConvTranspose3d)  # noqa: S101 - narrows the type for the checker
        inputs, outputs = convolution.in_channels, convolution.out_channels
        self._weight = nn.Parameter(convolution.weight.detach().movedim(1, -1).reshape(inputs, 8 * outputs))
        bias = convolution.bias
        self._bias = nn.Parameter(torch.zeros(8 * outputs) if bias is None else bias.detach().repeat(8))

    def forward(self, coarse: Tensor, target: Tensor) -> None:
        """Upsample ``coarse`` ``[n, C, X, Y, Z]``, and write the result to ``target`` ``[n, C', 2 X, 2 Y, 2 Z]``."""
        count, inputs, *size = coarse.shape
        rows = coarse.movedim(1, -1).reshape(-1, inputs)
        x, y, z = size
        # [n, X, Y, Z, 2, 2, 2, C'] to [n, C', X, 2, Y, 2, Z, 2]
        fine = torch.addmm(self._bias, rows, self._weight).reshape(count, x, y, z, 2, 2, 2, -1)
        view = target.movedim(1, -1).unflatten(3, (z, 2)).unflatten(2, (y, 2)).unflatten(1, (x, 2))
        view.copy_(fine.permute(0, 1, 4, 2, 5, 3, 6, 7))


def _unpadded_along_x(layer: ConvolutionNorm) -> nn.Conv3d:
    convolution = copy.copy(layer.convolution)
    convolution.padding = (0, 1, 1)
    return convolution


def _residual_block(module: nn.Module) -> ResidualBlock:
    assert isinstance(module, ResidualBlock)  # noqa: S101 - narrows the type for the checker
    return module
