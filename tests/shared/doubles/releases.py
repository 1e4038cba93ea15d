"""The authors' networks, written without code of this toolkit, and checkpoints in the layouts of their releases."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from monai.networks.nets import swin_unetr
from torch import Tensor, nn
from torch.nn import functional as F

FEATURE_SIZE = 12
WIDTH = 4


def published_merging(module: nn.Module, x: Tensor) -> Tensor:
    """Patch merging of MONAI 0.9 to 1.5 and of FSEFT's network, slice by slice."""
    x0 = x[:, 0::2, 0::2, 0::2, :]
    x1 = x[:, 1::2, 0::2, 0::2, :]
    x2 = x[:, 0::2, 1::2, 0::2, :]
    x3 = x[:, 0::2, 0::2, 1::2, :]
    x4 = x[:, 1::2, 0::2, 1::2, :]
    x5 = x[:, 0::2, 1::2, 0::2, :]
    x6 = x[:, 0::2, 0::2, 1::2, :]
    x7 = x[:, 1::2, 1::2, 1::2, :]
    return module.reduction(module.norm(torch.cat([x0, x1, x2, x3, x4, x5, x6, x7], -1)))


def authors_swin(classes: int, feature_size: int = FEATURE_SIZE, seed: int = 7) -> nn.Module:
    """Return MONAI's SwinUNETR; all its weights affect the features, including biases and position tables."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = swin_unetr.SwinUNETR(in_channels=1, out_channels=classes, feature_size=feature_size).eval()
        for name, parameter in network.named_parameters():
            if "bias" in name:
                nn.init.normal_(parameter, std=0.5)
    for module in network.modules():
        if isinstance(module, swin_unetr.PatchMerging):
            module.forward = types.MethodType(published_merging, module)
    return network


class AuthorsUnet(nn.Module):
    """The U-Net of Models Genesis.

    Channels: down 1-32-64, 64-64-128, 128-128-256, 256-256-512; up 512+256, 256+128, 128+64. All convolutions except
    the last are 3x3x3.
    """

    def __init__(self, classes: int, width: int = WIDTH) -> None:
        super().__init__()
        c = [2 * width, 4 * width, 8 * width, 16 * width]
        layers: dict[str, nn.Module] = {}
        for name, inputs, inner, outputs in (
            ("down_tr64", 1, c[0] // 2, c[0]),
            ("down_tr128", c[0], c[1] // 2, c[1]),
            ("down_tr256", c[1], c[2] // 2, c[2]),
            ("down_tr512", c[2], c[3] // 2, c[3]),
            ("up_tr256", c[3] + c[2], c[2], c[2]),
            ("up_tr128", c[2] + c[1], c[1], c[1]),
            ("up_tr64", c[1] + c[0], c[0], c[0]),
        ):
            for number, (first, second) in enumerate(((inputs, inner), (inner, outputs))):
                layers[f"{name}.ops.{number}.conv1"] = nn.Conv3d(first, second, 3, padding=1)
                layers[f"{name}.ops.{number}.bn1"] = nn.BatchNorm3d(second)
        for name, width_in in (("up_tr256", c[3]), ("up_tr128", c[2]), ("up_tr64", c[1])):
            layers[f"{name}.up_conv"] = nn.ConvTranspose3d(width_in, width_in, 2, stride=2)
        layers["out_tr.final_conv"] = nn.Conv3d(c[0], classes, 1)
        for module in layers.values():
            if isinstance(module, nn.BatchNorm3d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.3)
                nn.init.normal_(module.running_mean, std=3.0)  # running statistics, which this network never uses
        self.layers = nn.ModuleDict({key.replace(".", "/"): layer for key, layer in layers.items()})

    def state(self) -> dict[str, Tensor]:
        """Return the state dict with the names of the release."""
        return {key.replace("/", ".").removeprefix("layers."): value for key, value in self.state_dict().items()}

    def forward(self, windows: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the feature pyramid, finest level first, and the logits of the classifier."""
        a = self._two("down_tr64", windows)
        b = self._two("down_tr128", F.max_pool3d(a, 2))
        c = self._two("down_tr256", F.max_pool3d(b, 2))
        d = self._two("down_tr512", F.max_pool3d(c, 2))
        c = self._two("up_tr256", torch.cat([self.layers["up_tr256/up_conv"](d), c], 1))
        b = self._two("up_tr128", torch.cat([self.layers["up_tr128/up_conv"](c), b], 1))
        a = self._two("up_tr64", torch.cat([self.layers["up_tr64/up_conv"](b), a], 1))
        return [a, b, c, d], self.layers["out_tr/final_conv"](a)

    def _two(self, name: str, x: Tensor) -> Tensor:
        for number in (0, 1):
            x = self.layers[f"{name}/ops/{number}/conv1"](x)
            norm = self.layers[f"{name}/ops/{number}/bn1"]
            x = F.relu(F.batch_norm(x, None, None, norm.weight, norm.bias, training=True))
        return x


def authors_unet(classes: int, width: int = WIDTH, seed: int = 7) -> AuthorsUnet:
    """Return the U-Net of Models Genesis, whose batch normalisation always uses the statistics of the batch."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AuthorsUnet(classes, width).eval()


def prefixed(prefix: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{key}": value for key, value in weights.items()}


def renamed(weights: Mapping[str, Tensor], *pairs: tuple[str, str]) -> dict[str, Tensor]:
    found = dict(weights)
    for old, new in pairs:
        found = {key.replace(old, new): value for key, value in found.items()}
    return found


def old_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a SwinUNETR's weights with the names of the first MONAI releases, without the computed indices."""
    named = renamed(weights, ("swinViT.", "swin_vit."), (".mlp.linear", ".mlp.fc"))
    return {key: value for key, value in named.items() if "relative_position_index" not in key}


def with_unused_skips(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a SwinUNETR's weights as in MONAI before 0.9, with unused convolutions in blocks of equal widths."""
    unused = {}
    for number in (2, 3, 4, 10):
        channels = weights[f"encoder{number}.layer.conv1.conv.weight"].shape[0]
        unused[f"encoder{number}.layer.conv3.conv.weight"] = torch.ones(channels, channels, 1, 1, 1)
    return {**weights, **unused}


def text_head(channels: int, organs: int = 32) -> dict[str, Tensor]:
    """Return the universal model's head, which computes its classifier from the scan and from texts."""
    shapes = {
        "organ_embedding": (organs, 512),
        "precls_conv.0.weight": (channels,),
        "precls_conv.0.bias": (channels,),
        "precls_conv.2.weight": (8, channels, 1, 1, 1),
        "precls_conv.2.bias": (8,),
        "GAP.0.weight": (16 * channels,),
        "GAP.0.bias": (16 * channels,),
        "GAP.3.weight": (256, 16 * channels, 1, 1, 1),
        "GAP.3.bias": (256,),
        "controller.weight": (153, 512, 1, 1, 1),
        "controller.bias": (153,),
        "text_to_vision.weight": (256, 512),
        "text_to_vision.bias": (256,),
    }
    return {name: torch.ones(shape) for name, shape in shapes.items()}


def pretext_heads(dimension: int) -> dict[str, Tensor]:
    """Return the heads for the pretext tasks of the self-supervised release."""
    shapes = {
        "norm.weight": (dimension,),
        "norm.bias": (dimension,),
        "rotation_head.weight": (4, dimension),
        "rotation_head.bias": (4,),
        "contrastive_head.weight": (512, dimension),
        "contrastive_head.bias": (512,),
        "convTrans3d.weight": (dimension, 1, 2, 2, 2),
        "convTrans3d.bias": (1,),
    }
    return {name: torch.ones(shape) for name, shape in shapes.items()}


def transformer(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the self-supervised part of a SwinUNETR, with the names of the release."""
    swin = {key.removeprefix("swinViT."): v for key, v in weights.items() if key.startswith("swinViT.")}
    return renamed(swin, (".mlp.linear", ".mlp.fc"))


@dataclass(frozen=True)
class Release:
    """Layout of a checkpoint.

    Attributes:
        model: name of the model for ``--model``.
        classes: number of rows of the authors' classifier, or 0 if the classifier is not used.
        content: function from the network's state dict to the content of the file.
    """

    model: str
    classes: int
    content: Callable[[dict[str, Tensor]], object]


def _without_out(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in weights.items() if not key.startswith(("out.", "out_tr."))}


_UNIVERSAL = prefixed("module.", text_head(FEATURE_SIZE))
_OPTIMISER = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}

RELEASES = {
    "fseft": Release("fseft", 29, lambda w: renamed(w, ("out.conv.conv", "classifier"))),
    "suprem_swinunetr, as released": Release(
        "suprem_swinunetr",
        0,
        lambda w: {
            "net": prefixed("module.backbone.", w) | _UNIVERSAL,
            "optimizer": _OPTIMISER,
            "scheduler": {"last_epoch": 3, "base_lrs": [1e-4]},
            "epoch": 3,
        },
    ),
    "suprem_swinunetr, only the backbone": Release("suprem_swinunetr", 0, lambda w: {"net": _without_out(w)}),
    "suprem_swinunetr, own head": Release(
        "suprem_swinunetr",
        29,
        lambda w: {"state_dict": prefixed("backbone.", old_names(renamed(w, ("out.conv.conv", "classifier"))))},
    ),
    "clipdriven": Release(
        "clipdriven",
        0,
        lambda w: {"net": prefixed("module.backbone.", old_names(with_unused_skips(_without_out(w)))) | _UNIVERSAL},
    ),
    "btcv": Release("btcv", 14, lambda w: {"epoch": 4999, "best_acc": np.float64(0.8), "state_dict": w}),
    "btcv, old names": Release(
        "btcv", 14, lambda w: {"state_dict": prefixed("module.", old_names(with_unused_skips(w)))}
    ),
    "suprem_unet, as released": Release(
        "suprem_unet",
        0,
        lambda w: {"net": prefixed("module.backbone.", _without_out(w)) | prefixed("module.", text_head(2 * WIDTH))},
    ),
    "suprem_unet, own head": Release("suprem_unet", 29, lambda w: {"net": prefixed("module.", w)}),
    "suprem_unet, head as FSEFT's code names it": Release(
        "suprem_unet", 29, lambda w: {"net": renamed(w, ("out_tr.", "classifier."))}
    ),
}
"""All layouts of releases that contain the whole network, by name."""
