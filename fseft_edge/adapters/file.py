"""The adapter file ``NAME.adapter``: weights in safetensors, everything else as JSON in its header."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, TypeAdapter, model_serializer

from fseft_edge._version import __version__
from fseft_edge.adapters.described_tensors import (
    SelfDescription,
    check_content,
    does_not_fit,
    read_described,
    write_described,
)
from fseft_edge.adapters.network import Adapter, AdapterSettings, Levels
from fseft_edge.runtime.encoder.bundle import sha256_of_file
from fseft_edge.runtime.encoder.networks.base import FeatureLevel
from fseft_edge.runtime.errors import AdapterError
from fseft_edge.runtime.scans.intensities import HuPercentiles

STORED_LEVELS: Final[dict[Levels, Literal["last", "pyramid"]]] = {"finest": "last", "all": "pyramid"}
"""The words of the file format for the levels that a classifier uses."""
_METADATA_KEY = "fseft_edge_adapter"


@dataclass(frozen=True)
class PostProcessing:
    """What is done to an organ's mask.

    Attributes:
        largest_component: of its 26-connected components the largest is kept, the others become background.
        fill_holes: background that the organ encloses on all sides becomes the organ; other organs in it stay.
    """

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid", strict=True)  # it is part of the adapter file

    largest_component: bool = False
    fill_holes: bool = False


class AdapterOrgan(BaseModel):
    """An organ of an adapter.

    Attributes:
        name: as the user named it.
        label: its value in the support set's annotation files.
        support_volumes_ml: its volume in every support scan that annotates it; the size prior comes from these.
        left_out_dsc: DSC on every support scan that annotates it, of an adapter made from the others: what to expect on
            a new scan. Empty where nothing was validated.
        post_processing: of its masks, unless the user of the adapter wants it otherwise; included in ``left_out_dsc``.
        support_hu: what it looks like in every support scan that annotates it. Empty in adapters made before this was
            kept, and then not written, so that they keep their checksum.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    label: int
    support_volumes_ml: tuple[float, ...]
    left_out_dsc: tuple[float, ...] = ()
    post_processing: PostProcessing = PostProcessing()
    support_hu: tuple[HuPercentiles, ...] = ()

    @model_serializer(mode="wrap")
    def _without_what_is_not_known(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = serialize(self)
        if not self.support_hu:
            del fields["support_hu"]
        return fields


class AdapterDescription(SelfDescription):
    """What an adapter is, for which encoder, and how it was trained.

    Attributes:
        bfloat16: whether training computed in bfloat16.
    """

    schema_version: Literal[3] = 3
    toolkit_version: str = __version__
    encoder_id: str
    encoder_name: str
    levels: tuple[tuple[int, int], ...]
    settings: dict[str, str | int]
    organs: tuple[AdapterOrgan, ...] = Field(min_length=1)
    shots: int
    seed: int
    steps: int
    losses: tuple[float, ...]
    bfloat16: bool

    @property
    def kind(self) -> str:
        """What kind of adapter it is, for people."""
        return f"{settings_of(self.settings).name}" if self.steps else "the encoder's own classifiers"


@dataclass(frozen=True, eq=False)
class AdapterFile:
    """A trained adapter with its description.

    Attributes:
        description: what it is.
        adapter: the network, in evaluation mode.
        sha256: of the file it was read from; None for one that was not.
    """

    description: AdapterDescription
    adapter: Adapter
    sha256: str | None = None

    def check_encoder(self, encoder_id: str, *, path: Path) -> None:
        """Raise :class:`AdapterError` unless the adapter was trained on this encoder's features."""
        if encoder_id != self.description.encoder_id:
            raise AdapterError(
                f"{path} was trained on the encoder {self.description.encoder_name} "
                f"({self.description.encoder_id[:12]}), not on this one ({encoder_id[:12]}).",
                remedy="Name the encoder it was trained with by --encoder, or adapt again.",
            )


def stored_settings(settings: AdapterSettings) -> dict[str, str | int]:
    """Return the settings as the description holds them."""
    return {
        "method": settings.method,
        "reads": STORED_LEVELS[settings.levels],
        "activation": settings.activation,
        "width": settings.width,
    }


def settings_of(stored: Mapping[str, str | int]) -> AdapterSettings:
    """Return the settings that a description holds.

    Raises:
        ValueError: a setting has a value that this version does not know.
    """
    fields = dict(stored)
    if "reads" in fields:
        known = {str(word): levels for levels, word in STORED_LEVELS.items()}
        fields["levels"] = known.get(str(fields["reads"]), "")
    return TypeAdapter(AdapterSettings).validate_python(fields)


def write_adapter(path: Path, file: AdapterFile) -> None:
    """Write an adapter; it appears complete or not at all, and the same adapter gives the same bytes."""
    write_described(path, _METADATA_KEY, file.description, file.adapter.state_dict())


def read_adapter(path: Path) -> AdapterFile:
    """Return the adapter in a file.

    Raises:
        AdapterError: the file is missing, damaged, no adapter, or of an unknown schema.
    """
    header, tensors = read_described(path, _METADATA_KEY, suffix="adapter", schema=3)
    try:
        description = AdapterDescription.model_validate_json(header)
        levels = [FeatureLevel(stride, channels) for stride, channels in description.levels]
        settings = settings_of(description.settings)
        adapter = Adapter(settings, levels, len(description.organs))
        adapter.load_state_dict(tensors)
    except (ValueError, TypeError, RuntimeError, AttributeError, IndexError) as error:
        raise does_not_fit(path) from error
    check_content(path, description, tensors)
    return AdapterFile(description, adapter.eval(), sha256_of_file(path))
