"""Variations of annotated scans: scans that imitate another patient or another scanner.

Fine-tuning and pre-training make a new variation in every training step. With cached features, only a few variations of
a scan are possible, because each variation must be encoded. A variation is a scan and its annotation, rotated, scaled
and changed in image style on the grid.
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

_MAX_WINDOWS, _DEFAULT_VARIATIONS = 16, 8
_SIZE_MULTIPLE = 2  # voxels along every axis; :func:`restyle` may average pairs of slices


@dataclass(frozen=True, eq=False)
class Variation:
    """A synthetic variation of a scan.

    Attributes:
        volume: float32 HU on the grid, limited to the HU window of the encoder.
        shares: share of each voxel that each organ fills, from 0 to 255 (the complete voxel), uint8 ``[K, X, Y, Z]``.
    """

    volume: Volume
    shares: NDArray[np.uint8]


def default_variations(shots: int, windows: int) -> int:
    """Return the default number of variations of a scan: 8 if it is the only scan and has at most 16 windows, else 0.

    With five scans, variations did not improve the result. For a scan of many windows, encoding a variation takes as
    long as encoding the scan.

    Args:
        shots: number of scans in the support set.
        windows: number of windows of the scan.
    """
    return _DEFAULT_VARIATIONS if shots == 1 and windows <= _MAX_WINDOWS else 0


def vary(
    volume: Volume, grid: Grid, masks: Iterable[NDArray[np.bool_]], *, margin: int, random: np.random.Generator
) -> Variation:
    """Return a variation of a scan: rotated and scaled about its centre, restyled, and cropped to its organs.

    Args:
        volume: the scan.
        grid: grid of the scan.
        masks: masks of the organs, on the lattice of the scan.
        margin: number of grid voxels to keep around the organs.
        random: generator for all random choices.
    """
    turn = random_turn(random, grid.preprocessing.spacing)
    image = _transformed(grid.section(volume, 0, grid.shape[2]), turn)
    # The organs are transformed one by one and stored as bytes. All organs as floats would need many times the memory
    # of the scan.
    shares = np.stack([np.rint(255 * _transformed(grid.occupancy(mask), turn)).astype(np.uint8) for mask in masks])
    box = _box_around(np.any(shares, axis=0), margin)
    first = np.array([part.start for part in box])
    low, high = grid.preprocessing.hu_window
    hu = low + (high - low) * restyle(torch.from_numpy(image[box]), random)
    affine = grid.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ first
    return Variation(Volume(hu.numpy(), affine), shares[:, *box].copy())


def _transformed(image: NDArray[np.float32], turn: Tensor) -> NDArray[np.float32]:
    """Sample an image ``[X, Y, Z]`` at the positions ``turn @ p``, with ``p`` relative to the centre; 0 outside."""
    size = torch.tensor(image.shape, dtype=torch.float32)[:, None]
    axes = [torch.arange(length, dtype=torch.float32) - (length - 1) / 2 for length in image.shape]
    position = turn @ torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1)
    normalised = (2 * position / size).flip(0).T.reshape(1, *image.shape, 3)
    source = torch.from_numpy(image)[None, None]
    turned = F.grid_sample(source, normalised, padding_mode="zeros", align_corners=False)
    values: NDArray[np.float32] = turned[0, 0].numpy()
    return values


def _box_around(mask: NDArray[np.bool_], margin: int) -> tuple[slice, slice, slice]:
    """Return the bounding box of a mask plus a margin, limited to the grid, with an even number of voxels per axis.

    If the mask is empty, because the rotation moved the organs out of the grid, the box is the complete grid.
    """
    whole = tuple(slice(0, length) for length in mask.shape)
    parts = []
    for part, length in zip(bounding_box(mask) if mask.any() else whole, mask.shape, strict=True):
        start, stop = max(part.start - margin, 0), min(part.stop + margin, length)
        parts.append(slice(start, stop - (stop - start) % _SIZE_MULTIPLE))
    x, y, z = parts
    return x, y, z


def random_turn(random: np.random.Generator, spacing: tuple[float, float, float]) -> Tensor:
    """Return a random rotation by up to 12 degrees about each axis, times a scale of 0.8 to 1.25, without reflection.

    Args:
        random: generator for all random choices.
        spacing: voxel spacing along x, y and z in mm.

    Returns:
        Matrix ``[3, 3]`` that applies to positions in voxels.
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
    """Return an image in the style of another scanner: changed contrast and brightness, blur or thick slices, noise.

    Args:
        image: ``[X, Y, Z]`` with even Z, scaled to 0..1 by the grid.
        random: generator for all random choices.
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
