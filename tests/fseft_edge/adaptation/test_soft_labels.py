"""Occupancies of organs: blocks and positions, compared with the complete array."""

from __future__ import annotations

import numpy as np
import torch

from fseft_edge.adaptation.soft_labels import Occupancy
from fseft_edge.adapters.blocks import Box

SHAPE = (10, 12, 14)


def test_a_block_is_a_part_of_the_complete_array_and_zero_outside() -> None:
    random = np.random.default_rng(0)
    shares = np.zeros((3, *SHAPE), np.float32)
    shares[0, 2:5, 3:9, 0:4] = random.random((3, 6, 4))
    shares[1, 9, 11, 13] = 1.0  # a corner; organ 2 is absent
    occupancy = Occupancy(shares)
    padded = np.pad(shares, [(0, 0)] + [(16, 16)] * 3)
    for low in (*random.integers(-15, 14, (40, 3)), np.array([9, 11, 13]), np.array([-8, -8, -8])):
        core = Box(*((int(start), int(start) + 8) for start in low))
        expected = padded[:, *(slice(start + 16, start + 24) for start in low)]
        torch.testing.assert_close(occupancy.block(core), torch.from_numpy(expected), rtol=0, atol=0.5 / 255 + 1e-6)


def test_positions_are_the_voxels_that_are_at_least_half_filled() -> None:
    share = np.zeros(SHAPE)
    share[4, 5, 6], share[4, 5, 7], share[1, 0, 2] = 0.51, 0.49, 1.0
    occupancy = Occupancy([share, np.zeros(SHAPE)])
    assert occupancy.positions(0).tolist() == [[1, 0, 2], [4, 5, 6]]
    assert occupancy.positions(1).shape == (0, 3)
    assert len(occupancy) == 2
