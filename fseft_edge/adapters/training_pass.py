"""The forward pass of training: the logits of an adapter for perturbed blocks of features, arranged for speed.

The logits and gradients are those of :meth:`Adapter.forward` for perturbed features, up to rounding:

- Normalisation and perturbation are a factor and an offset for each channel of a block. They are multiplied into the
  1x1x1 kernels, so that no normalised or perturbed copy of the features exists. The bias is added at the coarser level,
  which has fewer voxels, because interpolation keeps a constant.
- The second convolution of the finest residual step and the classifier after it are one convolution ``V C``, if the
  adapter has fewer classes than channels (:meth:`Adapter.folded` does the same for inference).
- Tensors of the residual path have their channels last, ``[n, X, Y, Z, C]``. With this layout, the convolutions of
  oneDNN convert nothing, and interpolation and projection are matrix products over long rows.

Convolutions may compute in bfloat16; sums, projections and interpolation are float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fseft_edge.adapters.blocks import Box, interpolation_matrices, upsample_into
from fseft_edge.adapters.network import Adapter, ResidualStep

_Context: TypeAlias = Any
"""What PyTorch gives to a function and its gradient; it takes any attribute."""

# The kernels of oneDNN compute channels in groups of eight.
_CHANNEL_GROUP = 8


@dataclass(frozen=True)
class ChannelChange:
    """A change of the normalised channels of each block of one level: ``factor * channel + offset``.

    Attributes:
        factor: ``[n, C_l]``.
        offset: ``[n, C_l]``.
    """

    factor: Tensor
    offset: Tensor


def training_logits(
    adapter: Adapter, features: Sequence[Tensor], changes: Sequence[ChannelChange], core: Box, precision: torch.dtype
) -> Tensor:
    """Return logits ``[n, classes, *core.shape]``, float32, with gradients of the parameters.

    Args:
        adapter: adapter with the method ``pointwise`` or ``spatial``.
        features: features of each level in the boxes ``adapter.boxes(core)``, float32 ``[n, C_l, ...]``.
        changes: change of the normalised features of each level.
        core: box of the voxels to compute (see :meth:`Adapter.forward`).
        precision: number format of the convolutions of the residual steps.
    """
    levels = [
        _Level(block, change, adapter.mean(level), adapter.scale(level))
        for level, (block, change) in enumerate(zip(features, changes, strict=True))
    ]
    boxes = adapter.boxes(core)
    if adapter.settings.levels == "finest":
        direct = levels[0].classified(adapter.direct.weight, adapter.direct.bias)
        logits = _cropped(direct, boxes[0], core)
        return logits + _residual_logits(adapter, levels[0].normalised(), adapter.direct.weight, precision)
    x: Tensor = levels[-1].projected(_layer(adapter.project[-1]))
    coarse: Tensor | None = None
    for number in reversed(range(len(levels) - 1)):
        step = _step(adapter, number + 1)
        coarse = _residual(x, step.first.weight, step.second.weight, precision, identity=True)
        layer = _layer(adapter.project[number])
        x = levels[number].projected(layer, (coarse, boxes[number + 1].grown(-step.halo), boxes[number]))
    logits = _linear(adapter, levels, coarse, boxes, core)
    return logits + _residual_logits(adapter, x, adapter.classifier.weight, precision)


class _Level:
    """The features of one level, with the factor and the offset of each channel that normalise and change them."""

    def __init__(self, block: Tensor, change: ChannelChange, mean: Tensor, scale: Tensor) -> None:
        self._shape = block.shape[2:]
        self._block = block.flatten(2)
        self._factor = change.factor / scale
        self._offset = change.offset - mean * self._factor

    def normalised(self) -> Tensor:
        """Return the changed features ``[n, X, Y, Z, C_l]``."""
        changed = self._block * self._factor[..., None] + self._offset[..., None]
        result: Tensor = changed.transpose(1, 2).contiguous().unflatten(1, self._shape)
        return result

    def projected(self, layer: nn.Conv3d, coarse: tuple[Tensor, Box, Box] | None = None) -> Tensor:
        """Return the result of a 1x1x1 convolution plus that of the coarser level, ``[n, X, Y, Z, O]``.

        Args:
            layer: 1x1x1 convolution.
            coarse: result of the coarser level, ``[n, X', Y', Z', O]``, its box, and the box of this level; None for
                the coarsest level.
        """
        weight, bias = self._folded(layer.weight, layer.bias)
        if coarse is None:
            x = torch.baddbmm(bias[:, None], self._block.transpose(1, 2), weight.transpose(1, 2))
        else:
            values, *boxes = coarse
            x = _projection(self._block, weight, values + bias[:, None, None, None], *boxes)
        result: Tensor = x.unflatten(1, self._shape)
        return result

    def classified(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the result of a 1x1x1 convolution with a kernel ``[O, C_l, ...]``, ``[n, O, X, Y, Z]``."""
        folded, offset = self._folded(weight, bias)
        result: Tensor = torch.baddbmm(offset[..., None], folded, self._block).unflatten(2, self._shape)
        return result

    def _folded(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the kernel ``[n, O, C_l]`` and the bias ``[n, O]`` for the raw features of each block."""
        rows = weight.flatten(1)
        offset = self._offset @ rows.T
        return rows * self._factor[:, None], offset if bias is None else offset + bias


def _projection(block: Tensor, weight: Tensor, coarse: Tensor, coarse_box: Box, box: Box) -> Tensor:
    """Return ``coarse``, interpolated to ``box``, plus the product of ``block`` and ``weight``, ``[n, voxels, O]``."""
    matrices = interpolation_matrices(coarse_box, box, coarse)
    result: Tensor = _Projection.apply(block, weight, coarse, *matrices)  # type: ignore[no-untyped-call]  # of PyTorch
    return result


class _Projection(torch.autograd.Function):
    """The interpolation of a coarser level to a finer one, plus a product of the features of the finer level."""

    @staticmethod
    def forward(ctx: _Context, *inputs: Tensor) -> Tensor:
        block, weight, coarse, x, y, z = inputs
        ctx.save_for_backward(block, x, y, z)
        ctx.shape = coarse.shape
        result = _interpolated((z, y, x), coarse).flatten(1, 3)
        return result.baddbmm_(block.transpose(1, 2), weight.transpose(1, 2))

    @staticmethod
    def backward(ctx: _Context, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        block, x, y, z = ctx.saved_tensors
        (gradient,) = gradients
        of_weight = torch.bmm(block, gradient).transpose(1, 2)
        count, extent_x, extent_y, extent_z, channels = ctx.shape
        of_x = torch.bmm(x.T.expand(count, -1, -1), gradient.reshape(count, len(x), -1))
        of_y = torch.bmm(y.T.expand(count * extent_x, -1, -1), of_x.view(count * extent_x, len(y), -1))
        rows = count * extent_x * extent_y
        of_z = torch.bmm(z.T.expand(rows, -1, -1), of_y.view(rows, len(z), channels))
        return None, of_weight, of_z.view(count, extent_x, extent_y, extent_z, channels), None, None, None


def _interpolated(matrices: Sequence[Tensor], coarse: Tensor) -> Tensor:
    """Return ``coarse`` multiplied by one matrix along z, y and x; z first, because its products are the shortest."""
    z, y, x = matrices
    count, extent_x, extent_y, extent_z, channels = coarse.shape
    rows = count * extent_x * extent_y
    along_z = torch.bmm(z.expand(rows, -1, -1), coarse.reshape(rows, extent_z, channels))
    along_y = torch.bmm(y.expand(count * extent_x, -1, -1), along_z.view(count * extent_x, extent_y, -1))
    along_x = torch.bmm(x.expand(count, -1, -1), along_y.view(count, extent_x, -1))
    return along_x.view(count, len(x), len(y), len(z), channels)


def _layer(module: nn.Module) -> nn.Conv3d:
    assert isinstance(module, nn.Conv3d)  # noqa: S101 - narrows the type for the checker
    return module


def _step(adapter: Adapter, level: int) -> ResidualStep:
    step = adapter.steps[level]
    assert isinstance(step, ResidualStep)  # noqa: S101 - narrows the type for the checker
    return step


def _residual_logits(adapter: Adapter, x: Tensor, classifier: Tensor, precision: torch.dtype) -> Tensor:
    """Return ``V C(ReLU(C(x)))`` of the finest level as ``[n, classes, X, Y, Z]``."""
    step = _step(adapter, 0)
    first, second, rows = step.first.weight, step.second.weight, classifier.flatten(1)
    classes, channels = rows.shape
    padded = math.ceil(classes / _CHANNEL_GROUP) * _CHANNEL_GROUP
    if padded < channels:
        folded = torch.einsum("kc,cixyz->kixyz", F.pad(rows, (0, 0, 0, padded - classes)), second)
        logits = _residual(x, first, folded, precision, identity=False)[..., :classes]
    else:
        logits = F.linear(_residual(x, first, second, precision, identity=False), rows)
    return logits.permute(0, 4, 1, 2, 3)


def _residual(x: Tensor, first: Tensor, second: Tensor, precision: torch.dtype, *, identity: bool) -> Tensor:
    """Return ``second(ReLU(first(x)))``, plus ``x`` with ``identity``: ``[n, X - 2 h, ..., O]`` for a halo ``h``.

    Args:
        x: float32 ``[n, X, Y, Z, C]``.
        first: kernel of the first convolution.
        second: kernel of the second convolution.
        precision: number format of the convolutions.
        identity: whether the inner voxels of ``x`` are added.
    """
    result: Tensor = _Residual.apply(x, first, second, identity, precision)  # type: ignore[no-untyped-call]  # of PyTorch
    return result


class _Residual(torch.autograd.Function):
    """The function of :func:`_residual`. Its gradients need fewer passes over memory than those of its parts."""

    @staticmethod
    def forward(  # noqa: PLR0917 - PyTorch gives the arguments by position
        ctx: _Context, x: Tensor, first: Tensor, second: Tensor, identity: bool, precision: torch.dtype
    ) -> Tensor:
        converted = x.to(precision)
        hidden = _convolved(converted, first).relu_()
        result = _convolved(hidden, second).to(x.dtype)
        ctx.save_for_backward(converted, hidden, first, second)
        ctx.halo = (x.shape[1] - result.shape[1]) // 2
        ctx.identity = identity
        return result.add_(_without_halo(x, ctx.halo)) if identity else result

    @staticmethod
    def backward(ctx: _Context, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        converted, hidden, first, second = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        of_hidden, of_second = _convolution_gradients(gradient.to(converted.dtype), hidden, second)
        torch.ops.aten.threshold_backward.grad_input(of_hidden, hidden, 0, grad_input=of_hidden)
        of_x, of_first = _convolution_gradients(of_hidden, converted, first)
        of_x = of_x.to(gradient.dtype)
        if ctx.identity:
            _without_halo(of_x, ctx.halo).add_(gradient)
        return of_x, of_first, of_second, None, None


def _convolved(x: Tensor, weight: Tensor) -> Tensor:
    """Return the convolution of ``x``, ``[n, X, Y, Z, C]``, contiguous, with ``weight``, ``[O, C, *kernel]``."""
    kernel = weight.to(x.dtype).contiguous(memory_format=torch.channels_last_3d)
    return F.conv3d(x.permute(0, 4, 1, 2, 3), kernel).permute(0, 2, 3, 4, 1).contiguous()


def _convolution_gradients(gradient: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of the input and the kernel of :func:`_convolved`."""
    of_x, of_weight, _ = torch.ops.aten.convolution_backward(
        gradient.permute(0, 4, 1, 2, 3),
        x.permute(0, 4, 1, 2, 3),
        weight.to(x.dtype).contiguous(memory_format=torch.channels_last_3d),
        None,
        stride := (1, 1, 1),
        padding := (0, 0, 0),
        stride,
        False,
        padding,
        1,
        (True, True, False),
    )
    return of_x.permute(0, 2, 3, 4, 1).contiguous(), of_weight.to(weight.dtype)


def _linear(
    adapter: Adapter, levels: Sequence[_Level], coarse: Tensor | None, boxes: Sequence[Box], core: Box
) -> Tensor:
    """Return the part of the logits that is linear in the features and in the residual path, ``[n, classes, ...]``.

    It contains the classifier ``V`` of the residual path for ``x`` at the finest level, which is the projection ``P f``
    plus the interpolated result of level 1: ``V P`` is added to the classifier of level 0, and ``V`` is applied to
    level 1.

    Args:
        adapter: adapter with all levels.
        levels: all levels.
        coarse: result of the residual path at level 1, ``[n, X', Y', Z', C]``; None if there is only one level.
        boxes: box of each level.
        core: box of the voxels to compute.
    """
    rows, projection = adapter.classifier.weight.flatten(1), _layer(adapter.project[0])
    assert adapter.direct.bias is not None  # noqa: S101 - narrows the type for the checker
    assert projection.bias is not None  # noqa: S101 - narrows the type for the checker
    direct = adapter.direct.weight.flatten(1) + rows @ projection.weight.flatten(1)
    finest = levels[0].classified(direct, adapter.direct.bias + rows @ projection.bias)
    logits = _cropped(finest, boxes[0], core)
    if coarse is None:
        return logits
    wanted = [core]
    for _ in levels[1:]:
        wanted.append(wanted[-1].coarser())
    of_coarse = (rows @ coarse.flatten(1, 3).transpose(1, 2)).unflatten(2, coarse.shape[1:4])
    below = _cropped(of_coarse, boxes[1].grown(-_step(adapter, 1).halo), wanted[1])
    above: Tensor | None = None
    for number in reversed(range(1, len(levels))):
        layer = _layer(adapter.coarse[number - 1])
        here = _cropped(levels[number].classified(layer.weight), boxes[number], wanted[number])
        above = here if above is None else here + upsample_into(above, wanted[number + 1], wanted[number])
    return logits + upsample_into(below if above is None else below + above, wanted[1], core)


def _cropped(x: Tensor, box: Box, wanted: Box) -> Tensor:
    """Return the voxels of ``wanted`` from a tensor ``[n, C, X, Y, Z]`` whose voxels are those of ``box``."""
    return x[:, :, *(slice(a - low, b - low) for (a, b), (low, _) in zip(wanted.ranges, box.ranges, strict=True))]


def _without_halo(x: Tensor, halo: int) -> Tensor:
    return x[:, halo:-halo, halo:-halo, halo:-halo] if halo else x
