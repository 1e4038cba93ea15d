"""A learned global filter of feature volumes, for volumes of any size, in arithmetic that every engine has."""

from __future__ import annotations

import contextlib
import math

import torch
from torch import Tensor, nn

_GRID = 4


class FrequencyFilter(nn.Module):
    """Multiplies every frequency of every channel by a learned real gain, in float32.

    ``F^-1(g F(x))`` with the 3D discrete Fourier transform F. The gain depends on the absolute values of frequencies
    along X, Y, Z alone, so that the filter shifts nothing. It is learned on a small grid over 0 to 1/2 cycles a voxel
    along each axis and interpolated linearly to the frequencies of the volume at hand: a filter means the same in
    windows of any size. It starts as 1, the identity.

    TensorRT has no Fourier transform, and ONNX engines have it in part. Hartley's transform along one axis after the
    other takes its place: ``H[k, x] = cos(2 pi k x / N) + sin(2 pi k x / N)``. Its rows mix a frequency with its
    negative, which have the same gain here, and ``H H = N``. So ``H g H / N`` is the same function, in real products.

    Args:
        channels: of the features.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(channels, _GRID, _GRID, _GRID))

    def forward(self, x: Tensor) -> Tensor:
        """Return the filtered features of ``x`` ``[n, C, X, Y, Z]``, in its type."""
        size = x.shape[2:]
        with _without_autocast(x):
            transforms = [_hartley(length, x.device) for length in size]
            spectrum = _along_axes(x.float(), transforms)
            spectrum = spectrum * _along_axes(self.gain, [_interpolation(length, x.device) for length in size])
            return _along_axes(spectrum, [transform / transform.shape[0] for transform in transforms]).to(x.dtype)


def _along_axes(x: Tensor, matrices: list[Tensor]) -> Tensor:
    """Return ``[..., X, Y, Z]`` times a matrix ``[X', X]``, ``[Y', Y]``, ``[Z', Z]`` along each of its last axes."""
    for matrix in reversed(matrices):
        # The last axis comes to the front of the three each time, and is where it was after the third.
        x = (x @ matrix.T).movedim(-1, -3)
    return x


def _hartley(length: int, device: torch.device) -> Tensor:
    """Return Hartley's transform ``[N, N]``, not normalised."""
    places = torch.arange(length, device=device)
    # Whole turns are taken off while they are whole numbers: float32 would lose what is left of large angles.
    angles = (places[:, None] * places % length).float() * (2 * math.pi / length)
    return torch.cos(angles) + torch.sin(angles)


def _interpolation(length: int, device: torch.device) -> Tensor:
    """Return ``[N, grid]`` weights of the grid's points for each of the N frequencies of a transform."""
    places = torch.arange(length, device=device)
    positions = torch.minimum(places, length - places).float() * (2 * (_GRID - 1) / length)
    points = torch.arange(_GRID, device=device)
    return (1 - (positions[:, None] - points).abs()).clamp(min=0)


def _without_autocast(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Return what keeps matrix products in float32 where training lets them be shorter."""
    kind = x.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return contextlib.nullcontext()
