"""Blocks of feature maps: tiles, interpolation between levels, and voxels beyond the border of the map."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from doubles.features import random_features

from fseft_edge.adapters.blocks import Box, pad_to_boxes, read_block, tiles, upsample_into


def test_tiles_cover_every_voxel_once() -> None:
    shape = (37, 20, 41)
    seen = np.zeros(shape, int)
    for box in tiles(shape, (16, 16, 32)):
        seen[tuple(slice(*axis) for axis in box.ranges)] += 1
    assert (seen == 1).all()


@pytest.mark.parametrize("low", range(0, 9))
@pytest.mark.parametrize("length", [1, 2, 5, 8])
def test_upsampling_of_a_part_equals_the_part_of_the_upsampled_map(low: int, length: int) -> None:
    coarse = random_features((16, 16, 16), (3,)).tensors[0][None]
    whole = F.interpolate(coarse, scale_factor=2, mode="trilinear", align_corners=False)
    low += 8
    box = Box((low, low + length), (9, 20), (8, 24))
    need = box.coarser()
    part = coarse[:, :, slice(*need.x), slice(*need.y), slice(*need.z)]
    wanted = whole[:, :, slice(*box.x), slice(*box.y), slice(*box.z)]
    torch.testing.assert_close(upsample_into(part, need, box), wanted, rtol=0, atol=1e-6)


def test_a_block_beyond_the_map_repeats_its_edge() -> None:
    features = random_features((8, 8, 8), (2, 3))
    boxes = [Box((-3, 5), (4, 11), (-2, 10)), Box((-4, -1), (5, 9), (1, 3))]
    for level, (box, block) in enumerate(zip(boxes, read_block(features, boxes), strict=True)):
        whole = features.tensors[level].numpy()
        index = np.ix_(
            range(whole.shape[0]),
            *(np.clip(range(*axis), 0, size - 1) for axis, size in zip(box.ranges, whole.shape[1:], strict=True)),
        )
        np.testing.assert_array_equal(block[0].numpy(), whole[index])


def test_interpolation_matrix_cached_in_inference_mode_can_be_used_in_training() -> None:
    coarse, box = Box((-3, 5), (-3, 5), (-3, 5)), Box((-4, 8), (-4, 8), (-4, 8))
    values = torch.randn(1, 2, *coarse.shape)
    with torch.inference_mode():
        first = upsample_into(values, coarse, box)
    trained = values.clone().requires_grad_()
    again = upsample_into(trained, coarse, box)
    torch.testing.assert_close(again.detach(), first.clone(), rtol=0, atol=0)
    again.sum().backward()
    assert float(trained.grad.sum()) == pytest.approx(again.numel(), rel=1e-5)  # the weights of a voxel have the sum 1


def test_interpolation_used_while_tracing_a_graph_can_be_used_afterwards() -> None:
    """Tracing replaces tensors by placeholders, and a placeholder must not remain in the cache of matrices."""
    coarse, box = Box((-3, 6), (-3, 6), (-3, 6)), Box((-4, 9), (-4, 9), (-4, 9))

    class Upsampling(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return upsample_into(x, coarse, box)

    values = torch.randn(1, 2, *coarse.shape)
    traced = torch.export.export(Upsampling(), (values,)).module()
    torch.testing.assert_close(traced(values), upsample_into(values, coarse, box), rtol=0, atol=1e-6)


def test_padding_of_a_map_in_memory_equals_reading_of_a_map_on_disk() -> None:
    features = random_features((8, 8, 8), (2, 3))
    boxes = [Box((-3, 8), (0, 11), (-2, 10)), Box((-4, 5), (-1, 9), (0, 4))]
    blocks = pad_to_boxes([level[None] for level in features.tensors], boxes)
    for block, expected in zip(blocks, read_block(features, boxes), strict=True):
        assert torch.equal(block, expected)
