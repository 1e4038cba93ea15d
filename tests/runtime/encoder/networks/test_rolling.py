"""Pass of the compact encoder over a whole scan: comparison with the network on the whole grid."""

from __future__ import annotations

import pytest
import torch
from doubles.models import random_network
from doubles.storages import LiveStorage
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from fseft_edge.runtime.encoder.networks.rolling import (
    STEP,
    RollingResidualUNet,
    held_planes,
    level_lengths,
    schedule,
)

EDGE = (3, 5, 7, 8, 9)


def rolled(rolling: RollingResidualUNet, image: Tensor, *, section: int = STEP, on_disk: bool = False) -> list[Tensor]:
    """Return the features of a pass over a grid ``[X, Y, Z]``, after checking that the sections tile the grid."""
    done, parts = 0, []
    x, y, z = image.shape

    def read(start: int, stop: int) -> Tensor:
        return image[..., start:stop]

    for (start, stop), levels in rolling.features(read, (x, y, z), section=section, on_disk=on_disk):
        assert start == done < stop
        done = stop
        parts.append([level.clone() for level in levels])
    assert done == z
    return [torch.cat(level, dim=-1) for level in zip(*parts, strict=True)]


@pytest.mark.parametrize(
    ("channels", "shape"),
    [
        ((4, 8), (16, 12, 8)),
        ((4, 8), (1, 1, 1)),
        ((4, 6, 8), (12, 15, 37)),
        ((4, 8, 8, 8), (9, 16, 33)),
        (EDGE, (48, 16, 32)),
        (EDGE, (33, 47, 81)),
        (EDGE, (17, 18, 130)),
        (EDGE, (2, 31, 5)),
        (EDGE, (16, 1, 3)),
    ],
)
@torch.no_grad()
def test_equals_the_network_on_the_whole_grid(channels: tuple[int, ...], shape: tuple[int, int, int]) -> None:
    network = random_network(channels).in_air()
    rolling = RollingResidualUNet(network)
    assert rolling.levels == network.levels
    image = torch.rand(shape)
    for expected, features in zip(network(image[None, None]), rolled(rolling, image), strict=True):
        torch.testing.assert_close(features, expected[0], rtol=1e-4, atol=1e-5 * expected.abs().max().item())


@torch.no_grad()
def test_temporary_files_and_thinner_sections_change_no_bit() -> None:
    rolling = RollingResidualUNet(random_network(EDGE).in_air())
    image = torch.rand(20, 19, 70)
    expected = rolled(rolling, image)
    for features in (rolled(rolling, image, section=8), rolled(rolling, image, on_disk=True)):
        assert all(torch.equal(a, b) for a, b in zip(features, expected, strict=True))


@torch.no_grad()
@pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this CPU has no instructions for bfloat16 convolutions"
)
def test_bfloat16_is_close_to_float32() -> None:
    network = random_network(EDGE).in_air()
    image = torch.rand(16, 24, 40, generator=torch.Generator().manual_seed(0))
    exact = rolled(RollingResidualUNet(network), image)
    for expected, features in zip(exact, rolled(RollingResidualUNet(network, torch.bfloat16), image), strict=True):
        assert features.dtype == torch.float32
        error = (features - expected).abs().max() / expected.abs().max()
        assert 1e-4 < error < 0.1


@torch.no_grad()
def test_features_far_from_a_change_do_not_change() -> None:
    """The context of the network is the largest distance from which a voxel has an effect."""
    network = random_network((3, 4, 5))
    assert network.whole_scan is not None
    rolling, context = RollingResidualUNet(network.in_air()), network.whole_scan.context
    image = torch.rand(8, 8, 4 * context)
    changed = image.clone()
    changed[..., : 2 * context] = torch.rand(8, 8, 2 * context)
    for level, before, after in zip(network.levels, rolled(rolling, image), rolled(rolling, changed), strict=True):
        differs = (before != after).any(dim=(0, 1, 2))
        assert differs[: 2 * context // level.stride].all()
        assert not differs[3 * context // level.stride :].any()


@given(planes=st.integers(1, 400), stages=st.integers(2, 5))
@example(planes=1, stages=5)
def test_a_step_has_all_planes_that_it_needs(planes: int, stages: int) -> None:
    lengths = level_lengths(planes, stages)
    steps = schedule(planes, stages)
    assert [stops.merge[0] for stops in steps] == [*range(STEP, planes, STEP), planes]
    assert steps[-1].down == tuple(lengths)
    assert steps[-1].merge == tuple(lengths[:-1])
    for stops in steps:
        coarser = [*stops.merge[1:], stops.down[-1]]
        for level in range(stages - 1):
            assert 2 * coarser[level] >= min(stops.merge[level] + 2, lengths[level])
            assert stops.down[level] >= min(stops.merge[level] + 2, lengths[level])
            assert stops.down[level] >= min(2 * stops.down[level + 1] + 2, lengths[level])
        assert stops.image >= min(stops.down[0] + 2, planes)


@pytest.mark.parametrize("stages", [2, 3, 5])
def test_the_number_of_planes_in_memory_does_not_grow_with_the_scan(stages: int) -> None:
    assert held_planes(400, stages) == held_planes(2000, stages)


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize(("channels", "shape"), [((16, 32, 64, 128, 128), (40, 36, 150)), ((4, 6, 8), (64, 30, 60))])
@torch.no_grad()
def test_predicted_memory_is_enough_and_not_far_too_much(
    channels: tuple[int, ...], shape: tuple[int, int, int], on_disk: bool
) -> None:
    rolling = RollingResidualUNet(random_network(channels).in_air())
    planes = torch.rand(*shape[:2], 1)
    memory = rolling.memory(shape)
    with LiveStorage() as live:  # counts temporary files, too
        for _, levels in rolling.features(
            lambda start, stop: planes.expand(-1, -1, stop - start), shape, on_disk=on_disk
        ):
            levels.clear()
    used = memory.waiting + memory.kept
    assert 0.7 * memory.computing <= live.peak - used <= memory.computing
