"""Which parameters of an encoder learn: everything is frozen, then a method's own parts are added or opened."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from fseft_edge.finetuning.folding import CentreSum, LowRankSum, add_sum
from fseft_edge.finetuning.settings import TuningSettings
from fseft_edge.runtime.errors import UsageError
from fseft_edge.runtime.networks.base import FeatureNetwork
from fseft_edge.runtime.networks.inserts import add_inserts

_NORMS = (nn.LayerNorm, nn.InstanceNorm3d, nn.BatchNorm3d, nn.GroupNorm)


def open_encoder(network: FeatureNetwork, settings: TuningSettings) -> frozenset[str]:
    """Prepare an encoder for fine-tuning, in place: afterwards exactly the parameters with a gradient learn.

    With ``frozen`` and ``tuned`` decoders the network still computes what it did; a new decoder starts from weights
    that ``settings.seed`` decides on.

    Args:
        network: a pre-trained encoder.
        settings: of which method, decoder, rank and seed count.

    Returns:
        The names of those parameters that learn and hold nothing pre-trained: added ones, and a new decoder's.

    Raises:
        UsageError: the method does not fit the network, or nothing at all would learn.
    """
    network.requires_grad_(False)
    before = {name for name, _ in network.named_parameters()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        _open_method(network, settings)
        if settings.of_decoder != "frozen":
            _open_decoder(network, afresh=settings.of_decoder == "new")
        elif settings.method == "full":
            for name in network.decoder_parts:
                network.get_submodule(name).requires_grad_(False)
    learning = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    if not learning:
        raise UsageError(
            f"With --method {settings.method} and --decoder {settings.of_decoder} nothing of this encoder would learn.",
            remedy="Say --decoder tuned or new, or choose another method.",
        )
    renewed = renewed_parts(network) if settings.of_decoder == "new" else ()
    return frozenset(name for name in learning if name not in before or name.partition(".")[0] in renewed)


def _open_method(network: FeatureNetwork, settings: TuningSettings) -> None:
    match settings.method:
        case "full":
            network.requires_grad_(True)
        case "affine":
            _open_norms(network)
        case "bitfit":
            for name, parameter in _encoder_parameters(network):
                if name.endswith("bias"):
                    parameter.requires_grad_(True)
        case "lora":
            _add_low_rank_sums(network, settings.rank)
        case "conv-adapter":
            for convolution in _convolutions(network):
                add_sum(convolution, CentreSum(convolution.weight))
        case "adaptformer" | "med-adapter" | "compacter":
            add_inserts(network, settings.method)
            if settings.method == "compacter":
                _open_norms(network)


def _open_norms(network: FeatureNetwork) -> None:
    for module in _encoder_modules(network):
        if isinstance(module, _NORMS):
            module.requires_grad_(True)


def _add_low_rank_sums(network: FeatureNetwork, rank: int) -> None:
    attention = [
        module.qkv for module in _encoder_modules(network) if isinstance(getattr(module, "qkv", None), nn.Linear)
    ]
    if attention:
        for matrix in attention:
            assert isinstance(matrix, nn.Linear)  # noqa: S101 - narrows the type for the checker
            add_sum(matrix, LowRankSum(matrix.weight, 3 * rank))
        return
    for convolution in _convolutions(network):
        add_sum(convolution, LowRankSum(convolution.weight, rank))


def renewed_parts(network: FeatureNetwork) -> tuple[str, ...]:
    """Return the submodules that a new decoder replaces: of a self-supervised encoder, all that was never trained."""
    return network.decoder_parts + network.bridge_parts


def _open_decoder(network: FeatureNetwork, *, afresh: bool) -> None:
    if not network.decoder_parts:
        raise UsageError("This encoder has no decoder of its own.", remedy="Leave --decoder out.")
    for name in renewed_parts(network) if afresh else network.decoder_parts:
        part = network.get_submodule(name)
        part.requires_grad_(True)
        if afresh:
            for module in part.modules():
                reset = getattr(module, "reset_parameters", None)
                if callable(reset):
                    reset()


def _convolutions(network: FeatureNetwork) -> list[nn.Conv3d]:
    """Return the convolutions of the encoder, without its decoder, that see a voxel's neighbours."""
    return [
        module
        for module in _encoder_modules(network)
        if isinstance(module, nn.Conv3d) and set(module.kernel_size) == {3} and module.groups == 1
    ]


def _encoder_modules(network: FeatureNetwork) -> list[nn.Module]:
    """Return what lies outside the decoder."""
    return [
        module
        for name, module in network.named_modules()
        if name and name.partition(".")[0] not in network.decoder_parts
    ]


def _encoder_parameters(network: FeatureNetwork) -> Iterator[tuple[str, nn.Parameter]]:
    for name, parameter in network.named_parameters():
        if name.partition(".")[0] not in network.decoder_parts:
            yield name, parameter
