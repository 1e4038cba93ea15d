"""Modules that fine-tuning inserts into an encoder and that do not fold into its weights.

They become part of the architecture: a bundle's settings say ``"inserts": "med-adapter"``. A network into which they
were just inserted computes exactly what it computed before.
"""

from __future__ import annotations

from typing import Literal, Protocol, get_args, runtime_checkable

from torch import nn

from fseft_edge.runtime.encoder.networks import med_adapter
from fseft_edge.runtime.encoder.networks.base import FeatureNetwork
from fseft_edge.runtime.encoder.networks.block_inserts import AdaptFormer, BlockInserts, BlockPlace, Compacter
from fseft_edge.runtime.encoder.networks.med_adapter import MedAdapter
from fseft_edge.runtime.errors import UsageError

InsertKind = Literal["adaptformer", "compacter", "med-adapter"]
INSERTS: tuple[InsertKind, ...] = get_args(InsertKind)

_IN_BLOCKS: dict[InsertKind, type[BlockInserts]] = {"adaptformer": AdaptFormer, "compacter": Compacter}
_NAMES = {*(inserts.name for inserts in _IN_BLOCKS.values()), med_adapter.NAME}


@runtime_checkable
class HasStages(Protocol):
    """A network with an encoder in stages, each half as fine as the one before."""

    def stage_widths(self) -> list[int]:
        """Return the channels at the end of each stage."""
        ...


@runtime_checkable
class HasBlocks(Protocol):
    """A network with transformer blocks."""

    def block_widths(self) -> dict[BlockPlace, int]:
        """Return the channels of each block."""
        ...


def fitting_inserts(network: FeatureNetwork) -> tuple[InsertKind, ...]:
    """Return the kinds that a network has a place for."""
    places = {"med-adapter": HasStages, **dict.fromkeys(_IN_BLOCKS, HasBlocks)}
    return tuple(kind for kind in INSERTS if isinstance(network, places[kind]))


def add_inserts(network: FeatureNetwork, kind: InsertKind) -> None:
    """Insert modules into a network, in place; it computes what it computed before until they are trained.

    The new modules are on the CPU, in float32. All their parameters lie in one submodule of the network:
    ``adaptformer``, ``compacter`` or ``med_adapter``.

    Args:
        network: without inserts.
        kind: which. The transformer's normalisations (``norm1``, ``norm2``) are meant to be trained along with
            ``compacter``.

    Raises:
        UsageError: the network has no place for such modules, or has some already.
    """
    fitting = fitting_inserts(network)
    if kind not in fitting:
        raise UsageError(
            f"The encoder has no place for {kind}.",
            remedy=f"Choose {' or '.join(fitting)}." if fitting else "Choose a method that changes weights in place.",
        )
    if insert_parameters(network):
        raise UsageError(
            "The encoder was fine-tuned by inserted modules already.",
            remedy="Start from the encoder that it was made from.",
        )
    if isinstance(network, HasBlocks) and kind in _IN_BLOCKS:
        inserts = _IN_BLOCKS[kind](network.block_widths())
        network.add_module(inserts.name, inserts)
    elif isinstance(network, HasStages):
        widths = network.stage_widths()
        adapters = [MedAdapter(*pair) for pair in zip(widths, [None, *widths], strict=False)]
        network.add_module(med_adapter.NAME, nn.ModuleList(adapters))


def insert_parameters(network: nn.Module) -> list[str]:
    """Return the names of all inserted parameters, as ``named_parameters`` has them; there are no buffers."""
    return [name for name, _ in network.named_parameters() if not _NAMES.isdisjoint(name.split("."))]
