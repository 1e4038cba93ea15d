"""Small networks with random weights and statistics, and models and graphs of these networks."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from fseft_edge.export.checkpoints import ModelDescription, ModelFile
from fseft_edge.export.onnx_graph import write_graph
from fseft_edge.runtime.encoder.bundle import BundleContents
from fseft_edge.runtime.encoder.networks.residual_unet import ResidualUNet
from fseft_edge.runtime.scans.preprocessing import Preprocessing

CHANNELS = (4, 6, 8)
WINDOW = (16, 16, 16)
ORGANS = ("liver", "spleen")


def random_network(channels: tuple[int, ...]) -> ResidualUNet:
    """Return a network whose normalisations are not the identity and whose biases are not zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        network = ResidualUNet(channels).eval()
        for module in network.modules():
            if isinstance(module, nn.BatchNorm3d):
                for values in (module.running_mean, module.weight, module.bias):
                    assert values is not None
                    nn.init.normal_(values, std=0.5)
                assert module.running_var is not None
                nn.init.uniform_(module.running_var, 0.5, 2.0)
            elif isinstance(module, nn.ConvTranspose3d) and module.bias is not None:
                nn.init.normal_(module.bias)
    return network


def small_network(seed: int = 0) -> ResidualUNet:
    """Return a residual U-Net whose batch normalisations are very different from the identity."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = ResidualUNet(CHANNELS).eval()
        for module in network.modules():
            if isinstance(module, nn.BatchNorm3d):
                module.running_mean.normal_(0.0, 0.3)
                module.running_var.uniform_(0.5, 2.0)
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0.0, 0.3)
    return network


@functools.cache
def small_graph_bytes(precision: Literal["float32", "mixed"] = "float32", *, whole_scan: bool = False) -> bytes:
    """Return the ONNX file of the small network; the export takes seconds, so all tests share the result.

    Args:
        precision: precision of the graph.
        whole_scan: whether the graph accepts windows of any size.
    """
    network = small_network()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "encoder.onnx"
        write_graph(network, WINDOW, path, precision, whole_scan=network.whole_scan if whole_scan else None)
        return path.read_bytes()


def small_model(seed: int = 0) -> ModelFile:
    """Return the small network as a model file of `fseft-edge pretrain`."""
    description = ModelDescription(
        name="small",
        architecture="residual_unet",
        settings={"channels": list(CHANNELS)},
        preprocessing=Preprocessing(spacing=(6.0, 6.0, 6.0)),
        window=WINDOW,
        organs=ORGANS,
        training={"seed": seed},
    )
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(len(ORGANS), CHANNELS[0], generator=generator)
    return ModelFile(description, small_network(seed).state_dict(), weight, torch.tensor([0.5, -0.25]))


def small_contents(seed: int = 0, **changes: object) -> BundleContents:
    """Return the small network as contents of an encoder bundle, without a graph."""
    entries: dict[str, object] = {
        "name": "small",
        "architecture": "residual_unet",
        "settings": {"channels": list(CHANNELS)},
        "preprocessing": Preprocessing(spacing=(6.0, 6.0, 6.0)),
        "window": WINDOW,
        "organs": ORGANS,
        "checkpoint_sha256": "0" * 64,
        "tools": {"fseft-edge": "0.0.0"},
        "parity": {},
        "network": small_network(seed),
        "head_weight": torch.ones(len(ORGANS), CHANNELS[0]),
        "head_bias": torch.tensor([0.5, -0.25]),
        "graph": None,
    }
    return BundleContents(**{**entries, **changes})  # type: ignore[arg-type]  # each entry has its own type


def windows(count: int, seed: int = 0) -> torch.Tensor:
    """Return input windows `[n, 1, X, Y, Z]`."""
    return torch.rand(count, 1, *WINDOW, generator=torch.Generator().manual_seed(seed))
