"""Forward pass of the compact encoder over a whole scan: one pass along z, with some planes of each level in memory.

The features of a :class:`ResidualUNet` with folded normalisations depend on the surroundings of a voxel alone, and air
without an end surrounds the scan (:meth:`ResidualUNet.in_air`). The network therefore needs no windows: every
convolution runs once over the whole grid. The planes of the grid stream through the network. Each block computes its
next planes when its input contains them, and keeps the two planes of its inner tensor that these planes need. Nothing
is computed twice, and no value depends on the available memory.

A decoder level needs the features of the deepest stage, which are some 75 planes of the grid ahead. Skip features wait
for that time in ring buffers, so the memory depends on the size of the planes and not on their number.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from fseft_edge.runtime.encoder.file_tensor import FileTensor
from fseft_edge.runtime.encoder.networks.residual_unet import (
    AirRectifier,
    ConvolutionNorm,
    ResidualBlock,
    ResidualUNet,
)

STEP = 16
"""Planes of the grid in a step, a multiple of the stride of the deepest stage. The sizes of all computations follow
from it, so that a memory budget has no effect on the features."""

_SLAB = 8
"""Planes that a block computes at a time on a CPU, so that their intermediate values stay in the cache."""

Range = tuple[int, int]


@dataclass(frozen=True)
class Stops:
    """The number of planes of each stage that are computed at the end of a step.

    Attributes:
        image: planes of the grid that are read.
        down: planes of each encoder stage, finest first; the last stage is the deepest.
        merge: planes of each decoder level, finest first.
    """

    image: int
    down: tuple[int, ...]
    merge: tuple[int, ...]


def schedule(planes: int, stages: int, step: int = STEP) -> list[Stops]:
    """Return the stops of all steps of a scan.

    Args:
        planes: number of planes of the grid.
        stages: number of encoder stages.
        step: number of planes of the finest level in a step, a multiple of the stride of the deepest stage.
    """
    lengths = level_lengths(planes, stages)
    steps = []
    for start in range(0, planes, step):
        merge = [min(start + step, planes)]
        for length in lengths[1:]:
            # The convolutions of a residual block need two more planes of its input. An even number of planes comes
            # from whole planes of the coarser level.
            needed = -(-(merge[-1] + 2) // 2)
            merge.append(min(needed + needed % 2, length))
        down = [merge.pop()]
        for length, merged in zip(reversed(lengths[:-1]), reversed(merge), strict=True):
            down.append(min(max(2 * down[-1] + 2, merged + 2), length))
        down.reverse()
        steps.append(Stops(min(down[0] + 2, planes), tuple(down), tuple(merge)))
    return steps


def level_lengths(voxels: int, levels: int) -> list[int]:
    """Return the number of voxels of each level along an axis of the grid; level ``l`` has the stride ``2**l``."""
    return [-(-voxels // 2**level) for level in range(levels)]


@dataclass(frozen=True)
class Held:
    """The largest number of planes that each stage keeps, in the order of :class:`Stops`."""

    image: int
    down: tuple[int, ...]
    merge: tuple[int, ...]


def held_planes(planes: int, stages: int, step: int = STEP) -> Held:
    """Return how many planes the ring buffers of a scan hold (arguments as in :func:`schedule`).

    The input of a block is kept from the block's position on; the features of a level until the finest level is final.
    """
    image, down, merge = 0, [0] * stages, [0] * (stages - 1)
    before = Stops(0, (0,) * stages, (0,) * (stages - 1))
    for now in schedule(planes, stages, step):
        image = max(image, now.image - before.down[0])
        for level in range(stages):
            # The deepest stage is read by the decoder level above it.
            position = before.merge[level] if level < stages - 1 else before.merge[level - 1] // 2
            down[level] = max(down[level], now.down[level] - position)
        for level in range(stages - 1):
            merge[level] = max(merge[level], now.merge[level] - (before.merge[0] >> level))
        before = now
    return Held(image, tuple(down), tuple(merge))


@dataclass(frozen=True)
class PlaneMemory:
    """Predicted memory of a pass over a grid, in bytes.

    Attributes:
        waiting: planes that wait for deeper stages, or for the finest level; they can be in temporary files.
        kept: other tensors that are kept during the pass.
        computing: tensors that exist while a block is computed.
    """

    waiting: int
    kept: int
    computing: int


class RollingResidualUNet(nn.Module):
    """Network for inference that computes the features of a :class:`ResidualUNet` in air, except for rounding.

    Args:
        network: result of :meth:`ResidualUNet.in_air`, without inserted modules.
        dtype: number format of the computation.
    """

    def __init__(self, network: ResidualUNet, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.levels = network.levels
        # Tuples keep the types of the modules; the lists register the modules.
        self.down = tuple(_DownWeights(_residual_block(block)) for block in network.down)
        self.merge = tuple(
            _MergeWeights(up, _residual_block(block), finest=level == 0)
            for level, (up, block) in enumerate(zip(network.up, network.merge, strict=True))
        )
        self._modules_of_down, self._modules_of_merge = nn.ModuleList(self.down), nn.ModuleList(self.merge)
        self.to(dtype)

    def forward(self, windows: Tensor) -> list[Tensor]:
        """Return the feature pyramid of grids of any size in memory, finest level first.

        Args:
            windows: grids, ``[n, 1, X, Y, Z]``.

        Returns:
            One tensor per level, float32 ``[n, C_l, X / s, Y / s, Z / s]``, sizes rounded up.
        """
        return [torch.cat(level) for level in zip(*map(self._pyramid, windows[:, 0]), strict=True)]

    def _pyramid(self, image: Tensor) -> list[Tensor]:
        """Return the features ``[1, C_l, X / s, Y / s, Z / s]`` of a grid ``[X, Y, Z]``."""
        x, y, z = image.shape
        results = self.features(lambda start, stop: image[..., start:stop], (x, y, z))
        parts = [[level.clone() for level in levels] for _, levels in results]
        return [torch.cat(level, -1)[None] for level in zip(*parts, strict=True)]

    def memory(self, shape: tuple[int, int, int]) -> PlaneMemory:
        """Return the predicted memory of a pass over a grid of this shape."""
        parameter = next(self.parameters())
        channels = [1, *(weights.second.outputs for weights in self.down)]
        held, slab = held_planes(shape[2], len(self.down)), _slab(parameter)
        planes = [
            math.prod(sizes) for sizes in zip(*(level_lengths(side, len(self.down)) for side in shape[:2]), strict=True)
        ]
        waiting = held.image * planes[0]
        inner = transient = 0
        for level, (inputs, outputs) in enumerate(pairwise(channels)):
            plane, finer = planes[level], planes[max(level - 1, 0)]
            waiting += (held.down[level] + (held.merge[level] if level < len(self.merge) else 0)) * outputs * plane
            # An encoder stage: planes of the finer level, two results.
            inner += (slab + 2) * outputs * plane
            stage = (2 if level else 1) * (slab + 2) * inputs * finer + 2 * slab * outputs * plane
            if level < len(self.merge):
                # A decoder level: copied planes of both inputs, eight values for each coarser voxel, two results.
                inner += (slab + 2) * outputs * plane
                coarser = (slab // 2 + 2) * channels[level + 2] * planes[level + 1]
                eighths = 8 * outputs * (slab // 2 + 1) * planes[level + 1]
                stage = max(stage, (slab + 2) * outputs * plane + coarser + eighths + 2 * slab * outputs * plane)
            transient = max(transient, stage)
        size = parameter.dtype.itemsize
        return PlaneMemory(size * waiting, size * inner, size * transient)

    @torch.no_grad()
    def features(
        self,
        read: Callable[[int, int], Tensor],
        shape: tuple[int, int, int],
        *,
        section: int = STEP,
        on_disk: bool = False,
    ) -> Iterator[tuple[Range, list[Tensor]]]:
        """Compute the features of a grid.

        Args:
            read: function that returns the planes ``z0:z1`` of the grid, ``[X, Y, z1 - z0]``, for ``(z0, z1)``. It is
                called once for each plane, in order.
            shape: shape of the grid.
            section: number of planes of a result, a multiple of the stride of the coarsest level.
            on_disk: keep the planes that wait for deeper stages in temporary files.

        Yields:
            A range of planes, and their final features, float32 ``[C_l, X / s, Y / s, n / s]`` for each level, finest
            first, with sizes rounded up. The tensors are only valid until the next result.
        """
        yield from _Pass(self, shape, on_disk=on_disk).run(read, section)


def _slab(parameter: Tensor) -> int:
    return _SLAB if parameter.device.type == "cpu" else STEP


class _Pass:
    """The computation of one scan: the position and the kept planes of every stage."""

    def __init__(self, network: RollingResidualUNet, shape: tuple[int, int, int], *, on_disk: bool) -> None:
        parameter = next(network.parameters())
        stages = len(network.down)
        x, y, z = (level_lengths(voxels, stages) for voxels in shape)
        held = held_planes(shape[2], stages)
        slab = _slab(parameter)

        def ring(planes: int, channels: int, level: int) -> _Ring:
            return _Ring((planes, x[level], y[level], channels), z[level], parameter, on_disk=on_disk)

        widths = [weights.second.outputs for weights in network.down]
        self._planes, self._stages = shape[2], stages
        self._dtype, self._device = parameter.dtype, parameter.device
        self._image = ring(held.image, 1, 0)
        skips = [ring(*sizes, level) for level, sizes in enumerate(zip(held.down, widths, strict=True))]
        self._features = [ring(*sizes, level) for level, sizes in enumerate(zip(held.merge, widths[:-1], strict=True))]
        self._down: list[_Block] = [_Block(network.down[0], self._image, skips[0], slab)]
        for level in range(1, stages):
            self._down.append(_StridedBlock(network.down[level], skips[level - 1], skips[level], slab))
        self._merge = [
            _MergeBlock(weights, coarser, skip, features, slab)
            for weights, coarser, skip, features in zip(
                network.merge, [*self._features[1:], skips[-1]], skips[:-1], self._features, strict=True
            )
        ]

    def run(self, read: Callable[[int, int], Tensor], section: int) -> Iterator[tuple[Range, list[Tensor]]]:
        """Yield the features of all steps (arguments as in :meth:`RollingResidualUNet.features`)."""
        done = arrived = 0
        for stops in schedule(self._planes, self._stages):
            for start in range(arrived, stops.image, STEP):
                stop = min(start + STEP, stops.image)
                planes = read(start, stop).to(self._device, self._dtype)
                self._image.write(start, planes.movedim(-1, 0)[None, None])
            arrived = stops.image
            for block, stop in zip(self._down, stops.down, strict=True):
                block.advance(stop)
            for merge, stop in zip(reversed(self._merge), reversed(stops.merge), strict=True):
                merge.advance(stop)
            for start in range(done, stops.merge[0], section):
                stop = min(start + section, stops.merge[0])
                yield (start, stop), [self._final(level, start, stop) for level in range(self._stages - 1)]
            done = stops.merge[0]

    def _final(self, level: int, start: int, stop: int) -> Tensor:
        """Return the features of a level for planes of the grid, ``[C, X, Y, n]``."""
        first = -(-start >> level)
        planes = self._features[level].planes(first, -(-stop >> level)).float()
        return self._merge[level].rectifier.unshifted(planes, first).movedim(2, -1)[0]


class _Ring:
    """The last planes of a tensor ``[1, C, Z, X, Y]``, channels last.

    Args:
        shape: number of kept planes, X, Y and number of channels.
        length: number of planes Z of the tensor.
        like: tensor with the number format and the device of the planes.
        on_disk: keep the planes in a temporary file, in float32.
    """

    def __init__(self, shape: tuple[int, int, int, int], length: int, like: Tensor, *, on_disk: bool) -> None:
        self.length = length
        self._capacity = shape[0]
        self._like = like
        self._file: FileTensor | None = FileTensor(shape) if on_disk else None
        planes = (
            self._file.tensor if self._file is not None else torch.empty(shape, dtype=like.dtype, device=like.device)
        )
        self._planes = planes.movedim(-1, 0)[None]

    def write(self, start: int, planes: Tensor) -> None:
        """Write planes ``[1, C, n, X, Y]`` from the plane ``start`` on."""
        self._each_part(start, planes, lambda part, values: part.copy_(values))

    def write_rectified(self, start: int, planes: Tensor, rectifier: _PeriodicRectifier) -> None:
        """Rectify planes ``[1, C, n, X, Y]``, and write them from the plane ``start`` on."""
        rectifier.rectify(planes, start, planes)
        self.write(start, planes)

    def planes(self, start: int, stop: int) -> Tensor:
        """Return the planes ``start:stop``, as a view if possible; planes outside the tensor are 0."""
        first = start % self._capacity
        inside = start >= 0 and stop <= self.length
        if inside and self._file is None and first + stop - start <= self._capacity:
            return self._planes[:, :, first : first + stop - start]
        result = self.empty(stop - start)
        low, high = max(start, 0), min(stop, self.length)
        result[:, :, : low - start] = 0
        result[:, :, high - start :] = 0
        self._each_part(low, result[:, :, low - start : high - start], lambda part, values: values.copy_(part))
        return result

    def empty(self, count: int) -> Tensor:
        """Return a new tensor ``[1, C, count, X, Y]``, channels last, in the format of the computation."""
        _, channels, _, x, y = self._planes.shape
        return self._like.new_empty(1, count, x, y, channels).movedim(-1, 1)

    def _each_part(self, start: int, planes: Tensor, act: Callable[[Tensor, Tensor], object]) -> None:
        done, count = 0, planes.shape[2]
        while done < count:
            first = (start + done) % self._capacity
            length = min(count - done, self._capacity - first)
            act(self._planes[:, :, first : first + length], planes[:, :, done : done + length])
            done += length
        if self._file is not None:
            self._file.release()


class _Block:
    """A residual block that computes its planes in order, from planes of the same resolution.

    The output at z needs the inner tensor at z - 1 to z + 1, which needs the input at z - 2 to z + 2.

    Args:
        weights: convolutions of the block.
        source: input of the block.
        output: receiver of the features.
        slab: number of planes to compute at a time; even.

    Attributes:
        rectifier: rectifier of the output.
    """

    def __init__(self, weights: _DownWeights, source: _Ring, output: _Ring, slab: int) -> None:
        self._weights, self._source, self._output, self._slab = weights, source, output, slab
        self._inner_rectifier, self.rectifier = weights.inner_rectifier, weights.rectifier
        self._position = 0
        self._last = slab
        # For planes from `position` on, `inner` contains the inner tensor from `position - 1` on.
        self._inner: Tensor | None = None

    def advance(self, stop: int) -> None:
        """Compute the planes up to ``stop``, for which the source has all planes that are needed."""
        length = self._output.length
        if self._inner is None:
            self._inner = self._output.empty(self._slab + 2)
            self._inner[:, :, self._slab] = 0
            self._inner_rectifier.rectify(self._first(0, 1), 0, self._inner[:, :, self._slab + 1 :])
        inner = self._inner
        while self._position < stop:
            start, end = self._position, min(self._position + self._slab, stop)
            count, new = end - start, min(end + 1, length) - (start + 1)
            inner[:, :, :2] = inner[:, :, self._last : self._last + 2].clone()
            if new:
                first = self._first(start + 1, start + 1 + new)
                self._inner_rectifier.rectify(first, start + 1, inner[:, :, 2 : 2 + new])
            inner[:, :, 2 + new : 2 + count] = 0  # outside the grid
            result = self._weights.second(inner[:, :, : count + 2])
            self._add_shortcut(start, end, result)
            self._output.write_rectified(start, result, self.rectifier)
            self._position, self._last = end, count

    def _first(self, start: int, stop: int) -> Tensor:
        """Return the first convolution of the planes ``start:stop`` of the inner tensor."""
        convolved: Tensor = self._weights.first(self._source.planes(start - 1, stop + 1))
        return convolved

    def _add_shortcut(self, start: int, stop: int, result: Tensor) -> None:
        """Add the shortcut of the planes ``start:stop``."""
        _add_product(self._source.planes(start, stop), self._weights.shortcut, result)


class _StridedBlock(_Block):
    """A residual block of stride 2 that computes its planes in order, from planes of twice the resolution."""

    def _first(self, start: int, stop: int) -> Tensor:
        convolved: Tensor = self._weights.first(self._source.planes(2 * start - 1, 2 * stop))
        return convolved

    def _add_shortcut(self, start: int, stop: int, result: Tensor) -> None:
        even = self._source.planes(2 * start, 2 * stop - 1)[:, :, ::2, ::2, ::2]
        _add_product(even, self._weights.shortcut, result)


class _MergeBlock(_Block):
    """A residual block of a decoder level, from upsampled features of the coarser level and the skip features.

    The first convolution is linear, so it is the sum of a convolution of the skip features and of one of the upsampled
    features. A plane of the upsampled features consists of planes of the coarser level. The convolution of the
    upsampled features with a kernel of 3 voxels is therefore a convolution of the coarser features with a kernel of 2
    voxels for each of the eight positions within a coarser voxel, which needs 8 instead of 27 products.
    """

    def __init__(self, weights: _MergeWeights, coarser: _Ring, skip: _Ring, output: _Ring, slab: int) -> None:
        super().__init__(weights, skip, output, slab)
        self._merge_weights, self._coarser = weights, coarser

    def _first(self, start: int, stop: int) -> Tensor:
        result = super()._first(start, stop)
        # Position p of the convolution of the coarser features is between its planes p - 1 and p, and belongs to the
        # planes 2 p - 1 and 2 p of this level.
        length, x, y = self._output.length, *result.shape[3:]
        # A coarser voxel at an odd end is only half inside the grid. The last voxel there is computed by itself.
        even_x, even_y = x - x % 2, y - y % 2
        even_stop = min(stop, length - length % 2)
        if start < even_stop:
            low, high = -(-start // 2), even_stop // 2
            eighths = self._merge_weights.coarse(self._coarser.planes(low - 1, high + 1))
            inside = result[:, :, : even_stop - start, :even_x, :even_y]
            _add_eighths(eighths, inside, [2 * low - 1 - start, -1, -1])
        for planes, rows, columns in (
            ((start, stop), (even_x, x), (0, y)),
            ((start, stop), (0, even_x), (even_y, y)),
            ((max(start, even_stop), stop), (0, even_x), (0, even_y)),
        ):
            if planes[0] < planes[1] and rows[0] < rows[1] and columns[0] < columns[1]:
                part = result[:, :, slice(planes[0] - start, planes[1] - start), slice(*rows), slice(*columns)]
                part += self._of_upsampled(planes, rows, columns, (length, x, y))
        return result

    def _of_upsampled(self, planes: Range, rows: Range, columns: Range, shape: tuple[int, int, int]) -> Tensor:
        """Return the first convolution of the upsampled features in a box, directly.

        Args:
            planes: range of the box along z, in voxels of this level.
            rows: range of the box along x, in voxels of this level.
            columns: range of the box along y, in voxels of this level.
            shape: number of voxels of this level along z, x and y.
        """
        coarse: list[Range] = []
        kept: list[slice] = []
        padding: list[int] = []
        for (low, high), length in zip((planes, rows, columns), shape, strict=True):
            first, last = max(low - 1, 0), min(high + 1, length)
            coarse.append((first // 2, -(-last // 2)))
            kept.append(slice(first % 2, first % 2 + last - first))
            padding = [first - (low - 1), high + 1 - last, *padding]
        source = self._coarser.planes(*coarse[0])[:, :, :, slice(*coarse[1]), slice(*coarse[2])]
        upsampled = nn.functional.conv_transpose3d(source, self._merge_weights.upsampling, stride=2)[:, :, *kept]
        convolved: Tensor = self._merge_weights.of_upsampled(nn.functional.pad(upsampled, padding))
        return convolved

    def _add_shortcut(self, start: int, stop: int, result: Tensor) -> None:
        super()._add_shortcut(start, stop, result)
        coarse = self._coarser.planes(start // 2, -(-stop // 2))
        rows = coarse.movedim(1, -1).reshape(-1, coarse.shape[1])
        eighths = (rows @ self._merge_weights.coarse_shortcut).reshape(*coarse.movedim(1, -1).shape[:-1], -1)
        _add_eighths(eighths.movedim(-1, 1), result, [0, 0, 0])


def _add_product(source: Tensor, weight: Tensor | None, result: Tensor) -> None:
    """Add the product of the channels of ``source`` with ``weight`` ``[C, C']`` to ``result``; None adds ``source``."""
    if weight is None:
        result += source
        return
    rows = source.movedim(1, -1).reshape(-1, source.shape[1])
    result.movedim(1, -1).view(-1, result.shape[1]).addmm_(rows, weight)


def _add_eighths(eighths: Tensor, result: Tensor, offset: list[int]) -> None:
    """Add values at half the resolution, eight for each voxel, to values at full resolution.

    Args:
        eighths: values ``[1, 8 C, n, X', Y']``; the channels are those of the eight voxels, the last axis fastest.
        result: values ``[1, C, n', X, Y]`` to which those inside are added.
        offset: index in ``result`` of the first of the eight voxels of the first value, along each axis.
    """
    channels = result.shape[1]
    for eighth in range(8):
        parts: list[tuple[slice, slice]] = []
        for axis, shift in enumerate((eighth >> 2 & 1, eighth >> 1 & 1, eighth & 1)):
            first = offset[axis] + shift
            skipped = -(first // 2) if first < 0 else 0
            first += 2 * skipped
            count = max(min(eighths.shape[2 + axis] - skipped, -(-(result.shape[2 + axis] - first) // 2)), 0)
            parts.append((slice(skipped, skipped + count), slice(first, first + 2 * count, 2)))
        (from_z, to_z), (from_x, to_x), (from_y, to_y) = parts
        values = eighths[:, eighth * channels : (eighth + 1) * channels, from_z, from_x, from_y]
        result[:, :, to_z, to_x, to_y] += values


class _PeriodicRectifier(nn.Module):
    """An :class:`AirRectifier` for planes ``[1, C, n, X, Y]``.

    Attributes:
        bias: one period, ``[p, p, p, C]`` along z, x, y; None if the convolution before the rectifier adds it.
        floor: one period, ``[p, p, p, C]``; None means 0.

    Args:
        rectifier: the rectifier in air.
        shifted: whether the result is shifted. The finest features are not, because no convolution reads them.
    """

    bias: Tensor | None
    floor: Tensor | None

    def __init__(self, rectifier: nn.Module, *, shifted: bool = True) -> None:
        super().__init__()
        assert isinstance(rectifier, AirRectifier)  # noqa: S101 - narrows the type for the checker
        bias = (rectifier.bias if shifted else rectifier.bias - rectifier.floor).permute(3, 1, 2, 0).contiguous()
        constant = len(bias) == 1
        self.constant_bias = bias[0, 0, 0] if constant else None
        self.register_buffer("bias", None if constant else bias)
        self.register_buffer("floor", rectifier.floor.permute(3, 1, 2, 0).contiguous() if shifted else None)

    def rectify(self, values: Tensor, start: int, result: Tensor) -> None:
        """Rectify planes ``[1, C, n, X, Y]``, channels last, from the plane ``start`` on; ``values`` is changed."""
        if self.bias is not None:
            for part, bias in _parts(values, start, self.bias):
                part.add_(bias)
        if self.floor is None:
            torch.clamp_min(values, 0, out=result)
            return
        written = (part for part, _ in _parts(result, start, self.floor))
        for (part, floor), out in zip(_parts(values, start, self.floor), written, strict=True):
            torch.maximum(part, floor, out=out)

    def unshifted(self, planes: Tensor, start: int) -> Tensor:
        """Return rectified planes ``[1, C, n, X, Y]`` without the shift."""
        if self.floor is None:
            return planes
        result = planes.clone()
        for part, floor in _parts(result, start, self.floor):
            part.sub_(floor)
        return result


def _parts(planes: Tensor, start: int, period: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield views of planes with whole periods along x and y, or with a rest, each with the period that belongs to it.

    Args:
        planes: planes ``[1, C, n, X, Y]``, channels last.
        start: position of the first plane.
        period: one period, ``[p, p, p, C]`` along z, x, y.

    Yields:
        A view ``[n, k, x, k', y, C]``, and a part of the period, ``[n, 1, x, 1, y, C]``.
    """
    last, length = planes.movedim(1, -1)[0], len(period)
    if length > 1:
        period = period[torch.arange(start, start + len(last), device=period.device) % length]
    whole_x, whole_y = (side - side % length for side in last.shape[1:3])
    for rows in (last[:, :whole_x].unflatten(1, (-1, length)) if whole_x else None, last[:, None, whole_x:]):
        if rows is None or not rows.shape[2]:
            continue
        whole = rows[:, :, :, :whole_y].unflatten(3, (-1, length)) if whole_y else None
        for part in (whole, rows[:, :, :, None, whole_y:]):
            if part is not None and part.shape[4]:
                yield part, period[:, None, : part.shape[2], None, : part.shape[4]]


class _DownWeights(nn.Module):
    """The convolutions and rectifiers of a residual block in air, for planes along z and without padding along z.

    Attributes:
        shortcut: weight ``[C, C']`` of the shortcut; None if the block has no convolution there.
    """

    shortcut: Tensor | None

    def __init__(self, block: ResidualBlock) -> None:
        super().__init__()
        shortcut: Tensor | None = None
        if isinstance(block.shortcut, ConvolutionNorm):
            shortcut = _planes_first(block.shortcut)[:, :, 0, 0, 0].T
        self.register_buffer("shortcut", shortcut if shortcut is None else shortcut.float().contiguous())
        self.inner_rectifier = _PeriodicRectifier(block.inner_rectifier)
        self.rectifier = _PeriodicRectifier(block.rectifier)
        stride = int(block.first.convolution.stride[0])
        self.first = _PlaneConvolution(_planes_first(block.first), self.inner_rectifier.constant_bias, stride=stride)
        self.second = _PlaneConvolution(_planes_first(block.second), self.rectifier.constant_bias)


class _MergeWeights(_DownWeights):
    """The convolutions of a decoder level: those of the skip features, and those of the coarser features.

    Attributes:
        coarse_shortcut: weight ``[C_coarse, 8 C']`` of the shortcut of the upsampled features.
        upsampling: weight ``[C_coarse, C, 2, 2, 2]`` of the transposed convolution.
    """

    coarse_shortcut: Tensor
    upsampling: Tensor

    def __init__(self, up: nn.Module, block: ResidualBlock, *, finest: bool) -> None:
        assert isinstance(up, nn.ConvTranspose3d)  # noqa: S101 - narrows the type for the checker
        super().__init__(block)
        self.rectifier = _PeriodicRectifier(block.rectifier, shifted=not finest)
        channels = up.out_channels
        first, shortcut = _planes_first(block.first), _planes_first(block.shortcut)[:, :, 0, 0, 0]
        self.first = _PlaneConvolution(first[:, channels:], None)
        upsampling = up.weight.detach().double().permute(0, 1, 4, 2, 3)  # [C_coarse, C, z, x, y]
        self.coarse = _PlaneConvolution(_of_coarser(upsampling, first[:, :channels]), None, padding=1)
        eighths = torch.einsum("icabd,oc->iabdo", upsampling, shortcut[:, :channels])
        self.register_buffer("upsampling", upsampling.float())
        self.of_upsampled = _PlaneConvolution(first[:, :channels], None, padding=0)
        self.register_buffer("coarse_shortcut", eighths.reshape(up.in_channels, -1).float().contiguous())
        self.shortcut = shortcut[:, channels:].T.float().contiguous()


def _of_coarser(upsampling: Tensor, kernel: Tensor) -> Tensor:
    """Return the kernel ``[8 C', C_coarse, 2, 2, 2]`` that a convolution of upsampled features is of coarser features.

    Along an axis, position p is between the coarser voxels p - 1 and p. It gives two finer voxels: the second half of
    voxel p - 1 and the first half of voxel p.

    Args:
        upsampling: weight of the transposed convolution, ``[C_coarse, C, 2, 2, 2]``.
        kernel: weight of the convolution, ``[C', C, 3, 3, 3]``.
    """
    # taps[half of the result, tap of the kernel, coarser voxel, half of that voxel]
    taps = kernel.new_zeros(2, 3, 2, 2)
    for half, tap in itertools.product(range(2), range(3)):
        finer = half + tap  # counted from the first half of the coarser voxel p - 1
        taps[half, tap, finer // 2, finer % 2] = 1
    outputs, inputs = kernel.shape[0], upsampling.shape[0]
    products = torch.einsum("ocklm,icuvw->oiklmuvw", kernel, upsampling)
    products = torch.einsum("akzu,oiklmuvw->aoizlmvw", taps, products)
    products = torch.einsum("blxv,aoizlmvw->aboizxmw", taps, products)
    products = torch.einsum("dmyw,aboizxmw->abdoizxy", taps, products)
    return products.reshape(8 * outputs, inputs, 2, 2, 2)


def _planes_first(layer: nn.Module) -> Tensor:
    """Return the weight of a folded convolution for the axes z, x, y instead of x, y, z, in float64."""
    assert isinstance(layer, ConvolutionNorm)  # noqa: S101 - narrows the type for the checker
    return layer.convolution.weight.detach().double().permute(0, 1, 4, 2, 3)


class _PlaneConvolution(nn.Module):
    """A convolution of planes ``[1, C, Z, X, Y]``, padded with zeros along X and Y only.

    Args:
        weight: weight ``[C', C, z, x, y]``.
        bias: bias ``[C']``, or None.
        stride: stride along each axis.
        padding: number of zeros along X and Y on each side; None means half of the kernel.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, *, stride: int = 1, padding: int | None = None) -> None:
        super().__init__()
        self.outputs = weight.shape[0]
        self.weight = nn.Parameter(weight.float().to(memory_format=torch.channels_last_3d, copy=True))
        self.bias = nn.Parameter(torch.zeros(self.outputs) if bias is None else bias.float())
        side = weight.shape[-1] // 2 if padding is None else padding
        self._stride, self._padding = [stride] * 3, [0, side, side]

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution of ``x``."""
        if x.device.type == "cpu" and torch.backends.mkldnn.is_available():
            # PyTorch would compute a few channels or voxels without oneDNN, which is slower.
            convolved: Tensor = torch.mkldnn_convolution(
                x, self.weight, self.bias, self._padding, self._stride, [1] * 3, 1
            )
            return convolved
        return nn.functional.conv3d(x, self.weight, self.bias, self._stride, self._padding)


def _residual_block(module: nn.Module) -> ResidualBlock:
    assert isinstance(module, ResidualBlock)  # noqa: S101 - narrows the type for the checker
    return module
