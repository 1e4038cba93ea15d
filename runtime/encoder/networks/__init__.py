"""Encoder architectures. The torch backend builds a network from an architecture and weights in a safetensors file.

Networks are not stored as serialised programs, because loading such a program unpickles data and may execute code.

A new architecture needs entries in these places:

1. a module in this package with a subclass of :class:`fseft_edge.runtime.encoder.networks.base.FeatureNetwork`;
2. its name in :data:`ARCHITECTURES`, and its class in :func:`build_network`;
3. a formula for its memory in :mod:`fseft_edge.runtime.encoder.networks.peak_memory`;
4. its order of backends, fastest first, in :mod:`fseft_edge.runtime.encoder.backend_choice`; an architecture without an
   order uses the default order.

``docs/developing.md`` describes the steps, including export, pretraining, fine-tuning and tests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from fseft_edge.runtime.errors import EncoderBundleError

if TYPE_CHECKING:
    from fseft_edge.runtime.encoder.networks.base import FeatureNetwork

IMPORTED: Final = "imported"
"""Architecture name of encoders whose network is the user's own code; the bundle only contains the ONNX graph."""

ARCHITECTURES: Final = ("residual_unet", "swin_unetr", "genesis_unet", IMPORTED)
"""Architecture names in bundles that this version can use. :func:`build_network` builds all of them except
:data:`IMPORTED`."""

_REMEDY = "Update fseft-edge, or export the encoder again with this version."


def build_network(
    architecture: str,
    *,
    inserts: object = None,
    **settings: Any,  # noqa: ANN401 - each architecture checks its own
) -> FeatureNetwork:
    """Return a network with newly initialised weights.

    Args:
        architecture: one of :data:`ARCHITECTURES`, except :data:`IMPORTED`.
        inserts: one of :data:`fseft_edge.runtime.encoder.networks.inserts.INSERTS`, or ``None``. The value comes from a
            manifest, so it may have any type.
        settings: keyword arguments of the architecture. Together with ``inserts``, these are the settings in a bundle's
            manifest.

    Raises:
        EncoderBundleError: this version does not know the architecture or its settings, or the architecture is
            :data:`IMPORTED`.
    """
    try:
        network = _built(architecture, settings)
    except TypeError as error:
        raise EncoderBundleError(
            f"This version of fseft-edge does not know the settings {sorted(settings)} of the encoder architecture "
            f"{architecture!r}.",
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
            f"This version of fseft-edge does not know the inserts {inserts!r} for the encoder architecture "
            f"{architecture!r}.",
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
            f"The encoder was exported from the code {settings.get('factory')}. The bundle contains only its ONNX "
            "graph, so the encoder cannot run in PyTorch.",
            remedy="Use --backend onnxruntime, openvino, tensorrt_rtx or tensorrt; `fseft-edge doctor BUNDLE` reports "
            "why a backend cannot be used.",
        )
    raise EncoderBundleError(
        f"This version of fseft-edge does not know the encoder architecture {architecture!r}.", remedy=_REMEDY
    )
