"""Formulas for the memory of the networks' tensors: comparison with all storages of a forward pass."""

from __future__ import annotations

import math

import pytest
import torch
from doubles.errors import refused
from doubles.storages import LiveStorage

from fseft_edge.runtime.encoder.backends.pytorch import inference_network
from fseft_edge.runtime.encoder.networks import build_network
from fseft_edge.runtime.encoder.networks.base import FeatureNetwork
from fseft_edge.runtime.encoder.networks.inserts import INSERTS, InsertKind
from fseft_edge.runtime.encoder.networks.peak_memory import Window, activation_bytes
from fseft_edge.runtime.encoder.networks.residual_unet import ResidualUNet
from fseft_edge.runtime.encoder.networks.slabwise import SlabwiseResidualUNet
from fseft_edge.runtime.errors import EncoderBundleError


def peak_bytes(network: torch.nn.Module, window: Window, device: str) -> int:
    windows = torch.zeros(1, 1, *window, device=device)
    with torch.no_grad(), LiveStorage() as live:
        network(windows)
    return live.peak


def without_values(architecture: str, **settings: object) -> FeatureNetwork:
    """Return a network on the meta device, whose tensors have no values."""
    return build_network(architecture, **settings).to("meta").eval()


@pytest.mark.parametrize("slabwise", [False, True])
@pytest.mark.parametrize(
    ("channels", "window"),
    [
        ((16, 32, 64, 128, 128), (48, 48, 48)),
        ((4, 8), (16, 16, 16)),
        ((4, 6, 8), (32, 32, 32)),
        ((8, 16, 32, 64, 64), (64, 96, 32)),
    ],
)
def test_compact_encoder_is_exact(channels: tuple[int, ...], window: Window, slabwise: bool) -> None:
    network: torch.nn.Module = ResidualUNet(channels).folded()
    if slabwise:
        network = SlabwiseResidualUNet(network)
    expected = peak_bytes(network, window, "cpu")
    if slabwise:  # its views of the input count as if the forward pass had allocated the input
        expected -= 4 * math.prod(window)
    assert activation_bytes("residual_unet", {"channels": channels}, window, slabwise=slabwise) == expected


@pytest.mark.parametrize("slabwise", [False, True])
@pytest.mark.parametrize(
    ("channels", "window"), [((16, 32, 64, 128, 128), (48, 48, 48)), ((4, 8), (16, 16, 16)), ((4, 6, 8), (32, 32, 32))]
)
def test_compact_encoder_with_adapters_within_one_percent(
    channels: tuple[int, ...], window: Window, slabwise: bool
) -> None:
    settings = {"channels": channels, "inserts": "med-adapter"}
    network = inference_network(build_network("residual_unet", **settings), whole_scan=False)
    # Views of parameters, and the slab-wise network's views of the input, count as if the forward pass had allocated
    # these tensors.
    views = sum(4 * values.numel() for name, values in network.named_parameters() if name.endswith("gain"))
    if slabwise:
        assert isinstance(network, ResidualUNet)
        network = SlabwiseResidualUNet(network)
        views += 4 * math.prod(window)
    measured = peak_bytes(network, window, "cpu") - views
    assert 1.0 <= activation_bytes("residual_unet", settings, window, slabwise=slabwise) / measured <= 1.01


@pytest.mark.parametrize("inserts", INSERTS)
def test_swin_unetr_with_inserts_within_ten_percent(inserts: InsertKind) -> None:
    settings = {"feature_size": 12, "inserts": inserts}
    predicted = activation_bytes("swin_unetr", settings, (96, 64, 64), slabwise=True)
    assert 1.0 <= predicted / peak_bytes(without_values("swin_unetr", **settings), (96, 64, 64), "meta") <= 1.1


@pytest.mark.parametrize(
    ("feature_size", "window"), [(48, (96, 96, 96)), (24, (96, 96, 96)), (48, (64, 64, 64)), (60, (64, 96, 64))]
)
def test_swin_unetr_within_ten_percent(feature_size: int, window: Window) -> None:
    network = without_values("swin_unetr", feature_size=feature_size)
    predicted = activation_bytes("swin_unetr", {"feature_size": feature_size}, window, slabwise=True)
    assert 1.0 <= predicted / peak_bytes(network, window, "meta") <= 1.1


@pytest.mark.parametrize(("width", "window"), [(32, (96, 96, 96)), (4, (16, 32, 16)), (8, (64, 64, 32))])
def test_genesis_unet_within_one_percent(width: int, window: Window) -> None:
    network = without_values("genesis_unet", width=width)
    predicted = activation_bytes("genesis_unet", {"width": width}, window, slabwise=True)
    assert 0.99 <= predicted / peak_bytes(network, window, "meta") <= 1.01


def test_genesis_unet_with_adapters_within_one_percent() -> None:
    settings = {"width": 16, "inserts": "med-adapter"}
    measured = peak_bytes(without_values("genesis_unet", **settings), (64, 64, 32), "meta")
    assert 0.99 <= activation_bytes("genesis_unet", settings, (64, 64, 32), slabwise=True) / measured <= 1.01


def test_memory_of_an_imported_network_is_read_from_its_settings() -> None:
    assert activation_bytes("imported", {"activation_bytes": 12345}, (8, 8, 8), slabwise=True) == 12345


def test_an_unknown_architecture_is_refused() -> None:
    with refused(EncoderBundleError, "net_of_2030"):
        activation_bytes("net_of_2030", {}, (96, 96, 96), slabwise=False)
