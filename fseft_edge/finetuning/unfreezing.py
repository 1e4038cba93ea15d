"""Selection of the trained parameters: all parameters are frozen, then each method adds or unfreezes its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from fseft_edge.finetuning.folding import CentreSum, LowRankSum, add_sum
from fseft_edge.finetuning.settings import TuningSettings
from fseft_edge.runtime.encoder.networks.base import FeatureNetwork
from fseft_edge.runtime.encoder.networks.inserts import add_inserts
from fseft_edge.runtime.errors import UsageError

_NORMS = (nn.LayerNorm, nn.InstanceNorm3d, nn.BatchNorm3d, nn.GroupNorm)


def unfreeze(network: FeatureNetwork, settings: TuningSettings) -> frozenset[str]:
    """Prepare an encoder for fine-tuning, in place: only the parameters to train require a gradient afterwards.

    With a ``frozen`` or ``tuned`` decoder, the output of the network does not change. A ``new`` decoder receives random
    weights, determined by ``settings.seed``.

    Args:
        network: a pre-trained encoder.
        settings: settings of the fine-tuning; only method, decoder, rank and seed are used.

    Returns:
        The names of the trained parameters that have no pre-trained values: added parameters, and the parameters of a
        new decoder.

    Raises:
        UsageError: the method cannot be used with the network, or finds no parameters to train in the network.
    """
    network.requires_grad_(False)
    before = {name for name, _ in network.named_parameters()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        _unfreeze_method(network, settings)
        opened = any(parameter.requires_grad for parameter in network.parameters())
        if not opened and (settings.method != "decoder" or settings.of_decoder == "frozen"):
            raise UsageError(
                f"--method {settings.method} with --decoder {settings.of_decoder} finds no parameters to train in this "
                "encoder.",
                remedy="Choose another --method or another --decoder.",
            )
        if settings.of_decoder != "frozen":
            _unfreeze_decoder(network, afresh=settings.of_decoder == "new")
        elif settings.method == "full":
            for name in network.decoder_parts:
                network.get_submodule(name).requires_grad_(False)
    learning = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    renewed = renewed_parts(network) if settings.of_decoder == "new" else ()
    return frozenset(name for name in learning if name not in before or name.partition(".")[0] in renewed)


def renewed_parts(network: FeatureNetwork) -> tuple[str, ...]:
    """Return the submodules that ``decoder="new"`` trains from random weights: decoder and bridges."""
    return network.decoder_parts + network.bridge_parts


def _unfreeze_method(network: FeatureNetwork, settings: TuningSettings) -> None:
    encoder = _Encoder(network, renewed_parts(network) if settings.of_decoder == "new" else network.decoder_parts)
    match settings.method:
        case "full":
            network.requires_grad_(True)
        case "affine":
            encoder.unfreeze_norms()
        case "bitfit":
            encoder.unfreeze_biases()
        case "lora":
            encoder.add_low_rank_sums(settings.rank)
        case "conv-adapter":
            for convolution in encoder.convolutions():
                add_sum(convolution, CentreSum(convolution.weight))
        case "adaptformer" | "med-adapter" | "compacter":
            add_inserts(network, settings.method)
            if settings.method == "compacter":
                encoder.unfreeze_norms()


class _Encoder:
    """The part of a network outside the decoder, in which a method trains its parameters.

    Args:
        network: the whole network.
        without: names of the submodules that do not belong to this part.
    """

    def __init__(self, network: FeatureNetwork, without: Sequence[str]) -> None:
        self._network, self._without = network, without

    def modules(self) -> list[nn.Module]:
        """Return all modules of this part."""
        named = self._network.named_modules()
        return [module for name, module in named if name and name.partition(".")[0] not in self._without]

    def convolutions(self) -> list[nn.Conv3d]:
        """Return all ungrouped 3x3x3 convolutions of this part."""
        return [
            module
            for module in self.modules()
            if isinstance(module, nn.Conv3d) and set(module.kernel_size) == {3} and module.groups == 1
        ]

    def unfreeze_norms(self) -> None:
        """Unfreeze gains and offsets of all normalisations."""
        for module in self.modules():
            if isinstance(module, _NORMS):
                module.requires_grad_(True)

    def unfreeze_biases(self) -> None:
        """Unfreeze all biases."""
        for name, parameter in self._network.named_parameters():
            if name.endswith("bias") and name.partition(".")[0] not in self._without:
                parameter.requires_grad_(True)

    def add_low_rank_sums(self, rank: int) -> None:
        """Add low-rank sums to the attention matrices; without attention, to the convolutions."""
        found = [getattr(module, "qkv", None) for module in self.modules()]
        attention = [matrix for matrix in found if isinstance(matrix, nn.Linear)]
        for matrix in attention:
            add_sum(matrix, LowRankSum(matrix.weight, 3 * rank))
        if not attention:
            for convolution in self.convolutions():
                add_sum(convolution, LowRankSum(convolution.weight, rank))


def _unfreeze_decoder(network: FeatureNetwork, *, afresh: bool) -> None:
    if not network.decoder_parts:
        raise UsageError(
            "This encoder has no separate decoder that could be trained.",
            remedy="Add --decoder frozen, or choose another --method.",
        )
    for name in renewed_parts(network) if afresh else network.decoder_parts:
        part = network.get_submodule(name)
        part.requires_grad_(True)
        if afresh:
            for module in part.modules():
                reset = getattr(module, "reset_parameters", None)
                if callable(reset):
                    reset()
