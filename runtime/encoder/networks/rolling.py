"""Forward pass of the compact encoder over a whole scan: one pass along z, with some planes of each level in memory.

The features of a :class:`ResidualUNet` with folded normalisations depend on the surroundings of a voxel alone. The
network therefore needs no windows: every convolution runs once over the whole grid. The planes of the grid stream
through the network. Each block computes the next planes as soon as its input contains them, and keeps the two planes of
its inner tensor that its next planes need. Nothing is computed twice, and no value depends on the available memory.

A decoder level needs the features of the deepest stage, which are some 75 planes of the grid ahead. Skip features wait
for that time in ring buffers, so the memory depends on the size of the planes and not on their number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fseft_edge.runtime.encoder.blend import FileTensor
from fseft_edge.runtime.encoder.networks.residual_unet import ConvolutionNorm, ResidualBlock, ResidualUNet

STEP = 32
"""Planes of the grid in a step, a multiple of the stride of the deepest stage. The sizes of all computations follow
from it, so that a memory budget has no effect on the features."""

_SLAB = 4
"""Planes that a block computes at a time on a CPU, so that their intermediate values stay in the cache."""

Range = tuple[int, int]

_Fill = Callable[[int, Tensor], None]


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
        planes: number of planes of the padded grid; a multiple of the stride of the deepest stage.
        stages: number of encoder stages.
        step: number of planes of the finest level in a step.
    """
    lengths = [planes >> level for level in range(stages)]
    steps = []
    for start in range(0, planes, step):
        merge = [min(start + step, planes)]
        for length in lengths[1:]:
            # The residual block needs two planes more than it computes. An even number of planes comes from whole
            # planes of the coarser level.
            needed = -(-(merge[-1] + 2) // 2)
            merge.append(min(needed + needed % 2, length))
        down = [merge.pop()]
        for length, merged in zip(reversed(lengths[:-1]), reversed(merge), strict=True):
            down.append(min(max(2 * down[-1] + 2, merged + 2), length))
        down.reverse()
        steps.append(Stops(min(down[0] + 2, planes), tuple(down), tuple(merge)))
    return steps


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


class RollingResidualUNet(nn.Module):
    """Network for inference that computes the features of a folded :class:`ResidualUNet` plane by plane.

    Args:
        network: network with folded normalisations and without inserted modules.
        dtype: number format of the computation.
    """

    def __init__(self, network: ResidualUNet, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.levels = network.levels
        self.dtype = dtype
        self._down = nn.ModuleList(_BlockWeights(_residual_block(block)) for block in network.down)
        self._merge = nn.ModuleList(_BlockWeights(_residual_block(block)) for block in network.merge)
        self._up = nn.ModuleList(_Upsampling(layer) for layer in network.up)
        self.to(dtype)

    @torch.no_grad()
    def features(
        self,
        read: Callable[[int, int], Tensor],
        shape: tuple[int, int, int],
        *,
        on_disk: bool = False,
    ) -> Iterator[tuple[Range, list[Tensor]]]:
        """Compute the features of a padded grid.

        Args:
            read: function that returns the planes ``z0:z1`` of the padded grid, ``[X, Y, z1 - z0]``, for ``(z0, z1)``.
                It is called once for each plane, in order.
            shape: shape of the padded grid; each side is a multiple of the stride of the deepest stage.
            on_disk: keep the ring buffers in temporary files.

        Yields:
            The range of planes of a step, and their final features, ``[C_l, X / s, Y / s, n / s]`` for each level,
            finest first. The tensors are only valid until the next step.
        """
        yield from _Pass(self, shape, on_disk=on_disk).run(read)


class _Pass:
    """The computation of one scan: the position and the kept planes of every stage."""

    def __init__(self, network: RollingResidualUNet, shape: tuple[int, int, int], *, on_disk: bool) -> None:
        x, y, self._planes = shape
        parameter = next(network.parameters())
        stages = len(network._down)
        held = held_planes(self._planes, stages)
        slab = _SLAB if parameter.device.type == "cpu" else STEP

        def ring(planes: int, channels: int, level: int) -> _Ring:
            return _Ring((planes, x >> level, y >> level, channels), parameter, on_disk=on_disk)

        widths = [weights.outputs for weights in network._down]
        self._dtype, self._device = parameter.dtype, parameter.device
        self._image = ring(held.image, 1, 0)
        self._skips = [ring(*sizes, level) for level, sizes in enumerate(zip(held.down, widths, strict=True))]
        self._merged = [ring(*sizes, level) for level, sizes in enumerate(zip(held.merge, widths[:-1], strict=True))]
        self._down: list[_Block | _StridedBlock] = []
        for level, weights in enumerate(network._down):
            kind = _StridedBlock if level else _Block
            self._down.append(kind(weights, self._skips[level], self._planes >> level, slab))
        self._merge = [
            _Block(weights, self._merged[level], self._planes >> level, slab)
            for level, weights in enumerate(network._merge)
        ]
        self._up = network._up
        self._stages = stages

    def run(self, read: Callable[[int, int], Tensor]) -> Iterator[tuple[Range, list[Tensor]]]:
        """Yield the features of all steps (arguments as in :meth:`RollingResidualUNet.features`)."""
        done = arrived = 0
        for stops in schedule(self._planes, self._stages):
            for start in range(arrived, stops.image, STEP):
                stop = min(start + STEP, stops.image)
                planes = read(start, stop).to(self._device, self._dtype)
                self._image.write(start, planes.movedim(-1, 0)[None, None])
            arrived = stops.image
            source = self._image
            for block, ring, stop in zip(self._down, self._skips, stops.down, strict=True):
                block.advance(stop, source.copy_into)
                source = ring
            for level in reversed(range(self._stages - 1)):
                self._merge[level].advance(stops.merge[level], self._beside_skip(level))
            planes_done = (done, stops.merge[0])
            yield (
                planes_done,
                [
                    ring.joined(done >> level, stops.merge[0] >> level).movedim(2, -1)[0]
                    for level, ring in enumerate(self._merged)
                ],
            )
            done = stops.merge[0]

    def _beside_skip(self, level: int) -> _Fill:
        """Return the function that fills the input of a decoder level: upsampled features and skip features."""
        coarser = self._merged[level + 1] if level + 2 < self._stages else self._skips[-1]
        skip, up = self._skips[level], self._up[level]

        def fill(start: int, target: Tensor) -> None:
            channels, filled = target.shape[1] // 2, 0
            for part in coarser.parts(start // 2, (start + target.shape[2]) // 2):
                length = 2 * part.shape[2]
                up(part, target[:, :channels, filled : filled + length])
                filled += length
            skip.copy_into(start, target[:, channels:])

        return fill


class _Ring:
    """The last planes of a tensor ``[1, C, Z, X, Y]``, channels last.

    Args:
        shape: number of kept planes, X, Y and number of channels.
        like: tensor with the number format and the device of the planes.
        on_disk: keep the planes in a temporary file.
    """

    def __init__(self, shape: tuple[int, int, int, int], like: Tensor, *, on_disk: bool) -> None:
        self._capacity = shape[0]
        self._file: FileTensor | None = FileTensor(shape) if on_disk else None
        planes = torch.zeros(shape, dtype=like.dtype, device=like.device) if self._file is None else self._file.tensor
        self._planes = planes.movedim(-1, 0)[None]

    def parts(self, start: int, stop: int) -> list[Tensor]:
        """Return the planes ``start:stop`` as one or two views ``[1, C, n, X, Y]``."""
        if start >= stop:
            return []
        first = start % self._capacity
        fitting = min(stop - start, self._capacity - first)
        views = [self._planes[:, :, first : first + fitting]]
        if fitting < stop - start:
            views.append(self._planes[:, :, : stop - start - fitting])
        return views

    def write(self, start: int, planes: Tensor) -> None:
        """Write planes ``[1, C, n, X, Y]`` from the plane ``start`` on."""
        self._each_part(start, planes, lambda part, values: part.copy_(values))

    def write_rectified(self, start: int, planes: Tensor) -> None:
        """Write ``ReLU(planes)`` from the plane ``start`` on."""
        self._each_part(start, planes, lambda part, values: torch.clamp_min(values, 0, out=part))

    def copy_into(self, start: int, target: Tensor) -> None:
        """Copy the planes from ``start`` on into ``target`` ``[1, C, n, X, Y]``."""
        self._each_part(start, target, lambda part, values: values.copy_(part))

    def joined(self, start: int, stop: int) -> Tensor:
        """Return the planes ``start:stop``, as a view where possible."""
        views = self.parts(start, stop)
        return views[0] if len(views) == 1 else torch.cat(views, 2)

    def _each_part(self, start: int, planes: Tensor, act: Callable[[Tensor, Tensor], object]) -> None:
        done = 0
        for part in self.parts(start, start + planes.shape[2]):
            act(part, planes[:, :, done : done + part.shape[2]])
            done += part.shape[2]
        if self._file is not None:
            self._file.release()


class _Block:
    """A residual block of stride 1 that computes its planes in order.

    Args:
        weights: convolutions of the block.
        output: receiver of the features.
        length: number of planes of the level.
        slab: number of planes to compute at a time.
    """

    def __init__(self, weights: nn.Module, output: _Ring, length: int, slab: int) -> None:
        assert isinstance(weights, _BlockWeights)  # noqa: S101 - narrows the type for the checker
        self._weights, self._output, self._length, self._slab = weights, output, length, slab
        self._position = 0
        self._last = slab
        # For planes from `position` on, `input` contains the input from `position` on, and `inner` the inner tensor
        # from `position - 1` on.
        self._input: Tensor | None = None
        self._inner: Tensor | None = None

    def advance(self, stop: int, fill: _Fill) -> None:
        """Compute the planes up to ``stop``.

        Args:
            stop: one past the last plane to compute.
            fill: function that writes the planes of the block's input from ``start`` on into a tensor
                ``[1, C, n, X, Y]``. It is called for ascending, adjacent ranges, even ones if all stops are even.
        """
        if self._input is None or self._inner is None:
            self._input, self._inner = self._started(fill)
        source, inner, weights = self._input, self._inner, self._weights
        while self._position < stop:
            start, end = self._position, min(self._position + self._slab, stop)
            count = end - start
            source[:, :, :2] = source[:, :, self._last : self._last + 2].clone()
            inner[:, :, :2] = inner[:, :, self._last : self._last + 2].clone()
            filled = min(end + 2, self._length)
            if filled > start + 2:
                fill(start + 2, source[:, :, 2 : filled - start])
            source[:, :, filled - start : count + 2] = 0
            torch.clamp_min(weights.first(source[:, :, : count + 2]), 0, out=inner[:, :, 2 : count + 2])
            if end == self._length:  # outside the grid, the second convolution needs zeros as inner tensor
                inner[:, :, count + 1] = 0
            result = weights.second(inner[:, :, : count + 2])
            result += weights.shortcut(source[:, :, :count])
            self._output.write_rectified(start, result)
            self._position, self._last = end, count

    def _started(self, fill: _Fill) -> tuple[Tensor, Tensor]:
        """Return the buffers, whose last two planes are the input and the inner tensor before the first slab."""
        weights, plane = self._weights, self._output.joined(0, 1)
        source = _planes_like(plane, weights.inputs, self._slab + 2)
        inner = _planes_like(plane, weights.outputs, self._slab + 2)
        first = _planes_like(plane, weights.inputs, 3)
        available = min(2, self._length)
        fill(0, first[:, :, 1 : 1 + available])
        source[:, :, self._slab :] = first[:, :, 1:]
        torch.clamp_min(weights.first(first), 0, out=inner[:, :, self._slab + 1 :])
        return source, inner


class _StridedBlock(_Block):
    """A residual block of stride 2 that computes its planes in order."""

    def advance(self, stop: int, fill: _Fill) -> None:
        """Compute the planes up to ``stop`` (arguments as in :meth:`_Block.advance`; any ranges of the input)."""
        weights = self._weights
        if self._inner is None:
            plane = self._output.joined(0, 1)
            self._inner = _planes_like(plane, weights.outputs, self._slab + 2)
            finer = plane.new_empty(1, 1, 1, 2 * plane.shape[3], 2 * plane.shape[4])
            self._input = _planes_like(finer, weights.inputs, 2 * self._slab + 2)
            first = _planes_like(finer, weights.inputs, 3)
            fill(0, first[:, :, 1:])
            torch.clamp_min(weights.first(first), 0, out=self._inner[:, :, self._slab + 1 :])
        assert self._input is not None  # noqa: S101 - set together with the inner tensor
        source, inner = self._input, self._inner
        while self._position < stop:
            start, end = self._position, min(self._position + self._slab, stop)
            count = end - start
            filled = min(2 * end + 2, 2 * self._length)
            fill(2 * start, source[:, :, : filled - 2 * start])
            inner[:, :, :2] = inner[:, :, self._last : self._last + 2].clone()
            new = min(end + 1, self._length) - (start + 1)
            if new:
                below = source[:, :, 1 : 2 * new + 2]
                torch.clamp_min(weights.first(below), 0, out=inner[:, :, 2 : 2 + new])
            inner[:, :, 2 + new : count + 2] = 0
            result = weights.second(inner[:, :, : count + 2])
            result += weights.shortcut(source[:, :, : 2 * count])
            self._output.write_rectified(start, result)
            self._position, self._last = end, count


def _planes_like(plane: Tensor, channels: int, count: int) -> Tensor:
    """Return zeros ``[1, channels, count, X, Y]``, channels last, for the X and Y of ``plane``."""
    return plane.new_zeros(1, count, *plane.shape[3:], channels).movedim(-1, 1)


class _BlockWeights(nn.Module):
    """The convolutions of a folded residual block, for planes along z and without padding along z."""

    def __init__(self, block: ResidualBlock) -> None:
        super().__init__()
        self.inputs = block.first.convolution.in_channels
        self.outputs = block.second.convolution.out_channels
        self.first = _PlaneConvolution(block.first)
        self.second = _PlaneConvolution(block.second)
        self.shortcut: nn.Module = nn.Identity()
        if isinstance(block.shortcut, ConvolutionNorm):
            self.shortcut = _PlaneConvolution(block.shortcut)


class _PlaneConvolution(nn.Module):
    """A folded convolution of planes ``[1, C, Z, X, Y]``, padded with zeros along X and Y only."""

    def __init__(self, layer: ConvolutionNorm) -> None:
        super().__init__()
        folded = layer.convolution
        assert folded.bias is not None  # noqa: S101 - folding a normalisation gives a bias
        weight = folded.weight.detach().permute(0, 1, 4, 2, 3)  # from the axes x, y, z to z, x, y
        self.weight = nn.Parameter(weight.to(memory_format=torch.channels_last_3d, copy=True))
        self.bias = nn.Parameter(folded.bias.detach().clone())
        self._stride = [int(folded.stride[0])] * 3
        self._padding = [0, folded.kernel_size[0] // 2, folded.kernel_size[0] // 2]

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution of ``x``."""
        if x.device.type == "cpu" and torch.backends.mkldnn.is_available():
            # PyTorch would compute a few channels or voxels without oneDNN, which is slower.
            return torch.mkldnn_convolution(x, self.weight, self.bias, self._padding, self._stride, [1] * 3, 1)
        return torch.nn.functional.conv3d(x, self.weight, self.bias, self._stride, self._padding)


class _Upsampling(nn.Module):
    """A transposed convolution with kernel 2 and stride 2 of planes ``[1, C, Z, X, Y]``, as one matrix product."""

    def __init__(self, convolution: nn.Module) -> None:
        super().__init__()
        assert isinstance(convolution, nn.ConvTranspose3d)  # noqa: S101 - narrows the type for the checker
        inputs, outputs = convolution.in_channels, convolution.out_channels
        weight = convolution.weight.detach().permute(0, 4, 2, 3, 1)  # [C, z, x, y, C']
        self._weight = nn.Parameter(weight.reshape(inputs, 8 * outputs))
        bias = convolution.bias
        self._bias = nn.Parameter(torch.zeros(8 * outputs) if bias is None else bias.detach().repeat(8))

    def forward(self, coarse: Tensor, target: Tensor) -> None:
        """Upsample ``coarse`` ``[1, C, Z, X, Y]``, and write the result to ``target`` ``[1, C', 2 Z, 2 X, 2 Y]``."""
        rows = coarse.movedim(1, -1).reshape(-1, coarse.shape[1])
        z, x, y = coarse.shape[2:]
        # [1, Z, X, Y, 2, 2, 2, C'] to [1, Z, 2, X, 2, Y, 2, C']
        fine = torch.addmm(self._bias, rows, self._weight).reshape(1, z, x, y, 2, 2, 2, -1)
        view = target.movedim(1, -1).unflatten(3, (y, 2)).unflatten(2, (x, 2)).unflatten(1, (z, 2))
        view.copy_(fine.permute(0, 1, 4, 2, 5, 3, 6, 7))


def _residual_block(module: nn.Module) -> ResidualBlock:
    assert isinstance(module, ResidualBlock)  # noqa: S101 - narrows the type for the checker
    return module
