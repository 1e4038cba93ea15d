"""The adapter file ``NAME.adapter``: weights in safetensors, and the description as JSON in the header."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    SerializerFunctionWrapHandler,
    TypeAdapter,
    model_serializer,
    model_validator,
)
from torch import Tensor

from fseft_edge._version import __version__
from fseft_edge.adapters.described_tensors import (
    SelfDescription,
    check_content,
    does_not_fit,
    read_described,
    write_described,
)
from fseft_edge.adapters.network import Adapter, AdapterSettings, Levels
from fseft_edge.runtime.encoder.bundle import EncoderBundle, sha256_of_file
from fseft_edge.runtime.encoder.networks.base import FeatureLevel
from fseft_edge.runtime.errors import AdapterError
from fseft_edge.runtime.scans.intensities import HuPercentiles
from fseft_edge.runtime.scans.organs import OrganLabel

STORED_LEVELS: Final[dict[Levels, Literal["last", "pyramid"]]] = {"finest": "last", "all": "pyramid"}
"""The value of ``reads`` in the file format for each value of ``AdapterSettings.levels``."""
_METADATA_KEY = "fseft_edge_adapter"
_LOCATOR_TENSORS = "locator."
"""Prefix of the names of the locator's tensors."""


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
        annotation_names: names of the organ in annotations that name their structures; empty for label maps. An empty
            field is not written.
        in_label_maps: whether ``label`` is the label value in label maps of the support set. True is not written.
        expected_ml: range of volumes to which the threshold of the organ is moved
            (:mod:`fseft_edge.adaptation.size_threshold`); None if the cross-validation has not shown that this helps.
            None is not written.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    label: int
    support_volumes_ml: tuple[float, ...]
    left_out_dsc: tuple[float, ...] = ()
    post_processing: PostProcessing = PostProcessing()
    support_hu: tuple[HuPercentiles, ...] = ()
    annotation_names: tuple[str, ...] = ()
    in_label_maps: bool = True
    expected_ml: tuple[float, float] | None = None

    @model_validator(mode="after")
    def _expects_a_possible_size(self) -> Self:
        if self.expected_ml is not None and not 0 < self.expected_ml[0] <= self.expected_ml[1] < math.inf:
            raise ValueError("the expected volumes are not a range")
        return self

    @model_serializer(mode="wrap")
    def _omit_defaults(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = serialize(self)
        for name in ("support_hu", "annotation_names"):
            if not fields[name]:
                del fields[name]
        if self.in_label_maps:
            del fields["in_label_maps"]
        if self.expected_ml is None:
            del fields["expected_ml"]
        return fields

    def as_annotated(self) -> OrganLabel:
        """Return how the organ is found in the annotations of the support set."""
        return OrganLabel(self.name, self.label, self.annotation_names, self.in_label_maps)


class LocatedOrgan(BaseModel):
    """How a locator finds an organ, and how well it found the organ in the scans that it was not trained on.

    Attributes:
        name: organ name, as in the adapter.
        threshold: probability above which a voxel of the coarse pass belongs to a place of the organ.
        margin_mm: margin around the bounding box of a place.
        recall: for every left-out support scan that annotates the organ, the share of the organ's voxels that were
            inside the located boxes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    threshold: float = Field(gt=0, lt=1)
    margin_mm: float = Field(ge=0)
    recall: tuple[float, ...]


class LocatorDescription(BaseModel):
    """The description of the locator of an adapter.

    Attributes:
        encoder_id: id of the encoder of the coarse pass.
        encoder_name: name of that encoder.
        levels: stride and number of channels of every level of that encoder, finest level first.
        settings: settings of the adapter of the coarse pass (see :func:`stored_settings`).
        organs: the organs, in the order of the classes.
        selected: for every left-out support scan, the share of the windows of the adapter's encoder that were selected
            for all organs together.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    encoder_id: str
    encoder_name: str
    levels: tuple[tuple[PositiveInt, PositiveInt], ...] = Field(min_length=1)
    settings: dict[str, str | int]
    organs: tuple[LocatedOrgan, ...] = Field(min_length=1)
    selected: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Locator:
    """An adapter of a small encoder that tells where the organs are (:mod:`fseft_edge.adaptation.locator`).

    Attributes:
        description: the description of the locator.
        adapter: the network, in evaluation mode.
    """

    description: LocatorDescription
    adapter: Adapter


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
        for name, empty in (
            ("support_annotations", ()),
            ("support_groups", None),
            ("windows_elsewhere", None),
            ("locator", None),
        ):
            if getattr(self, name, empty) == empty:
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
        windows_elsewhere: largest number of windows of a support scan that were encoded in addition to those around the
            organs; None if the whole scans were encoded. Not written without a value.
        locator: the locator; None for an adapter of whole scans. Not written without a value.
        schema_version: 5 with ``expected_ml`` of an organ; else 4 with ``windows_elsewhere`` or ``locator``; else 3,
            which earlier versions read.
    """

    schema_version: Literal[3, 4, 5] = 3
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
    windows_elsewhere: int | None = None
    locator: LocatorDescription | None = None

    @model_validator(mode="after")
    def _has_the_schema_version_of_its_fields(self) -> Self:
        if self.schema_version != schema_version_of(self.organs, self.windows_elsewhere, self.locator):
            raise ValueError("the fields do not belong to the schema version")
        return self

    @property
    def kind(self) -> str:
        """The kind of adapter, as text for the user."""
        return f"{settings_of(self.settings).name}" if self.steps else "the classifiers of the encoder"


def schema_version_of(
    organs: Sequence[AdapterOrgan],
    windows_elsewhere: int | None,
    locator: LocatorDescription | None,
) -> Literal[3, 4, 5]:
    """Return the schema version of a description with these fields: the oldest one that has them."""
    if any(organ.expected_ml is not None for organ in organs):
        return 5
    return 3 if windows_elsewhere is None and locator is None else 4


@dataclass(frozen=True, eq=False)
class AdapterFile:
    """A trained adapter with its description.

    Attributes:
        description: the description of the adapter.
        adapter: the network, in evaluation mode.
        sha256: SHA-256 of the file that was read; None if the adapter was not read from a file.
        locator: the locator; None if the adapter has none.
    """

    description: AdapterDescription
    adapter: Adapter
    sha256: str | None = None
    locator: Locator | None = None

    def check_encoder(self, bundle: EncoderBundle, *, path: Path | None) -> None:
        """Raise AdapterError if the adapter was trained on the features of another encoder.

        Args:
            bundle: the given encoder.
            path: file of the adapter, for the message; None for an adapter in memory.
        """
        if bundle.encoder_id != self.description.encoder_id:
            raise AdapterError(
                f"{path or 'The adapter in memory'} was trained with the encoder {self.description.encoder_name} "
                f"(id {self.description.encoder_id[:12]}), but the given encoder has the id {bundle.encoder_id[:12]}.",
                remedy=bundle.tiling_explained(self.description.encoder_id)
                + "Give the encoder of the adapter with --encoder, or run `fseft-edge adapt` with this encoder.",
            )


def stored_settings(settings: AdapterSettings) -> dict[str, str | int]:
    """Return adapter settings in the form that the description stores."""
    stored: dict[str, str | int] = {
        "method": settings.method,
        "reads": STORED_LEVELS[settings.levels],
        "activation": settings.activation,
        "width": settings.width,
    }
    return stored | (
        {"wide_levels": settings.wide_levels} if _has_coarse_steps(stored) and settings.wide_levels else {}
    )


def _has_coarse_steps(stored: Mapping[str, str | int]) -> bool:
    return stored.get("method") == "spatial" and stored.get("reads") == STORED_LEVELS["all"]


def settings_of(stored: Mapping[str, str | int]) -> AdapterSettings:
    """Return the adapter settings from the form that the description stores.

    Raises:
        ValueError: this version does not know the value of a setting.
    """
    fields: dict[str, str | int | None] = dict(stored)
    if _has_coarse_steps(stored):
        fields.setdefault("wide_levels", None)  # older files
    if "reads" in fields:
        known = {str(word): levels for levels, word in STORED_LEVELS.items()}
        fields["levels"] = known.get(str(fields["reads"]), "")
    return TypeAdapter(AdapterSettings).validate_python(fields)


def write_adapter(path: Path, file: AdapterFile) -> None:
    """Write an adapter. The file appears complete or not at all, and equal adapters give equal bytes.

    Raises:
        OutOfSpaceError: the disk is full, or the folder is not writable.
    """
    tensors = dict(file.adapter.state_dict())
    if file.locator is not None:
        tensors |= {f"{_LOCATOR_TENSORS}{name}": value for name, value in file.locator.adapter.state_dict().items()}
    write_described(path, _METADATA_KEY, file.description, tensors)


def read_adapter(path: Path) -> AdapterFile:
    """Read an adapter file.

    Raises:
        AdapterError: the file is missing, is damaged, is not an adapter, or has an unknown schema.
    """
    header, tensors = read_described(path, _METADATA_KEY, suffix="adapter", schemas=(3, 4, 5))
    try:
        description = AdapterDescription.model_validate_json(header)
        own = {name: value for name, value in tensors.items() if not name.startswith(_LOCATOR_TENSORS)}
        adapter = _network(description, own)
        locator = None
        if description.locator is not None:
            others = {name.removeprefix(_LOCATOR_TENSORS): tensors[name] for name in tensors.keys() - own.keys()}
            locator = Locator(description.locator, _network(description.locator, others))
        elif len(own) < len(tensors):
            raise ValueError("there are tensors of a locator without its description")
    except (ValueError, TypeError, RuntimeError, AttributeError, IndexError) as error:
        raise does_not_fit(path) from error
    check_content(path, description, tensors)
    return AdapterFile(description, adapter, sha256_of_file(path), locator)


def _network(description: AdapterDescription | LocatorDescription, tensors: Mapping[str, Tensor]) -> Adapter:
    """Return the network of a description with these weights, in evaluation mode."""
    levels = [FeatureLevel(stride, channels) for stride, channels in description.levels]
    adapter = Adapter(settings_of(description.settings), levels, len(description.organs))
    adapter.load_state_dict(dict(tensors))
    return adapter.eval()
