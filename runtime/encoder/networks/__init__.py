"""The encoder architectures. They live on the ground floor because the torch backend rebuilds them from weights.

A serialised program would spare that, but loading one unpickles; safetensors and code do not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fseft_edge.runtime.errors import EncoderBundleError

if TYPE_CHECKING:
    from fseft_edge.runtime.encoder.networks.base import FeatureNetwork

IMPORTED = "imported"
"""The architecture of encoders whose network is the user's own code: an ONNX graph is all there is of it."""

_REMEDY = "Update fseft-edge, or export the encoder again with this version."


def build_network(
    architecture: str,
    *,
    inserts: object = None,
    **settings: Any,  # noqa: ANN401 - each architecture checks its own
) -> FeatureNetwork:
    """Return a freshly initialised network.

    Args:
        architecture: ``residual_unet``, ``swin_unetr`` or ``genesis_unet``.
        inserts: one of :data:`fseft_edge.runtime.encoder.networks.inserts.INSERTS`, or ``None``; manifests may hold
            anything.
        settings: the architecture's own keyword arguments; with ``inserts``, what a bundle's manifest holds.

    Raises:
        EncoderBundleError: for an architecture, or settings of it, that this version does not know, and for
            :data:`IMPORTED`.
    """
    try:
        network = _built(architecture, settings)
    except TypeError as error:
        raise EncoderBundleError(
            f"This version does not know the settings {sorted(settings)} of the encoder architecture {architecture!r}.",
            remedy=_REMEDY,
        ) from error
    if inserts is not None:
        _insert(network, inserts, architecture)
    return network


def _insert(network: FeatureNetwork, inserts: object, architecture: str) -> None:
    from fseft_edge.runtime.encoder.networks.inserts import add_inserts, fitting_inserts  # noqa: PLC0415 - imported when used

    kind = next((kind for kind in fitting_inserts(network) if kind == inserts), None)
    if kind is None:
        raise EncoderBundleError(
            f"This version does not know the inserts {inserts!r} of the encoder architecture {architecture!r}.",
            remedy=_REMEDY,
        )
    add_inserts(network, kind)


def _built(architecture: str, settings: dict[str, Any]) -> FeatureNetwork:
    if architecture == "residual_unet":
        from fseft_edge.runtime.encoder.networks.residual_unet import ResidualUNet  # noqa: PLC0415 - imported when used

        return ResidualUNet(**settings)
    if architecture == "swin_unetr":
        from fseft_edge.runtime.encoder.networks.swin_unetr import SwinUnetrFeatures  # noqa: PLC0415 - brings in MONAI

        return SwinUnetrFeatures(**settings)
    if architecture == "genesis_unet":
        from fseft_edge.runtime.encoder.networks.genesis_unet import GenesisUnetFeatures  # noqa: PLC0415 - imported when used

        return GenesisUnetFeatures(**settings)
    if architecture == IMPORTED:
        raise EncoderBundleError(
            f"The encoder's network was imported from {settings.get('factory')}, which is code that no bundle holds or "
            "calls: it runs from its ONNX graph, not in PyTorch.",
            remedy="Use onnxruntime, openvino or TensorRT; `fseft-edge doctor BUNDLE` says what stands in their way.",
        )
    raise EncoderBundleError(f"The encoder architecture {architecture!r} is unknown to this version.", remedy=_REMEDY)
