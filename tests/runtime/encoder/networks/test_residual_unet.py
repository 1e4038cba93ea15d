"""Whole scans in air: the compact encoder without a border."""

from __future__ import annotations

import torch
from doubles.models import random_network
from torch import Tensor
from torch.nn import functional as F

from fseft_edge.runtime.encoder.networks.residual_unet import ResidualUNet

CHANNELS = (4, 6, 8, 8)
MULTIPLE = 8


def inside(network: ResidualUNet, image: Tensor, margin: int) -> list[Tensor]:
    """Return the features of an image ``[X, Y, Z]`` that lies in a larger grid of zeros."""
    with torch.no_grad():
        pyramid = network(F.pad(image, [margin] * 6)[None, None])
    parts = []
    for level, features in enumerate(pyramid):
        where = [slice(margin >> level, (margin >> level) + -(-side >> level)) for side in image.shape]
        parts.append(features[0, :, *where])
    return parts


def errors(found: list[Tensor], expected: list[Tensor]) -> list[float]:
    return [float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True)]


def test_features_within_air_are_those_of_a_much_larger_grid() -> None:
    network = random_network(CHANNELS)
    image = torch.rand(16, 24, 8, generator=torch.Generator().manual_seed(0))
    expected = inside(network, image, 10 * MULTIPLE)
    assert max(errors(inside(network.in_air(), image, MULTIPLE), expected)) < 1e-5
    assert max(errors(inside(network, image, MULTIPLE), expected)) > 1e-4


def test_air_has_no_border() -> None:
    """The features of air repeat with the stride of the coarsest inner level, up to the border of any grid."""
    air = torch.zeros(1, 1, 19, 32, 27)
    with torch.no_grad():
        pyramid, bordered = random_network(CHANNELS).in_air()(air), random_network(CHANNELS)(air)
    for level, (features, other) in enumerate(zip(pyramid, bordered, strict=True)):
        period = MULTIPLE >> level
        again = features[..., :period].repeat(1, 1, 1, 1, 8)[..., : features.shape[-1]]
        torch.testing.assert_close(features, again)
        assert not torch.allclose(other, other[..., :period].repeat(1, 1, 1, 1, 8)[..., : other.shape[-1]], atol=0.01)


def test_a_scan_that_fills_the_grid_is_closer_to_the_scan_in_air() -> None:
    network = random_network(CHANNELS)
    image = torch.rand(16, 24, 24, generator=torch.Generator().manual_seed(1))
    expected = inside(network, image, 10 * MULTIPLE)
    with_air, without = (
        errors(inside(network.in_air(), image, 0), expected),
        errors(inside(network, image, 0), expected),
    )
    assert all(a < b for a, b in zip(with_air, without, strict=True))


def test_the_network_itself_is_not_changed() -> None:
    network = random_network(CHANNELS)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    network.in_air()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
