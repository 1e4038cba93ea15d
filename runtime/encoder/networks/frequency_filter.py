"""Learned global filter of feature volumes of any size, computed with operators that all engines support."""

from __future__ import annotations

import contextlib
import math

import torch
from torch import Tensor, nn

_GRID = 4


class FrequencyFilter(nn.Module):
    """Filter that multiplies every frequency of every channel by a learned real gain, in float32.

    The filter computes ``F^-1(g F(x))`` with the 3D discrete Fourier transform F. The gain only depends on the absolute
    values of the frequencies along X, Y, Z, so that the filter does not shift features. The gain is learned on a small
    grid over 0 to 1/2 cycles per voxel along each axis, and is interpolated linearly to the frequencies of the volume.
    Therefore a filter has the same effect in windows of any size. The initial gain is 1, the identity.

    TensorRT has no Fourier transform, and ONNX engines only support a part of it. Therefore Hartley's transform is
    applied along one axis after the other: ``H[k, x] = cos(2 pi k x / N) + sin(2 pi k x / N)``. The rows of H mix a
    frequency with its negative, which has the same gain here, and ``H H = N``. Therefore ``H g H / N`` is the same
    function, computed with real numbers.

    Args:
        channels: number of feature channels.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(channels, _GRID, _GRID, _GRID))

    def forward(self, x: Tensor) -> Tensor:
        """Return the filtered features of ``x`` ``[n, C, X, Y, Z]``, in the number format of ``x``."""
        size = x.shape[2:]
        with _without_autocast(x):
            transforms = [_hartley(length, x.device) for length in size]
            spectrum = _along_axes(x.float(), transforms)
            spectrum = spectrum * _along_axes(self.gain, [_interpolation(length, x.device) for length in size])
            return _along_axes(spectrum, [transform / transform.shape[0] for transform in transforms]).to(x.dtype)


def _along_axes(x: Tensor, matrices: list[Tensor]) -> Tensor:
    """Return ``[..., X, Y, Z]`` multiplied by matrices ``[X', X]``, ``[Y', Y]``, ``[Z', Z]`` along the last axes."""
    for matrix in reversed(matrices):
        # Each step moves the last axis in front of the other two; after three steps, the order is as before.
        x = (x @ matrix.T).movedim(-1, -3)
    return x


def _hartley(length: int, device: torch.device) -> Tensor:
    """Return the matrix ``[N, N]`` of Hartley's transform, not normalised."""
    places = torch.arange(length, device=device)
    # The product is reduced modulo the length as integers, because large angles lose precision in float32.
    angles = (places[:, None] * places % length).float() * (2 * math.pi / length)
    return torch.cos(angles) + torch.sin(angles)


def _interpolation(length: int, device: torch.device) -> Tensor:
    """Return the interpolation weights ``[N, grid]`` of the grid's points for each of the N frequencies."""
    places = torch.arange(length, device=device)
    positions = torch.minimum(places, length - places).float() * (2 * (_GRID - 1) / length)
    points = torch.arange(_GRID, device=device)
    return (1 - (positions[:, None] - points).abs()).clamp(min=0)


def _without_autocast(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Return a context in which matrix products stay in float32, also inside training's autocast."""
    kind = x.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return contextlib.nullcontext()
