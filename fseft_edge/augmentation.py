"""How a scan might have looked otherwise: the patient turned and of another size, another scanner."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


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
