"""The adapter file ``NAME.adapter``: weights in safetensors, and the description as JSON in the header."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    SerializerFunctionWrapHandler,
    TypeAdapter,
    model_serializer,
)

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
"""The value of ``reads`` in the file format for each value of ``AdapterSettings.levels``."""
_METADATA_KEY = "fseft_edge_adapter"


@dataclass(frozen=True)
class PostProcessing:
    """Post-processing steps for the mask of one organ.

    Attributes:
        largest_component: keep the largest 26-connected component; all other components become background.
        fill_holes: background that the organ encloses on all sides becomes the organ; other organs inside the hole
            remain.
    """

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid", strict=True)  # the adapter file contains these fields

    largest_component: bool = False
    fill_holes: bool = False


class AdapterOrgan(BaseModel):
    """The metadata of one organ of an adapter.

    Attributes:
        name: organ name that the user gave.
        label: label value of the organ in the annotations of the support set.
        support_volumes_ml: volume of the organ in every support scan that annotates it; source of the size prior.
        left_out_dsc: DSC of the cross-validation, for every support scan that annotates the organ. Empty
            without validation.
        post_processing: default post-processing of the masks; ``left_out_dsc`` includes it.
        support_hu: HU percentiles of the organ in every support scan that annotates it. Files of older versions do not
            contain this field. An empty field is not written, so that those files keep their checksum.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    label: int
    support_volumes_ml: tuple[float, ...]
    left_out_dsc: tuple[float, ...] = ()
    post_processing: PostProcessing = PostProcessing()
    support_hu: tuple[HuPercentiles, ...] = ()

    @model_serializer(mode="wrap")
    def _omit_empty_hu(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = serialize(self)
        if not self.support_hu:
            del fields["support_hu"]
        return fields


class SupportSetDescription(SelfDescription):
    """The part of a description that identifies the support set.

    Files of older versions do not contain these fields. Fields without a value are not written, so that those files
    keep their checksum.

    Attributes:
        support_annotations: hash of the annotation of every support scan
            (:func:`fseft_edge.runtime.scans.content.annotation_sha256`).
        support_groups: number of groups of support scans that cross-validation left out together: the number of
            patients, if the user named the patients, and else the number of different scans, if a scan occurred twice.
            None if every support scan is a group.
    """

    support_annotations: tuple[str, ...] = ()
    support_groups: int | None = None

    @model_serializer(mode="wrap")
    def _omit_fields_without_value(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = serialize(self)
        for name, empty in (("support_annotations", ()), ("support_groups", None)):
            if getattr(self, name) == empty:
                fields.pop(name, None)
        return fields


class AdapterDescription(SupportSetDescription):
    """The description of an adapter: its encoder, its settings, its organs, and its training.

    Attributes:
        encoder_id: id of the encoder whose features the adapter was trained on.
        encoder_name: name of that encoder.
        levels: stride and number of channels of every level of the encoder, finest level first.
        settings: the adapter settings (see :func:`stored_settings`).
        organs: metadata of the organs, in the order of the classes.
        shots: number of support scans.
        seed: seed for all random choices of the training.
        steps: number of training steps; for a linear adapter, number of evaluations of the loss; 0 without training.
        losses: mean loss of every epoch.
        bfloat16: whether training computed in bfloat16.
    """

    schema_version: Literal[3] = 3
    toolkit_version: str = __version__
    encoder_id: str
    encoder_name: str
    levels: tuple[tuple[PositiveInt, PositiveInt], ...] = Field(min_length=1)
    settings: dict[str, str | int]
    organs: tuple[AdapterOrgan, ...] = Field(min_length=1)
    shots: int
    seed: int
    steps: int
    losses: tuple[float, ...]
    bfloat16: bool

    @property
    def kind(self) -> str:
        """The kind of adapter, as text for the user."""
        return f"{settings_of(self.settings).name}" if self.steps else "the classifiers of the encoder"


@dataclass(frozen=True, eq=False)
class AdapterFile:
    """A trained adapter with its description.

    Attributes:
        description: the description of the adapter.
        adapter: the network, in evaluation mode.
        sha256: SHA-256 of the file that was read; None if the adapter was not read from a file.
    """

    description: AdapterDescription
    adapter: Adapter
    sha256: str | None = None

    def check_encoder(self, encoder_id: str, *, path: Path | None) -> None:
        """Raise AdapterError if the adapter was trained on the features of another encoder.

        Args:
            encoder_id: id of the given encoder.
            path: file of the adapter, for the message; None for an adapter in memory.
        """
        if encoder_id != self.description.encoder_id:
            raise AdapterError(
                f"{path or 'The adapter in memory'} was trained with the encoder {self.description.encoder_name} "
                f"(id {self.description.encoder_id[:12]}), but the given encoder has the id {encoder_id[:12]}.",
                remedy="Give the encoder of the adapter with --encoder, or run `fseft-edge adapt` with this encoder.",
            )


def stored_settings(settings: AdapterSettings) -> dict[str, str | int]:
    """Return adapter settings in the form that the description stores."""
    return {
        "method": settings.method,
        "reads": STORED_LEVELS[settings.levels],
        "activation": settings.activation,
        "width": settings.width,
    }


def settings_of(stored: Mapping[str, str | int]) -> AdapterSettings:
    """Return the adapter settings from the form that the description stores.

    Raises:
        ValueError: this version does not know the value of a setting.
    """
    fields = dict(stored)
    if "reads" in fields:
        known = {str(word): levels for levels, word in STORED_LEVELS.items()}
        fields["levels"] = known.get(str(fields["reads"]), "")
    return TypeAdapter(AdapterSettings).validate_python(fields)


def write_adapter(path: Path, file: AdapterFile) -> None:
    """Write an adapter. The file appears complete or not at all, and equal adapters give equal bytes.

    Raises:
        OutOfSpaceError: the disk is full, or the folder is not writable.
    """
    write_described(path, _METADATA_KEY, file.description, file.adapter.state_dict())


def read_adapter(path: Path) -> AdapterFile:
    """Read an adapter file.

    Raises:
        AdapterError: the file is missing, is damaged, is not an adapter, or has an unknown schema.
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
