"""Files of tensors with a description: safetensors, with the description as JSON in the header, and a checksum."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from fseft_edge.runtime.encoder.bundle import sha256_of_weights
from fseft_edge.runtime.errors import AdapterError
from fseft_edge.runtime.system.atomic import atomic_path
from fseft_edge.runtime.system.json_text import parse_json

TUNING_KEY = "fseft_edge_tuning"
"""Key of the description in the header of a tuning file."""


_COPY_OR_TRAIN_AGAIN = "Copy the file again, or train again with `fseft-edge adapt` or `fseft-edge finetune`."
_COMMANDS: Final = {"adapter": "fseft-edge adapt", "tuning": "fseft-edge finetune"}
"""The command that writes each kind of file, by the suffix of its name."""


class SelfDescription(BaseModel):
    """The description in the header of a file.

    Attributes:
        content_sha256: SHA-256 of the tensors and of all other fields; set when the file is written.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    content_sha256: str = ""


def write_described(path: Path, key: str, description: SelfDescription, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors and their description. The file appears complete or not at all; equal contents give equal bytes.

    Args:
        path: file to write.
        key: key of the description in the header; the key identifies the kind of file.
        description: description of the tensors.
        tensors: the tensors by name, on any device.

    Raises:
        OutOfSpaceError: the disk is full, or the folder is not writable.
    """
    stored = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    header = _text(description, content_digest(description, stored))
    with atomic_path(path) as temporary:
        # save_file would report a full disk as a SafetensorError.
        temporary.write_bytes(save(stored, metadata={key: header}))


def read_described(path: Path, key: str, *, suffix: str, schemas: tuple[int, ...]) -> tuple[str, dict[str, Tensor]]:
    """Return the description (as JSON) and the tensors of a file.

    Args:
        path: file to read.
        key: key of the description in the header.
        suffix: file name suffix of this kind of file, for messages.
        schemas: schema versions of the description that are accepted.

    Raises:
        AdapterError: the file is missing, damaged, of another kind, or of an unknown schema.
    """
    if not path.is_file():
        problem = "is not a file" if path.exists() else "does not exist"
        raise AdapterError(f"{path} {problem}.", remedy=f"Give the .{suffix} file that `{_COMMANDS[suffix]}` wrote.")
    try:
        with safe_open(path, framework="pt") as opened:
            found = opened.metadata() or {}
        header = found.get(key)
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise AdapterError(
            f"{path} is not a valid .{suffix} file, or is damaged: {error}.", remedy=_COPY_OR_TRAIN_AGAIN
        ) from error
    if header is None:
        remedy = f"Give the .{suffix} file that `{_COMMANDS[suffix]}` wrote."
        if TUNING_KEY in found:
            remedy = "The file is a tuning. Run `fseft-edge merge` to make an encoder and an adapter from it."
        raise AdapterError(f"{path} is not a valid .{suffix} file.", remedy=remedy)
    try:
        version = parse_json(header).get("schema_version")
    except (ValueError, AttributeError) as error:
        raise does_not_fit(path) from error
    if version not in schemas:
        raise AdapterError(
            f"{path} has the {suffix} schema version {version}, but this version of fseft-edge reads version "
            f"{' and '.join(map(str, schemas))}.",
            remedy=f"Update fseft-edge, or run `{_COMMANDS[suffix]}` again with this version.",
        )
    return header, tensors


def check_content(path: Path, description: SelfDescription, tensors: Mapping[str, Tensor]) -> None:
    """Raise AdapterError if the checksum of the description and the tensors is not the stored checksum."""
    if description.content_sha256 != content_digest(description, tensors):
        raise AdapterError(
            f"{path} is damaged: its contents do not match the checksum in its header.", remedy=_COPY_OR_TRAIN_AGAIN
        )


def does_not_fit(path: Path) -> AdapterError:
    """Return the error for a file whose description and weights do not match."""
    return AdapterError(
        f"{path} contains a description that is not valid or does not match its weights.",
        remedy="Train again with this version of `fseft-edge adapt` or `fseft-edge finetune`.",
    )


def content_digest(description: SelfDescription, tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of the complete contents of a file."""
    return hashlib.sha256(f"{_text(description, '')}{sha256_of_weights(tensors)}".encode()).hexdigest()


def _text(description: SelfDescription, digest: str) -> str:
    """Return a description as JSON. The digest is the last field in all versions of the format."""
    rest = description.model_dump_json(exclude={"content_sha256"})
    return f'{rest[:-1]},"content_sha256":"{digest}"}}'
