"""Add inserts to an encoder: modules of fine-tuning that cannot be merged into the encoder's weights.

Inserts are part of the architecture: a bundle's settings contain, for example, ``"inserts": "med-adapter"``. Untrained
inserts do not change the features.
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
    """A network whose encoder has stages; each stage has half the resolution of the stage before."""

    def stage_widths(self) -> list[int]:
        """Return the number of channels at the end of each stage."""
        ...


@runtime_checkable
class HasBlocks(Protocol):
    """A network with transformer blocks."""

    def block_widths(self) -> dict[BlockPlace, int]:
        """Return the number of channels of each block."""
        ...


def fitting_inserts(network: FeatureNetwork) -> tuple[InsertKind, ...]:
    """Return the kinds of inserts that can be added to a network."""
    places = {"med-adapter": HasStages, **dict.fromkeys(_IN_BLOCKS, HasBlocks)}
    return tuple(kind for kind in INSERTS if isinstance(network, places[kind]))


def add_inserts(network: FeatureNetwork, kind: InsertKind) -> None:
    """Add inserts to a network, in place. Until the inserts are trained, the features do not change.

    The new modules are on the CPU, in float32. All parameters of the inserts are in one submodule of the network:
    ``adaptformer``, ``compacter`` or ``med_adapter``.

    Args:
        network: network without inserts.
        kind: kind of the inserts. With ``compacter``, the transformer's normalisations (``norm1``, ``norm2``) are
            trained too.

    Raises:
        UsageError: this kind cannot be added to the network, or the network already has inserts.
    """
    fitting = fitting_inserts(network)
    if kind not in fitting:
        raise UsageError(
            f"The method {kind} cannot be used with this architecture of the encoder.",
            remedy=f"Choose {' or '.join(fitting)}." if fitting else "Choose a method that changes weights in place.",
        )
    if insert_parameters(network):
        raise UsageError(
            "The encoder already contains inserts from an earlier fine-tuning.",
            remedy="Start from the original encoder, which was not fine-tuned.",
        )
    if isinstance(network, HasBlocks) and kind in _IN_BLOCKS:
        inserts = _IN_BLOCKS[kind](network.block_widths())
        network.add_module(inserts.name, inserts)
    elif isinstance(network, HasStages):
        widths = network.stage_widths()
        adapters = [MedAdapter(*pair) for pair in zip(widths, [None, *widths], strict=False)]
        network.add_module(med_adapter.NAME, nn.ModuleList(adapters))


def insert_parameters(network: nn.Module) -> list[str]:
    """Return the names of all parameters of inserts, as in ``named_parameters``. Inserts have no buffers."""
    return [name for name, _ in network.named_parameters() if not _NAMES.isdisjoint(name.split("."))]
