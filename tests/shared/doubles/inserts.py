"""Networks with trained or untrained inserts."""

from __future__ import annotations

import copy
import functools

import torch
from torch import nn

from fseft_edge.runtime.encoder.networks import build_network
from fseft_edge.runtime.encoder.networks.base import FeatureNetwork
from fseft_edge.runtime.encoder.networks.inserts import InsertKind, add_inserts, insert_parameters

SETTINGS = {
    "residual_unet": {"channels": [4, 6, 8]},
    "swin_unetr": {"feature_size": 12},
    "genesis_unet": {"width": 3},
}
FITTING: list[tuple[str, InsertKind]] = [
    ("swin_unetr", "adaptformer"),
    ("swin_unetr", "compacter"),
    ("swin_unetr", "med-adapter"),
    ("residual_unet", "med-adapter"),
    ("genesis_unet", "med-adapter"),
]


def network_with(architecture: str, inserts: InsertKind | None, *, trained: bool = False) -> FeatureNetwork:
    """Return a small network. Networks of one architecture have the same weights, except for the inserts.

    A SwinUNETR has no blocks in the first stage, which would take most of the time, and one block in the other stages.
    """
    network = copy.deepcopy(_plain(architecture))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        if inserts is not None:
            add_inserts(network, inserts)
        if trained:
            parameters = dict(network.named_parameters())
            for name in insert_parameters(network):
                change = parameters[name].data
                change += 0.1 * torch.randn_like(change)
    return network.eval()


@functools.cache
def _plain(architecture: str) -> FeatureNetwork:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        network = build_network(architecture, **SETTINGS[architecture])
        if architecture == "swin_unetr":
            for stage in range(1, 5):
                layer = network.get_submodule(f"swinViT.layers{stage}.0")
                layer.blocks = nn.ModuleList() if stage == 1 else layer.get_submodule("blocks")[:1]
        for module in network.modules():
            if isinstance(module, nn.BatchNorm3d) and module.running_mean is not None:
                nn.init.normal_(module.running_mean, std=0.3)
    return network
