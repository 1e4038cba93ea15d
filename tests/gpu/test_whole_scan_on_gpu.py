"""Whole scans in one pass on a GPU: comparison with the network on the CPU."""

from __future__ import annotations

from typing import cast

import pytest
import torch

from fseft_edge.runtime.encoder.networks import build_network
from fseft_edge.runtime.encoder.networks.residual_unet import ResidualUNet
from fseft_edge.runtime.encoder.networks.rolling import RollingResidualUNet
from fseft_edge.runtime.system.gpu_arithmetic import exact_float32

SHAPE = (32, 16, 136)


def features(network: RollingResidualUNet, image: torch.Tensor, *, on_disk: bool) -> list[torch.Tensor]:
    """Return the pyramid of a scan ``[X, Y, Z]``."""
    sections = [  # a tensor is valid until the next section
        [level.cpu().clone() for level in levels]
        for _, levels in network.features(lambda z0, z1: image[..., z0:z1], SHAPE, section=8, on_disk=on_disk)
    ]
    return [torch.cat(level, dim=-1) for level in zip(*sections, strict=True)]


@pytest.mark.gpu
@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize(("number", "bound"), [(torch.float32, 1e-4), (torch.float16, 5e-3)])
def test_features_of_a_whole_scan_equal_those_of_the_cpu(*, number: torch.dtype, bound: float, on_disk: bool) -> None:
    network = cast(ResidualUNet, build_network("residual_unet", channels=[4, 8, 8, 8])).eval().folded()
    image = torch.rand(SHAPE)
    with torch.no_grad():
        expected = network(image[None, None])
    with exact_float32():
        found = features(RollingResidualUNet(network, number).to("cuda"), image, on_disk=on_disk)
        again = features(RollingResidualUNet(network, number).to("cuda"), image, on_disk=on_disk)
    for a, b, c in zip(expected, found, again, strict=True):
        assert float((a[0] - b).abs().max()) <= bound * float(a.abs().max())
        assert torch.equal(b, c)
