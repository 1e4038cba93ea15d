"""Files of tensors that describe themselves: safetensors, with a checked description as JSON in the header."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from fseft_edge.runtime.encoder.bundle import sha256_of_weights
from fseft_edge.runtime.errors import AdapterError
from fseft_edge.runtime.system.atomic import atomic_path

TUNING_KEY = "fseft_edge_tuning"
"""Name of the description in the header of a tuning file."""


class SelfDescription(BaseModel):
    """What such a file says about itself.

    Attributes:
        content_sha256: of the tensors and of everything else here; set when the file is written.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    content_sha256: str = ""


def write_described(path: Path, key: str, description: SelfDescription, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors; the file appears complete or not at all, and the same contents give the same bytes.

    Args:
        path: where to.
        key: name of the description in the header, which tells one kind of file from another.
        description: what the tensors are.
        tensors: on any device.

    Raises:
        OutOfSpaceError: the disk is full, or the folder cannot be written to.
    """
    stored = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    header = _text(description, content_digest(description, stored))
    with atomic_path(path) as temporary:
        # Not save_file: it reports a full disk as a SafetensorError.
        temporary.write_bytes(save(stored, metadata={key: header}))


def read_described(path: Path, key: str, *, suffix: str, schema: int) -> tuple[str, dict[str, Tensor]]:
    """Return the description, as JSON, and the tensors of a file of one kind.

    Args:
        path: the file.
        key: name of the description in the header.
        suffix: what such a file is called after, for messages.
        schema: the version of the description that is read.

    Raises:
        AdapterError: the file is missing, damaged, of another kind, or of an unknown schema.
    """
    if not path.is_file():
        raise AdapterError(f"{path} is no file.", remedy=f"Give the .{suffix} file that `fseft-edge adapt` wrote.")
    try:
        with safe_open(path, framework="pt") as opened:
            found = opened.metadata() or {}
        header = found.get(key)
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path} is damaged: {error}.", remedy="Copy the file again, or adapt again.") from error
    if header is None:
        remedy = f"Give the .{suffix} file that `fseft-edge adapt` wrote."
        if TUNING_KEY in found:
            remedy = "It is a tuning: `fseft-edge merge` makes an encoder and an adapter of it."
        raise AdapterError(f"{path} is no {suffix} file.", remedy=remedy)
    try:
        version = json.loads(header).get("schema_version")
    except (ValueError, AttributeError) as error:
        raise does_not_fit(path) from error
    if version != schema:
        raise AdapterError(
            f"{path} has the {suffix} schema {version}, which this version does not read.",
            remedy="Update fseft-edge, or adapt again with this version.",
        )
    return header, tensors


def check_content(path: Path, description: SelfDescription, tensors: Mapping[str, Tensor]) -> None:
    """Raise :class:`AdapterError` unless description and tensors are what was written."""
    if description.content_sha256 != content_digest(description, tensors):
        raise AdapterError(f"{path} has changed since it was written.", remedy="Copy the file again, or adapt again.")


def does_not_fit(path: Path) -> AdapterError:
    """Return the error for a file whose parts contradict one another."""
    return AdapterError(
        f"{path} holds weights or settings that do not fit together.", remedy="Adapt again with this version."
    )


def content_digest(description: SelfDescription, tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 of all that a file holds."""
    return hashlib.sha256(f"{_text(description, '')}{sha256_of_weights(tensors)}".encode()).hexdigest()


def _text(description: SelfDescription, digest: str) -> str:
    """Return a description as JSON, with a digest where it has always stood: at the end."""
    rest = description.model_dump_json(exclude={"content_sha256"})
    return f'{rest[:-1]},"content_sha256":"{digest}"}}'
