"""The encoder architectures. They live on the ground floor because the torch backend rebuilds them from weights.

A serialised program would spare that, but loading one unpickles; safetensors and code do not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fseft_edge.runtime.errors import EncoderBundleError

if TYPE_CHECKING:
    from fseft_edge.runtime.networks.base import FeatureNetwork

_REMEDY = "Update fseft-edge, or export the encoder again with this version."


def build_network(architecture: str, **settings: Any) -> FeatureNetwork:  # noqa: ANN401 - each architecture checks its own
    """Return a freshly initialised network.

    Args:
        architecture: ``residual_unet`` or ``swin_unetr``.
        settings: the architecture's own keyword arguments, as a bundle's manifest holds them.

    Raises:
        EncoderBundleError: for an architecture, or settings of it, that this version does not know.
    """
    try:
        return _built(architecture, settings)
    except TypeError as error:
        raise EncoderBundleError(
            f"This version does not know the settings {sorted(settings)} of the encoder architecture {architecture!r}.",
            remedy=_REMEDY,
        ) from error


def _built(architecture: str, settings: dict[str, Any]) -> FeatureNetwork:
    if architecture == "residual_unet":
        from fseft_edge.runtime.networks.residual_unet import ResidualUNet  # noqa: PLC0415 - imported when used

        return ResidualUNet(**settings)
    if architecture == "swin_unetr":
        from fseft_edge.runtime.networks.swin_unetr import SwinUnetrFeatures  # noqa: PLC0415 - brings in MONAI

        return SwinUnetrFeatures(**settings)
    raise EncoderBundleError(f"The encoder architecture {architecture!r} is unknown to this version.", remedy=_REMEDY)
