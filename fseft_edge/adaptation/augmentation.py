"""Variations of annotated scans: how a scan might have looked with another patient or another scanner.

Fine-tuning and pre-training vary the scan anew in every step. Cached features can only be varied a few times: the scan
is turned, zoomed and restyled on the grid, its annotation with it, and encoded like any other scan.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fseft_edge.runtime.scans.components import bounding_box
from fseft_edge.runtime.scans.grid import Grid
from fseft_edge.runtime.scans.volume import Volume

_FEW_WINDOWS, _VARIATIONS = 16, 8
_MULTIPLE = 2  # of voxels along an axis: restyling may average pairs


@dataclass(frozen=True, eq=False)
class Variation:
    """A scan that never was.

    Attributes:
        volume: float32 HU, one voxel a grid voxel, within the encoder's HU window.
        shares: how much of each voxel each organ fills, 255 is all of it, uint8 ``[K, X, Y, Z]``.
    """

    volume: Volume
    shares: NDArray[np.uint8]


def default_variations(shots: int, windows: int) -> int:
    """Return how many variations of a scan are made where nobody says: 8 of a single scan that is soon encoded.

    With five scans they gained nothing, and one of a scan of many windows takes as long as the scan itself.

    Args:
        shots: scans of the support set.
        windows: that the encoder takes for the scan.
    """
    return _VARIATIONS if shots == 1 and windows <= _FEW_WINDOWS else 0


def vary(
    volume: Volume, grid: Grid, masks: Iterable[NDArray[np.bool_]], *, margin: int, random: np.random.Generator
) -> Variation:
    """Return a scan turned and zoomed about its middle and restyled, cut to what lies around its organs.

    Args:
        volume: the scan.
        grid: of the scan.
        masks: of its organs, on its own lattice.
        margin: grid voxels to keep around the organs.
        random: decides on everything.
    """
    turn = random_turn(random, grid.preprocessing.spacing)
    image = _turned(grid.section(volume, 0, grid.shape[2]), turn)
    # One organ after another, and as bytes: all of them as floats would be many times the scan.
    shares = np.stack([np.rint(255 * _turned(grid.occupancy(mask), turn)).astype(np.uint8) for mask in masks])
    box = _around(np.any(shares, axis=0), margin)
    first = np.array([part.start for part in box])
    low, high = grid.preprocessing.hu_window
    hu = low + (high - low) * restyle(torch.from_numpy(image[box]), random)
    affine = grid.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ first
    return Variation(Volume(hu.numpy(), affine), shares[:, *box].copy())


def _turned(image: NDArray[np.float32], turn: Tensor) -> NDArray[np.float32]:
    """Return an image ``[X, Y, Z]`` sampled where ``turn`` takes each voxel about the middle; 0 from beyond."""
    size = torch.tensor(image.shape, dtype=torch.float32)[:, None]
    axes = [torch.arange(length, dtype=torch.float32) - (length - 1) / 2 for length in image.shape]
    position = turn @ torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1)
    normalised = (2 * position / size).flip(0).T.reshape(1, *image.shape, 3)
    source = torch.from_numpy(image)[None, None]
    turned = F.grid_sample(source, normalised, padding_mode="zeros", align_corners=False)
    values: NDArray[np.float32] = turned[0, 0].numpy()
    return values


def _around(mask: NDArray[np.bool_], margin: int) -> tuple[slice, slice, slice]:
    """Return the box of a mask grown by a margin as far as the grid goes, an even number of voxels long.

    A mask that was turned out of the grid leaves the whole of it.
    """
    whole = tuple(slice(0, length) for length in mask.shape)
    parts = []
    for part, length in zip(bounding_box(mask) if mask.any() else whole, mask.shape, strict=True):
        start, stop = max(part.start - margin, 0), min(part.stop + margin, length)
        parts.append(slice(start, stop - (stop - start) % _MULTIPLE))
    x, y, z = parts
    return x, y, z


def random_turn(random: np.random.Generator, spacing: tuple[float, float, float]) -> Tensor:
    """Return a turn by up to 12 degrees about each axis times a zoom of 0.8 to 1.25, never a reflection.

    Args:
        random: decides on everything.
        spacing: mm between voxels along x, y and z.

    Returns:
        ``[3, 3]``, of positions in voxels.
    """
    turn = torch.eye(3)
    for axis, angle in enumerate(random.uniform(-np.pi / 15, np.pi / 15, 3)):
        i, j = [other for other in range(3) if other != axis]
        step = torch.eye(3)
        step[i, i] = step[j, j] = float(np.cos(angle))
        step[i, j], step[j, i] = -float(np.sin(angle)), float(np.sin(angle))
        turn = step @ turn
    turn = turn * float(np.exp(random.uniform(np.log(0.8), np.log(1.25))))
    if len(set(spacing)) == 1:
        return turn
    sizes = torch.tensor(spacing)
    return turn * sizes / sizes[:, None]


def restyle(image: Tensor, random: np.random.Generator) -> Tensor:
    """Return an image as another scanner might have shown it: contrast, brightness, blur or coarse slices, noise.

    Args:
        image: ``[X, Y, Z]`` with even Z, scaled to 0..1 by the grid.
        random: decides on everything.
    """
    image = image * random.uniform(0.8, 1.25) + random.uniform(-0.1, 0.1)
    if random.random() < 0.3:
        sigma = random.uniform(0.4, 1.0)
        tap = float(np.exp(-0.5 / sigma**2))
        kernel = torch.tensor([tap, 1.0, tap]) / (1 + 2 * tap)
        for shape in ((3, 1, 1), (1, 3, 1), (1, 1, 3)):
            image = F.conv3d(image[None, None], kernel.reshape(1, 1, *shape), padding="same")[0, 0]
    elif random.random() < 0.2:
        coarse = F.avg_pool3d(image[None, None], (1, 1, 2))
        image = F.interpolate(coarse, image.shape, mode="trilinear")[0, 0]
    noise = random.standard_normal(image.shape, dtype=np.float32) * random.uniform(0, 0.06)
    return (image + torch.from_numpy(noise)).clamp(0, 1)
