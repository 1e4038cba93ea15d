"""A network in half precision wherever that is safe: what adds many numbers up, or divides by such a sum, is not.

It is a property of the network, not of an engine: weights and features are float16, and casts stand in the network
itself. Engines that obey the types of a graph then all compute the same.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from fseft_edge.runtime.encoder.networks.base import FeatureNetwork
from fseft_edge.runtime.encoder.networks.frequency_filter import FrequencyFilter

# Batch normalisations are folded before (`inference_network`); softmax and the normalisations that are no modules
# compute in float32 in the networks themselves.
_IN_FLOAT32 = (nn.LayerNorm, nn.InstanceNorm3d, FrequencyFilter)


class MixedPrecision(FeatureNetwork):
    """The same function as a network in its form for inference, computed in float16.

    Norms, softmax and frequency filters compute in float32. Windows and features stay float32.

    Args:
        network: it stays as it is; its parameters are copied.
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
        """Return the pyramid in float32 (see :class:`FeatureNetwork`)."""
        return [level.float() for level in self.network(windows.half())]


class _InFloat32(nn.Module):
    """A module for float16 features that computes in float32, with weights in float32."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.module(x.float())
        return result.to(torch.float16)
