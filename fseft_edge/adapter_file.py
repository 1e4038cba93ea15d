"""The adapter file ``NAME.adapter``: weights in safetensors, everything else as JSON in its header."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, TypeAdapter, model_serializer
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from fseft_edge._version import __version__
from fseft_edge.adapters import Adapter, AdapterSettings
from fseft_edge.intensities import HuPercentiles
from fseft_edge.postprocessing import PostProcessing
from fseft_edge.runtime.atomic import atomic_path
from fseft_edge.runtime.bundle import sha256_of_file, sha256_of_weights
from fseft_edge.runtime.errors import AdapterError
from fseft_edge.runtime.networks.base import FeatureLevel

_METADATA_KEY = "fseft_edge_adapter"


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


class AdapterDescription(BaseModel):
    """What an adapter is, for which encoder, and how it was trained.

    Attributes:
        bfloat16: whether training computed in bfloat16.
        content_sha256: of the weights and of everything else here; set when the file is written.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

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
    content_sha256: str = ""


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


def adapter_settings(settings: AdapterSettings) -> dict[str, str | int]:
    """Return the settings as the description holds them."""
    return asdict(settings)


def write_adapter(path: Path, file: AdapterFile) -> None:
    """Write an adapter; it appears complete or not at all, and the same adapter gives the same bytes."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in file.adapter.state_dict().items()}
    description = file.description.model_copy(update={"content_sha256": _digest(file.description, tensors)})
    with atomic_path(path) as temporary:
        # Not save_file: it reports a full disk as a SafetensorError.
        temporary.write_bytes(save(tensors, metadata={_METADATA_KEY: description.model_dump_json()}))


def read_adapter(path: Path) -> AdapterFile:
    """Return the adapter in a file.

    Raises:
        AdapterError: the file is missing, damaged, no adapter, or of an unknown schema.
    """
    if not path.is_file():
        raise AdapterError(f"{path} is no file.", remedy="Give the .adapter file that `fseft-edge adapt` wrote.")
    try:
        with safe_open(path, framework="pt") as opened:
            header = (opened.metadata() or {}).get(_METADATA_KEY)
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path} is damaged: {error}.", remedy="Copy the adapter again, or adapt again.") from error
    if header is None:
        raise AdapterError(f"{path} is no adapter file.", remedy="Give the file that `fseft-edge adapt` wrote.")
    try:
        version = json.loads(header).get("schema_version")
        if version != 3:
            raise AdapterError(
                f"{path} has the adapter schema {version}, which this version does not read.",
                remedy="Update fseft-edge, or adapt again with this version.",
            )
        description = AdapterDescription.model_validate_json(header)
        levels = [FeatureLevel(stride, channels) for stride, channels in description.levels]
        settings = TypeAdapter(AdapterSettings).validate_python(description.settings)
        adapter = Adapter(settings, levels, len(description.organs))
        adapter.load_state_dict(tensors)
    except (ValueError, TypeError, RuntimeError, AttributeError, IndexError) as error:
        raise AdapterError(
            f"{path} holds weights or settings that do not fit together.", remedy="Adapt again with this version."
        ) from error
    if description.content_sha256 != _digest(description, tensors):
        raise AdapterError(
            f"{path} has changed since it was written.", remedy="Copy the adapter again, or adapt again."
        )
    return AdapterFile(description, adapter.eval(), sha256_of_file(path))


def _digest(description: AdapterDescription, tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 of all that an adapter file holds."""
    text = description.model_copy(update={"content_sha256": ""}).model_dump_json()
    return hashlib.sha256(f"{text}{sha256_of_weights(tensors)}".encode()).hexdigest()
