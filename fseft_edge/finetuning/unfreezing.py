"""Which parameters of an encoder learn: everything is frozen, then a method's own parts are added or opened."""

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
    """Prepare an encoder for fine-tuning, in place: afterwards exactly the parameters with a gradient learn.

    With ``frozen`` and ``tuned`` decoders the network still computes what it did; a new decoder starts from weights
    that ``settings.seed`` decides on.

    Args:
        network: a pre-trained encoder.
        settings: of which method, decoder, rank and seed count.

    Returns:
        The names of those parameters that learn and hold nothing pre-trained: added ones, and a new decoder's.

    Raises:
        UsageError: the method does not fit the network, or finds nothing in it.
    """
    network.requires_grad_(False)
    before = {name for name, _ in network.named_parameters()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        _open_method(network, settings)
        opened = any(parameter.requires_grad for parameter in network.parameters())
        if not opened and (settings.method != "decoder" or settings.of_decoder == "frozen"):
            raise UsageError(
                f"With --method {settings.method} and --decoder {settings.of_decoder} nothing of this encoder would "
                "learn by that method.",
                remedy="Choose another method, or another --decoder.",
            )
        if settings.of_decoder != "frozen":
            _open_decoder(network, afresh=settings.of_decoder == "new")
        elif settings.method == "full":
            for name in network.decoder_parts:
                network.get_submodule(name).requires_grad_(False)
    learning = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    renewed = renewed_parts(network) if settings.of_decoder == "new" else ()
    return frozenset(name for name in learning if name not in before or name.partition(".")[0] in renewed)


def renewed_parts(network: FeatureNetwork) -> tuple[str, ...]:
    """Return the submodules that a new decoder replaces: of a self-supervised encoder, all that was never trained."""
    return network.decoder_parts + network.bridge_parts


def _open_method(network: FeatureNetwork, settings: TuningSettings) -> None:
    encoder = _Encoder(network, renewed_parts(network) if settings.of_decoder == "new" else network.decoder_parts)
    match settings.method:
        case "full":
            network.requires_grad_(True)
        case "affine":
            encoder.open_norms()
        case "bitfit":
            encoder.open_biases()
        case "lora":
            encoder.add_low_rank_sums(settings.rank)
        case "conv-adapter":
            for convolution in encoder.convolutions():
                add_sum(convolution, CentreSum(convolution.weight))
        case "adaptformer" | "med-adapter" | "compacter":
            add_inserts(network, settings.method)
            if settings.method == "compacter":
                encoder.open_norms()


class _Encoder:
    """What lies outside the decoder, which is what a method concerns.

    Args:
        network: the whole.
        without: names of the submodules that do not count.
    """

    def __init__(self, network: FeatureNetwork, without: Sequence[str]) -> None:
        self._network, self._without = network, without

    def modules(self) -> list[nn.Module]:
        """Return the modules."""
        named = self._network.named_modules()
        return [module for name, module in named if name and name.partition(".")[0] not in self._without]

    def convolutions(self) -> list[nn.Conv3d]:
        """Return the convolutions that see a voxel's neighbours."""
        return [
            module
            for module in self.modules()
            if isinstance(module, nn.Conv3d) and set(module.kernel_size) == {3} and module.groups == 1
        ]

    def open_norms(self) -> None:
        """Let gains and offsets of normalisations learn."""
        for module in self.modules():
            if isinstance(module, _NORMS):
                module.requires_grad_(True)

    def open_biases(self) -> None:
        """Let every bias learn."""
        for name, parameter in self._network.named_parameters():
            if name.endswith("bias") and name.partition(".")[0] not in self._without:
                parameter.requires_grad_(True)

    def add_low_rank_sums(self, rank: int) -> None:
        """Add them to the attention's matrices; where there is no attention, to the convolutions."""
        found = [getattr(module, "qkv", None) for module in self.modules()]
        attention = [matrix for matrix in found if isinstance(matrix, nn.Linear)]
        for matrix in attention:
            add_sum(matrix, LowRankSum(matrix.weight, 3 * rank))
        if not attention:
            for convolution in self.convolutions():
                add_sum(convolution, LowRankSum(convolution.weight, rank))


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
