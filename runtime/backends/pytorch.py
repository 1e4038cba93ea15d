"""The torch backend: always there, and the reference that the others are compared with."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from fseft_edge.runtime.networks.base import FeatureNetwork


@runtime_checkable
class _Foldable(Protocol):
    def folded(self) -> FeatureNetwork: ...


def inference_network(bundle_network: FeatureNetwork) -> FeatureNetwork:
    """Return the same function in its form for inference: evaluation mode, normalisations folded where they can be."""
    network = bundle_network.folded() if isinstance(bundle_network, _Foldable) else bundle_network
    return network.eval().requires_grad_(requires_grad=False)
