"""Mixed precision: compute a network in float16, except for long sums and divisions by such sums.

Mixed precision is a property of the network and not of an engine: weights and features are float16, and the network
itself contains the casts to float32. Therefore all engines that follow the number formats of a graph compute the same.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from fseft_edge.runtime.encoder.networks.base import FeatureNetwork
from fseft_edge.runtime.encoder.networks.frequency_filter import FrequencyFilter

# Batch normalisations are already folded (`inference_network`). The code of the networks itself computes softmax, and
# normalisations that are functions and not modules, in float32.
_IN_FLOAT32 = (nn.LayerNorm, nn.InstanceNorm3d, FrequencyFilter)


class MixedPrecision(FeatureNetwork):
    """Network that computes the features of another network in float16.

    Normalisations, softmax and frequency filters compute in float32. Input windows and returned features are float32.

    Args:
        network: network in its form for inference. The network is not changed; its parameters are copied.
    """

    def __init__(self, network: FeatureNetwork) -> None:
        super().__init__()
        self.levels = network.levels
        self.network = copy.deepcopy(network).half()
        for name, module in network.named_modules():
            if isinstance(module, _IN_FLOAT32):
                self.network.set_submodule(name, _InFloat32(copy.deepcopy(module)))
        self.eval()

    def forward(self, windows: Tensor) -> list[Tensor]:
        """Return the feature pyramid in float32 (:meth:`FeatureNetwork.forward`)."""
        return [level.float() for level in self.network(windows.half())]


class _InFloat32(nn.Module):
    """Wrapper that computes a module in float32, for float16 inputs and outputs. The weights stay float32."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.module(x.float())
        return result.to(torch.float16)
